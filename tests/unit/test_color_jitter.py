"""Compare colour jitter with torchvision's: the distribution of factors and orders, and the pixels for equal draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torchvision.transforms import ColorJitter as Theirs
from torchvision.transforms import functional as F

from sws_dist.config.schema import AugmentConfig
from sws_dist.data.color_jitter import ColorJitter
from sws_dist.data.draws import Recipe
from sws_dist.data.randaugment import OPERATORS, SKIP
from tests.unit.images import photograph
from tests.unit.test_randaugment import run_layer

COUNT = 20_000
ADJUST = {
    "BrightnessIncreasing": F.adjust_brightness,
    "ContrastIncreasing": F.adjust_contrast,
    "ColorIncreasing": F.adjust_saturation,
}


def test_draws_are_torchvisions() -> None:
    jitter = ColorJitter.parse((0.4, 0.2, 1.5))
    draws = jitter.draw(np.random.default_rng(1).random((COUNT, jitter.num_uniforms)), 32, 32)
    torch.manual_seed(2)
    theirs = Theirs(0.4, 0.2, 1.5)
    drawn = [Theirs.get_params(theirs.brightness, theirs.contrast, theirs.saturation, None) for _ in range(COUNT)]
    for column, name in enumerate(ADJUST):
        ours = draws.strength[draws.operator == OPERATORS.index(name)]
        assert len(ours) == COUNT
        assert stats.ks_2samp(ours, [row[1 + column] for row in drawn]).pvalue > 1e-3
    their_orders = [tuple(i for i in row[0].tolist() if i < 3) for row in drawn]
    ids = [OPERATORS.index(name) for name in ADJUST]
    our_orders = [tuple(ids.index(i) for i in row) for row in draws.operator.tolist()]
    kinds = sorted(set(their_orders))
    assert len(kinds) == 6
    table = [[orders.count(kind) for kind in kinds] for orders in (our_orders, their_orders)]
    assert stats.chi2_contingency(table).pvalue > 1e-3


def test_pixels_are_torchvisions() -> None:
    image = photograph("china", 100, 200, 192, 256)
    jitter = ColorJitter.parse(0.4)
    draws = jitter.draw(np.random.default_rng(3).random((8, 4)), 192, 256)
    got = [np.asarray(image)] * 8
    for layer in range(3):
        operator, strength, matrix = (np.ascontiguousarray(part[:, layer]) for part in draws)
        got = list(run_layer(got, operator, strength, matrix))
    for row, pixels in enumerate(got):
        expected: Image.Image = image
        for operator, strength in zip(draws.operator[row], draws.strength[row], strict=True):
            expected = ADJUST[OPERATORS[operator]](expected, float(strength))
        assert np.abs(pixels.astype(np.int16) - np.asarray(expected)).mean() < 0.05


def test_rand_augment_replaces_it() -> None:
    both = AugmentConfig(auto_augment="rand-m9-mstd0.5-inc1", color_jitter=0.4)
    assert not isinstance(Recipe(both, 32).policy, ColorJitter)
    assert isinstance(Recipe(AugmentConfig(color_jitter=0.4), 32).policy, ColorJitter)
    assert Recipe(AugmentConfig(), 32).policy is None


def test_a_change_of_zero_is_skipped() -> None:
    draws = ColorJitter.parse((0.0, 0.5, 0.0)).draw(np.random.default_rng(0).random((50, 4)), 32, 32)
    assert ((draws.operator == SKIP).sum(axis=1) == 2).all()


@pytest.mark.parametrize(
    ("value", "message"), [((0.4, 0.4, 0.4, 0.1), "hue"), ((0.4,), "one number or three"), (-1.0, "from 0 to")]
)
def test_other_values_are_refused(value: float | tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=rf"augment.color_jitter.*{message}"):
        ColorJitter.parse(value)
