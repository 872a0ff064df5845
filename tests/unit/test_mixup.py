"""Compare mixup, cutmix, smoothing and erasing with timm's own classes: the arithmetic and the distributions."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from scipy import stats
from timm.data.mixup import Mixup, mixup_target
from timm.data.random_erasing import RandomErasing

from sws_dist.config.schema import AugmentConfig
from sws_dist.data.mixup import Mixing, denormalise, erase

SIZE, CLASSES, COUNT = 16, 7, 20_000
ONE_IN_A_THOUSAND = 1e-3  # chance that samples of equal distributions differ so much; the seeds are fixed
PAPER = {"mixup": 0.8, "cutmix": 1.0, "mixup_switch_prob": 0.5}


def batch(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    images = torch.randn(count, 3, SIZE, SIZE, generator=generator)
    return images, torch.randint(CLASSES, (count,), generator=generator)


# Two images that differ everywhere, so that a mixed pixel tells how much of each is in it.
PAIR = torch.stack([torch.zeros(1, SIZE, SIZE), torch.ones(1, SIZE, SIZE)])
PAIR_LABELS = torch.tensor([0, 1])


def drawn(mix, calls: int) -> dict[str, np.ndarray]:
    """Find out from the results of ``mix(images, labels, call)`` what it drew.

    Returns:
        Arrays [calls]: ``cutmix`` (1 where a box was pasted), ``share`` (of the first image in its target), and
        ``height``, ``width``, ``top``, ``left`` of the box (where there is one).
    """
    rows = []
    for call in range(calls):
        images, targets = mix(PAIR.clone(), PAIR_LABELS, call)
        first, share = images[0, 0].numpy(), round(float(targets[0, 0]), 5)  # equal shares must stay equal
        pasted = first == 1  # in numpy: torch takes some times as long for so few numbers
        is_box = bool((pasted | (first == 0)).all())
        ys, xs = pasted.any(1).nonzero()[0], pasted.any(0).nonzero()[0]
        box = (len(ys), len(xs), int(ys[0]), int(xs[0])) if is_box and len(ys) else (0, 0, -1, -1)
        if is_box:
            assert abs(share - (1 - box[0] * box[1] / SIZE**2)) <= 1e-5
        else:
            assert np.abs(first - (1 - share)).max() <= 1e-5
        rows.append((is_box, share, *box))
    return dict(zip(("cutmix", "share", "height", "width", "top", "left"), np.array(rows).T, strict=True))


@pytest.mark.parametrize("parts", [PAPER, {"mixup": 0.2}, {"cutmix": 1.0}, PAPER | {"mixup_switch_prob": 0.2}])
def test_draws_have_timms_distribution(parts: dict[str, float]) -> None:
    config = AugmentConfig(**parts)
    ours = drawn(Mixing(config, 2, seed=1), COUNT)
    np.random.seed(2)
    theirs_mixup = Mixup(
        config.mixup, config.cutmix, switch_prob=config.mixup_switch_prob, label_smoothing=0.0, num_classes=2
    )
    theirs = drawn(lambda images, labels, call: theirs_mixup(images, labels), COUNT)

    counts = [[(kind["cutmix"] == value).sum() for value in (0, 1)] for kind in (ours, theirs)]
    if 0 in counts[0]:
        assert counts[0] == counts[1]
    else:
        assert stats.chi2_contingency(counts).pvalue > ONE_IN_A_THOUSAND
    for value in (0, 1):
        a, b = (kind["share"][kind["cutmix"] == value] for kind in (ours, theirs))
        if len(a):
            assert stats.ks_2samp(a, b).pvalue > ONE_IN_A_THOUSAND
    for name in ("height", "width", "top", "left"):
        a, b = (kind[name][kind["top"] >= 0] for kind in (ours, theirs))
        if len(a):
            assert stats.ks_2samp(a, b).pvalue > ONE_IN_A_THOUSAND, name


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("parts", [PAPER, {"mixup": 0.8}, {"cutmix": 1.0}])
def test_targets_are_timms_for_the_share_that_was_drawn(parts: dict[str, float], smoothing: float) -> None:
    config = AugmentConfig(**parts, smoothing=smoothing)
    images, labels = batch(8)
    for position in range(0, 800, 8):
        mixed, targets = Mixing(config, CLASSES, seed=3)(images.clone(), labels, position)
        torch.testing.assert_close(targets.sum(dim=1), torch.ones(8))
        assert targets.min() >= smoothing / CLASSES - 1e-7
        # The share is computed from the images: mixup's from all pixels, cutmix's from the box that was pasted.
        changed = (mixed != images).any(dim=1)[0]
        pasted = bool((mixed[0][:, changed] == images[-1][:, changed]).all())
        if pasted:
            share = 1 - float(changed.sum()) / changed.numel()
        else:
            share = float(((mixed - images.flip(0)) / (images - images.flip(0)))[0].median())
        expected = mixup_target(labels, CLASSES, share, smoothing)
        torch.testing.assert_close(targets, expected, atol=2e-4, rtol=0)


def test_smoothing_alone_is_timms() -> None:
    images, labels = batch(5)
    mixed, targets = Mixing(AugmentConfig(smoothing=0.1), CLASSES, seed=0)(images, labels, 0)
    assert mixed is images
    off = 0.1 / CLASSES
    expected = torch.full((5, CLASSES), off).scatter(1, labels[:, None], 0.9 + off)
    torch.testing.assert_close(targets, expected)


def test_without_any_part_labels_stay_labels() -> None:
    images, labels = batch(5)
    mixed, targets = Mixing(AugmentConfig(), CLASSES, seed=0)(images, labels, 0)
    assert mixed is images
    assert targets is labels


def test_draws_depend_on_seed_and_position_alone() -> None:
    images, labels = batch(4)
    config = AugmentConfig(**PAPER)
    mixing = Mixing(config, CLASSES, seed=5)
    before = [mixing(images.clone(), labels, position) for position in (0, 4, 8)]
    torch.manual_seed(123)  # neither torch's state nor the calls before matter
    again = [Mixing(config, CLASSES, seed=5)(images.clone(), labels, position) for position in (8, 4, 0)]
    for (a, ta), (b, tb) in zip(before, reversed(again), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(ta, tb)
    _, other_position = mixing(images.clone(), labels, 12)
    _, other_seed = Mixing(config, CLASSES, seed=6)(images.clone(), labels, 0)
    assert not torch.equal(before[0][1], other_position)
    assert not torch.equal(before[0][1], other_seed)


def test_batches_of_any_size_are_mixed() -> None:
    """Check odd batches, which timm refuses: the middle image is mixed with itself."""
    for count in (1, 3):
        images, labels = batch(count)
        mixed, targets = Mixing(AugmentConfig(mixup=0.8), CLASSES, seed=0)(images.clone(), labels, 0)
        torch.testing.assert_close(mixed[count // 2], images[count // 2])
        torch.testing.assert_close(targets.sum(dim=1), torch.ones(count))


@pytest.mark.parametrize("mode", ["pixel", "rand", "const"])
def test_erased_pixels_are_timms(mode: str) -> None:
    """Check that only the box changes, and that its filling is distributed as in timm: noise, one colour, or zero."""
    torch.manual_seed(1)
    images = torch.full((400, 3, 32, 32), 5.0)
    boxes = np.tile([3, 5, 9, 7], (400, 1))
    boxes[::4, 2] = 0
    out = erase(images.clone(), boxes, mode)
    inside = torch.zeros(32, 32, dtype=torch.bool)
    inside[3:12, 5:12] = True
    assert (out[:, :, ~inside] == 5).all()
    assert (out[::4] == 5).all()
    ours = out[boxes[:, 2] > 0][:, :, inside]  # [300, 3, 63]

    random.seed(0)
    torch.manual_seed(2)
    eraser = RandomErasing(probability=1.0, mode=mode, device="cpu")
    theirs = [eraser(torch.full((1, 3, 32, 32), 5.0))[0] for _ in range(300)]
    erased = [image[:, (image != 5).all(dim=0)] for image in theirs]
    colours = {min(filled.unique(dim=1).shape[1], 2) for filled in (*ours, *erased) if filled.shape[1] > 1}
    assert colours == {2 if mode == "pixel" else 1}  # 2: many
    a, b = (np.array([float(filled[c, 0]) for filled in side for c in range(3)]) for side in (ours, erased))
    if mode == "const":
        assert not a.any()
        assert not b.any()
    else:
        assert stats.ks_2samp(a, b).pvalue > ONE_IN_A_THOUSAND
        assert stats.kstest(a, "norm").pvalue > ONE_IN_A_THOUSAND


def test_denormalise_undoes_the_normalisation() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 3, 16, 16)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    shape = (1, 3, 1, 1)
    normalised = (pixels / 255 - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
    assert torch.equal(denormalise(normalised, mean, std), pixels)
