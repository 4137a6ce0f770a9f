"""tests/sass.py finds what makes steps wait, in programs of a few instructions."""

from __future__ import annotations

import pytest
import sass

pytestmark = pytest.mark.tools
NO_BARRIER = 7


def line(text: str, sets: int = NO_BARRIER, waits: tuple[int, ...] = ()) -> str:
    """An instruction as nvdisasm prints it; a label as it is."""
    if text.startswith(".L"):
        return text
    control = sum(1 << barrier for barrier in waits) << 11 | 7 << 8 | sets << 5
    return f"/*0000*/ {text} ; /* 0x{0:016x} */\n /* 0x{control << 41:016x} */"


def errors(*lines: str | tuple, waits: bool = True) -> list[str]:
    text = "\n".join(line(one) if isinstance(one, str) else line(*one) for one in lines)
    return sass.look(sass.parse(text), waits).errors


def chain(*accumulators: int) -> list[str]:
    """Products, each added to what its register has."""
    return [f"HMMA.16816.F32.BF16 R{d}, R40, R44.reuse, R{d}" for d in accumulators]


POLL = (
    ".L_x_1:",
    ("@!P0 LDG.E.128.STRONG.GPU R4, desc[UR6][R8.64]", 0),
    ("ISETP.NE.AND P1, PT, R4, -0x1, PT", NO_BARRIER, (0,)),
    "@!P1 BRA `(.L_x_1)",
)
AHEAD = ("LDG.E R3, desc[UR6][R10.64]", 5)
USE = ("FADD R2, R3, R2", NO_BARRIER, (5,))


def step(
    *before: str | tuple, poll: tuple = POLL, products: list[str], after: tuple = ()
) -> list[str]:
    return errors(".L_x_0:", *before, *poll, *products, *after, "@P2 BRA `(.L_x_0)", "EXIT")


def test_four_sums() -> None:
    assert step(products=chain(12, 16, 20, 24) * 2) == []
    assert step(products=chain(12, 16) * 4) == ["4 of 8 products wait for the one before"]
    assert step(products=chain(*[12] * 16)) == ["16 of 16 products wait for the one before"]
    assert step(products=["HMMA.1688.F32.TF32 R12, R40, R44, RZ", *chain(16)]) == []
    assert step(products=[*chain(12), "MOV R12, RZ", *chain(12)]) == []


@pytest.mark.parametrize("constant", ["LDC.64 R8, c[0x0][R30+0x2d0]", "LDC R8, c[0x0][0x210]"])
def test_constants_while_polling(constant: str) -> None:
    """Not in the block that is entered each 64th time, nor before."""
    head, *rest = POLL
    products = chain(12, 16, 20, 24)
    assert step(constant, products=products) == []
    name, _, operands = constant.partition(" ")
    found = [f"{name} {operands} while it polls"]
    assert step(poll=(head, constant, *rest), products=products) == found
    rarely = ("@P3 BRA `(.L_x_2)", constant, ".L_x_2:")
    assert step(poll=(head, *rarely, *rest), products=products) == []


def test_waits_for_what_is_loaded_ahead() -> None:
    products = chain(12, 16, 20, 24)
    found = ["LDG.E R3, desc[UR6][R10.64] is waited for by FADD R2, R3, R2"]
    assert step(AHEAD, products=products, after=(USE,)) == []
    assert step(AHEAD, USE, products=products) == found
    assert step(USE, products=products, after=(AHEAD,)) == found  # of the next step
    # Who waits for another load by the same barrier waits for this one, too.
    other = ("IADD3 R20, R21, R22, RZ", NO_BARRIER, (5,))
    assert len(step(AHEAD, other, products=products)) == 1
    # Not on the way out, nor in a warp that has come apart.
    assert errors(
        ".L_x_0:", AHEAD, "@P5 BRA `(.L_x_9)", "BRA.DIV UR4, `(.L_x_9)", *POLL, *products,
        "@P2 BRA `(.L_x_0)", "EXIT", ".L_x_9:", USE, "EXIT",
    ) == []  # fmt: skip


def test_nothing_is_found_where_nothing_is() -> None:
    """A kernel that this cannot read is an error."""
    assert errors("EXIT") == ["0 products and 0 polls were found"]
    assert errors(*chain(12), "EXIT") == ["1 products and 0 polls were found"]
    assert errors(*chain(12), "EXIT", waits=False) == []
