"""``python -m benchmarks run | table | plot | compare | pages | peers | suites``, see README.md"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import cases, compare, peers, report
from .machine import default_threads, machine
from .results import Results

DEFAULT_ROUNDS = 9
DEFAULT_LIMIT = 60.0


def _share(text: str) -> float:
    share = float(text)
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"above 0 and at most 1, not {text}")
    return share


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)

    p = commands.add_parser("run", help="measure a suite; what the file has already is kept")
    p.add_argument("--suite", default="quick", help="a name (see `suites`), or a .json file")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--dtype", nargs="+", choices=cases.BYTES, help="default: float32")
    p.add_argument("--cells", nargs="+", choices=cases.CELLS, help="default: all of the suite")
    p.add_argument("--phases", nargs="+", choices=cases.PHASES, help="default: all of the suite")
    p.add_argument("--match", default="", help="only rows whose name has this text in it")
    p.add_argument("--peers", nargs="+", metavar="PEER", help="exactly these (see `peers`)")
    p.add_argument("--json", type=Path, help="default: out/benchmarks/SUITE-DEVICE.json")
    p.add_argument("--threads", type=int, default=default_threads())
    p.add_argument("--busy", type=int, default=0, metavar="N", help="beside N other processes")
    p.add_argument(
        "--busy-share",
        type=_share,
        default=1.0,
        metavar="PART",
        help="of a core's time that each of them takes; default: 1, they never rest",
    )
    p.add_argument("--rounds", type=int, help=f"default: the suite's, or {DEFAULT_ROUNDS}")
    p.add_argument(
        "--limit", type=float, help=f"seconds per row; default: the suite's, or {DEFAULT_LIMIT:g}"
    )
    p.add_argument("--memory", action=argparse.BooleanOptionalAction, help="measure peak memory")
    p.add_argument("--fresh", action="store_true", help="forget what the file has")

    p = commands.add_parser("table", help="print a file of results as Markdown")
    p.add_argument("file", type=Path)
    p.add_argument("--details", action="store_true", help="also memory, first calls, the pulse")

    p = commands.add_parser("plot", help="draw a file of results")
    p.add_argument("file", type=Path)
    p.add_argument("--out", type=Path, help="folder; default: where the file is")

    p = commands.add_parser("compare", help="name what became slower; exit code 1 if anything did")
    p.add_argument("old", type=Path)
    p.add_argument("new", type=Path)
    p.add_argument("--tolerance", type=float, default=0.05, help="loss that is still no regression")

    commands.add_parser("pages", help="write what is made of results/: pages, README's tables")
    commands.add_parser("peers", help="say who can be measured here, and why others cannot")
    commands.add_parser("suites", help="list the suites")
    return top


def run(a: argparse.Namespace) -> int:
    from tqdm import tqdm

    from . import runner

    suite = cases.read_suite(a.suite)
    items = cases.load_suite(
        a.suite,
        device=a.device,
        dtypes=a.dtype,
        cells=a.cells,
        phases=a.phases,
        match=a.match,
    )
    if not items:
        raise ValueError("no row of the suite is left")
    if a.peers:  # what is asked for is done, whatever the suite says
        items = [cases.Item(item.case) for item in items]
    else:
        own = tuple(suite.get("peers", peers.NAMES))
        items = [cases.Item(item.case, item.peers or own) for item in items]
    wanted = {name for item in items for name in item.peers or ()}
    names = a.peers or [n for n in peers.NAMES if n in wanted and a.device in peers.load(n).devices]
    path = a.json or Path("out/benchmarks") / f"{Path(a.suite).stem}-{a.device}.json"
    if a.fresh:
        path.unlink(missing_ok=True)
    results = Results.open(path, machine(a.threads, a.device))
    memory = suite.get("memory", True) if a.memory is None else a.memory
    settings = runner.Settings(
        threads=a.threads,
        rounds=a.rounds or suite.get("rounds", DEFAULT_ROUNDS),
        limit_s=a.limit or suite.get("limit_s", DEFAULT_LIMIT),
        memory=memory,
        busy=a.busy,
        busy_share=a.busy_share,
    )
    with tqdm(total=len(items), unit="row", dynamic_ncols=True) as bar:

        def progress(text: str, done: int) -> None:
            bar.set_postfix_str(text, refresh=sys.stderr.isatty())  # a log wants rows only
            bar.update(done)

        runner.run(items, names, results, settings, progress)
    print(report.render(results))
    print(f"\n{path}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    top = parser()
    a = top.parse_args(arguments)
    try:
        if a.command == "run":
            return run(a)
        if a.command == "table":
            print(report.render(Results.read(a.file), details=a.details))
        elif a.command == "plot":
            from . import plots

            for path in plots.draw(Results.read(a.file), a.out or a.file.parent):
                print(path)
        elif a.command == "compare":
            return compare.main(Results.read(a.old), Results.read(a.new), a.tolerance)
        elif a.command == "pages":
            from . import pages, plots

            for path in [*pages.write(), plots.draw_speed(pages.RESULTS, pages.SPEED_PICTURE)]:
                print(path.relative_to(pages.ROOT))
        elif a.command == "suites":
            names = cases.suite_names()
            width = max(map(len, names))
            for name in names:
                about = cases.read_suite(name)["about"]
                print(f"{name:{width}} {len(cases.load_suite(name)):4}  {about}")
        else:
            width = max(map(len, peers.NAMES))
            for name in peers.NAMES:
                peer = peers.load(name)
                why = {device: peer.missing(device) for device in ("cpu", "cuda")}
                answers = (f"{device}: {reason or 'yes':34}" for device, reason in why.items())
                print(f"{name:{width}}", *answers)
    except (ValueError, OSError) as error:
        top.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
