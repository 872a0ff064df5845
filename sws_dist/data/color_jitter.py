"""Draw torchvision's ColorJitter without hue, as layers of RandAugment's operators.

timm uses this jitter where no RandAugment replaces it. Source: torchvision 0.29, ``transforms.ColorJitter``. The
factors are uniform in [max(0, 1 - x), 1 + x] and applied in random order. On Pillow images they are Pillow's
enhancements, which are three of the operators that RandAugment has as well.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sws_dist.data.randaugment import OPERATORS, SKIP, RandAugmentDraws

_OPERATOR_NAMES = ("BrightnessIncreasing", "ContrastIncreasing", "ColorIncreasing")
_MAX_CHANGE = 100
_ORDERS = np.array(list(itertools.permutations(range(3))))


@dataclass(frozen=True)
class ColorJitter:
    """Jitter of brightness, contrast and saturation."""

    max_change: tuple[float, float, float]
    """Largest change of brightness, contrast and saturation; 0 leaves that one alone."""

    num_layers = 3
    num_uniforms = 4

    @classmethod
    def parse(cls, value: float | Sequence[float]) -> ColorJitter:
        """Read ``augment.color_jitter`` as timm does: one number for all three, or three numbers.

        Raises:
            ValueError: another count of numbers, or one out of range.
        """
        numbers = tuple(value) if isinstance(value, Sequence) else (value,) * 3
        if len(numbers) != 3:
            hue = " (hue is not supported)" if len(numbers) == 4 else ""
            raise ValueError(f"augment.color_jitter {list(numbers)}: expected one number or three{hue}")
        if not all(0 <= number <= _MAX_CHANGE for number in numbers):
            raise ValueError(f"augment.color_jitter {list(numbers)}: each has to be from 0 to {_MAX_CHANGE}")
        return cls((numbers[0], numbers[1], numbers[2]))

    def draw(self, uniforms: np.ndarray, height: int, width: int) -> RandAugmentDraws:
        """Turn uniforms [B, 4] float64 in [0, 1) into three layers for each of B images of height x width pixels."""
        largest = np.array(self.max_change)
        low, high = np.maximum(0.0, 1.0 - largest), 1.0 + largest
        factor = low + (high - low) * uniforms[:, :3]
        kind = np.array(
            [OPERATORS.index(name) if x else SKIP for name, x in zip(_OPERATOR_NAMES, largest, strict=True)]
        )
        order = _ORDERS[(uniforms[:, 3] * len(_ORDERS)).astype(int)]
        strength = np.take_along_axis(factor, order, axis=1).astype(np.float32)
        matrix = np.broadcast_to(np.eye(3, dtype=np.float32), (*order.shape, 3, 3))
        return RandAugmentDraws(kind[order].astype(np.int32), strength, matrix)
