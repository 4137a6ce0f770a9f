"""Text as numbers: a corpus that every machine has, a vocabulary, streams read side by side."""

from __future__ import annotations

import random
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor


def standard_library_source(limit: int = 4_000_000) -> str:
    """A few MB of the .py files of this Python, in an order that is mixed but always the same."""
    root = Path(sysconfig.get_paths()["stdlib"])
    # Installed packages differ between machines; tests and character tables are no fair reading.
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"}
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    names = [name for name in names if not skip.intersection(name.split("/"))]
    random.Random(0).shuffle(names)  # in order of names the held-out end would be of another kind
    text = ""
    while names and len(text) < limit:
        text += (root / names.pop()).read_text(encoding="utf-8", errors="ignore")
    return text[:limit]


def read_text(path: Path | None, limit: int = 4_000_000) -> str:
    """The first ``limit`` characters of a UTF-8 file, or by default of ``standard_library_source``.

    A folder stands for all files below it, in order of their names. Ends the program if there is
    nothing to read.
    """
    if path is None:
        return standard_library_source(limit)
    if not path.exists():
        raise SystemExit(f"--data {path}: there is no such file or folder")
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    text = ""
    for file in files:
        text += file.read_text(encoding="utf-8", errors="ignore")
        if len(text) >= limit:
            break
    if not text:
        raise SystemExit(f"--data {path}: no text in it")
    return text[:limit]


class Text:
    """A text as numbers, its end held out (by default its last twentieth).

    ``symbols[i]`` is the character of number i. A character seen once or twice cannot be learned:
    all of these share symbol 0. ``train`` and ``held_out`` [N] are the numbers, ``train_text`` and
    ``held_out_text`` the characters that they stand for, one for one.
    """

    def __init__(self, text: str, parts: int = 20) -> None:
        common = sorted(c for c, n in Counter(text).items() if n > 2)
        self.symbols = ["\N{REPLACEMENT CHARACTER}", *common]
        self.index = {c: i for i, c in enumerate(self.symbols)}
        split = len(text) - len(text) // parts
        self.train_text, self.held_out_text = text[:split], text[split:]
        self.train, self.held_out = self.encode(self.train_text), self.encode(self.held_out_text)

    def encode(self, text: str) -> Tensor:
        """The numbers of the characters, int64 [len(text)]; unknown ones are 0."""
        return torch.tensor([self.index.get(c, 0) for c in text], dtype=torch.int64)

    def decode(self, numbers: Iterable[int] | Tensor) -> str:
        """The characters of numbers, in a tensor of any shape or a list."""
        if isinstance(numbers, Tensor):
            numbers = numbers.flatten().tolist()
        return "".join(self.symbols[i] for i in numbers)


def chunks(ids: Tensor, batch: int, chunk: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Input and target, both [T, B], such that each chunk goes on where the last one ended.

    The text is cut into B streams of equal length that are read side by side, T = ``chunk``
    characters at a time; the target is the input shifted by one. Ends the program if the text is
    too short.
    """
    streams = ids[: len(ids) // batch * batch].view(batch, -1).t()  # [N, B]
    if len(streams) <= chunk:
        raise SystemExit(f"the text is too short for {batch} streams of more than {chunk}")
    for begin in range(0, len(streams) - chunk, chunk):
        part = streams[begin : begin + chunk + 1]
        yield part[:-1].contiguous(), part[1:].contiguous()
