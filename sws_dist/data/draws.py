"""Draw what is done to each training image, as a pure function of the seed and the image's position in the stream.

Each position owns a fixed number of uniforms of a counter-based generator (numpy's Philox). Everything random about its
image, from the crop window to the erased box, is computed from these uniforms, for a whole batch at once. So a run that
is resumed at any step, at any world size, draws what the uninterrupted run would have drawn.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sws_dist.config.schema import AugmentConfig
from sws_dist.data.color_jitter import ColorJitter
from sws_dist.data.randaugment import OPERATORS, SKIP, RandAugment, RandAugmentDraws, affine_matrix

_CROP_TRIES = 10  # torchvision's RandomResizedCrop
_ERASE_TRIES = 10  # timm's RandomErasing
_ERASE_AREA = (0.02, 1 / 3)
_ERASE_LOG_ASPECT = (np.log(0.3), np.log(1 / 0.3))
_PHILOX_BLOCK = 4  # number of uniforms that Philox makes at once


def draw_uniforms(seed: int, positions: np.ndarray, width: int) -> np.ndarray:
    """Draw ``width`` uniforms in [0, 1) for each position.

    Args:
        positions: [n], rising.
        width: a multiple of 4.

    Returns:
        [n, width] float64.
    """
    assert width % _PHILOX_BLOCK == 0
    blocks = width // _PHILOX_BLOCK  # of one position
    philox = np.random.Philox(key=seed)
    generator = np.random.Generator(philox)
    out = np.empty((len(positions), width))
    at = 0
    for row, position in zip(out, positions.tolist(), strict=True):
        philox.advance(position * blocks - at)  # moves the counter, at the same cost for any distance
        generator.random(out=row)
        at = (position + 1) * blocks
    return out


@dataclass(frozen=True)
class Draws:
    """The draws of one batch of B images. A field is None where the recipe has no such part."""

    crop_start: np.ndarray
    """[B, 2] int32: top and left of the crop window, in pixels of the file."""
    crop_shape: np.ndarray
    """[B, 2] int32: height and width of the crop window, in pixels of the file."""
    flip: np.ndarray
    """[B] int32: 1 for an image that is mirrored."""
    affine: np.ndarray | None
    """[B, 3, 3] float32: maps output positions to input positions, in pixels."""
    operations: RandAugmentDraws | None
    """The layers of RandAugment or of the colour jitter."""
    erase: np.ndarray | None
    """[B, 4] int32: top, left, height, width of the erased box, in pixels of the output; a height of 0 means none."""


def describe_draws(draws: Draws, row: int) -> list[str]:
    """Describe in words what was drawn for one image: its window, its operations, its erased box."""
    (top, left), (height, width) = draws.crop_start[row].tolist(), draws.crop_shape[row].tolist()
    lines = [f"{width} x {height} at {left}, {top}" + (", mirrored" if draws.flip[row] else "")]
    if draws.affine is not None:
        (a, b), (c, d) = draws.affine[row][:2, :2].tolist()
        lines.append(f"turned {np.degrees(np.arctan2(b, a)):.0f} degrees, enlarged {1 / np.sqrt(a * d - b * c):.2f} x")
    if draws.operations is not None:
        drawn = zip(draws.operations.operator[row].tolist(), draws.operations.strength[row].tolist(), strict=True)
        lines += [
            OPERATORS[operator].removesuffix("Increasing") + (f" {strength:.3g}" if strength else "")
            for operator, strength in drawn
            if operator != SKIP
        ]
    if draws.erase is not None and draws.erase[row, 2]:
        lines.append("erased {3} x {2}".format(*draws.erase[row]))
    return lines


class Recipe:
    """Draw the parts of ``AugmentConfig`` that concern single images.

    Args:
        config: the recipe.
        image_size: height and width of the output, in pixels.

    Raises:
        ValueError: a RandAugment policy or a colour jitter that is not supported.
    """

    def __init__(self, config: AugmentConfig, image_size: int) -> None:
        self.config, self.image_size = config, image_size
        self.policy: RandAugment | ColorJitter | None = None
        if config.auto_augment:  # the colour jitter is then left out, as in timm
            self.policy = RandAugment.parse(config.auto_augment)
        elif config.color_jitter:
            self.policy = ColorJitter.parse(config.color_jitter)
        counts = {
            "crop": 2 * _CROP_TRIES + 2,
            "flip": 1,
            "affine": 4 if config.affine else 0,
            "operations": self.policy.num_uniforms if self.policy else 0,
            "erase": 1 + 4 * _ERASE_TRIES if config.re_prob else 0,
        }
        ends = np.cumsum(list(counts.values()))
        self._columns = {name: slice(end - counts[name], end) for name, end in zip(counts, ends, strict=True)}
        self.num_uniforms = int(-(-ends[-1] // _PHILOX_BLOCK) * _PHILOX_BLOCK)

    def draw(self, seed: int, positions: np.ndarray, sizes: np.ndarray) -> Draws:
        """Draw for the images at ``positions``.

        Args:
            positions: [B], rising.
            sizes: [B, 2] height and width of the files, in pixels.
        """
        u = draw_uniforms(seed, positions, self.num_uniforms)
        parts = {name: u[:, columns] for name, columns in self._columns.items()}
        start, shape = _random_resized_crop(parts["crop"], sizes, self.config.scale, self.config.ratio)
        size = self.image_size
        return Draws(
            crop_start=start,
            crop_shape=shape,
            flip=(parts["flip"][:, 0] < self.config.hflip).astype(np.int32),
            affine=self._affine(parts["affine"]) if self.config.affine else None,
            operations=self.policy.draw(parts["operations"], size, size) if self.policy else None,
            erase=_erase_boxes(parts["erase"], self.config.re_prob, size) if self.config.re_prob else None,
        )

    def _affine(self, u: np.ndarray) -> np.ndarray:
        config, size = self.config.affine, self.image_size
        assert config is not None
        low, high = config.scale
        return affine_matrix(
            degrees=config.degrees * (2 * u[:, 0] - 1),
            scale=low + (high - low) * u[:, 1],
            translate_x=config.translate * size * (2 * u[:, 2] - 1),
            translate_y=config.translate * size * (2 * u[:, 3] - 1),
            height=size,
            width=size,
        )


def _random_resized_crop(
    u: np.ndarray, sizes: np.ndarray, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray]:
    """Draw torchvision's RandomResizedCrop: the first of ten windows that fits, else the largest central one.

    Args:
        u: [B, 22] uniforms.
        sizes: [B, 2] height and width of the files.

    Returns:
        [B, 2] top and left, and [B, 2] height and width.
    """
    height, width = sizes[:, :1].astype(np.float64), sizes[:, 1:].astype(np.float64)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * u[:, :_CROP_TRIES])
    log_ratio = np.log(ratio[0]) + (np.log(ratio[1]) - np.log(ratio[0])) * u[:, _CROP_TRIES : 2 * _CROP_TRIES]
    w = np.round(np.sqrt(area * np.exp(log_ratio)))
    h = np.round(np.sqrt(area / np.exp(log_ratio)))
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    rows, first = np.arange(len(u)), fits.argmax(axis=1)
    any_fits = fits[rows, first]
    whole_h, whole_w = _central_window(sizes, ratio)
    h = np.where(any_fits, h[rows, first], whole_h)
    w = np.where(any_fits, w[rows, first], whole_w)
    room_y, room_x = sizes[:, 0] - h, sizes[:, 1] - w
    top = np.where(any_fits, np.floor(u[:, -2] * (room_y + 1)), room_y // 2)
    left = np.where(any_fits, np.floor(u[:, -1] * (room_x + 1)), room_x // 2)
    return np.stack([top, left], axis=1).astype(np.int32), np.stack([h, w], axis=1).astype(np.int32)


def _central_window(sizes: np.ndarray, ratio: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Return height [B] and width [B] of the whole image, cut to the nearest allowed aspect ratio."""
    height, width = sizes[:, 0].astype(np.float64), sizes[:, 1].astype(np.float64)
    aspect = width / height
    h = np.where(aspect < ratio[0], np.maximum(np.round(width / ratio[0]), 1), height)
    w = np.where(aspect > ratio[1], np.maximum(np.round(height * ratio[1]), 1), width)
    return h, w


def _erase_boxes(u: np.ndarray, probability: float, size: int) -> np.ndarray:
    """Draw timm's RandomErasing with one box: the first of ten that is smaller than the image. Returns [B, 4]."""
    area, aspect, y, x = (u[:, 1 + i * _ERASE_TRIES : 1 + (i + 1) * _ERASE_TRIES] for i in range(4))
    area = (_ERASE_AREA[0] + (_ERASE_AREA[1] - _ERASE_AREA[0]) * area) * size * size
    aspect = np.exp(_ERASE_LOG_ASPECT[0] + (_ERASE_LOG_ASPECT[1] - _ERASE_LOG_ASPECT[0]) * aspect)
    h, w = np.round(np.sqrt(area * aspect)), np.round(np.sqrt(area / aspect))
    fits = (h < size) & (w < size)
    rows, first = np.arange(len(u)), fits.argmax(axis=1)
    erased = fits[rows, first] & (u[:, 0] < probability)
    h, w = h[rows, first], w[rows, first]
    top, left = np.floor(y[rows, first] * (size - h + 1)), np.floor(x[rows, first] * (size - w + 1))
    return (np.stack([top, left, h, w], axis=1) * erased[:, None]).astype(np.int32)
