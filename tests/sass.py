"""What the instructions of a compiled resident kernel say about how long its steps wait.

    python tests/sass.py FILE.cubin

Three things make a step slow without making it wrong, and no emulation shows them:

- Products that wait for each other, where four sums could be under way: in a part of the program
  without branches, no more than a quarter of the products may stand in one chain.
- Constants that are read from memory each time that a block looks whether others have written: the
  shortest way from such a look to the next must have none.
- A wait for what was loaded ahead before the wait for other blocks is over: between that load and
  the next product no instruction may wait for the load's barrier. To look for the registers of a
  load would not do: a warp has six barriers, and loads that branches part from their use share one,
  so that who waits for one of them waits for all. Numbers of rows may be waited for, which only
  ragged batches load: after one product, to have them in shared memory before the next.

Needs nvdisasm (of the package nvidia-cuda-nvdisasm, or of a CUDA toolkit).
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

CHAINS = 4  # products that should be under way at once


class Instruction(NamedTuple):
    predicate: str
    name: str  # with its modifiers: LDG.E.128.STRONG.GPU
    operands: str
    target: int | None  # of a branch: an index
    sets: int | None  # the barrier that tells when the result is there
    waits: int  # a bit for each barrier that must be done before

    @property
    def is_poll(self) -> bool:
        return self.name.startswith("LDG") and "STRONG.GPU" in self.name

    @property
    def is_row_number(self) -> bool:
        """Nothing else that a step loads has 64 bits."""
        return self.name == "LDG.E.64"

    @property
    def is_product(self) -> bool:
        return self.name.startswith("HMMA")


def find_disassembler() -> str | None:
    package = Path(sysconfig.get_path("purelib"), "nvidia").glob("*/bin/nvdisasm")
    return shutil.which("nvdisasm") or next((str(path) for path in package), None)


def disassemble(tool: str, cubin: Path) -> dict[str, list[Instruction]]:
    """The instructions of each kernel."""
    done = subprocess.run([tool, "-c", "-hex", str(cubin)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{tool} {cubin}\n{done.stdout}{done.stderr}")
    sections = re.split(r"^\.text\.(\w+):$", done.stdout, flags=re.MULTILINE)
    return dict(zip(sections[1::2], map(parse, sections[2::2]), strict=True))


def parse(text: str) -> list[Instruction]:
    line = re.compile(
        r"/\*[0-9a-f]{4,}\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*?)\s*;"
        r"\s*/\* 0x[0-9a-f]{16} \*/\s+/\* 0x([0-9a-f]{16}) \*/"
    )
    labels: dict[str, int] = {}
    found: list[tuple[str, ...]] = []
    for label, *parts in re.findall(rf"^(\.L_x_\d+):$|{line.pattern}", text, re.MULTILINE):
        if label:
            labels[label] = len(found)
        else:
            found.append(tuple(parts))
    instructions = []
    for predicate, name, operands, word in found:
        to = re.search(r"`\((\.L_x_\d+)\)", operands) if name.startswith("BRA") else None
        control = int(word, 16) >> 41  # 4 bits of stall, yield, 3 + 3 of barriers set, 6 waited for
        sets = control >> 5 & 7
        instructions.append(
            Instruction(
                predicate,
                name,
                operands,
                labels[to[1]] if to else None,
                sets if sets < 6 else None,
                control >> 11 & 63,
            )
        )
    return instructions


def after(code: list[Instruction], at: int) -> Iterator[int]:
    """Where the program may go from an instruction, in warps that have not come apart."""
    one = code[at]
    if one.target is not None and one.name != "BRA.DIV":
        yield one.target
    ends = one.name in ("EXIT", "BRA") and not one.predicate and not is_conditional(one)
    if not ends and one.name != "BRA.CONV" and at + 1 < len(code):
        yield at + 1


def is_conditional(branch: Instruction) -> bool:
    """Whether it has a second predicate, in front of its target."""
    return re.match(r"!?U?P\d", branch.operands) is not None


def way_round(code: list[Instruction], start: int) -> list[int]:
    """The shortest way from an instruction to itself; empty if there is none."""
    came: dict[int, int] = {}
    queue = deque([start])
    while queue:
        at = queue.popleft()
        for to in after(code, at):
            if to not in came:
                came[to] = at
                queue.append(to)
            if to == start:
                way = [at]
                while way[-1] != start:
                    way.append(came[way[-1]])
                return way
    return []


def loops(code: list[Instruction]) -> list[int]:
    """For each instruction a number that it shares with those that lie in a loop with it: in the
    graph of where the program may go, its strongly connected component (after Tarjan)."""
    number, low = [-1] * len(code), [0] * len(code)
    component = [-1] * len(code)
    path: list[int] = []
    count = 0
    for root in range(len(code)):
        stack = [] if number[root] >= 0 else [(root, after(code, root))]
        while stack:
            at, ways = stack[-1]
            if number[at] < 0:
                number[at] = low[at] = count
                count += 1
                path.append(at)
            for to in ways:
                if number[to] < 0:
                    stack.append((to, after(code, to)))
                    break
                if component[to] < 0:
                    low[at] = min(low[at], low[to])
            else:
                stack.pop()
                if stack:
                    low[stack[-1][0]] = min(low[stack[-1][0]], low[at])
                if low[at] == number[at]:
                    while component[at] < 0:
                        component[path.pop()] = at
    return component


def blocks(code: list[Instruction]) -> Iterator[list[Instruction]]:
    """Instructions between branches and their targets."""
    targets = {one.target for one in code}
    block: list[Instruction] = []
    for at, one in enumerate(code):
        if at in targets and block:
            yield block
            block = []
        block.append(one)
        if one.name.startswith(("BRA", "EXIT")):
            yield block
            block = []
    if block:
        yield block


def longest_chain(block: list[Instruction]) -> tuple[int, int]:
    """Products of a block, and how many of them at most each wait for the one before."""
    depth: dict[str, int] = {}  # by the register that an accumulator begins with
    count = longest = 0
    for one in block:
        operands = [word.split(".")[0].strip() for word in one.operands.split(",")]
        if one.is_product:
            count += 1
            depth[operands[0]] = 1 + max(depth.get(word, 0) for word in operands[1:])
            longest = max(longest, depth[operands[0]])
        elif operands[0] in depth:
            del depth[operands[0]]
    return count, longest


def early_wait(code: list[Instruction], loop: list[int], load: int) -> int | None:
    """The first instruction of its loop that waits for a load although no product has come yet."""
    barrier = code[load].sets
    seen = {load}
    queue = deque(after(code, load))
    while queue and barrier is not None:
        at = queue.popleft()
        if at in seen or code[at].is_product or loop[at] != loop[load]:
            continue
        if code[at].waits >> barrier & 1:
            return at
        seen.add(at)
        queue.extend(after(code, at))
    return None


class Findings(NamedTuple):
    products: int
    chain: int  # the longest
    errors: list[str]


def look(code: list[Instruction], waits: bool) -> Findings:
    """waits: whether the kernel waits for other blocks."""
    errors = []
    products = polls = chain = 0
    for block in blocks(code):
        count, longest = longest_chain(block)
        products, chain = products + count, max(chain, longest)
        if longest > -(-count // CHAINS):
            errors.append(f"{longest} of {count} products wait for the one before")
    loop = loops(code)
    steps = {loop[at] for at, one in enumerate(code) if one.is_product}
    for at, one in enumerate(code):
        if one.is_poll:
            way = [code[i] for i in way_round(code, at)]
            if not way or any(other.is_product for other in way):
                continue  # what is read while others are multiplied, and polled for later
            polls += 1
            constants = [other for other in way if other.name.startswith("LDC")]
            errors += [f"{c.name} {c.operands} while it polls" for c in constants]
        elif one.name.startswith("LDG") and loop[at] in steps and not one.is_row_number:
            early = early_wait(code, loop, at)
            if early is not None:
                user = code[early]
                errors.append(
                    f"{one.name} {one.operands} is waited for by {user.name} {user.operands}"
                )
    if not products or waits != (polls > 0):
        errors.append(f"{products} products and {polls} polls were found")
    return Findings(products, chain, list(dict.fromkeys(errors)))


def main() -> None:
    tool = find_disassembler() or sys.exit("nvdisasm was not found")
    for name, code in disassemble(tool, Path(sys.argv[1])).items():
        if any(one.is_product for one in code):
            findings = look(code, waits=any(one.is_poll for one in code))
            print(f"{name} {findings.products} products, chain {findings.chain}")
            print("".join(f"    {error}\n" for error in findings.errors), end="")


if __name__ == "__main__":
    main()
