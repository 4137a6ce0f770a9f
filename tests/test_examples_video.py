"""examples/video.py: what it computes, and that it learns to tell motions."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from helpers import assert_close
from torch.nn.utils.rnn import pack_sequence

for package in ("matplotlib", "tqdm", "sklearn", "PIL"):
    pytest.importorskip(package)
np = pytest.importorskip("numpy")

import digits  # noqa: E402
import video  # noqa: E402
from common import find_cell  # noqa: E402
from programs import CELLS, Run, learns  # noqa: E402

pytestmark = [pytest.mark.examples, pytest.mark.usefixtures("one_thread")]
pytest_plugins = "program_fixtures"


def test_digits_move_as_labelled() -> None:
    rng = np.random.default_rng(torch.initial_seed())
    steps = list(digits.COMPASS.values())
    bounces = 0
    for _ in range(50):
        track = list(digits.path(rng, 12))
        moves = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(track)]
        assert all(0 <= top <= 12 and 0 <= left <= 12 for top, left, _ in track)
        for (down, right), (_, _, direction) in zip(moves, track[1:], strict=True):
            speed = max(abs(down), abs(right))
            assert (down, right) == tuple(speed * s for s in steps[direction]) and speed > 0
        assert track[0][2] == track[1][2]
        bounces += len({direction for _, _, direction in track}) > 1
    assert bounces > 10


@pytest.mark.parametrize("cell", CELLS)
def test_the_last_state_answers_for_each_clip_as_the_clip_would_alone(cell: str) -> None:
    lengths = [4, 9, 1, 6, 9]
    model = video.Watcher(find_cell(cell), video.DIGIT_QUESTIONS, (1, 24, 24), 16).eval()
    films = [torch.rand(n, 1, 24, 24) for n in lengths]
    together = model.answer(pack_sequence(films, enforce_sorted=False))
    for b, film in enumerate(films):
        frames = pack_sequence([film])
        alone, every = model.answer(frames), model(frames)
        for name in ("digit", "start"):
            assert_close(together[name][b], alone[name][0], 1e-5)
            assert_close(alone[name][0], every[name][-1], 1e-5)


@learns
@pytest.mark.drawn(2, of="long training")
def test_video_beats_single_frames_and_the_commonest_answer(run: Run) -> None:
    figures = run(video, "--steps", 240, "--held-out", 200)
    ours, single, common = (
        figures["accuracies"][kind] for kind in ("recurrent", "single frame", "commonest answer")
    )
    assert ours["moving"] > max(single["moving"], common["moving"]) + 40
    assert ours["start"] > max(single["start"], common["start"]) + 40
    assert single["digit"] > common["digit"] + 10  # a frame shows the digit, but no direction
    seen = figures["by_frames_seen"]["start"]
    assert len(seen) == 16 and seen[-1] > seen[0] + 30
    assert seen[-1] == pytest.approx(ours["start"])


@learns
@pytest.mark.drawn(2, of="long training")
def test_films_in_folders_are_told_apart_by_their_motion(run: Run, tmp_path: Path) -> None:
    from PIL import Image

    rng = np.random.default_rng(4)
    for name in ("leftward", "rightward"):
        (tmp_path / "films" / name).mkdir(parents=True)
        for i in range(40):
            length, row, start = rng.integers(5, 9), rng.integers(0, 24), rng.integers(0, 12)
            columns = start + np.arange(length) * 2
            frames = []
            for column in columns if name == "rightward" else columns[::-1]:
                pixels = np.zeros((32, 32), np.uint8)
                pixels[row : row + 8, column : column + 8] = 255
                frames.append(Image.fromarray(pixels))
            folder = tmp_path / "films" / name
            if i % 2:
                frames[0].save(
                    folder / f"{i}.gif", save_all=True, append_images=frames[1:], duration=100
                )
            else:
                (folder / str(i)).mkdir()
                for t, frame in enumerate(frames):
                    frame.save(folder / str(i) / f"{t}.png")
    figures = run(video, "--films", tmp_path / "films", "--size", 32, "--steps", 80)
    accuracies = {kind: a["class"] for kind, a in figures["accuracies"].items()}
    assert figures["clips_held_out"] == 16
    assert accuracies["recurrent"] > accuracies["commonest answer"] + 30
    assert accuracies["recurrent"] > accuracies["all frames, no order"] + 20
