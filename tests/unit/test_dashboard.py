"""What TensorBoard is given: few groups, a page on which runs compare, a confusion matrix, shares of a known peak."""

from __future__ import annotations

import csv
import io
import re

import numpy as np
import pytest
import torch

from sws_dist.logging.confusion import confusion_table, draw_confusion
from sws_dist.logging.dashboard import LAYOUT, tag_of
from sws_dist.logging.peaks import PEAKS, find_peak, peak_flops


@pytest.mark.parametrize(
    ("name", "tag"),
    [
        ("val/top1", "val/top1"),
        ("val_ema/loss", "val/loss_ema"),
        ("val_depth7/top1", "depth/val_top1/7"),
        ("val_ema_depth12/top5", "depth/val_top5_ema/12"),
        ("train_depth5/loss", "depth/train_loss/5"),
        ("train/loss_distill", "train/loss_distill"),
        ("norms/gradient/blocks.3", "norms/gradient/blocks.3"),
    ],
)
def test_scores_of_all_depths_are_one_group(name: str, tag: str) -> None:
    assert tag_of(name) == tag


def test_every_chart_of_the_layout_is_one_that_tensorboard_draws() -> None:
    for charts in LAYOUT.values():
        for kind, tags in charts.values():
            assert kind == "Multiline"
            assert all(re.compile(tag) for tag in tags)


@pytest.mark.parametrize(
    ("name", "half"),
    [
        ("NVIDIA H200", 989.4),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.4),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", None),  # another chip than the A10
        ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", None),  # a part of one
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_a_gpu_has_its_own_peak_or_none(name: str, half: float | None) -> None:
    found = find_peak(name)
    assert (found and found.half) == half
    assert len([pattern for pattern in PEAKS if re.fullmatch(pattern, name)]) == (half is not None)


def test_a_cpu_has_no_peak() -> None:
    assert peak_flops(torch.device("cpu"), torch.float32) is None


def test_the_confusion_table_is_csv() -> None:
    counts = np.array([[3, 1], [0, 2]])
    rows = list(csv.reader(io.StringIO(confusion_table(counts, ["a cat, small", "dog"]))))
    assert rows == [["label / guess", "a cat, small", "dog"], ["a cat, small", "3", "1"], ["dog", "0", "2"]]


def test_mistakes_are_red_and_hits_blue() -> None:
    """Without names and numbers, where a cell is small: what is not there is white."""
    counts = np.diag(np.arange(100))
    counts[4, 90] = 1
    picture = draw_confusion(counts, [str(n) for n in range(100)])
    assert picture.shape == (600, 600, 3)
    red, green, blue = (picture[..., channel].astype(int) for channel in range(3))
    hit, mistake, nothing = (50 * 6 + 3, 50 * 6 + 3), (4 * 6 + 3, 90 * 6 + 3), (3, 3)
    assert blue[hit] > red[hit] + 100
    assert red[mistake] > blue[mistake] + 50
    assert red[nothing] == green[nothing] == blue[nothing] == 255


@pytest.mark.parametrize("classes", [1, 10, 40, 1000])
def test_any_number_of_classes_can_be_drawn(classes: int) -> None:
    picture = draw_confusion(np.eye(classes, dtype=int), [f"class number {n}" for n in range(classes)])
    assert picture.dtype == np.uint8
    assert max(picture.shape) <= 1000
