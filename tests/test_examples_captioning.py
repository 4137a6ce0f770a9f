"""examples/captioning.py: what it computes, and that it learns to say what it sees."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from helpers import assert_close

for package in ("matplotlib", "tqdm", "sklearn", "sacrebleu", "PIL"):
    pytest.importorskip(package)
np = pytest.importorskip("numpy")

import captioning  # noqa: E402
import decoding  # noqa: E402
import digits  # noqa: E402
from common import find_cell  # noqa: E402
from programs import Run, learns  # noqa: E402

pytestmark = [pytest.mark.examples, pytest.mark.usefixtures("one_thread")]
pytest_plugins = "program_fixtures"


def test_captions_are_true_of_their_scenes() -> None:
    rng = np.random.default_rng(torch.initial_seed())
    seen = set()
    for _ in range(300):
        picture, sentences, things = digits.scene(rng)
        assert picture.shape == (digits.SCENE, digits.SCENE)
        centres = {t.name: t.centre for t in things}
        for sentence in sentences:
            match = re.fullmatch(r"(a \w+ \w+) (left of|right of|above|below) (.+)", sentence)
            if not match:
                (row, column), words = things[0].centre, sentence.split()
                assert words[-2:] == [
                    "top" if row < digits.SCENE / 2 else "bottom",
                    "left" if column < digits.SCENE / 2 else "right",
                ]
                continue
            if len(centres) == 1:  # two things of one name
                continue
            (row, column), (row2, column2) = centres[match[1]], centres[match[3]]
            truth = {
                "left of": column < column2, "right of": column > column2,
                "above": row < row2, "below": row > row2,
            }  # fmt: skip
            assert truth[match[2]], sentence
            seen.add(match[2])
    assert len(seen) == 4


def test_handwriting_is_of_other_people_when_held_out() -> None:
    ours, theirs = digits.handwriting(False)[0], digits.handwriting(True)[0]
    assert len(ours) + len(theirs) == 1797
    assert not {i.tobytes() for i in ours} & {i.tobytes() for i in theirs}


@pytest.mark.parametrize("variant", captioning.VARIANTS)
def test_captioner_steps_as_it_was_taught(variant: str) -> None:
    model = captioning.Captioner(find_cell("lstm"), (5, 4, 4), 9, 6, variant).double().eval()
    maps, target = torch.rand(3, 5, 4, 4).double(), torch.randint(4, 9, (7, 3))
    taught, state = model(maps, target), model.see(maps)
    token = torch.full((3,), decoding.BEGIN)
    for t in range(7):
        logits, state, weights = model.step(token, state)
        assert_close(logits, taught[t])
        token = target[t]
        if variant == "attend":
            assert_close(weights.sum(0), torch.ones(3).double())
            assert weights.shape == (16, 3)


@learns
@pytest.mark.drawn(2, of="long training")
def test_captioning_beats_copying_the_nearest_images_caption(run: Run) -> None:
    figures = run(
        captioning, "--cnn-steps", 180, "--steps", 220, "--examples", 1500, "--held-out", 300,
        "--variant", "attend", "--hidden", 64, "--lr", 6e-3,
    )  # fmt: skip
    assert figures["nearest_bleu"] > 20  # no straw man
    assert figures["attend_bleu"] > figures["nearest_bleu"] + 5
    assert figures["attend_exact"] > figures["nearest_exact"] + 10


@learns
@pytest.mark.drawn(2, of="long training")
def test_pretrained_cnn_is_frozen_and_every_variant_learns(run: Run, tmp_path: Path) -> None:
    args = ["--cnn-steps", 40, "--steps", 50, "--examples", 400, "--held-out", 50, "--hidden", 64]
    figures = run(captioning, *args)
    again = run(captioning, *args, "--resume")  # nothing is left to train
    assert all(figures[k] == again[k] for k in figures if k.endswith(("_bleu", "_exact", "_loss")))
    out = Path(figures["arguments"]["out"])
    weights = torch.load(out / "cnn.pt", weights_only=True)["parts"]["look"]
    look = captioning.Look(1, figures["words"] + 4, 64)
    look.load_state_dict(weights)
    for variant in captioning.VARIANTS:
        content = torch.load(out / f"{variant}.pt", weights_only=True)
        assert not any(name.startswith("map") for name in content["parts"]["model"])
        losses = content["extra"]
        assert len(losses) == 50 and sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_coco_files_are_read_as_they_are(run: Run, tmp_path: Path) -> None:
    from PIL import Image

    rng = np.random.default_rng(3)
    entries, annotations, pictures = [], [], []
    for i in range(40):
        pixels, sentences, _ = digits.scene(rng)
        pictures.append((255 * pixels.clip(0, 1)).astype(np.uint8))
        wide = np.pad(pictures[-1], ((0, 0), (8, 8)))  # the loader takes the middle
        Image.fromarray(wide).save(tmp_path / f"{i}.png")
        entries.append({"id": 100 + i, "file_name": f"{i}.png"})
        annotations += [{"image_id": 100 + i, "caption": s.capitalize() + "."} for s in sentences]
    file = tmp_path / "captions.json"
    file.write_text(json.dumps({"images": entries, "annotations": annotations[::-1]}))
    read = captioning.read_coco(file, tmp_path, size=32, most=100)
    assert read.images.shape == (40, 3, 32, 32)
    assert_close(read.images[7, 1], torch.from_numpy(pictures[7] / 255).float(), 1e-6)
    expected = [a["caption"].lower()[:-1] for a in annotations if a["image_id"] == 107]
    assert sorted(read.captions[7]) == sorted(expected)

    figures = run(
        captioning, "--coco", file, "--images", tmp_path, "--size", 32, "--cnn-steps", 3,
        "--steps", 3, "--variant", "always",
    )  # fmt: skip
    assert figures["images_held_out"] == 4 and "always_bleu" in figures
