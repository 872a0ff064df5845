"""Which of a model's labels a class folder is, where they are fewer, numbered, or called otherwise."""

from __future__ import annotations

import io
import json
import logging
import re
import tarfile
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

from sws_dist.class_names import name_labels
from sws_dist.data.tar_shards import SampleKeys
from tests import ranks


class Brightness(nn.Module):
    """Tell images of one grey apart: label i is the grey ``20 i``."""

    def __init__(self, num_classes: int, label_names: tuple[str, ...] | None = None) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.greys = nn.Parameter(torch.arange(num_classes) * 20 / 255)
        self.pretrained_cfg = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "input_size": (3, 32, 32), "crop_pct": 1.0}
        self.pretrained_cfg |= {"label_names": label_names}

    def forward(self, images: Tensor) -> Tensor:
        return -(images.mean((1, 2, 3))[:, None] - self.greys).square()


def grey_folders(root: Path, greys: dict[str, int]) -> Path:
    for name, label in greys.items():
        (root / name).mkdir(parents=True)
        for number in range(2):
            Image.new("L", (32, 32), 20 * label).save(root / name / f"{number}.png")
    return root


def names(model: nn.Module, data: Path, **options: Any) -> tuple[str, ...]:
    return name_labels(model, "the model", data, **options)


def _top1(cases: list[tuple[Brightness, dict[str, Any]]], data: Path) -> list[float]:
    import sws_dist

    return [sws_dist.evaluate(model, data, num_threads=1, **options).top1 for model, options in cases]


def test_numbered_folders_are_scored_under_their_numbers(tmp_path: Path) -> None:
    """Folder 10 is label 10, which as text comes third."""
    data = grey_folders(tmp_path / "val", {str(i): i for i in range(12)})
    order = [str(i) for i in range(12)]
    cases: list[tuple[Brightness, dict[str, Any]]] = [
        (Brightness(12, tuple(order)), {}),
        (Brightness(12), {"numeric_classes": True}),
        (Brightness(12), {"classes": order}),
        (Brightness(12), {"classes": sorted(order)}),  # as text: 0 and 1 are right, 2 is called 10, ...
    ]
    assert ranks.run(_top1, cases, data) == [[1.0, 1.0, 1.0, 2 / 12]] * 2
    with pytest.raises(ValueError, match=r"sort as text \(0, 1, 10, 11, ...\), and the model does not say"):
        names(Brightness(12), data)


def test_fewer_folders_than_labels_are_scored_with_a_class_map(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = grey_folders(tmp_path / "val", {"eel": 4, "ant": 0, "cow": 2})
    model = Brightness(6, ("ant", "bee", "cow", "dog", "eel", "fox"))
    assert ranks.run(_top1, [(model, {})], data) == [[1.0]] * 2
    caplog.set_level(logging.INFO, "sws_dist")
    assert names(model, data)[4] == "eel"
    assert "has 3 of the 6 classes that the model tells apart: ant, cow, eel" in caplog.text
    for options in ({}, {"numeric": True}):
        with pytest.raises(ValueError, match=r"--classes FILE names|classes from 0 to 5 are needed"):
            names(Brightness(6), data, **options)
    (tmp_path / "labels.txt").write_text("ant\nbee\ncow\ndog\neel\nfox\n")
    assert names(Brightness(6), data, classes=tmp_path / "labels.txt") == model.pretrained_cfg["label_names"]
    with pytest.raises(ValueError, match="--classes has 6 names, the model knows 7 labels"):
        names(Brightness(7), data, classes=tmp_path / "labels.txt")


def test_an_imagenet_model_on_a_few_of_its_classes(tmp_path: Path) -> None:
    synsets = ["n01440764", "n02102040", "n03888257"]  # tench, springer, parachute: labels 0, 217 and 701
    for synset in synsets:
        (tmp_path / "val" / synset).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "val" / synset / "a.png")
    with torch.device("meta"):
        model = timm.create_model("test_resnet")
    assert [names(model, tmp_path / "val").index(synset) for synset in synsets] == [0, 217, 701]
    (tmp_path / "val" / "n01440764").rename(tmp_path / "val" / "tench")
    with pytest.raises(ValueError, match=r"1 of its 3 classes are not among the 1000 labels of the model: tench;"):
        names(model, tmp_path / "val")


def test_names_that_the_model_does_not_know(tmp_path: Path) -> None:
    data = grey_folders(tmp_path / "val", {"1": 1, "3": 3})
    with pytest.raises(
        ValueError, match=re.escape("not among the 4 labels of the model: 1, 3; those are called a, b, c")
    ):
        names(Brightness(4, ("a", "b", "c", "d")), data)
    assert names(Brightness(4, ("a", "b", "c", "d")), data, numeric=True) == ("0", "1", "2", "3")
    grey_folders(data, {"007": 0})
    assert names(Brightness(9), data, numeric=True)[7] == "007"
    with pytest.raises(ValueError, match="classes from 0 to 6 are needed, the labels of the model; 007 is none"):
        names(Brightness(7), data, numeric=True)
    grey_folders(data, {"7": 0})
    with pytest.raises(ValueError, match="there twice, with leading zeros"):
        names(Brightness(9), data, numeric=True)


def test_the_numbers_of_a_list_are_labels(tmp_path: Path) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    (tmp_path / "val.txt").write_text("a.png 0\na.png 2\n")
    assert names(Brightness(4), tmp_path / "val.txt") == ("0", "1", "2", "3")
    assert names(Brightness(3, ("a", "b", "c")), tmp_path / "val.txt") == ("a", "b", "c")
    with pytest.raises(ValueError, match="classes from 0 to 1 are needed"):
        names(Brightness(2), tmp_path / "val.txt")


def test_shards_with_keys_of_their_own_are_scored(tmp_path: Path) -> None:
    """The image is a sample's .webp, not its .png, and the label a key of its own in the .json."""
    (tmp_path / "val").mkdir()
    with tarfile.open(tmp_path / "val" / "0.tar", "w") as shard:
        for label in range(3):
            for name, content in {
                f"{label}.webp": _image(20 * label, "webp"),
                f"{label}.png": _image(0, "png"),
                f"{label}.json": json.dumps({"shade": label}).encode(),
            }.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                shard.addfile(entry, io.BytesIO(content))
    keys = SampleKeys(("webp",), "shade")
    assert _top1([(Brightness(3), {"shard_keys": keys})], tmp_path / "val") == [1.0]


def _image(grey: int, kind: str) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (32, 32), (grey, grey, grey)).save(content, kind, lossless=True)
    return content.getvalue()


def test_a_batch_that_one_rank_cannot_decode_is_refused(tmp_path: Path) -> None:
    data = grey_folders(tmp_path / "val", {"0": 0, "1": 1})
    with pytest.raises(ValueError, match="a batch of 4097 images: expected 1 to 4096"):
        _top1([(Brightness(2), {"batch_size": 4097})], data)
