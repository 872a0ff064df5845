"""A share of the training images is held out: of each class, the same at each start."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sws_dist.config.schema import DataConfig
from sws_dist.data.build import list_images


def paths(root: Path, **keys: Any) -> tuple[set[str], set[str]]:
    train, val = list_images(DataConfig(root=str(root), **keys))
    assert train.classes == val.classes
    for images in (train, val):
        assert [images.classes[label] for label in images.labels] == [path.split("/")[0] for path in images.paths]
        assert len(images.sizes) == len(images.paths)
    return set(train.paths), set(val.paths)


def test_each_class_gives_its_share_and_each_start_the_same(few_digits: Path) -> None:
    train, val = list_images(DataConfig(root=str(few_digits), val_share=0.25))
    assert np.bincount(train.labels).tolist() == [6] * 10
    assert np.bincount(val.labels).tolist() == [2] * 10
    assert train.notes[-1] == "20 of 80 images are held out for validation (data.val_share 0.25 of each class)"
    assert val.notes == ()
    first = paths(few_digits, val_share=0.25)
    assert first == (set(train.paths), set(val.paths))
    assert not first[0] & first[1]
    assert paths(few_digits, val_share=0.25, val_seed=1)[1] != first[1]
    assert paths(few_digits, val_share=0.5)[1] > first[1], "a larger share keeps what a smaller one held out"


def test_images_stay_on_their_side_when_others_are_added(few_digits: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(few_digits, root)
    before = paths(root, val_share=0.25)
    file = next((root / "train" / "3").iterdir())
    for number in range(4):
        shutil.copy(file, file.with_name(f"new{number}.jpg"))
    after = paths(root, val_share=0.25)
    assert len(after[1]) == len(before[1]) + 1
    assert len(after[1] & before[1]) >= len(before[1]) - 2


def test_classes_of_one_image_stay_in_training(few_digits: Path, tmp_path: Path) -> None:
    for name, count in (("one", 1), ("two", 2), ("many", 5)):
        (tmp_path / "train" / name).mkdir(parents=True)
        for file in sorted((few_digits / "train" / "4").iterdir())[:count]:
            shutil.copy(file, tmp_path / "train" / name)
    train, val = list_images(DataConfig(root=str(tmp_path), val_share=0.1))
    assert {name: int((val.labels == i).sum()) for i, name in enumerate(val.classes)} == {"many": 1, "one": 0, "two": 1}
    assert "none of the 1 class(es) with a single image: one" in train.notes[-1]
    for name in ("two", "many"):
        shutil.rmtree(tmp_path / "train" / name)
    with pytest.raises(ValueError, match=r"data\.val_share 0\.1: no class of .* has two images"):
        list_images(DataConfig(root=str(tmp_path), val_share=0.1))


def test_what_a_list_repeats_counts_once(few_digits: Path, tmp_path: Path) -> None:
    """A rare class is repeated to be seen more often: its one image must not end in validation, with all its copies."""
    files = [few_digits / "train" / "4" / file.name for file in sorted((few_digits / "train" / "4").iterdir())[:6]]
    lines = [f"{file} often" for file in files[:5]] + [f"{files[5]} rare"] * 5
    (tmp_path / "train.txt").write_text("\n".join(lines))
    train, val = list_images(DataConfig(root=str(tmp_path), train_split="train.txt", val_share=0.2))
    assert np.bincount(train.labels, minlength=2).tolist() == [4, 5]
    assert np.bincount(val.labels, minlength=2).tolist() == [1, 0]
    assert train.notes[-1].startswith("1 of 6 images are held out")
    lines += [f"{file} often" for file in files[:5]] * 2
    (tmp_path / "train.txt").write_text("\n".join(lines))
    train, val = list_images(DataConfig(root=str(tmp_path), train_split="train.txt", val_share=0.4))
    assert len(val) == len(set(val.paths)) == 2, "validation has each image once"
    assert np.bincount(train.labels, minlength=2).tolist() == [9, 5]
    assert "validation has each once, though 14 lines of the list repeat an image" in train.notes[-1]
    assert not set(train.paths) & set(val.paths)
