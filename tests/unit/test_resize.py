"""Compare the resizing of boxes and crops with Pillow's, for the CPU's operator and, run on the CPU, for the GPU's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from nvidia.dali import fn, pipeline_def, types
from PIL import Image

from sws_dist.data.resize import build_resize, build_resize_crops
from tests.unit import images

SIZE = 64


def resize_box(image: np.ndarray, box: tuple[float, ...], interpolation: str, like_gpu: bool) -> np.ndarray:
    """Resize a box (left, top, right, bottom, in pixels) of an image to 64 x 64 in a DALI pipeline."""
    resize, (height, width, _) = build_resize(interpolation, SIZE, like_gpu, num_threads=1), image.shape

    @pipeline_def(batch_size=1, num_threads=1, device_id=None, exec_dynamic=True)
    def graph() -> Any:
        inputs = fn.external_source(name="image", layout="HWC"), *(fn.external_source(name=n) for n in ("start", "end"))
        return resize(*inputs)

    pipeline = graph()
    pipeline.build()
    left, top, right, bottom = box
    pipeline.feed_input("image", [image], layout="HWC")
    pipeline.feed_input("start", [np.array([top / height, left / width], dtype=np.float32)])
    pipeline.feed_input("end", [np.array([bottom / height, right / width], dtype=np.float32)])
    (resized,) = pipeline.run()
    return np.asarray(resized.at(0))


@pytest.mark.parametrize(
    "box", [(0, 0, 101, 90), (10, 20, 74, 84), (3.25, 11.5, 60.75, 80.125), (40.3, 40.1, 43.9, 44)]
)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("like_gpu", [False, True])
def test_boxes_are_resized_as_pillow_does(box: tuple[float, ...], interpolation: str, like_gpu: bool) -> None:
    image = images.photograph("china", 0, 0, 90, 101)
    theirs = image.resize((SIZE, SIZE), Image.Resampling[interpolation.upper()], box)
    error = np.abs(resize_box(np.asarray(image), box, interpolation, like_gpu).astype(int) - np.asarray(theirs))
    assert error.mean() <= (0.1 if like_gpu and interpolation == "bicubic" else 0.01)
    assert error.max() <= (4 if like_gpu and interpolation == "bicubic" else 1)


@pytest.mark.parametrize("like_gpu", [False, True])
def test_crops_of_one_image_are_cut_first(like_gpu: bool) -> None:
    """Compare two windows, one of which reaches over the image's edges, with Pillow's crops of its own."""
    image, resize = images.photograph("china", 0, 0, 90, 101), build_resize_crops("bilinear", SIZE, like_gpu, 1)
    windows = [((10, 20), (70, 33)), ((30, 81), (500, 40))]  # start and shape, vertical first

    @pipeline_def(batch_size=1, num_threads=1, device_id=None, exec_dynamic=True)
    def graph() -> Any:
        parts = zip(*windows, strict=True)
        starts, shapes = ([types.Constant(list(pair), device="cpu") for pair in part] for part in parts)
        return tuple(resize(fn.external_source(name="image", layout="HWC"), starts, shapes))

    pipeline = graph()
    pipeline.build()
    pipeline.feed_input("image", [np.asarray(image)], layout="HWC")
    for ours, ((top, left), (height, width)) in zip(pipeline.run(), windows, strict=True):
        box = (left, top, min(left + width, 101), min(top + height, 90))
        theirs = np.asarray(image.crop(box).resize((SIZE, SIZE), Image.Resampling.BILINEAR))
        assert np.abs(np.asarray(ours.at(0)).astype(int) - theirs).max() <= 1
