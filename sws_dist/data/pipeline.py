"""DALI pipelines for training and evaluation; one definition serves DALI's CPU and GPU backends.

A Python source hands DALI each batch's paths and draws; DALI reads, decodes, resizes, augments and normalises in
its own threads, ahead of the training step. Nothing random happens inside DALI.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from torch import Tensor

from sws_dist.config import DataConfig
from sws_dist.data.manifest import Manifest
from sws_dist.data.randaugment import apply_layer, warp
from sws_dist.data.recipe import Recipe
from sws_dist.data.sampler import TrainOrder

_INTERPOLATION = {"bicubic": types.INTERP_CUBIC, "bilinear": types.INTERP_LINEAR}
_RESIZE = {"antialias": True, "subpixel_scale": False, "dtype": types.UINT8}  # what Pillow does


@dataclass(frozen=True)
class Batch:
    """images [B, 3, S, S] float32, normalised, and labels [B] int64, both on the rank's device.

    ``indices`` [B]: the images' places in the manifest. ``valid`` [B]: whether each counts (evaluation fills up
    its last batch). ``erase`` [B, 4]: boxes to erase, or None. ``position``: the batch's first place in the stream.
    """

    images: Tensor
    labels: Tensor
    indices: np.ndarray
    valid: np.ndarray
    erase: np.ndarray | None = None
    position: int = 0


@dataclass(frozen=True)
class _Planned:
    feeds: tuple[Any, ...]
    indices: np.ndarray
    valid: np.ndarray
    erase: np.ndarray | None = None
    position: int = 0


class Loader:
    """Iterates ``Batch``es in the order of ``plan``; DALI works ``prefetch`` batches ahead.

    Args:
        plan: for each batch the host's side: (feeds for DALI, indices, valid, erase boxes, position).
    """

    def __init__(self, graph: Any, plan: Iterable[_Planned], manifest: Manifest, device: torch.device) -> None:
        self.manifest, self.device = manifest, device
        self._planned: deque[_Planned] = deque()
        self._plan = iter(plan)
        self._graph = graph(source=self._feed)
        self._graph.build()

    def __iter__(self) -> Iterator[Batch]:
        while True:
            try:
                (output,) = self._graph.run()
            except StopIteration:
                return
            except RuntimeError as error:
                raise self._name_the_bad_file(error) from None
            now = self._planned.popleft()
            # Without a copy: DALI keeps the buffer for as long as the tensor lives (exec_dynamic).
            images = torch.from_dlpack(output.as_tensor())
            labels = torch.from_numpy(self.manifest.labels[now.indices])
            yield Batch(
                images.to(self.device, non_blocking=True),
                labels.to(self.device, non_blocking=True),
                now.indices,
                now.valid,
                now.erase,
                now.position,
            )

    def _feed(self) -> tuple[Any, ...]:
        planned = next(self._plan)
        self._planned.append(planned)
        paths = [np.frombuffer(str(self.manifest.file(i)).encode(), dtype=np.uint8) for i in planned.indices]
        return (paths, *planned.feeds)

    def _name_the_bad_file(self, error: RuntimeError) -> Exception:
        """A decode error as a message that names the file, where one of the batch proves unreadable."""
        from PIL import Image

        indices = self._planned[0].indices if self._planned else ()
        for index in indices:
            file = self.manifest.file(index)
            try:
                with Image.open(file) as image:
                    image.load()
            except Exception as reason:  # Pillow raises a dozen types
                return ValueError(f"{file}: cannot be decoded ({reason}); mend or remove it")
        return error


def train_loader(
    manifest: Manifest,
    order: TrainOrder,
    positions: Iterable[np.ndarray],
    recipe: Recipe,
    seed: int,
    config: DataConfig,
    device: torch.device,
) -> Loader:
    """Training batches, one for each item of ``positions``: stream positions [B], evenly spaced."""

    def plan() -> Iterator[_Planned]:
        for places in positions:
            indices = order.images(places)
            draws = recipe.draw(seed, places, manifest.sizes[indices])
            feeds: list[Any] = [draws.crop_start, draws.crop_shape, draws.flip]
            if draws.affine is not None:
                feeds.append(draws.affine)
            if draws.rand_augment is not None:
                for layer in range(draws.rand_augment.operator.shape[1]):
                    feeds += [np.ascontiguousarray(part[:, layer]) for part in draws.rand_augment]
            everything = np.ones(len(indices), dtype=bool)
            yield _Planned(tuple(feeds), indices, everything, draws.erase, int(places[0]))

    return Loader(_bind(_train_graph, config, device, recipe=recipe), plan(), manifest, device)


def eval_loader(
    manifest: Manifest, batches: Iterable[tuple[np.ndarray, np.ndarray]], config: DataConfig, device: torch.device
) -> Loader:
    """Evaluation batches: (images [B], whether each counts [B]) as ``sampler.eval_batches`` gives them."""

    def plan() -> Iterator[_Planned]:
        for indices, valid in batches:
            resized, offset = _eval_geometry(manifest.sizes[indices], config.image_size, config.crop_pct)
            yield _Planned((resized, offset), indices, valid)

    return Loader(_bind(_eval_graph, config, device), plan(), manifest, device)


def _eval_geometry(sizes: np.ndarray, image_size: int, crop_pct: float) -> tuple[np.ndarray, np.ndarray]:
    """torchvision's Resize and CenterCrop in whole pixels: resized [B, 2], offset of the crop [B, 2].

    The shorter side becomes floor(image_size / crop_pct), the longer one keeps the aspect, rounded down; the crop's
    offset is rounded as Python rounds (half to even).
    """
    short = int(np.floor(image_size / crop_pct))
    resized = short * sizes.astype(np.int64) // sizes.min(axis=1, keepdims=True)
    offset = np.round((resized - image_size) / 2)
    return resized.astype(np.float32), offset.astype(np.int32)


def _bind(graph: Any, config: DataConfig, device: torch.device, **arguments: Any) -> Any:
    """The pipeline function with everything but its source."""
    on_gpu = config.device == "gpu" or (config.device == "auto" and device.type == "cuda")
    if on_gpu and device.type != "cuda":
        raise ValueError("data.device is gpu, but this rank trains on the CPU; set data.device to auto or cpu")

    def build(source: Any) -> Any:
        return graph(
            source=source,
            config=config,
            decoder="mixed" if on_gpu else "cpu",
            **arguments,
            batch_size=4096,  # only an upper bound: each batch has the size that the source gives it
            num_threads=config.num_threads,
            device_id=device.index if on_gpu else None,
            prefetch_queue_depth=config.prefetch,
            exec_dynamic=True,
        )

    return build


@pipeline_def(enable_conditionals=True)
def _train_graph(source: Any, config: DataConfig, decoder: str, recipe: Recipe) -> Any:
    num_layers = recipe.rand_augment.num_layers if recipe.rand_augment else 0
    affine = recipe.config.affine
    path, start, shape, flip, *rest = fn.external_source(
        source=source, num_outputs=4 + (affine is not None) + 3 * num_layers, batch=True
    )
    red, green, blue = (round(255 * channel) for channel in config.mean)
    size = config.image_size
    images = fn.decoders.image_slice(
        fn.io.file.read(path),
        device=decoder,
        output_type=types.RGB,
        start=start,
        shape=shape,
        axes=[0, 1],
        adjust_orientation=False,  # as Pillow
        jpeg_fancy_upsampling=True,
    )
    images = fn.resize(images, size=[size, size], interp_type=_INTERPOLATION[config.interpolation], **_RESIZE)
    images = fn.flip(images, horizontal=flip)
    if affine is not None:
        images = warp(images, rest.pop(0), fill=affine.fill)
    for _ in range(num_layers):
        operator, strength, matrix, *rest = rest
        images = apply_layer(images, operator, strength, matrix, fill=(red, green, blue))
    return _normalise(images, config)


@pipeline_def
def _eval_graph(source: Any, config: DataConfig, decoder: str) -> Any:
    path, resized, offset = fn.external_source(source=source, num_outputs=3, batch=True)
    images = fn.decoders.image(
        fn.io.file.read(path),
        device=decoder,
        output_type=types.RGB,
        adjust_orientation=False,
        jpeg_fancy_upsampling=True,
    )
    # Pillow resizes the columns, rounds to 8 bits, then resizes the rows. So do we: one pass would differ by ones.
    height = images.shape(dtype=types.FLOAT)[0]
    how = {"interp_type": _INTERPOLATION[config.interpolation], **_RESIZE}
    images = fn.resize(images, size=fn.stack(height, resized[1]), **how)
    images = fn.resize(images, size=resized, **how)
    images = fn.slice(images, start=offset, shape=[config.image_size] * 2, axes=[0, 1])
    return _normalise(images, config)


def _normalise(images: Any, config: DataConfig) -> Any:
    return fn.crop_mirror_normalize(
        images,
        dtype=types.FLOAT,
        output_layout="CHW",
        mean=[255 * channel for channel in config.mean],
        std=[255 * channel for channel in config.std],
    )
