"""DALI pipelines for training and evaluation; one definition serves DALI's CPU and GPU backends.

A Python source hands DALI each batch's encoded images and draws; DALI decodes, resizes, augments and normalises in
its own threads, ahead of the training step. Nothing random happens inside DALI.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali import math as dali_math

from sws_dist.config.schema import DataConfig
from sws_dist.data.bad_images import BadImages
from sws_dist.data.draws import Recipe
from sws_dist.data.loader import Build, Loader, Plan
from sws_dist.data.manifest import Manifest
from sws_dist.data.randaugment import apply_layer, warp
from sws_dist.data.resize import Resize, resizer
from sws_dist.data.sampler import TrainOrder

_DECODE = {"output_type": types.RGB, "adjust_orientation": False, "jpeg_fancy_upsampling": True}  # as Pillow


def train_loader(
    manifest: Manifest,
    order: TrainOrder,
    positions: Iterable[np.ndarray],
    recipe: Recipe,
    seed: int,
    config: DataConfig,
    device: torch.device,
    bad: BadImages | None = None,
) -> Loader:
    """Training batches, one for each item of ``positions``: rising stream positions [B]."""

    def plan(places: np.ndarray, indices: np.ndarray) -> Plan:
        draws = recipe.draw(seed, places, manifest.sizes[indices])
        feeds: list[Any] = [draws.crop_start, draws.crop_shape, draws.flip]
        if draws.affine is not None:
            feeds.append(draws.affine)
        if draws.operations is not None:
            for layer in range(draws.operations.operator.shape[1]):
                feeds += [np.ascontiguousarray(part[:, layer]) for part in draws.operations]
        return Plan(indices, np.ones(len(indices), dtype=bool), tuple(feeds), places, draws.erase)

    def substitute(bad_one: Plan, attempt: int) -> Plan:
        assert bad_one.positions is not None
        other = order.substitute(int(bad_one.positions[0]), attempt)
        return plan(bad_one.positions, np.array([other]))

    def plans() -> Iterator[Plan]:
        return (plan(places, order.images(places)) for places in positions)

    build = _builder(_train_graph, manifest, config, device, recipe=recipe)
    bad = BadImages() if bad is None else bad
    return Loader(build, plans, manifest, config.image_size, device, bad, substitute, order.epoch_size)


def eval_loader(
    manifest: Manifest,
    batches: Sequence[tuple[np.ndarray, np.ndarray]],
    config: DataConfig,
    device: torch.device,
    bad: BadImages | None = None,
) -> Loader:
    """Evaluation batches: (images [B], whether each counts [B]) as ``sampler.eval_batches`` gives them; any number of
    passes."""

    def plans() -> Iterator[Plan]:
        for indices, valid in batches:
            resized, offset = _eval_geometry(manifest.sizes[indices], config.image_size, config.crop_pct)
            yield Plan(indices, valid, (resized, offset))

    build = _builder(_eval_graph, manifest, config, device)
    bad = BadImages() if bad is None else bad
    return Loader(build, plans, manifest, config.image_size, device, bad)


def _eval_geometry(sizes: np.ndarray, image_size: int, crop_pct: float) -> tuple[np.ndarray, np.ndarray]:
    """torchvision's Resize and CenterCrop in whole pixels: resized [B, 2], offset of the crop [B, 2].

    The shorter side becomes floor(image_size / crop_pct), the longer one keeps the aspect, rounded down; the crop's
    offset is rounded as Python rounds (half to even).
    """
    short = int(np.floor(image_size / crop_pct))
    resized = short * sizes.astype(np.int64) // sizes.min(axis=1, keepdims=True)
    offset = np.round((resized - image_size) / 2)
    return resized.astype(np.float32), offset.astype(np.int32)


def _builder(
    graph: Callable[..., Any], manifest: Manifest, config: DataConfig, device: torch.device, **arguments: Any
) -> Build:
    """The pipeline function with everything but its source and the number of batches it works ahead."""
    on_gpu = config.device == "gpu" or (config.device == "auto" and device.type == "cuda")
    if on_gpu and device.type != "cuda":
        raise ValueError("data.device is gpu, but this rank trains on the CPU; set data.device to auto or cpu")
    decoder: dict[str, Any] = {"device": "mixed" if on_gpu else "cpu", **_DECODE}
    if config.hw_decoder_load is not None:
        if not on_gpu:
            raise ValueError("data.hw_decoder_load: there is no GPU decoder on the CPU; set it to null")
        decoder["hw_decoder_load"] = config.hw_decoder_load

    def build(source: Any, prefetch: int = config.prefetch) -> Any:
        pipeline = graph(
            source=source,
            config=config,
            decoder=decoder,
            resize=resizer(config.interpolation, on_gpu, config.num_threads),
            from_files=manifest.spans is None,
            **arguments,
            batch_size=4096,  # only an upper bound: each batch has the size that the source gives it
            num_threads=config.num_threads,
            device_id=device.index if on_gpu else None,
            prefetch_queue_depth=prefetch,
            exec_dynamic=True,
        )
        pipeline.build()
        return pipeline

    return build


@pipeline_def(enable_conditionals=True)
def _train_graph(
    source: Any, config: DataConfig, decoder: dict[str, Any], resize: Resize, from_files: bool, recipe: Recipe
) -> Any:
    num_layers = recipe.policy.num_layers if recipe.policy else 0
    affine = recipe.config.affine
    num_outputs = 4 + (affine is not None) + 3 * num_layers
    encoded, start, shape, flip, *rest = fn.external_source(source=source, num_outputs=num_outputs, batch=True)
    red, green, blue = (round(255 * channel) for channel in config.mean)
    size = config.image_size
    encoded = fn.io.file.read(encoded) if from_files else encoded
    images = _decode(encoded, decoder, start, shape)
    images = resize(images, types.Constant([size, size], dtype=types.FLOAT, shape=[2], device="cpu"))
    images = fn.flip(images, horizontal=flip)
    if affine is not None:
        images = warp(images, rest.pop(0), fill=affine.fill)
    for _ in range(num_layers):
        operator, strength, matrix, *rest = rest
        images = apply_layer(images, operator, strength, matrix, fill=(red, green, blue))
    return _normalise(images, config)


@pipeline_def
def _eval_graph(source: Any, config: DataConfig, decoder: dict[str, Any], resize: Resize, from_files: bool) -> Any:
    encoded, resized, offset = fn.external_source(source=source, num_outputs=3, batch=True)
    encoded = fn.io.file.read(encoded) if from_files else encoded
    images = _decode(encoded, decoder)
    images = resize(images, resized)
    images = fn.slice(images, start=offset, shape=[config.image_size] * 2, axes=[0, 1])
    return _normalise(images, config)


def _decode(encoded: Any, decoder: dict[str, Any], start: Any = None, shape: Any = None) -> Any:
    """A window of each image, or all of it.

    A file whose header the decoder cannot parse, or a window outside the image, makes DALI 2.4's decoder throw while
    its threads still work on the batch, which is a segmentation fault as often as an error. So the header is parsed
    by an operator of its own before, and windows are cut to the image that is really there.
    """
    size = fn.peek_image_shape(encoded, dtype=types.INT32, adjust_orientation=False)[:2]
    if start is None:
        start, shape = size * 0, size
    start = dali_math.min(start, size - 1)
    shape = dali_math.min(shape, size - start)
    return fn.decoders.image_slice(encoded, start=start, shape=shape, axes=[0, 1], **decoder)


def _normalise(images: Any, config: DataConfig) -> Any:
    return fn.crop_mirror_normalize(
        images,
        dtype=types.FLOAT,
        output_layout="CHW",
        mean=[255 * channel for channel in config.mean],
        std=[255 * channel for channel in config.std],
    )
