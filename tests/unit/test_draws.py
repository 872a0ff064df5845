"""Test that crops and erased boxes are distributed as torchvision's and timm's, and depend on the position alone."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation

from sws_dist.config.schema import AffineConfig, AugmentConfig
from sws_dist.data.draws import Draws, Recipe, draw_uniforms

COUNT = 20_000
ONE_IN_A_THOUSAND = 1e-3  # chance that samples of equal distributions differ so much; the seeds are fixed
FULL = AugmentConfig(
    affine=AffineConfig(degrees=15, translate=0.1, scale=(0.8, 1.2)), auto_augment="rand-m9-mstd0.5-inc1", re_prob=0.5
)


def same_distribution(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert stats.ks_2samp(ours, theirs).pvalue > ONE_IN_A_THOUSAND


# 375 x 500 is an ordinary photograph; in the others many windows do not fit, and the fall-back is drawn.
@pytest.mark.parametrize(("height", "width"), [(375, 500), (100, 640), (640, 100), (7, 9)])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.6, 1.0)])
def test_crops_are_timms(height: int, width: int, scale: tuple[float, float]) -> None:
    config = AugmentConfig(scale=scale)
    draws = Recipe(config, 224).draw(11, np.arange(COUNT), np.tile([height, width], (COUNT, 1)))
    image = Image.new("L", (width, height))
    random.seed(12)
    theirs = np.array(
        [RandomResizedCropAndInterpolation.get_params(image, scale, config.ratio) for _ in range(COUNT)]
    ).T
    ours = np.concatenate([draws.crop_start, draws.crop_shape], axis=1).T
    assert (ours[:2] >= 0).all()
    assert (ours[2:] >= 1).all()
    assert (ours[0] + ours[2] <= height).all()
    assert (ours[1] + ours[3] <= width).all()
    for mine, his in zip(ours, theirs, strict=True):  # top, left, height, width
        same_distribution(mine, his)
    same_distribution(ours[2] * ours[3], theirs[2] * theirs[3])
    same_distribution(ours[3] / ours[2], theirs[3] / theirs[2])


def test_crops_of_one_image_are_drawn_like_those_of_many() -> None:
    """Compare each of four crops a decode with single crops, and with its neighbour, which it must not resemble."""
    sizes = np.tile([375, 500], (COUNT, 1))
    single = Recipe(AugmentConfig(), 224).draw(11, np.arange(COUNT), sizes)
    several = Recipe(AugmentConfig(num_crops=4), 224).draw(12, np.arange(COUNT), sizes)
    for theirs, ours in ((single.crop_start, several.crop_start), (single.crop_shape, several.crop_shape)):
        for column in range(2):
            crops = ours[:, column].reshape(-1, 4)
            for crop in crops.T:
                same_distribution(crop, theirs[:, column])
            assert np.abs(np.corrcoef(crops.T) - np.eye(4)).max() < 4 / np.sqrt(len(crops))


def test_fallback_is_timms_window() -> None:
    """Check ratios that no window has: the largest central window of the nearest ratio is taken every time."""
    for height, width in [(100, 640), (640, 100), (101, 997), (33, 35)]:
        config = AugmentConfig(scale=(1.0, 1.0), ratio=(0.75, 1.3))
        draws = Recipe(config, 224).draw(0, np.arange(50), np.tile([height, width], (50, 1)))
        image = Image.new("L", (width, height))
        theirs = {RandomResizedCropAndInterpolation.get_params(image, (1.0, 1.0), (0.75, 1.3)) for _ in range(50)}
        ours = np.concatenate([draws.crop_start, draws.crop_shape], axis=1)
        assert {tuple(window) for window in ours.tolist()} <= theirs | {(0, 0, height, width)}


@pytest.mark.parametrize("size", [32, 224])
def test_erased_boxes_are_timms(size: int) -> None:
    boxes = Recipe(AugmentConfig(re_prob=0.25), size).draw(3, np.arange(COUNT), np.full((COUNT, 2), 256)).erase
    assert boxes is not None
    eraser = RandomErasing(probability=0.25, mode="pixel", device="cpu")
    random.seed(4)
    torch.manual_seed(4)
    theirs = np.array([_timm_box(eraser, size) for _ in range(COUNT)])
    erased, their_erased = (boxes[:, 2] > 0).sum(), (theirs[:, 2] > 0).sum()
    table = [[erased, COUNT - erased], [their_erased, COUNT - their_erased]]
    assert stats.chi2_contingency(table).pvalue > ONE_IN_A_THOUSAND
    ours, theirs = boxes[boxes[:, 2] > 0].T, theirs[theirs[:, 2] > 0].T
    assert (ours[0] + ours[2] <= size).all()
    assert (ours[1] + ours[3] <= size).all()
    for mine, his in zip(ours, theirs, strict=True):
        same_distribution(mine, his)
    same_distribution(ours[2] * ours[3], theirs[2] * theirs[3])


def _timm_box(eraser: RandomErasing, size: int) -> tuple[int, int, int, int]:
    """Return what timm erases from an image of zeros; its noise is never zero over a whole row or column."""
    image = eraser(torch.zeros(1, size, size))[0].numpy()
    if not image.any():
        return 0, 0, 0, 0
    rows, columns = image.any(axis=1).nonzero()[0], image.any(axis=0).nonzero()[0]
    top, left = int(rows[0]), int(columns[0])
    return top, left, int(rows[-1]) + 1 - top, int(columns[-1]) + 1 - left


def test_half_of_the_images_are_mirrored() -> None:
    for share in (0.0, 0.5, 1.0):
        flip = Recipe(AugmentConfig(hflip=share), 32).draw(0, np.arange(COUNT), np.full((COUNT, 2), 64)).flip
        assert stats.binomtest(int(flip.sum()), COUNT, share).pvalue > ONE_IN_A_THOUSAND


def fields(draws: Draws) -> list[np.ndarray]:
    assert draws.affine is not None
    assert draws.operations is not None
    assert draws.erase is not None
    return [draws.crop_start, draws.crop_shape, draws.flip, draws.affine, *draws.operations, draws.erase]


@pytest.mark.parametrize("positions", [range(96), range(5, 96, 8), range(40, 41), [3, 4, 50, 95]])
def test_draws_depend_on_the_position_alone(positions: list[int]) -> None:
    """Check that the rest of the batch does not matter, and with it ranks, accumulation and resuming."""
    recipe = Recipe(FULL, 64)
    sizes = np.random.default_rng(0).integers(20, 500, (96, 2))
    whole = fields(recipe.draw(7, np.arange(96), sizes))
    some = np.array(positions)
    for everywhere, here in zip(whole, fields(recipe.draw(7, some, sizes[some])), strict=True):
        np.testing.assert_array_equal(everywhere[some], here)


def test_neighbours_and_seeds_draw_differently() -> None:
    far = 1_281_167 * 150 * 3  # the last position of a long run on ImageNet
    a, b, c = (draw_uniforms(seed, np.arange(far, far + 500), 112) for seed in (0, 1, 0))
    np.testing.assert_array_equal(a, c)
    assert len(np.unique(np.concatenate([a, b]))) == 2 * a.size
    assert stats.kstest(a.ravel(), "uniform").pvalue > ONE_IN_A_THOUSAND
    assert abs(np.corrcoef(a[:-1].ravel(), a[1:].ravel())[0, 1]) < 0.02


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"scale": (0.0, 1.0)}, "augment.scale"),
        ({"scale": (0.5, 1.2)}, "augment.scale.*to 1"),
        ({"ratio": (1.5, 0.5)}, "augment.ratio"),
        ({"auto_augment": "rand-m9"}, "-inc1"),
    ],
)
def test_a_recipe_that_cannot_be_drawn_is_refused(keys: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe(AugmentConfig(**keys), 32)


def test_an_affine_scale_that_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(ValueError, match=r"augment.affine.scale"):
        AffineConfig(scale=(0.0, 1.0))
