"""What all programs here share: arguments, cells by name, checkpoints, torchrun, pictures.

A program reads like this:

    args = arguments(__doc__, "my_program", steps=1000).parse_args()
    run = start(args)                                     # seeds, threads, device, ranks, --out
    model = MyModel(find_cell(args.cell), args.hidden).to(run.device)
    optimizer = torch.optim.Adam(model.parameters(), args.lr)
    schedule = cosine(optimizer, args.steps)
    checkpoint = run.checkpoint(model=model, optimizer=optimizer, schedule=schedule)
    trained = run.distribute(model)                       # DistributedDataParallel under torchrun
    first = checkpoint.load()                             # 0, or where --resume goes on
    for step in run.progress(range(first, args.steps)):
        x, target = batch(run.generator(step))            # each step and rank has its own numbers
        ...
        checkpoint.save_now_and_then(step + 1)
    checkpoint.save(args.steps)
    if run.is_main:
        with picture(run.path("my_program.png"), figsize=(9, 5)) as figure:
            figure.subplots().plot(...)
    run.write({"accuracy": 0.97, "baseline": 0.1})        # my_program.json, and prints
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import math
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor, nn
from tqdm import tqdm

import fused_rnn

matplotlib.use("Agg")  # draws to files; needs no display
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

BITS = 1 / math.log(2)  # bits per nat

# --- cells ---------------------------------------------------------------------------------------

CELLS: dict[str, type[nn.RNNBase]] = {
    name.lower(): value
    for name, value in vars(fused_rnn).items()
    if inspect.isclass(value) and issubclass(value, nn.RNNBase)
}


def find_cell(name: str | type[nn.RNNBase]) -> type[nn.RNNBase]:
    """The recurrent layer of fused_rnn with this name; case does not matter. A layer is itself.

    Raises ``ValueError`` with the choices if there is none.
    """
    if not isinstance(name, str):
        return name
    if name.lower() not in CELLS:
        raise ValueError(f"no cell {name!r}; there are {', '.join(sorted(CELLS))}")
    return CELLS[name.lower()]


def detach(state: Any) -> Any:
    """The same values without history: where truncated back-propagation through time ends.

    ``state`` is what a layer returns: h, or the LSTM's (h, c), or None.
    """
    if isinstance(state, tuple):
        return tuple(map(detach, state))
    return None if state is None else state.detach()


def count_parameters(module: nn.Module) -> int:
    """How many numbers training may change."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


# --- arguments -----------------------------------------------------------------------------------


def arguments(
    description: str | None,
    name: str,
    *,
    cell: str | None = "lstm",
    hidden: int | None = 128,
    batch: int = 64,
    lr: float | None = 3e-3,
    steps: int | None = None,
    epochs: int | None = None,
) -> argparse.ArgumentParser:
    """A parser with what all programs share; ``name`` is the folder below out/.

    Of ``cell``, ``hidden``, ``lr``, ``steps`` and ``epochs``, those that are not None become
    arguments.
    """
    p = argparse.ArgumentParser(
        prog=f"{name}.py",
        description=(description or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    if cell is not None:
        p.add_argument(
            "--cell", type=str.lower, choices=sorted(CELLS), default=cell, help="recurrent layer"
        )
    if hidden is not None:
        p.add_argument("--hidden", type=positive, default=hidden, help="units of a layer")
    p.add_argument("--batch", type=positive, default=batch, help="sequences per step and process")
    if lr is not None:
        p.add_argument("--lr", type=float, default=lr, help="peak rate of learning")
    if steps is not None:
        p.add_argument("--steps", type=positive, default=steps, help="of the optimizer")
    if epochs is not None:
        p.add_argument("--epochs", type=positive, default=epochs, help="passes through the data")
    p.add_argument("--seed", type=int, default=0, help="of all random numbers")
    p.add_argument("--threads", type=positive, default=torch.get_num_threads(), help="of the CPU")
    p.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    p.add_argument("--out", type=Path, default=Path("out") / name, help="folder of all results")
    p.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    return p


def positive(text: str) -> int:
    """An argument that is a whole number from 1 on."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not positive")
    return number


# --- a run ---------------------------------------------------------------------------------------


class Run:
    """One run of a program: its device, its place among the processes of torchrun, its folder."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.name = args.out.name
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.began = time.perf_counter()
        self.device = torch.device(args.device)
        if self.device.type == "cuda":
            if not torch.cuda.is_available():
                raise SystemExit("--device cuda: torch finds no GPU here")
            if self.world > 1:
                self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(self.device)
        torch.set_num_threads(args.threads)
        random.seed(args.seed)
        torch.manual_seed(args.seed)
        if self.world > 1:
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            torch.distributed.init_process_group(backend)
        args.out.mkdir(parents=True, exist_ok=True)
        self.finished: Checkpoint | None = None

    @property
    def is_main(self) -> bool:
        """Whether this process prints, draws and writes."""
        return self.rank == 0

    def path(self, file: str) -> Path:
        """A file in the folder of results."""
        return self.args.out / file

    def print(self, *values: Any) -> None:
        """Print above the progress bar, once for all processes."""
        if self.is_main:
            tqdm.write(" ".join(map(str, values)))

    def progress(self, items: Iterable[Any], **options: Any) -> tqdm:
        """``items`` with a bar; ``.set_postfix_str(text)`` shows figures. Options are tqdm's."""
        return tqdm(items, **{"disable": not self.is_main, "smoothing": 0.05, **options})

    def generator(self, step: int = 0) -> torch.Generator:
        """Random numbers (CPU) of this step and process: the same when a run is resumed."""
        numbers = random.Random(f"{self.args.seed} {self.rank} {step}")
        return torch.Generator().manual_seed(numbers.getrandbits(63))

    def distribute(self, model: nn.Module) -> nn.Module:
        """Under torchrun the model with averaged gradients, otherwise the model itself.

        Call ``model`` for evaluation and checkpoints and the result for training steps.
        """
        if self.world == 1:
            return model
        torch.manual_seed(self.args.seed + self.rank)  # dropout differs between the processes
        return nn.parallel.DistributedDataParallel(model)

    def checkpoint(self, name: str = "checkpoint.pt", **parts: Any) -> Checkpoint:
        """A file that keeps the ``state_dict`` of each part; see ``Checkpoint``."""
        return Checkpoint(self, name, parts)

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """The result of ``compute()``, kept in finished.pt; with --resume, taken from there.

        For programs that train many small models: no run is repeated. The result must be what
        ``Checkpoint`` keeps as ``extra``.
        """
        if self.finished is None:
            self.finished = self.checkpoint("finished.pt")
            self.finished.free -= {"steps", "epochs"}
            self.finished.load()
            self.finished.extra = self.finished.extra or {}
        results = self.finished.extra
        if name not in results:
            results[name] = compute()
            self.finished.save(0, results)
        return results[name]

    def facts(self) -> dict[str, Any]:
        """What a figure must be read with."""
        return {
            "arguments": {
                k: str(v) if isinstance(v, Path) else v for k, v in vars(self.args).items()
            },
            "torch": torch.__version__,
            "fused_rnn": fused_rnn.__version__,
            "backend": fused_rnn.backend_info()["backend"],
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "processes": self.world,
            "seconds": time.perf_counter() - self.began,
        }

    def write(self, figures: dict[str, Any], name: str | None = None) -> None:
        """Write the figures and ``facts()`` as NAME.json in --out; print the single numbers.

        Lists, tables and texts go to the file alone. Ends the process group of torchrun.
        """
        if self.is_main:
            file = self.path(f"{name or self.name}.json")
            text = json.dumps(without_nan({**figures, **self.facts()}), indent=1, allow_nan=False)
            file.write_text(text + "\n", encoding="utf-8")
            width = max(map(len, figures), default=0)
            for key, value in figures.items():
                if isinstance(value, (bool, int, float)):
                    shown = f"{value:.4g}" if isinstance(value, float) else value
                    print(f"{key.replace('_', ' '):{width}}  {shown}")
            print(f"{time.perf_counter() - self.began:.0f} s; results in {self.args.out}")
        if self.world > 1:
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()


def without_nan(value: Any) -> Any:
    """The same, null for NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {k: without_nan(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def start(args: argparse.Namespace) -> Run:
    """Seeds, threads, device, process group and folder, as ``arguments`` were given."""
    return Run(args)


# --- checkpoints ---------------------------------------------------------------------------------


class Checkpoint:
    """Keeps parts with a ``state_dict``, the step and the random numbers; a resumed run goes on
    as the one that was interrupted would have.

    ``extra``, whatever is given to ``save``, is kept as well if it consists of tensors, numbers,
    strings, lists, tuples and dictionaries: a recurrent state, a history of losses. After ``load``
    it is the attribute ``extra``. ``free`` names the arguments that a resumed run may change; a
    program adds those of its own that do not touch the training.
    """

    def __init__(self, run: Run, name: str, parts: dict[str, Any]) -> None:
        self.run, self.parts, self.path = run, parts, run.path(name)
        self.extra: Any = None
        self.free = {"steps", "epochs", "out", "resume", "threads", "device"}
        self.saved = time.perf_counter()

    def _arguments(self) -> dict[str, str]:
        return {k: str(v) for k, v in vars(self.run.args).items() if k not in self.free}

    def save(self, step: int, extra: Any = None) -> None:
        """Write all to a new file, then put it in the old one's place: never half a file."""
        self.saved = time.perf_counter()
        if not self.run.is_main:
            return
        content = {
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
            "step": step,
            "extra": extra,
            "arguments": self._arguments(),
            "random": random.getstate(),
            "torch_random": torch.get_rng_state(),
            "cuda_random": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        unfinished = self.path.with_suffix(".tmp")
        torch.save(content, unfinished)
        os.replace(unfinished, self.path)

    def save_now_and_then(self, step: int, extra: Any = None, seconds: float = 30) -> None:
        """``save`` if the last time was at least ``seconds`` ago."""
        if time.perf_counter() - self.saved >= seconds:
            self.save(step, extra)

    def load(self) -> int:
        """The step to go on from: 0 without --resume or without a file.

        Ends the program if the file belongs to a run with other arguments.
        """
        if not self.run.args.resume or not self.path.exists():
            return 0
        content = torch.load(self.path, map_location="cpu", weights_only=True)
        theirs, ours = content["arguments"], self._arguments()
        differ = [k for k in sorted(theirs.keys() | ours.keys()) if theirs.get(k) != ours.get(k)]
        if differ:
            raise SystemExit(
                f"{self.path} is of a run with other arguments: "
                + ", ".join(f"--{k} {theirs.get(k)} (now {ours.get(k)})" for k in differ)
            )
        for name, part in self.parts.items():
            part.load_state_dict(content["parts"][name])
        if self.run.world == 1:
            random.setstate(content["random"])
            torch.set_rng_state(content["torch_random"])
            if content["cuda_random"] and torch.cuda.is_available():
                torch.cuda.set_rng_state_all(content["cuda_random"])
        self.extra = content["extra"]
        return content["step"]


# --- training ------------------------------------------------------------------------------------


def cosine(
    optimizer: torch.optim.Optimizer, steps: int, warmup: int = 0
) -> torch.optim.lr_scheduler.LambdaLR:
    """The rate rises evenly over ``warmup`` steps, then falls to 0 as half a cosine.

    A function of the step alone: a run that is resumed with more steps follows the longer plan.
    """

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        done = (step - warmup) / max(1, steps - warmup)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def train_step(
    loss: Tensor,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler | None = None,
    clip: float = 1.0,
) -> float:
    """Back-propagate, clip by norm, step. Returns the norm of the gradient before clipping."""
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    if schedule is not None:
        schedule.step()
    return norm.item()


# --- pictures ------------------------------------------------------------------------------------

# Okabe & Ito's colours, told apart by colour-blind readers too (without black and yellow).
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"]
INK, GREY, LIGHT = "#2b2f33", "#8a939c", "#e8eaed"

STYLE: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.prop_cycle": matplotlib.cycler(color=COLOURS),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "figure.titlesize": 14,
    "figure.titleweight": "bold",
    "font.size": 10,
    "grid.color": LIGHT,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "savefig.dpi": 150,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def cell_colour(name: str) -> str:
    """The same colour for a cell in every picture."""
    return COLOURS[list(CELLS).index(name) % len(COLOURS)]


@contextlib.contextmanager
def picture(path: Path, **options: Any) -> Iterator[Figure]:
    """A figure in the style of all pictures here, written to ``path`` (PNG) at the end.

    ``options`` are those of ``plt.figure``; the layout is constrained.
    """
    with plt.rc_context(STYLE):
        figure = plt.figure(**{"layout": "constrained", **options})
        try:
            yield figure
            figure.savefig(path)
        finally:
            plt.close(figure)


def smooth(values: list[float], width: int) -> list[float]:
    """The mean around each value; near the ends of fewer values, but always centred."""
    total = [0.0]
    for value in values:
        total.append(total[-1] + value)
    last = len(values) - 1
    reach = [min(i, last - i, width // 2) for i in range(len(values))]
    return [(total[i + r + 1] - total[i - r]) / (2 * r + 1) for i, r in enumerate(reach)]


def launch(main: Callable[[], None]) -> None:
    """Run a program; Ctrl-C ends it with one line instead of a traceback."""
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("\ninterrupted; --resume goes on from the last checkpoint") from None
