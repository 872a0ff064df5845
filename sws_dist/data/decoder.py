"""Decode images with DALI: windows inside a graph, and single images, to see whether training can decode them."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali import math as dali_math

# Decode as Pillow does. Orientation tags are not applied, as in torchvision and timm.
DECODER_ARGUMENTS = {"output_type": types.RGB, "adjust_orientation": False, "jpeg_fancy_upsampling": True}

_of_thread = threading.local()


def decode_window(encoded: Any, decoder: dict[str, Any], start: Any = None, shape: Any = None) -> Any:
    """Decode a window of each image, or all of it, as part of a DALI graph.

    DALI 2.4's decoder throws at a file whose header it cannot parse, and at a window outside the image, while its
    threads still work on the batch: a use after free, which ends in a segmentation fault as often as in an error. So an
    operator of its own parses the header first, and each window is cut to the image that is really there.

    Args:
        encoded: the encoded images.
        decoder: the decoder's arguments: its device and ``DECODER_ARGUMENTS``.
        start, shape: top and left, height and width of each window, in pixels.
    """
    size = fn.peek_image_shape(encoded, dtype=types.INT32, adjust_orientation=False)[:2]
    start, shape = ([0, 0], size) if start is None else _cut_window(start, shape, size)
    return fn.decoders.image_slice(encoded, start=start, shape=shape, axes=[0, 1], **decoder)


def slice_window(images: Any, start: Any, shape: Any) -> Any:
    """Copy a window out of each decoded image, cut to the image as ``decode_window`` cuts its windows."""
    start, shape = _cut_window(start, shape, images.shape(dtype=types.INT32)[:2])
    return fn.slice(images, start=start, shape=shape, axes=[0, 1])


def _cut_window(start: Any, shape: Any, size: Any) -> tuple[Any, Any]:
    start = dali_math.min(start, size - 1)
    return start, dali_math.min(shape, size - start)


def decode_size(data: bytes) -> tuple[int, int]:
    """Decode one image with training's CPU decoder, for its height and width. Threads may call this side by side.

    Raises:
        RuntimeError: the image cannot be decoded.
    """
    if not hasattr(_of_thread, "pipeline"):
        _of_thread.pipeline = _size_graph(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
        _of_thread.pipeline.build()
    try:
        _of_thread.pipeline.feed_input("encoded", [np.frombuffer(data, dtype=np.uint8)])
        (shape,) = _of_thread.pipeline.run()
    except RuntimeError:
        del _of_thread.pipeline  # an error makes it unusable
        raise
    height, width, _ = shape.at(0).tolist()
    return height, width


def describe_error(error: Exception) -> str:
    """Return the line of a DALI error that says what went wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    at = lines.index("encountered:") + 1 if "encountered:" in lines else 0
    return lines[min(at, len(lines) - 1)].rstrip(" :")


@pipeline_def(exec_dynamic=True)
def _size_graph() -> Any:
    images = decode_window(fn.external_source(name="encoded"), {"device": "cpu", **DECODER_ARGUMENTS})
    return images.shape(dtype=types.INT32)
