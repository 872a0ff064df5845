"""The picture of a batch: as large as it should be, showing the pixels that training sees, with readable captions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sws_dist.config.schema import AffineConfig, AugmentConfig
from sws_dist.data.draws import Recipe, describe_draws
from sws_dist.logging.images import labelled_grid
from tests import ranks

RUN = """
output: unused
model: {name: sws_vit}
data: {root: ROOT, image_size: 40, num_threads: 1}
augment: {AUGMENT}
train: {global_batch: 24}
"""


def show(tmp_path: Path, root: Path, augment: str) -> tuple[np.ndarray, str]:
    (tmp_path / "run.yaml").write_text(RUN.replace("ROOT", str(root)).replace("AUGMENT", augment))
    options = ["--config", tmp_path / "run.yaml", "--out", tmp_path / "batch.png", "--images", "12"]
    done = ranks.script("launcher/show_batch.py", *options)
    assert done.returncode == 0, done.stdout
    return np.asarray(Image.open(tmp_path / "batch.png")), done.stdout


@pytest.mark.parametrize(
    "augment", ["", "auto_augment: rand-m9-mstd0.5-inc1, re_prob: 0.5, mixup: 0.8, smoothing: 0.1"]
)
def test_a_batch_is_shown(tmp_path: Path, few_digits: Path, augment: str) -> None:
    picture, said = show(tmp_path, few_digits, augment)
    assert picture.shape[1] == 8 * 204
    assert "12 of 24 images of step 0" in said
    assert ("mixup" in said) == bool(augment)
    tiles = [picture[: 2 * 200][:200, 204 * i : 204 * i + 200] for i in range(8)]
    assert all(tile.std() > 5 for tile in tiles), "every tile shows something"
    assert len({tile.tobytes() for tile in tiles}) == 8


def test_captions_say_what_was_drawn() -> None:
    config = AugmentConfig(
        scale=(0.25, 0.25),
        ratio=(1.0, 1.0),
        hflip=1.0,
        affine=AffineConfig(degrees=10, scale=(2.0, 2.0)),
        auto_augment="rand-m9-p1-inc1",
        re_prob=1.0,
    )
    draws = Recipe(config, 224).draw(0, np.arange(1), np.array([[400, 400]]))
    window, affine, first, second, erased = describe_draws(draws, 0)
    top, left = draws.crop_start[0]
    assert window == f"200 x 200 at {left}, {top}, mirrored"
    assert affine.endswith("enlarged 2.00 x")
    assert draws.operations is not None
    assert all(any(c.isalpha() for c in line) for line in (first, second))
    assert draws.erase is not None
    assert erased == f"erased {draws.erase[0, 3]} x {draws.erase[0, 2]}"


def test_long_captions_stay_in_their_column() -> None:
    images = torch.full((2, 3, 8, 8), 255, dtype=torch.uint8)
    picture = labelled_grid(images, ["W" * 80 + "\nsecond line", "x"], columns=2, tile=60)
    assert picture.shape == (60 + 6 + 24, 2 * 64, 3)
    assert (picture[62:, 62:64] == 255).all()
    assert (picture[74:, :60] < 255).any(), "the second line is there"
