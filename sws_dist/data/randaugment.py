"""Draw timm's RandAugment with numpy, and apply it in a DALI graph.

timm draws and applies one image at a time, from global random state. Here these are two separate parts:

1. `RandAugment.draw` turns uniform random numbers into plain arrays (which operator, how strong, which matrix). It is a
   pure function of those numbers, so a run can be resumed or resharded bit for bit.
2. `apply_layer` is a part of a DALI graph that applies one layer of these arrays to a batch of images. All its
   operators exist for DALI's CPU and GPU backends. The drawn arrays stay on the CPU in both cases.

Source of the semantics: timm 1.0.31, `timm/data/auto_augment.py` (`rand_augment_transform`), and the Pillow functions
that it calls. Pillow's arithmetic is followed to the rounding, except where a comment says otherwise.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from nvidia.dali import fn, types
from nvidia.dali import math as dali_math
from nvidia.dali.auto_aug.core import select
from nvidia.dali.data_node import DataNode

# ---- From a level to an operator's argument ----
# A level is a magnitude after noise and clipping, usually in [0, 10]; `sign` is +1 or -1. Both are float64 arrays of
# one shape. The order of the arithmetic is timm's, since another order could give another result after `trunc`.

StrengthFunction = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""A function of level and sign that returns the operator's argument."""
PixelOperator = Callable[[DataNode, DataNode], DataNode]
"""A function of images and strengths that returns images."""
Number = np.ndarray | float
"""One number for each sample, or one for all."""
LEVEL_MAX = 10.0
"""The level at which every range below reaches its end (timm's _LEVEL_DENOM)."""


def _no_argument(level: np.ndarray, sign: np.ndarray) -> np.ndarray:
    return np.zeros_like(level)


def _signed(maximum: float) -> StrengthFunction:
    """Return a function for degrees, shear or a share of the side: 0 at level 0, +-`maximum` at level 10."""
    return lambda level, sign: sign * (level / LEVEL_MAX * maximum)


def _bits_kept(level: np.ndarray, sign: np.ndarray) -> np.ndarray:
    """Return 4 down to 1 bits. timm goes down to 0 at level 10, which Pillow 13 refuses (ValueError), so 1 is kept."""
    return np.maximum(1.0, 4.0 - np.trunc(level / LEVEL_MAX * 4.0))


def _solarize_threshold(level: np.ndarray, sign: np.ndarray) -> np.ndarray:
    """Return the pixel value from which on pixels are inverted: 256 down to 0."""
    return 256.0 - np.minimum(256.0, np.trunc(level / LEVEL_MAX * 256.0))


def _solarize_addend(level: np.ndarray, sign: np.ndarray) -> np.ndarray:
    """Return what is added to dark pixels: 0 up to 110."""
    return np.minimum(128.0, np.trunc(level / LEVEL_MAX * 110.0))


def _enhancement_factor(level: np.ndarray, sign: np.ndarray) -> np.ndarray:
    """Return a factor from 1, which leaves the image unchanged, down to 0.1 or up to 1.9."""
    return np.maximum(0.1, 1.0 + sign * (level / LEVEL_MAX * 0.9))


# ---- The operators on pixel values: uint8 HWC in and out; `strength` is a float32 scalar a sample ----
# They use DALI's arithmetic, which fuses an expression into one pass, exists on both backends, and accepts a scalar on
# the CPU beside an image on the GPU. Constants have a type where the result has to stay uint8: a plain Python number
# would make it int32 or float.

_WHITE = types.Constant(255, dtype=types.UINT8)
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], dtype=np.float32) / 13  # Pillow's ImageFilter.SMOOTH


def _truncate(values: DataNode) -> DataNode:
    """Convert float to uint8 as Pillow's C code does: drop the fraction, and saturate.

    `brightness_contrast` rounds to the nearest integer, so nearly one half is subtracted first (1/255 is one unit). It
    is not exactly one half, because an integer with float noise must stay that integer. `fn.cast(floor(...))` is
    several times slower.
    """
    return fn.brightness_contrast(values, brightness_shift=-0.4999 / 255, dtype=types.UINT8)


def _blend(degenerate: DataNode | int, images: DataNode, factor: DataNode) -> DataNode:
    """Apply Pillow's Image.blend: factor 0 gives `degenerate`, 1 gives the image, above 1 extrapolates."""
    return _truncate(degenerate + factor * (images - degenerate))


def _int16(images: DataNode) -> DataNode:
    """Convert to int16, which holds the difference of two uint8 images; uint8 would wrap around."""
    return fn.cast(images, dtype=types.INT16)


def _grey(images: DataNode) -> DataNode:
    """Convert to grey, [H, W, 1] int16: ITU-R 601 luma, rounded to an integer."""
    return _int16(fn.color_space_conversion(images, image_type=types.RGB, output_type=types.GRAY))


def _auto_contrast(images: DataNode, strength: DataNode) -> DataNode:
    low, high = fn.reductions.min(images, axes=[0, 1]), fn.reductions.max(images, axes=[0, 1])
    # Each channel is stretched from [low, high] to [0, 255]. Pillow leaves a flat channel as it is.
    flat = low == high
    low = low - low * flat
    span = high - low + (_WHITE - high) * flat
    return _truncate((images - _int16(low)) * (255.0 / span))


def _equalize(images: DataNode, strength: DataNode) -> DataNode:
    # DALI (with OpenCV's formula) leaves the darkest value out of the histogram's sum, Pillow the brightest. Inverting
    # before and after makes them agree, but for one unit at most in a photograph: Pillow divides by the sum // 255,
    # DALI by the sum / 255.
    return _WHITE - fn.equalize(_WHITE - images)


def _invert(images: DataNode, strength: DataNode) -> DataNode:
    return _WHITE - images


def _posterize(images: DataNode, bits: DataNode) -> DataNode:
    return images & fn.cast(256.0 - dali_math.pow(2.0, 8.0 - bits), dtype=types.UINT8)


def _solarize(images: DataNode, threshold: DataNode) -> DataNode:
    return images ^ ((images >= threshold) * _WHITE)  # x ^ 255 is 255 - x


def _solarize_add(images: DataNode, addend: DataNode) -> DataNode:
    # No saturation is needed: the largest result is 127 + 128.
    return images + (images < 128) * fn.cast(addend, dtype=types.UINT8)


def _color(images: DataNode, factor: DataNode) -> DataNode:
    return _blend(_grey(images), images, factor)


def _contrast(images: DataNode, factor: DataNode) -> DataNode:
    return _blend(dali_math.floor(fn.reductions.mean(_grey(images)) + 0.5), images, factor)


def _brightness(images: DataNode, factor: DataNode) -> DataNode:
    return _blend(0, images, factor)


def _sharpness(images: DataNode, factor: DataNode) -> DataNode:
    # Pillow's filter leaves the outermost pixels as they were, so only the inner ones are blended.
    smooth = fn.filter(images, types.Constant(_SMOOTH, device="cpu"), mode="valid")
    inner = _blend(_int16(smooth), images[1:-1, 1:-1], factor)
    rows = fn.cat(images[1:-1, :1], inner, images[1:-1, -1:], axis=1)
    return fn.cat(images[:1], rows, images[-1:], axis=0)


# ---- Geometry ----
# Matrices map an output position (x, y, 1) to an input position, in pixels. (0, 0) is the top left corner of the top
# left pixel, as in Pillow's Image.transform.


def affine_matrix(
    degrees: Number, scale: Number, translate_x: Number, translate_y: Number, height: Number, width: Number
) -> np.ndarray:
    """Compose the matrices that turn and enlarge images about their centre, and then move them.

    The signs are those of torchvision's `affine`. Everything is computed in float64.

    Args:
        degrees: positive values turn the picture clockwise.
        scale: values above 1 enlarge it.
        translate_x, translate_y: positive values move it right and down, in pixels.
        height, width: of the image, in pixels.

    Returns:
        [B, 3, 3] float32 for arguments [B]; scalar arguments are broadcast.
    """
    angle = np.radians(degrees)
    cos, sin = np.cos(angle) / scale, np.sin(angle) / scale
    centre_x, centre_y = np.asarray(width) / 2, np.asarray(height) / 2
    from_x, from_y = centre_x + translate_x, centre_y + translate_y  # the output position of the centre
    rows = (
        (cos, sin, centre_x - cos * from_x - sin * from_y),
        (-sin, cos, centre_y + sin * from_x - cos * from_y),
        (0.0, 0.0, 1.0),
    )
    entries = np.broadcast_arrays(*(entry for row in rows for entry in row))
    return np.stack(entries, axis=-1).reshape(*entries[0].shape, 3, 3).astype(np.float32)


def warp(images: DataNode, matrix: DataNode, *, fill: tuple[int, int, int]) -> DataNode:
    """Resample uint8 HWC images through `matrix` (float32 3x3, output to input) at the same size.

    The result differs slightly from Pillow's. Pillow has another cubic kernel, drops fractions instead of rounding, and
    repeats the last pixel at the picture's edge, where DALI mixes in the fill.

    Args:
        fill: red, green and blue of what comes in from outside the image.
    """
    return fn.experimental.warp_perspective(
        images,
        matrix=matrix,
        inverse_map=True,
        pixel_origin="corner",
        interp_type=types.INTERP_CUBIC,
        border_mode="constant",
        fill_value=list(fill),
    )


# ---- The table ----

# Each operator has a function that turns a level into its argument, and one that changes the pixels (None: the image is
# warped through the drawn matrix). The order is that of timm's _RAND_INCREASING_TRANSFORMS.
_OPERATOR_TABLE: dict[str, tuple[StrengthFunction, PixelOperator | None]] = {
    "AutoContrast": (_no_argument, _auto_contrast),
    "Equalize": (_no_argument, _equalize),
    "Invert": (_no_argument, _invert),
    "Rotate": (_signed(30.0), None),
    "PosterizeIncreasing": (_bits_kept, _posterize),
    "SolarizeIncreasing": (_solarize_threshold, _solarize),
    "SolarizeAdd": (_solarize_addend, _solarize_add),
    "ColorIncreasing": (_enhancement_factor, _color),
    "ContrastIncreasing": (_enhancement_factor, _contrast),
    "BrightnessIncreasing": (_enhancement_factor, _brightness),
    "SharpnessIncreasing": (_enhancement_factor, _sharpness),
    "ShearX": (_signed(0.3), None),
    "ShearY": (_signed(0.3), None),
    "TranslateXRel": (_signed(0.45), None),
    "TranslateYRel": (_signed(0.45), None),
}
OPERATORS: tuple[str, ...] = tuple(_OPERATOR_TABLE)
"""Names of the operators; the index is the operator's id."""
SKIP = -1
"""The operator id of a layer that does nothing."""


# ---- The policy and its draws ----


class RandAugmentDraws(NamedTuple):
    """The operations for B images. The second axis of every array is the layer."""

    operator: np.ndarray
    """[B, num_layers] int32: an index into OPERATORS, or SKIP."""
    strength: np.ndarray
    """[B, num_layers] float32: the operator's argument; 0 if it has none or is skipped."""
    matrix: np.ndarray
    """[B, num_layers, 3, 3] float32: maps output to input pixels; the identity for operators that are not geometric."""


# One layer of one image always consumes these five numbers, even those that it does not use. So a change of the policy
# does not shift what the other layers and images draw.
_UNIFORM_NAMES = ("operator", "applied", "sign", "magnitude_radius", "magnitude_angle")

# Piece of timm's grammar -> (field, type of its number). 'inc' is not a field, since only inc1 is implemented.
_GRAMMAR: dict[str, tuple[str, Callable[[str], float]]] = {
    "m": ("magnitude", int),
    "mstd": ("magnitude_std", float),
    "mmax": ("magnitude_max", int),
    "n": ("num_layers", int),
    "p": ("prob", float),
    "inc": ("increasing", int),
}


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """A policy: each of `num_layers` layers picks one operator (with replacement) and applies it with chance `prob`."""

    magnitude: float = 10
    magnitude_std: float = 0.0
    """Standard deviation of a normal; inf means uniform magnitudes in [0, magnitude]."""
    magnitude_max: float = LEVEL_MAX
    """Magnitudes are clipped to [0, magnitude_max]."""
    num_layers: int = 2
    prob: float = 0.5

    def __post_init__(self) -> None:
        if not 1 <= self.num_layers <= 100:
            raise ValueError(f"RandAugment: num_layers (n) must be from 1 to 100, got {self.num_layers}")
        if not 0 <= self.prob <= 1:
            raise ValueError(f"RandAugment: prob (p) must lie in [0, 1], got {self.prob}")
        if not (0 <= self.magnitude <= 1000 and self.magnitude_std >= 0 and 0 < self.magnitude_max <= 1000):
            raise ValueError(
                f"RandAugment: magnitude and its std must be at least 0, max above 0, none above 1000: {self}"
            )

    @classmethod
    def parse(cls, policy: str) -> RandAugment:
        """Read timm's string, for example 'rand-m9-mstd0.5-inc1'.

        Raises:
            ValueError: a policy that timm would not read, or that is not supported here.
        """
        kind, *pieces = policy.split("-")
        if kind != "rand":
            raise ValueError(f"policy {policy!r}: {kind!r} is not supported, use 'rand', e.g. 'rand-m9-inc1'")
        fields: dict[str, Any] = {}
        for piece in pieces:
            name, value = _parse_piece(policy, piece)
            if name in fields:
                raise ValueError(f"policy {policy!r}: {piece!r} sets {name} a second time")
            fields[name] = value
        if not fields.pop("increasing", 0):
            raise ValueError(f"policy {policy!r}: timm's default set, inc0, is not supported, use '-inc1'")
        if fields.get("magnitude_std", 0) > 100:  # timm writes infinity this way
            fields["magnitude_std"] = math.inf
        return cls(**fields)

    @property
    def num_uniforms(self) -> int:
        """Return how many uniform numbers one image consumes."""
        return self.num_layers * len(_UNIFORM_NAMES)

    def draw(self, uniforms: np.ndarray, height: int, width: int) -> RandAugmentDraws:
        """Turn `uniforms`, [B, num_uniforms] float64 in [0, 1), into draws for B images of height x width pixels.

        Raises:
            ValueError: uniforms of another shape.
        """
        if uniforms.ndim != 2 or uniforms.shape[1] != self.num_uniforms:
            raise ValueError(f"uniforms must have shape [B, {self.num_uniforms}], got {list(uniforms.shape)}")
        by_name = uniforms.reshape(-1, self.num_layers, len(_UNIFORM_NAMES))
        u = {name: by_name[:, :, i] for i, name in enumerate(_UNIFORM_NAMES)}

        operator = (u["operator"] * len(OPERATORS)).astype(np.int32)
        level = np.clip(self._magnitude(u["magnitude_radius"], u["magnitude_angle"]), 0.0, self.magnitude_max)
        sign = np.where(u["sign"] > 0.5, -1.0, 1.0)
        every_strength = np.stack([to_strength(level, sign) for to_strength, _ in _OPERATOR_TABLE.values()])
        strength = np.take_along_axis(every_strength, operator[None], axis=0)[0]

        applied = u["applied"] <= self.prob
        operator = np.where(applied, operator, SKIP).astype(np.int32)
        strength = np.where(applied, strength, 0.0)
        matrix = _geometric_matrix(operator, strength, height, width)
        return RandAugmentDraws(operator, strength.astype(np.float32), matrix)

    def _magnitude(self, radius: np.ndarray, angle: np.ndarray) -> np.ndarray:
        """Compute magnitudes before clipping from two arrays of uniforms."""
        if self.magnitude_std == 0:
            return np.full_like(radius, self.magnitude)
        if math.isinf(self.magnitude_std):
            return radius * self.magnitude
        # Box and Muller's transform; 1 - radius lies in (0, 1], so the logarithm is finite.
        normal = np.sqrt(-2.0 * np.log(1.0 - radius)) * np.cos(2.0 * np.pi * angle)
        return self.magnitude + self.magnitude_std * normal


def _parse_piece(policy: str, piece: str) -> tuple[str, float]:
    """Return the field's name and value of one piece of a policy string, for example 'mstd0.5'."""
    complaint = f"policy {policy!r}: {piece!r}"
    if piece[:1] in ("t", "w"):
        raise ValueError(f"{complaint} chooses another operator set or weights, not supported: leave it out")
    match = re.fullmatch(r"(\D+)(\d.*)", piece)
    if match is None or match[1] not in _GRAMMAR:
        known = ", ".join(f"{key}<number>" for key in _GRAMMAR)
        raise ValueError(f"{complaint} is not understood; known pieces are {known}")
    name, number = _GRAMMAR[match[1]]
    try:
        return name, number(match[2])
    except ValueError:
        raise ValueError(f"{complaint}: {match[2]!r} should be of type {number.__name__}") from None


def _geometric_matrix(operator: np.ndarray, strength: np.ndarray, height: int, width: int) -> np.ndarray:
    """Compose matrices [..., 3, 3] float32 for operators and strengths [...]; the identity where no pixel moves."""

    def strength_of(name: str) -> np.ndarray:
        return np.where(operator == OPERATORS.index(name), strength, 0.0)

    # timm's `rotate` is Pillow's: positive degrees turn the picture the other way than in torchvision.
    matrix = affine_matrix(-strength_of("Rotate"), 1.0, 0.0, 0.0, height, width)
    matrix[..., 0, 1] += strength_of("ShearX")
    matrix[..., 1, 0] += strength_of("ShearY")
    matrix[..., 0, 2] += strength_of("TranslateXRel") * width
    matrix[..., 1, 2] += strength_of("TranslateYRel") * height
    return matrix


# ---- The graph ----


def apply_layer(
    images: DataNode, operator: DataNode, strength: DataNode, matrix: DataNode, *, fill: tuple[int, int, int]
) -> DataNode:
    """Apply one layer to a batch. Call it inside a `pipeline_def(enable_conditionals=True)`.

    Args:
        images: uint8 HWC, on either backend.
        operator, strength, matrix: one layer of `RandAugmentDraws`, on the CPU: for each image an int32 scalar, a
            float32 scalar and a float32 3x3 matrix.
        fill: red, green and blue of what comes in from outside the image.
    """

    def unchanged(images: DataNode, strength: DataNode, matrix: DataNode) -> DataNode:
        return images

    def geometric(images: DataNode, strength: DataNode, matrix: DataNode) -> DataNode:
        return warp(images, matrix, fill=fill)

    def on_pixels(function: PixelOperator) -> Callable[..., DataNode]:
        return lambda images, strength, matrix: function(images, strength)

    # Each branch splits the batch once more. The five geometric operators share one branch, since only their matrices
    # differ.
    branches: list[Callable[..., DataNode]] = [unchanged, geometric]
    branch_of = [0]  # indexed by operator id + 1: the first entry is SKIP's
    for _, function in _OPERATOR_TABLE.values():
        branch_of.append(len(branches) if function else 1)
        if function:
            branches.append(on_pixels(function))
    keys = list(range(len(branch_of)))
    branch = fn.lookup_table(operator + 1, keys=keys, values=branch_of, dtype=types.INT32)
    return select(branches, branch, images, strength, matrix)
