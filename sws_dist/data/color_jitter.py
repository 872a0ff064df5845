"""torchvision's ColorJitter without hue, which is timm's where no RandAugment replaces it, as layers of operators.

Source of the semantics: torchvision 0.29, `transforms.ColorJitter`: factors uniform in [max(0, 1 - x), 1 + x], in
random order. On Pillow images they are Pillow's enhancements, three of the operators that RandAugment has as well.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sws_dist.data.randaugment import OPERATORS, SKIP, RandAugmentDraws

_NAMES = ("BrightnessIncreasing", "ContrastIncreasing", "ColorIncreasing")
_ORDERS = np.array(list(itertools.permutations(range(3))))


@dataclass(frozen=True)
class ColorJitter:
    """``largest``: of brightness, contrast and saturation; 0 leaves that one alone."""

    largest: tuple[float, float, float]

    num_layers = 3
    num_uniforms = 4

    @classmethod
    def parse(cls, value: float | Sequence[float]) -> ColorJitter:
        """``augment.color_jitter`` as timm takes it: one number for all three, or three. ValueError for the rest."""
        numbers = tuple(value) if isinstance(value, Sequence) else (value,) * 3
        if len(numbers) != 3:
            hue = " (hue is not supported)" if len(numbers) == 4 else ""
            raise ValueError(f"augment.color_jitter {list(numbers)}: expected one number or three{hue}")
        if min(numbers) < 0:
            raise ValueError(f"augment.color_jitter {list(numbers)}: must not be negative")
        return cls((numbers[0], numbers[1], numbers[2]))

    def draw(self, uniforms: np.ndarray, height: int, width: int) -> RandAugmentDraws:
        """``uniforms`` [B, 4] in [0, 1) -> three layers for each of B images."""
        largest = np.array(self.largest)
        low, high = np.maximum(0.0, 1.0 - largest), 1.0 + largest
        factor = low + (high - low) * uniforms[:, :3]
        kind = np.array([OPERATORS.index(name) if x else SKIP for name, x in zip(_NAMES, largest, strict=True)])
        order = _ORDERS[(uniforms[:, 3] * len(_ORDERS)).astype(int)]
        strength = np.take_along_axis(factor, order, axis=1).astype(np.float32)
        matrix = np.broadcast_to(np.eye(3, dtype=np.float32), (*order.shape, 3, 3))
        return RandAugmentDraws(kind[order].astype(np.int32), strength, matrix)
