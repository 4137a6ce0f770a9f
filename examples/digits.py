"""Pictures and films of real handwriting: scikit-learn's digits, alone, in scenes and in motion.

The 1797 digits (8 x 8 grey levels; UCI "Optical Recognition of Handwritten Digits", Alpaydin and
Kaynak 1998) lie in the order in which people wrote them. The last third is held out, so held-out
scenes and clips show handwriting of people who wrote nothing in the training part.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

NAMES = "zero one two three four five six seven eight nine".split()


@cache
def handwriting(held_out: bool, size: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Images ``[N, size, size]`` in 0..1 and their digits ``[N]``, of one part of the data."""
    data = load_digits()
    cut = len(data.target) * 2 // 3
    part = slice(cut, None) if held_out else slice(cut)
    images = torch.tensor(data.images[part] / 16, dtype=torch.float32)
    larger = F.interpolate(images[:, None], (size, size), mode="bilinear", align_corners=False)
    return larger[:, 0].numpy(), data.target[part]


def random_digit(rng: np.random.Generator, held_out: bool, size: int) -> tuple[np.ndarray, int]:
    """One image ``[size, size]`` and what it shows."""
    images, digits = handwriting(held_out, size)
    i = rng.integers(len(digits))
    return images[i], int(digits[i])


# --- scenes with captions ------------------------------------------------------------------------

SCENE = 32  # pixels, height and width
SIZES = {"large": 14, "small": 8}
MARGIN = 1.5  # how much farther apart along one axis than the other, so that words are beyond doubt


@dataclass(frozen=True)
class Thing:
    """A digit in a scene."""

    digit: int
    size: str
    top: int
    left: int

    @property
    def name(self) -> str:
        return f"a {self.size} {NAMES[self.digit]}"

    @property
    def centre(self) -> tuple[float, float]:
        """Row and column, in pixels."""
        return self.top + SIZES[self.size] / 2, self.left + SIZES[self.size] / 2

    def overlaps(self, other: Thing) -> bool:
        def apart(a: int, a_size: int, b: int, b_size: int) -> bool:
            return a + a_size <= b or b + b_size <= a

        mine, its = SIZES[self.size], SIZES[other.size]
        return not (
            apart(self.top, mine, other.top, its) or apart(self.left, mine, other.left, its)
        )


def captions(things: list[Thing]) -> list[str]:
    """All true sentences about the scene, or none where the words would be in doubt."""
    if len(things) == 1:
        down, right = (c - SCENE / 2 for c in things[0].centre)
        if min(abs(down), abs(right)) < 3:
            return []
        row, column = "top" if down < 0 else "bottom", "left" if right < 0 else "right"
        return [f"{things[0].name} at the {row} {column}"]
    a, b = things
    if a.overlaps(b):
        return []
    down, right = (p - q for p, q in zip(a.centre, b.centre, strict=True))
    if abs(right) >= MARGIN * abs(down):
        words = ("left of", "right of")
    elif abs(down) >= MARGIN * abs(right):
        words = ("above", "below")
    else:
        return []
    if (right if words[0] == "left of" else down) > 0:
        a, b = b, a
    return [f"{a.name} {words[0]} {b.name}", f"{b.name} {words[1]} {a.name}"]


def scene(
    rng: np.random.Generator, held_out: bool = False, count: int | None = None, noise: float = 0.1
) -> tuple[np.ndarray, list[str], list[Thing]]:
    """A picture ``[SCENE, SCENE]`` of one or two digits, all its captions, and what is where."""
    while True:  # until the digits lie so that words describe it
        picture = np.zeros((SCENE, SCENE), np.float32)
        things = []
        for _ in range(count or (1 if rng.random() < 0.2 else 2)):
            size = str(rng.choice(list(SIZES)))
            image, digit = random_digit(rng, held_out, SIZES[size])
            top, left = (int(p) for p in rng.integers(0, SCENE - SIZES[size] + 1, 2))
            things.append(Thing(digit, size, top, left))
            picture[top : top + SIZES[size], left : left + SIZES[size]] += image
        sentences = captions(things)
        if sentences:
            picture += noise * rng.standard_normal(picture.shape, np.float32)
            return picture, sentences, things


# --- clips of a digit in motion ------------------------------------------------------------------

FRAME = 24  # pixels, height and width
MOVING = 12  # pixels, height and width of the digit
# Steps (down, right) of one frame, by the compass: the names of the directions, and their classes.
COMPASS = {
    "N": (-1, 0), "NE": (-1, 1), "E": (0, 1), "SE": (1, 1),
    "S": (1, 0), "SW": (1, -1), "W": (0, -1), "NW": (-1, -1),
}  # fmt: skip
DIRECTIONS = list(COMPASS)
_CLASS = {step: i for i, step in enumerate(COMPASS.values())}


@dataclass(frozen=True)
class Clip:
    """A digit that moves straight on and bounces off the borders.

    ``frames`` is ``[T, FRAME, FRAME]``; ``directions[t]`` is the class of the move from frame
    ``t - 1`` to frame ``t``, and entry 0 is that of the first move, which frame 0 cannot show.
    """

    frames: np.ndarray
    digit: int
    directions: np.ndarray


def path(rng: np.random.Generator, length: int) -> Iterator[tuple[int, int, int]]:
    """Top and left of the digit in every frame, and the direction in which it came there."""
    free = FRAME - MOVING
    speed = int(rng.integers(1, 3))  # pixels per frame
    step = np.array(list(COMPASS.values())[rng.integers(len(COMPASS))])
    at = rng.integers(0, free + 1, 2)

    def bounced(at: np.ndarray, step: np.ndarray) -> np.ndarray:
        after = at + speed * step
        return np.where((after < 0) | (after > free), -step, step)

    step = bounced(at, step)
    yield int(at[0]), int(at[1]), _CLASS[int(step[0]), int(step[1])]
    for _ in range(length - 1):
        step = bounced(at, step)
        at = at + speed * step
        yield int(at[0]), int(at[1]), _CLASS[int(step[0]), int(step[1])]


def clip(rng: np.random.Generator, length: int, held_out: bool = False, noise: float = 0.3) -> Clip:
    """A clip of ``length`` frames; ``noise`` is the standard deviation of every pixel."""
    image, digit = random_digit(rng, held_out, MOVING)
    frames = noise * rng.standard_normal((length, FRAME, FRAME), np.float32)
    directions = np.empty(length, np.int64)
    for t, (top, left, direction) in enumerate(path(rng, length)):
        frames[t, top : top + MOVING, left : left + MOVING] += image
        directions[t] = direction
    return Clip(frames, digit, directions)


def as_images(pictures: list[np.ndarray]) -> Tensor:
    """Pictures of one size as a batch of one channel, ``[N, 1, height, width]``."""
    return torch.from_numpy(np.stack(pictures))[:, None]
