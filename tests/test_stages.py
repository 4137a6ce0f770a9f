"""What happens between two steps, every option alone, with each other, and in random mixtures,
against the loops of ``plain``."""

from __future__ import annotations

import copy
import itertools
import random
from typing import Any

import plain
import pytest
import torch
from helpers import assert_all_close, assert_no_worse, flatten
from problems import OPTIONS, Problem, call, draw, fit, leaves, make, some_options, with_gradients
from torch import Tensor
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import fused_rnn
from fused_rnn import segments

pytestmark = pytest.mark.parity


def draw_problem(options: tuple[str, ...], rng: random.Random) -> Problem:
    return make(draw(rng, options))


def expected(problem: Problem, draws: plain.Draws) -> list[Tensor]:
    y, last, states = plain.run(
        problem.module,
        problem.x,
        problem.hx,
        problem.lengths,
        problem.reset,
        problem.reset_to,
        draws,
    )
    return [y, *last, *(states if problem.config.states else ())]


def drawn(problem: Problem) -> plain.Draws:
    return plain.draw(problem.module, *problem.x.shape[:2], problem.lengths, problem.x.dtype)


def check(problem: Problem) -> None:
    torch.manual_seed(7)
    found = with_gradients(problem, call(problem))
    torch.manual_seed(7)
    wanted = with_gradients(problem, expected(problem, drawn(problem)))
    try:
        assert_all_close(found, wanted, tol=1e-9)
    except AssertionError as error:
        raise AssertionError(f"{problem.config}: {error}") from None
    torch.manual_seed(7)
    with torch.no_grad():
        without = call(problem)
    assert_all_close(without, [wanted[f"output {i}"] for i in range(len(without))], tol=1e-9)


SINGLE = [(option,) for option in OPTIONS]
PAIRS = [pair for pair in itertools.combinations(OPTIONS, 2) if fit(pair)]


@pytest.mark.parametrize("times", range(6))
@pytest.mark.parametrize("options", SINGLE, ids=lambda o: "-".join(o))
def test_alone(options: tuple[str, ...], times: int, seed: int) -> None:
    check(draw_problem(options, random.Random(f"{seed} {options} {times}")))


@pytest.mark.parametrize("options", PAIRS, ids=lambda o: "-".join(o))
def test_pairs(options: tuple[str, ...], seed: int) -> None:
    rng = random.Random(f"{seed} {options}")
    for _ in range(2):
        check(draw_problem(options, rng))


@pytest.mark.parametrize("times", range(60))
def test_mixtures(times: int, seed: int) -> None:
    rng = random.Random(f"{seed} {times}")
    check(draw_problem(some_options(rng, 0.45), rng))


MIXED = [
    ("reset", "zoneout", "blocks"),
    ("reset_to", "lengths", "norm", "return_states"),
    ("reset_to of each step", "packed", "recurrent_dropout"),
    ("norm", "zoneout", "weight_dropout"),
    ("dropout_over_time", "packed", "reset"),
    ("projection", "reset_to", "norm"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", MIXED, ids=lambda o: "-".join(o))
def test_types(options: tuple[str, ...], dtype: torch.dtype, seed: int) -> None:
    """No worse than loops in the same type."""
    rng = random.Random(f"{seed} {options}")
    for _ in range(3):
        problem = draw_problem(options, rng)
        if problem.module.mode == "RNN_RELU":  # any rounding may flip its derivative
            continue
        # The gradient of a single unit is 0, of which torch's function leaves rounding on arm64.
        if problem.module.between_steps.norm == "layer" and problem.module.hidden_size == 1:
            continue
        low = problem.to(dtype)
        exact = low.to(torch.float64)
        torch.manual_seed(7)
        found = with_gradients(low, call(low))
        torch.manual_seed(7)
        draws = drawn(low)
        theirs = with_gradients(low, expected(low, draws))
        wanted = with_gradients(exact, expected(exact, draws.to(torch.float64)), dtype)
        T, B, I = low.x.shape  # noqa: E741
        terms = max(4 * low.module.hidden_size, I, B * T)
        try:
            assert_no_worse(found, theirs, wanted, terms)
        except AssertionError as error:
            raise AssertionError(f"{problem.config}: {error}") from None


def of_leaves(problem: Problem) -> tuple[Any, tuple[Tensor, ...]]:
    """The call as a function of all that has a gradient."""
    wanted = leaves(problem)
    parameters = dict(problem.module.named_parameters())

    def fn(*values: Tensor) -> tuple[Tensor, ...]:
        by_name = dict(zip(wanted, values, strict=True))
        same = copy.copy(problem)
        same.x = by_name["x"]
        if problem.config.hx:
            same.hx = [by_name[f"hx {i}"] for i in range(len(problem.hx))]
        if problem.reset_to is not None:
            same.reset_to = [by_name[f"reset_to {i}"] for i in range(len(problem.reset_to))]
        own = {name: by_name[name] for name in parameters}
        module = lambda *args, **kwargs: functional_call(  # noqa: E731
            problem.module, own, args, kwargs
        )
        torch.manual_seed(7)
        return tuple(o for o in call(same, module) if o.requires_grad)

    return fn, tuple(wanted.values())


@pytest.mark.parametrize("options", MIXED, ids=lambda o: "-".join(o))
def test_derivatives(options: tuple[str, ...], seed: int) -> None:
    rng = random.Random(f"{seed} {options}")
    for _ in range(2):
        problem = draw_problem(options, rng)
        if problem.module.mode == "RNN_RELU":  # there is a kink
            continue
        fn, values = of_leaves(problem)
        assert torch.autograd.gradcheck(fn, values, fast_mode=True)
        assert torch.autograd.gradgradcheck(fn, values, fast_mode=True)


def small(kwargs: dict[str, Any]) -> tuple[Any, Tensor, Tensor, Any]:
    """A layer, its input, resets, and what its states become there."""
    kwargs = {"num_layers": 2, "bidirectional": True, **kwargs}
    module = fused_rnn.LSTM(4, 6, dtype=torch.float64, **kwargs)
    x = torch.randn(5, 3, 4, dtype=torch.float64, requires_grad=True)
    reset = torch.rand(5, 3) < 0.4
    h, c = torch.randn(2, 5, 4, 3, 6, dtype=torch.float64).unbind()
    return module, x, reset, (h.requires_grad_(), c.requires_grad_())


CALLS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "reset": ({}, ("reset",)),
    "reset_to": ({}, ("reset", "reset_to")),
    "states": ({}, ("return_states",)),
    "norm": ({"norm": "layer"}, ()),
    "rms": ({"norm": "rms", "norm_at": ("sum",)}, ("reset",)),
    "zoneout": ({"zoneout": 0.3}, ()),
    "recurrent_dropout": ({"recurrent_dropout": 0.3}, ("reset", "reset_to")),
    "weight_dropout": ({"weight_dropout": 0.3, "dropout": 0.3, "dropout_over_time": True}, ()),
    "blocks": ({"blocks": 3}, ("reset", "reset_to", "return_states")),
}


def asked(names: tuple[str, ...], reset: Tensor, to: Any) -> dict[str, Any]:
    known = {"reset": reset, "reset_to": to, "return_states": True}
    return {name: known[name] for name in names}


@pytest.mark.drawn(6)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("kwargs, names", CALLS.values(), ids=CALLS)
def test_compile(kwargs: dict[str, Any], names: tuple[str, ...], backend: str) -> None:
    """One graph, for resets of any number and place."""
    module, x, reset, to = small(kwargs)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    for cuts in (reset, ~reset, reset & False):
        given = asked(names, cuts, to)
        torch.manual_seed(7)
        wanted = flatten(module(x, **given))
        torch.manual_seed(7)
        found = flatten(compiled(x, **given))
        assert_all_close(found, wanted)
        wrt = [x, *module.parameters()]
        ours, theirs = (
            torch.autograd.grad(sum(o.square().sum() for o in some), wrt)  # type: ignore[arg-type]
            for some in (found, wanted)
        )
        assert_all_close(ours, theirs)


@pytest.mark.parametrize("kwargs, names", CALLS.values(), ids=CALLS)
def test_transforms(kwargs: dict[str, Any], names: tuple[str, ...]) -> None:
    """torch.func over a batch of inputs, forward mode, and gradients of many outputs at once."""
    module, x, reset, to = small(kwargs)
    given = asked(names, reset, to)
    module.eval()

    def fn(x: Tensor) -> Tensor:
        return torch.cat([o.flatten() for o in flatten(module(x, **given))])

    xs = torch.randn(2, *x.shape, dtype=x.dtype)
    assert_all_close(torch.func.vmap(fn)(xs), torch.stack([fn(x) for x in xs]))
    v = torch.randn_like(x)
    _, tangent = torch.func.jvp(fn, (x.detach(),), (v,))
    w = torch.randn_like(tangent)
    (grad,) = torch.autograd.grad(fn(x), x, w)
    assert_all_close((tangent * w).sum(), (grad * v).sum())
    (func_grad,) = torch.func.vjp(fn, x.detach())[1](w)
    assert_all_close(func_grad, grad)
    y, ws = fn(x), torch.stack([w, -w])
    (both,) = torch.autograd.grad(y, x, ws, is_grads_batched=True, retain_graph=True)
    assert_all_close(both, torch.stack([grad, -grad]))
    rows = torch.func.vmap(lambda w: torch.autograd.grad(y, x, w, retain_graph=True)[0])(ws)
    assert_all_close(rows, both)


@pytest.mark.parametrize("kwargs, names", CALLS.values(), ids=CALLS)
def test_random_numbers(kwargs: dict[str, Any], names: tuple[str, ...]) -> None:
    """The same from a seed, in a checkpoint and when layers run again; others at the next call."""
    module, x, reset, to = small(kwargs)
    given = asked(names, reset, to)

    def run(call: Any) -> list[Tensor]:
        torch.manual_seed(7)
        outputs = flatten(call())
        loss = sum(o.square().sum() for o in outputs)
        return [*outputs, *torch.autograd.grad(loss, [x, *module.parameters()])]  # type: ignore

    wanted = run(lambda: module(x, **given))
    again = flatten(module(x, **given))
    drops = {"zoneout", "recurrent_dropout", "weight_dropout"} & kwargs.keys()
    assert torch.equal(again[0], wanted[0]) == (not drops)
    checkpointed = run(lambda: checkpoint(module, x, use_reentrant=False, **given))
    assert_all_close(checkpointed, wanted, tol=0)
    module.recompute = True
    assert_all_close(run(lambda: module(x, **given)), wanted)
    module.eval()
    one, other = (flatten(module(x, **given)) for _ in range(2))
    assert_all_close(one, other, tol=0)


@pytest.mark.parametrize("kwargs, names", CALLS.values(), ids=CALLS)
def test_autocast(kwargs: dict[str, Any], names: tuple[str, ...]) -> None:
    """The types of a layer without options, and the values of the same layer in bfloat16."""
    module, x, reset, to = small(kwargs)
    x, to = x.detach().float(), tuple(s.detach().float() for s in to)
    module.float().eval()
    plain_one = fused_rnn.LSTM(4, 6, num_layers=2, bidirectional=True)
    given = asked(names, reset, to)
    with torch.autocast("cpu", torch.bfloat16):
        found = flatten(module(x, **given))
        types = [t.dtype for t in flatten(plain_one(x))]
    assert [t.dtype for t in found[:3]] == types
    given = asked(names, reset, tuple(s.bfloat16() for s in to))
    assert_all_close(found, flatten(module.bfloat16()(x.bfloat16(), **given)), tol=0)


def test_no_gradient_passes_a_reset() -> None:
    module, x, _, to = small({"bidirectional": False})
    reset = torch.zeros(5, 3, dtype=torch.bool)
    reset[2, 1] = True
    y, _ = module(x, reset=reset, reset_to=tuple(s[:, :2] for s in to))
    dx, dh = torch.autograd.grad(y[2:, 1].sum(), [x, to[0]])
    assert (dx[:2] == 0).all() and (dx[2:, 1] != 0).any()
    dh[2, :, 1].sub_(dh[2, :, 1].clone())
    assert (dh == 0).all()  # nothing but the states of that step and sequence


def test_without_a_reset_as_without_the_argument() -> None:
    module, x, reset, to = small({})
    assert_all_close(module(x, reset=reset & False, reset_to=to), module(x))
    hx = tuple(s[0].detach() for s in to)
    from_the_first = torch.zeros_like(reset)
    from_the_first[0] = True
    one_way = fused_rnn.GRU(4, 6, dtype=x.dtype)
    assert_all_close(one_way(x, hx[0][:1], reset=from_the_first), one_way(x))


@pytest.mark.parametrize("packed", [False, True])
def test_segments(packed: bool, seed: int) -> None:
    """Where rows go when a batch is cut, found by going through it row by row."""
    rng = random.Random(f"{seed} {packed}")
    for _ in range(50):
        T, B = rng.randint(1, 6), rng.randint(1, 6)
        lengths = sorted([T, *(rng.randint(1, T) for _ in range(B - 1))], reverse=True)
        lengths = lengths if packed else [T] * B
        sizes = [sum(n > t for n in lengths) for t in range(T)]
        rows = [(t, b) for t in range(T) for b in range(sizes[t])]
        reset = torch.rand(len(rows)) < 0.3
        parts: list[list[int]] = []  # the rows of each segment
        for b in range(B):
            for i, (t, sequence) in enumerate(rows):
                if sequence == b:
                    if t == 0 or reset[i]:
                        parts.append([])
                    parts[-1].append(i)
        parts.sort(key=len, reverse=True)
        steps = range(len(parts[0]))
        given = reset if packed else reset.view(T, B)
        cut = segments.find(given, torch.tensor(sizes) if packed else None, B)
        assert cut.origin.tolist() == [p[k] for k in steps for p in parts if len(p) > k]
        assert cut.origin[cut.place].tolist() == list(range(len(rows)))
        assert cut.batch_sizes.tolist() == [sum(len(p) > k for p in parts) for k in steps]
        assert cut.sequence.tolist() == [rows[p[0]][1] for p in parts]
        assert cut.begin.tolist() == [rows[p[0]][0] for p in parts]
        assert cut.anew.tolist() == [bool(reset[p[0]]) for p in parts]
        ends = [rows[p[-1]] for p in parts]
        assert cut.final.tolist() == [t + 1 == lengths[b] for t, b in ends]
        for end, final, (t, _) in zip(cut.end.tolist(), cut.final.tolist(), ends, strict=True):
            assert final or end == t + 1
        for b in range(B):
            first, last = parts[int(cut.first[b])], parts[int(cut.last[b])]
            assert rows[first[0]] == (0, b) and rows[last[-1]] == (lengths[b] - 1, b)
