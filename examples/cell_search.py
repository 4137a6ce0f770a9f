"""A search for recurrent cells: mutate, compile, train, keep what is best for its cost.

"Better and simpler architectures are a hot topic": here a cell is a function of a few lines, as
text. A mutation takes an expression of it and puts another one in its place, by a small grammar
(``RULES`` and ``leaves``); ``fused_rnn.cell`` refuses what is no cell and compiles the rest, which
then trains like a built-in one. It learns two tasks, characters of real text and the adding problem
(Hochreiter & Schmidhuber 1997). What no other beats in both losses and in floating-point operations
per character is the front, and the next cell is a mutation of one there, or a new one. All have as
many parameters, for each of the sizes asked for. LSTM, GRU and cells of the literature come first:
they are the first parents, and what the found ones are seen beside. (Jozefowicz et al. 2015
searched like this, 10,000 cells.)

    python examples/cell_search.py
    python examples/cell_search.py --resume --cells 200       # goes on, to 200 cells
    python examples/cell_search.py --parameters 300000 --steps 5000

Optuna keeps the record. With a database that they share, any number of machines search together,
each started with the same line (``pip install psycopg2-binary`` for this one). The cells in it are
run as Python, so it must be one's own:

    python examples/cell_search.py --storage postgresql://user:password@host/cells --cells 2000
"""

from __future__ import annotations

import argparse
import ast
import functools
import inspect
import itertools
import math
import random
import re
import string
from pathlib import Path
from typing import Any

import optuna
import torch
import torch.nn.functional as F
from common import COLOURS, GREY, Run, arguments, launch, picture, positive, start
from compare_cells import Characters, width_for
from gradient_flow import ADDING_BASELINE, Reader, adding_loss, adding_problem, learn
from optuna.trial import FrozenTrial, Trial, TrialState
from torch import nn

import fused_rnn
from fused_rnn import zoo

# --- cells as text -------------------------------------------------------------------------------

# What an expression may be made of, by the number of its parts.
RULES = {
    1: ["torch.sigmoid({})", "torch.tanh({})", "torch.relu({})", "F.silu({})", "F.softplus({})",
        "F.softsign({})", "torch.sin({})", "1 - ({})", "-({})"],
    2: ["({}) + ({})", "({}) - ({})", "({}) * ({})", "torch.maximum({}, {})",
        "torch.minimum({}, {})"],
    3: ["torch.lerp({}, {}, torch.sigmoid({}))"],
}  # fmt: skip
MOST_GATES, MOST_EXPRESSIONS = 6, 60

PLAIN = "def RNN(x, r, s, p):\n    return dict(h=torch.tanh(x.a + r.a))"
PLAIN_WITH_MEMORY = """def Memory(x, r, s, p):
    c = torch.lerp(s.c, torch.tanh(x.a + r.a), torch.sigmoid(x.f + r.f))
    return dict(h=torch.tanh(c), c=c)"""
GRU = """def GRU(x, r, s, p):
    z = torch.sigmoid(x.z + r.z)
    n = torch.tanh(x.n + torch.sigmoid(x.r + r.r) * r.n)
    return dict(h=torch.lerp(n, s.h, z))"""


def bare(text: str) -> ast.FunctionDef:
    """The function in a text of one, without decorator, docstring and annotations."""
    (function,) = ast.parse(text).body
    assert isinstance(function, ast.FunctionDef)
    if ast.get_docstring(function) is not None:
        function.body = function.body[1:]
    function.decorator_list, function.returns = [], None
    for argument in function.args.args:
        argument.annotation = None
    return function


def returned(function: ast.FunctionDef) -> list[ast.keyword]:
    """The new states: what the dict at the end of a cell is made of."""
    last = function.body[-1]
    assert isinstance(last, ast.Return) and isinstance(last.value, ast.Call)
    return last.value.keywords


def read_names(function: ast.FunctionDef) -> dict[str, set[str]]:
    """What a cell reads of each of its arguments: x, r, s and p."""
    found: dict[str, set[str]] = {"x": set(), "r": set(), "s": set(), "p": set()}
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute):
            owner = node.value.func if isinstance(node.value, ast.Call) else node.value
            found.get(ast.unparse(owner), set()).add(node.attr)
    return found


def declared(function: ast.FunctionDef) -> str:
    """The text of a cell: the function, decorated with the names that it reads. Lines whose value
    nobody reads are left out."""
    read: set[str] = set()
    body: list[ast.stmt] = []
    for line in reversed(function.body):
        if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) not in read:
            continue
        read |= {node.id for node in ast.walk(line) if isinstance(node, ast.Name)}
        body.insert(0, line)
    function.body = body
    found = read_names(function)
    names = {
        "gates": tuple(sorted(found["x"] | found["r"])),
        "states": tuple(keyword.arg for keyword in returned(function)),
        "params": tuple(sorted(found["p"])),
    }
    shown = ", ".join(f"{kind}={those!r}" for kind, those in names.items() if those)
    return f"@fused_rnn.cell({shown})\n{ast.unparse(function)}\n"


def layer_of(text: str) -> Any:
    """The layer that a text makes. Raises ``fused_rnn.CellError`` if it is no cell."""
    space: dict[str, Any] = {"torch": torch, "F": F, "fused_rnn": fused_rnn}
    exec(compile(text, "<cell>", "exec"), space)
    return space[bare(text).name]


def known_cells() -> dict[str, str]:
    """Cells to begin with, by name: the plain network, GRU and LSTM, and those of the zoo that have
    no hyperparameters and are declared by names alone."""
    cells = {"RNN": declared(bare(PLAIN)), "GRU": declared(bare(GRU))}
    for node in ast.parse(inspect.getsource(zoo)).body:
        if isinstance(node, ast.FunctionDef) and len(node.args.args) == 4 and by_names(node):
            # Torch's LSTM is Greff's variant without peepholes.
            cells["LSTM" if node.name == "NP" else node.name] = declared(bare(ast.unparse(node)))
    return cells


def by_names(function: ast.FunctionDef) -> bool:
    """Whether the decorator says nothing but names of gates, states and parameters."""
    (decorator,) = function.decorator_list
    assert isinstance(decorator, ast.Call)
    return all(
        keyword.arg in ("gates", "states", "params")
        and isinstance(keyword.value, ast.Tuple)
        and all(isinstance(name, ast.Constant) for name in keyword.value.elts)
        for keyword in decorator.keywords
    )


# --- mutation ------------------------------------------------------------------------------------


def expressions(function: ast.FunctionDef) -> list[tuple[int, ast.expr]]:
    """All that a mutation may replace, with the number of the line where it stands."""
    found = []
    for i, line in enumerate(function.body):
        for parent in ast.walk(line):
            if isinstance(parent, (ast.Attribute, ast.Return)):
                continue  # the x of x.f, and the dict
            children = [
                child
                for field, value in ast.iter_fields(parent)
                if field not in ("func", "targets")
                for child in (value if isinstance(value, list) else [value])
            ]
            found += [
                (i, child)
                for child in children
                if isinstance(child, ast.expr) and not isinstance(child, ast.Constant)
            ]
    return found


def parts(node: ast.expr) -> list[str]:
    """The values that an expression is made of, as text."""
    if isinstance(node, ast.BinOp):
        found = [node.left, node.right]
    elif isinstance(node, ast.UnaryOp):
        found = [node.operand]
    else:
        found = node.args if isinstance(node, ast.Call) else []
    return [ast.unparse(part) for part in found if not isinstance(part, ast.Constant)]


def leaves(function: ast.FunctionDef, line: int, rng: random.Random) -> list[str]:
    """What may stand at a place: a state, a value known there, or a new gate of some kind."""
    taken = set(re.findall(r"\w+", ast.unparse(function)))
    gate = next(name for name in string.ascii_lowercase if name not in taken)
    states = [f"s.{keyword.arg}" for keyword in returned(function)]
    known = [ast.unparse(node) for i, node in expressions(function) if i <= line]
    known += [ast.unparse(before.targets[0]) for before in function.body[:line]]
    of = f"({rng.choice(known)}) * {rng.choice(states)}"
    new = [f"x.{gate} + r.{gate}", f"x.{gate}", f"x.{gate} + r({of}).{gate}", f"p.{gate}"]
    return [rng.choice(states), rng.choice(known), rng.choice(new)]


class Replace(ast.NodeTransformer):
    """Puts one expression in the place of another."""

    def __init__(self, old: ast.expr, new: ast.expr) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return self.new if node is self.old else self.generic_visit(node)


def change(text: str, rng: random.Random) -> str:
    """A cell with another expression in the place of one, which may be no cell any more."""
    function = bare(text)
    line, old = rng.choice(expressions(function))
    leaf = functools.partial(leaves, function, line, rng)
    inner = parts(old)
    kind = rng.choice(["leaf", "wrap"] + ["rule", "part"] * bool(inner))
    if kind == "leaf":
        new = rng.choice(leaf())
    elif kind == "part":
        new = rng.choice(inner)
    elif kind == "rule":  # another of as many parts
        new = rng.choice(RULES.get(len(inner), ["{}"])).format(*inner)
    else:
        count = rng.choice(list(RULES))
        inside = [ast.unparse(old), *(rng.choice(leaf()) for _ in range(count - 1))]
        rng.shuffle(inside)
        new = rng.choice(RULES[count]).format(*inside)
    Replace(old, ast.parse(new, mode="eval").body).visit(function)
    function.name = "Found"
    return declared(function)


def is_cell(text: str) -> bool:
    """Whether it compiles, sees its input and has not grown too large."""
    function = bare(text)
    read = read_names(function)
    size = len(expressions(function))
    if not read["x"] or len(read["x"] | read["r"]) > MOST_GATES or size > MOST_EXPRESSIONS:
        return False
    try:
        layer_of(text).explain()
    except fused_rnn.CellError:
        return False
    return True


def mutate(text: str, rng: random.Random, times: int = 1) -> str:
    """The text of a cell that is ``times`` changes away."""
    for _ in range(times):
        changed = change(text, rng)
        while changed == text or not is_cell(changed):
            changed = change(text, rng)
        text = changed
    return text


def draw_cell(rng: random.Random) -> str:
    """A random cell: a plain one, changed often."""
    return mutate(declared(bare(rng.choice([PLAIN, PLAIN_WITH_MEMORY]))), rng, 8)


# --- what a cell is worth ------------------------------------------------------------------------


def flops(layer: Any, inputs: int, width: int, symbols: int) -> int:
    """Operations per character, forward: of the layer, as it counts itself, and of the head."""
    said = layer.explain()
    (per_unit,) = re.findall(r"operations +(\d+) forward", said)
    ((per_input, per_state),) = re.findall(r"products +(\d+) I \+ (\d+) H", said)
    products = int(per_input) * inputs + int(per_state) * width + 2 * symbols
    return width * (int(per_unit) + products)


class Tasks:
    """The two tasks, both at one number of parameters."""

    def __init__(self, run: Run) -> None:
        self.run, self.characters = run, Characters(run)
        self.adding = functools.partial(adding_problem, run.args.adding_length)

    def measure(self, text: str, parameters: int) -> dict[str, float]:
        """Train a cell on both; ``ArithmeticError`` if its numbers leave the range of floats."""
        args, layer, results = self.run.args, layer_of(text), {}
        width = width_for(lambda w: self.characters.build(layer, w), parameters)
        torch.manual_seed(args.seed)
        model = self.characters.build(layer, width).to(self.run.device)
        self.characters.train(model, args.steps, 0, args.lr)
        results["bits"] = self.characters.measure(model)
        results["flops"] = flops(layer, model.rnn.input_size, width, model.symbols)
        results["width"] = width
        width = width_for(lambda w: Reader(layer, 2, w), parameters)
        torch.manual_seed(args.seed)
        reader: nn.Module = Reader(layer, 2, width)
        optimizer = torch.optim.Adam(reader.parameters(), args.lr)
        found = learn(
            self.run, "adding", reader, self.adding, adding_loss, optimizer, args.adding_steps
        )
        results["adding"] = found["held_out_loss"]
        for name, value in results.items():
            if not math.isfinite(value):
                raise ArithmeticError(f"{name} is {value}")
        return results


# --- the search ----------------------------------------------------------------------------------

OBJECTIVES = ("bits", "adding", "flops")  # all to be minimised


def open_study(run: Run) -> optuna.Study:
    """The record: that of --storage, or a file in --out, which --resume goes on with.

    Ends the program if it is of a search with other arguments.
    """
    args = run.args
    if args.storage is None and not args.resume:
        run.path("study.db").unlink(missing_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        study_name="cells",
        storage=args.storage or f"sqlite:///{run.path('study.db')}",
        directions=["minimize"] * len(OBJECTIVES),
        load_if_exists=True,
    )
    free = {"cells", "out", "resume", "threads", "device", "storage"}
    ours = {name: str(value) for name, value in vars(args).items() if name not in free}
    theirs = study.user_attrs.get("arguments", ours)
    differ = [f"--{k} {theirs.get(k)} (now {v})" for k, v in ours.items() if theirs.get(k) != v]
    if differ:
        raise SystemExit(f"the study is of a search with other arguments: {', '.join(differ)}")
    if not study.trials:
        study.set_user_attr("arguments", ours)
        cells = known_cells()
        for place, (parameters, name) in enumerate(itertools.product(args.parameters, args.known)):
            asked = {"name": name, "cell": cells[name], "parameters": parameters, "place": place}
            study.enqueue_trial({}, user_attrs=asked)
    elif args.storage is None:  # what was under way when an earlier run ended; no other is there
        for trial in study.get_trials(states=(TrialState.RUNNING,)):
            study.tell(trial.number, state=TrialState.FAIL)
            if "cell" in trial.user_attrs:
                study.enqueue_trial({}, user_attrs=trial.user_attrs)
    return study


def is_done(trial: FrozenTrial) -> bool:
    """Whether a cell was trained, or could not be; not if the program ended meanwhile."""
    return trial.state is TrialState.COMPLETE or "error" in trial.user_attrs


def choose(study: optuna.Study, trial: Trial, args: argparse.Namespace) -> None:
    """Give a trial its cell, a mutation or a new one. It depends on the seed, on the place in the
    search and on the front."""
    before = study.get_trials(deepcopy=False)[: trial.number]
    ended = [t for t in before if t.state is TrialState.FAIL and "error" not in t.user_attrs]
    place = trial.number - len(ended)  # the same if the search was interrupted
    rng = random.Random(f"{args.seed} {place}")
    seen, text, parent = {t.user_attrs.get("cell") for t in before}, None, None
    front = sorted(study.best_trials, key=lambda t: t.user_attrs["place"])
    while text is None or text in seen:
        if front and rng.random() < 0.8:
            origin = rng.choice(front).user_attrs
            text, parent = mutate(origin["cell"], rng, rng.choice([1, 2, 3])), origin["name"]
        else:
            text, parent = draw_cell(rng), None
    chosen = {"name": f"found {place}", "cell": text, "parent": parent, "place": place}
    for name, value in {**chosen, "parameters": rng.choice(args.parameters)}.items():
        trial.set_user_attr(name, value)


def search(run: Run, study: optuna.Study, tasks: Tasks) -> None:
    """Train cells until there are as many as asked for, whoever trained them. One that cannot be
    compiled or trained is recorded with its error."""
    args = run.args
    total = args.cells + len(args.known) * len(args.parameters)
    bar = run.progress(total=total, initial=sum(map(is_done, study.trials)), unit="cell", items=())
    while sum(map(is_done, study.get_trials(deepcopy=False))) < total:
        trial = study.ask()
        if "cell" not in trial.user_attrs:
            choose(study, trial, args)
        asked = trial.user_attrs
        bar.set_postfix_str(f"{asked['name']}; {len(study.best_trials)} on the front")
        try:
            results = tasks.measure(asked["cell"], asked["parameters"])
        except Exception as error:
            trial.set_user_attr("error", f"{type(error).__name__}: {error}"[:500])
            study.tell(trial, state=TrialState.FAIL)
        else:
            trial.set_user_attr("width", results["width"])
            study.tell(trial, [results[name] for name in OBJECTIVES])
        bar.update(1)
    bar.close()


# --- what came of it -----------------------------------------------------------------------------


def results_of(study: optuna.Study) -> list[dict[str, Any]]:
    """One dictionary for each cell that was trained or failed, in the order of the search."""
    front = {trial.number for trial in study.best_trials}
    done = sorted(filter(is_done, study.trials), key=lambda trial: trial.user_attrs["place"])
    return [
        {
            **trial.user_attrs,
            **dict(zip(OBJECTIVES, trial.values or (), strict=False)),
            "front": trial.number in front,
        }
        for trial in done
    ]


def table(results: list[dict[str, Any]]) -> str:
    """The front and all known cells by size and bits, then the functions found on the front."""
    head = ("cell", "parameters", "units", "bits/char", "adding", "kFLOP/char")
    rows = ["{:20}{:>12}{:>7}{:>11}{:>10}{:>12}".format(*head)]
    trained = [r for r in results if "bits" in r]
    for r in sorted(trained, key=lambda r: (r["parameters"], r["bits"])):
        if r["front"] or "parent" not in r:
            name = r["name"] + " *" * r["front"]
            rows.append(
                f"{name:20}{r['parameters']:12,}{r['width']:7}{r['bits']:11.3f}"
                f"{r['adding']:10.4f}{r['flops'] / 1000:12.1f}"
            )
    rows.append("* on the front: no other is better in one of the three and in none worse")
    rows += [f"{r['name']} could not be trained: {r['error']}" for r in results if "error" in r]
    found = [r for r in results if r["front"] and "parent" in r]
    return "\n".join([*rows, *(f"\n# {r['name']}\n{r['cell']}" for r in found)])


def draw(path: Path, results: list[dict[str, Any]], baselines: dict[str, float]) -> None:
    """A row for each task, a column for each number of parameters: loss against operations of what
    was found and what was known, and the front of the two."""
    trained = [r for r in results if "bits" in r]
    sizes = sorted({r["parameters"] for r in results})
    titles = {
        "bits": ("held-out text", "bits per character"),
        "adding": ("adding problem", "mean squared error"),
    }
    with picture(path, figsize=(6.5 * len(sizes), 10)) as figure:
        figure.suptitle(f"{len(trained)} cells, each trained on two tasks", x=0.01, ha="left")
        grid = figure.subplots(2, len(sizes), squeeze=False)
        for (i, task), (j, size) in itertools.product(enumerate(titles), enumerate(sizes)):
            ax, (title, label) = grid[i, j], titles[task]
            own = [(r["flops"] / 1000, r[task], r) for r in trained if r["parameters"] == size]
            own.sort(key=lambda point: point[:2])
            best: list[tuple[float, float, Any]] = []
            for point in own:
                if not best or point[1] < best[-1][1]:
                    best.append(point)
            for kind, colour in (("found", COLOURS[0]), ("known", GREY)):
                shown = [p for p in own if ("parent" in p[2]) is (kind == "found")]
                x, y = [p[0] for p in shown], [p[1] for p in shown]
                ax.plot(x, y, "o", color=colour, alpha=0.6, label=kind)
            x, y = [p[0] for p in best], [p[1] for p in best]
            ax.step(x, y, where="post", color=COLOURS[1], label="best at its cost")
            for x, y, r in own:
                if (x, y, r) in best or "parent" not in r:
                    ax.annotate(
                        r["name"], (x, y), (4, 3), textcoords="offset points", fontsize=7,
                        color=COLOURS[1] if (x, y, r) in best else GREY,
                    )  # fmt: skip
            ax.set(
                title=f"{size:,} parameters, {title} (baseline {baselines[task]:.3g})",
                xlabel="thousand operations per character", ylabel=label,
                yscale="log" if task == "adding" else "linear",
            )  # fmt: skip
            # A cell whose losses run away would leave no room for the others.
            most, losses = 1.5 * baselines[task], [loss for _, loss, _ in own]
            if losses and max(losses) > most:
                ax.set_ylim(0.9 * min(losses), most)
            ax.legend()


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    p = arguments(__doc__, "cell_search", cell=None, hidden=None, lr=1e-2, steps=400)
    some = ["RNN", "LSTM", "GRU", "CIFG", "UGRNN", "MGU", "MUT1", "MinGRU"]
    p.add_argument("--cells", type=positive, default=16, help="to find, beside the known ones")
    p.add_argument(
        "--known", nargs="+", choices=sorted(known_cells()), default=some, metavar="CELL",
        help="to begin with: LSTM, GRU, RNN and names of the zoo",
    )  # fmt: skip
    p.add_argument(
        "--parameters", nargs="+", type=positive, default=[12_000, 48_000],
        help="sizes of the models: at most so many numbers each",
    )  # fmt: skip
    p.add_argument("--adding-length", type=positive, default=20, help="steps to remember over")
    p.add_argument("--adding-steps", type=positive, default=800, help="of the optimizer there")
    p.add_argument("--data", type=Path, help="UTF-8 text or folder (default: Python's own source)")
    p.add_argument("--storage", help="URL of a database that several machines share")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    run = start(args)
    if run.world > 1:
        raise SystemExit("a cell is trained by one process: start several with one --storage")
    tasks = Tasks(run)
    study = open_study(run)
    search(run, study, tasks)
    results = results_of(study)
    baselines = {"bits": tasks.characters.baseline, "adding": ADDING_BASELINE}
    draw(run.path("cell_search.png"), results, baselines)
    run.print(table(results) + "\n")
    trained = [r for r in results if "bits" in r]
    figures: dict[str, Any] = {
        "trained": len(trained),
        "failed": len(results) - len(trained),
        "on_the_front": sum(r["front"] for r in results),
        "found_on_the_front": sum(r["front"] and "parent" in r for r in results),
        "cells": results,
    }
    for task in baselines:
        figures[f"best_{task}"] = min((r[task] for r in trained), default=math.nan)
        figures[f"{task}_baseline"] = baselines[task]
    run.write(figures, "cell_search")


if __name__ == "__main__":
    launch(main)
