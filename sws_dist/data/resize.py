"""Resize images, or crops of them, with Pillow's filters and Pillow's rounding, as a part of a DALI graph.

On the CPU the graph calls torch's kernel for uint8 images. It is within one unit of Pillow, and several times as fast
as DALI's. It resizes whole images only, so Pillow itself resizes the boxes whose edges lie between two pixels. On the
GPU it is DALI's own operator, whose cubic filter comes from a table of 129 values, so its weights are off by up to
1e-3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, types
from PIL import Image

from sws_dist.data.decoder import slice_window

_DALI_FILTER = {"bicubic": types.INTERP_CUBIC, "bilinear": types.INTERP_LINEAR}
_TORCH_KERNEL = {
    "bicubic": torch.ops.aten._upsample_bicubic2d_aa.out,
    "bilinear": torch.ops.aten._upsample_bilinear2d_aa.out,
}
_PILLOW_FILTER = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_ALIGNED = 0.01
"""A box counts as aligned with the pixels of the resized image if it is no farther from them than this."""
_LIKE_PILLOW = {"antialias": True, "subpixel_scale": False, "dtype": types.UINT8}

Resize = Callable[[Any, Any, Any], Any]
ResizeCrops = Callable[[Any, Sequence[Any], Sequence[Any]], Sequence[Any]]


def build_resize(interpolation: str, size: int, on_gpu: bool, num_threads: int) -> Resize:
    """Build the resizing operator of a DALI graph.

    Args:
        interpolation: ``bicubic`` or ``bilinear``.
        size: height and width of the results in pixels.
        on_gpu: True if the images are on the GPU.
        num_threads: number of threads that resize on the CPU.

    Returns:
        A function of uint8 HWC images, and of start (top, left) and end (bottom, right) of a box in each, float32, as
        shares of its height and width. It returns the boxes, resized to [size, size, C], as if the whole image had been
        resized and the box cut out afterwards: the filter reaches over the edges of the box.
    """
    if on_gpu:
        return partial(_resize_with_dali, size=size, interpolation=_DALI_FILTER[interpolation])
    resize, pool = partial(_resize_on_cpu, interpolation, size), ThreadPoolExecutor(num_threads)

    def resize_batch(images: list[np.ndarray], starts: list[np.ndarray], ends: list[np.ndarray]) -> list[np.ndarray]:
        return list(pool.map(resize, images, starts, ends))  # torch and Pillow release Python's lock

    return partial(fn.python_function, function=resize_batch, batch_processing=True, output_layouts="HWC")


def build_resize_crops(interpolation: str, size: int, on_gpu: bool, num_threads: int) -> ResizeCrops:
    """Build the operator of a DALI graph that cuts crops out of each image, and resizes each as an image of its own.

    Args:
        interpolation, size, on_gpu, num_threads: as for ``build_resize``.

    Returns:
        A function of uint8 HWC images, and of the starts (top, left) and the shapes (height, width) of one or more
        windows in each, int32, in pixels. A window is cut to the image. It returns for each window the crops,
        [size, size, C].
    """
    if on_gpu:
        return partial(_resize_crops_with_dali, size=size, interpolation=_DALI_FILTER[interpolation])
    resize, pool = partial(_resize_crops_on_cpu, _TORCH_KERNEL[interpolation], size), ThreadPoolExecutor(num_threads)

    def resize_batch(images: list[np.ndarray], *windows: list[np.ndarray]) -> Any:
        crops = [list(column) for column in zip(*pool.map(resize, images, *windows), strict=True)]
        return tuple(crops) if len(crops) > 1 else crops[0]

    def resize_crops(images: Any, starts: Sequence[Any], shapes: Sequence[Any]) -> Sequence[Any]:
        crops: Any = fn.python_function(
            images,
            *starts,
            *shapes,
            function=resize_batch,
            batch_processing=True,
            num_outputs=len(starts),
            output_layouts=["HWC"] * len(starts),
        )
        return crops if len(starts) > 1 else [crops]

    return resize_crops


def _resize_crops_on_cpu(kernel: Any, size: int, image: np.ndarray, *windows: np.ndarray) -> list[np.ndarray]:
    """Resize windows of one image [H, W, C] uint8, given as all starts, then all shapes: [size, size, C] each."""
    crops, count = [], len(windows) // 2
    for start, shape in zip(windows[:count], windows[count:], strict=True):
        (top, left), (height, width) = np.minimum(start, np.array(image.shape[:2]) - 1).tolist(), shape.tolist()
        crop = np.ascontiguousarray(image[top : top + height, left : left + width])
        crops.append(_resize_with_torch(kernel, crop, size, size))
    return crops


def _resize_crops_with_dali(
    images: Any, starts: Sequence[Any], shapes: Sequence[Any], size: int, interpolation: Any
) -> Sequence[Any]:
    first, last = (types.Constant([edge, edge], dtype=types.FLOAT, shape=[2], device="cpu") for edge in (0.0, 1.0))
    crops = [slice_window(images, start, shape) for start, shape in zip(starts, shapes, strict=True)]
    return [_resize_with_dali(crop, first, last, size, interpolation) for crop in crops]


def _resize_on_cpu(interpolation: str, size: int, image: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Resize the box of one image [H, W, C] uint8. Returns [size, size, C]."""
    whole = size / (end - start).astype(np.float64)  # the size of the whole image after resizing
    first = start * whole  # where the box starts in it
    if max(np.abs(place - np.rint(place)).max() for place in (whole, first)) > _ALIGNED:
        top, left, bottom, right = np.concatenate([start, end]) * [*image.shape[:2], *image.shape[:2]]
        box = Image.fromarray(image).resize((size, size), _PILLOW_FILTER[interpolation], (left, top, right, bottom))
        return np.asarray(box)
    (height, width), (top, left) = np.rint(whole).astype(int).tolist(), np.rint(first).astype(int).tolist()
    resized = _resize_with_torch(_TORCH_KERNEL[interpolation], image, height, width)
    return np.ascontiguousarray(resized[top : top + size, left : left + size])


def _resize_with_torch(kernel: Any, image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize one image [H, W, C] uint8 to ``height`` x ``width``."""
    out = np.empty((height, width, image.shape[2]), dtype=np.uint8)
    nchw = (torch.from_numpy(array).permute(2, 0, 1)[None] for array in (image, out))  # views: memory stays HWC
    source, target = nchw
    kernel(source, [height, width], False, None, None, out=target)
    return out


def _resize_with_dali(images: Any, start: Any, end: Any, size: int, interpolation: Any) -> Any:
    # Pillow resizes the columns, rounds to 8 bits, and then resizes the rows. A single pass would differ by ones.
    rows = images.shape(dtype=types.FLOAT)[0]
    resize = partial(fn.resize, interp_type=interpolation, roi_relative=True, **_LIKE_PILLOW)
    images = resize(
        images, size=fn.stack(rows, float(size)), roi_start=fn.stack(0.0, start[1]), roi_end=fn.stack(1.0, end[1])
    )
    return resize(images, size=[size, size], roi_start=fn.stack(start[0], 0.0), roi_end=fn.stack(end[0], 1.0))
