"""Everything that is written from the committed results: ``python -m benchmarks pages``

benchmarks/results/pages/FILE.md   every row of results/FILE.json, and of a card's folder
benchmarks/results/README.md       what each of them comes to
README.md                          its tables of speed, between marks
docs/pictures/speed.png            its picture (plots.py)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from . import cases
from .gpu import page as gpu_page
from .report import Mean, means, render, table, title, when, where
from .results import Results, case_of, ratio

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SPEED_PICTURE = ROOT / "docs" / "pictures" / "speed.png"
CARDS = ("h200",)

# The machines of README's table and picture, and what ends the names of their files.
MACHINES = {
    "EPYC with AVX-512": "avx512-cpu",
    "Xeon with AVX-512 and AMX": "cpu",
    "EPYC with AVX2": "avx2-cpu",
}
# Its lines: what it is called, the suite, and the kind of rows.
LINES = (
    ("inference", "headline", "inference float32"),
    ("training", "headline-train", "training float32"),
    ("variable lengths, inference", "ragged", "inference float32 ragged"),
    ("variable lengths, training", "ragged", "training float32 ragged"),
    ("LSTM with projection, inference", "projected", "inference float32"),
    ("LSTM with projection, training", "projected", "training float32"),
    ("one step of one sequence", "decode", "decode float32"),
)
LAYERS = ("lstm", "gru", "rnn")


def texts(root: Path = ROOT) -> dict[Path, str]:
    """Every file and what belongs into it."""
    results = root / "benchmarks" / "results"
    files = [Results.read(path) for path in sorted(results.glob("*.json"))]
    found = {results / "pages" / f"{r.path.stem}.md": _page(r) for r in files}
    for card in CARDS:
        found[results / "pages" / f"{card}.md"] = gpu_page.page(results / card) + "\n"
    found[results / "README.md"] = _overview(files, results)
    readme = root / "README.md"
    text = fill(readme.read_text(), "speed on the CPU", cpu_table(results))
    text = fill(text, "speed of the zoo", zoo_table(results))
    found[readme] = fill(text, "speed on a GPU", gpu_table(results))
    return found


def write(root: Path = ROOT) -> list[Path]:
    """Write them, and delete the pages of results that are no more. Returns what changed."""
    wanted = texts(root)
    changed = []
    for page in sorted((root / "benchmarks" / "results" / "pages").glob("*.md")):
        if page not in wanted:
            page.unlink()
            changed.append(page)
    for path, text in wanted.items():
        if not path.exists() or path.read_text() != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            changed.append(path)
    return changed


def fill(text: str, name: str, body: str) -> str:
    """The text with ``body`` between the marks of this name. Raises ValueError without them."""
    begin, end = f"<!-- {name}: by python -m benchmarks pages -->\n", f"<!-- end of {name} -->"
    before, _, rest = text.partition(begin)
    _, mark, after = rest.partition(end)
    if not mark:
        raise ValueError(f"there is no place for {name}: {begin}...{end}")
    return f"{before}{begin}\n{body}\n\n{end}{after}"


# --- pages of results ----------------------------------------------------------------------------


def suite_of(stem: str) -> str | None:
    """The suite of a file, by its name: headline-bfloat16-cpu is of headline."""
    fitting = [name for name in cases.suite_names() if stem.startswith(f"{name}-")]
    return max(fitting, key=len, default=None)


def _about(stem: str) -> str:
    suite = suite_of(stem)
    return cases.read_suite(suite)["about"] if suite else ""


def _page(results: Results) -> str:
    stem = results.path.stem
    pictures = sorted(results.path.parent.glob(f"{stem}-*.png"))
    links = [f"![{path.stem}](../{path.name})" for path in pictures]
    parts = [f"# {stem}", _about(stem), render(results), *links]
    return "\n\n".join(part for part in parts if part) + "\n"


def _overview(files: Iterable[Results], folder: Path) -> str:
    lines = []
    for results in files:
        stem = results.path.stem
        first = [f"[{stem}](pages/{stem}.md)", where(results), when(results.runs[-1])]
        for mean in means(list(results.rows.values())):
            if mean.cell == "all":
                to_torch = mean.of_peer.get("torch_nn")
                ratios = [f"{to_torch[0]:.2f}" if to_torch else "-", f"{mean.best:.2f}"]
                lines.append([*first, mean.kind, str(mean.rows), *ratios, f"{mean.worst:.2f}"])
                first = ["", "", ""]
    head = ["results", "machine", "measured at", "pass", "rows", title("torch_nn")]
    cards = []
    for name in CARDS:
        cards += [f"[{name}](pages/{name}.md), inference / training:", gpu_table(folder)]
    return "\n\n".join(
        [
            "# Results",
            "Geometric means of how many times longer than ours others take: above 1, ours is "
            "faster. *best peer* compares each row with the fastest of the others, *worst row* is "
            "the lowest of these ratios. Each page names its machine and its commit, and has every "
            "row, the slow ones first. [How figures are made and read](../README.md).",
            "## On the CPU",
            table([*head, "best peer", "worst row"], lines),
            "## On a GPU",
            "Of older versions of the kernels, as the page says.",
            *cards,
            "`python -m benchmarks pages` writes this page and those it links from the JSON files "
            "in this folder.\n",
        ]
    )


# --- README's tables -----------------------------------------------------------------------------


def cpu_table(results: Path) -> str:
    """In every field a figure for each machine."""
    body = []
    for name, suite, kind in LINES:
        machines = [_by_cell(results / f"{suite}-{end}.json", kind) for end in MACHINES.values()]
        fields = [
            _of_each(machines, cell, lambda mean: mean.of_peer["torch_nn"][0]) for cell in LAYERS
        ]
        fields.append(_of_each(machines, "all", lambda mean: mean.best))
        fields.append(_of_each(machines, "all", lambda mean: mean.worst))
        link = f"[{name}](benchmarks/results/pages/{suite}-{next(iter(MACHINES.values()))}.md)"
        body.append([f"{link}, {machines[0]['lstm'].rows} sizes", *fields])
    return table(["", "LSTM", "GRU", "RNN", "fastest", "worst size"], body)


def _by_cell(path: Path, kind: str) -> dict[str, Mean]:
    found = means(list(Results.read(path).rows.values()))
    return {mean.cell: mean for mean in found if mean.kind == kind}


def _to_torch(mean: Mean) -> float:
    return mean.of_peer["torch_nn"][0]


def _of_each(machines: list[dict[str, Mean]], cell: str, value: Callable[[Mean], float]) -> str:
    return " / ".join(gpu_page.number(value(found[cell])) for found in machines if cell in found)


ZOO_COLUMNS = 4


def zoo_table(results: Path) -> str:
    """Every cell of the zoo at the size that all have: against an eager loop / torchrecurrent."""
    fields = {}
    for row in Results.read(results / "zoo-avx512-cpu.json").rows.values():
        case = case_of(row)
        if (case.B, case.T, case.H) == (16, 50, 128):
            found = [ratio(row, name) for name in ("zoo_loop", "torchrecurrent")]
            shown = " / ".join(gpu_page.number(r.median) for r in found if r is not None)
            fields[case.zoo.casefold()] = f"{case.zoo} {shown}"
    every = [fields[name] for name in sorted(fields)]
    every += [""] * (-len(every) % ZOO_COLUMNS)
    lines = [every[i : i + ZOO_COLUMNS] for i in range(0, len(every), ZOO_COLUMNS)]
    return table([""] * ZOO_COLUMNS, lines)


def gpu_table(results: Path) -> str:
    return gpu_page.means(gpu_page.read(results / CARDS[0]).shown)
