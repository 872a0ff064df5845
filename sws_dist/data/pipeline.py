"""Build the DALI pipelines for training and evaluation. One definition serves DALI's CPU and GPU backends.

A Python source gives DALI each batch's encoded images and draws. DALI decodes, resizes, augments and normalises them in
its own threads, ahead of the training step. Nothing random happens inside DALI.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types

from sws_dist.config.schema import MAX_BATCH, AffineConfig, DataConfig
from sws_dist.data.bad_images import BadImages
from sws_dist.data.decoder import DECODER_ARGUMENTS, decode_window
from sws_dist.data.draws import Draws, Recipe
from sws_dist.data.loader import BatchPlan, BuildPipeline, Loader
from sws_dist.data.manifest import Manifest
from sws_dist.data.randaugment import apply_layer, warp
from sws_dist.data.resize import Resize, ResizeCrops, build_resize, build_resize_crops
from sws_dist.data.sampler import TrainOrder

_THIN = 4
"""Images whose longer side is more than this many times the shorter one are cut before they are resized."""
_FILTER_REACH = 2
"""The bicubic filter reads this many pixels beyond an edge: of the file, or of the result where that is smaller."""


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
    """Build the loader of training batches.

    Args:
        manifest: the images.
        order: the image at each position of the stream.
        positions: for each batch the positions [B] of its images, rising; all crops of an image are in one batch.
        recipe: draws what is done to each image.
        seed: of the draws.
        config: image size, normalisation, and how DALI works.
        device: where the batches are moved to.
        bad: collects the unreadable images.

    Raises:
        ValueError: a GPU setting on a rank without a GPU.
    """

    num_crops = recipe.config.num_crops

    def plan(places: np.ndarray, indices: np.ndarray) -> BatchPlan:
        """Plan the crops of n files: at ``places`` [n, C] of the stream, ``indices`` [n] of the manifest."""
        assert (places[:, 0] % num_crops == 0).all(), "an image without its first crops"
        draws = recipe.draw(seed, places.ravel(), manifest.sizes_of(indices).repeat(num_crops, axis=0))
        erase = None if draws.erase is None else draws.erase.reshape(*places.shape, 4)
        return BatchPlan(indices, np.ones(len(indices), dtype=bool), _train_feeds(draws, num_crops), places, erase)

    def substitute(bad_one: BatchPlan, attempt: int) -> BatchPlan:
        assert bad_one.positions is not None
        other = order.substitute(int(bad_one.positions[0, 0]), attempt)
        return plan(bad_one.positions, np.array([other]))

    def plans() -> Iterator[BatchPlan]:
        return (plan(places.reshape(-1, num_crops), order.images(places)[::num_crops]) for places in positions)

    build_pipeline = _pipeline_builder(_train_graph, build_resize_crops, manifest, config, device, recipe=recipe)
    bad = BadImages() if bad is None else bad
    return Loader(build_pipeline, plans, manifest, config.image_size, device, bad, substitute, order.epoch_size)


def _train_feeds(draws: Draws, num_crops: int) -> tuple[np.ndarray, ...]:
    """Arrange the draws of n * ``num_crops`` crops as the training graph reads them, each [n, ...].

    The box to decode of each file comes first, then crop by crop: its window in the box, flip and augmentation.
    """
    box_start, box_shape = _bounding_boxes(draws, num_crops)
    arrays = [draws.crop_start - box_start.repeat(num_crops, axis=0), draws.crop_shape, draws.flip]
    if draws.affine is not None:
        arrays.append(draws.affine)
    if draws.operations is not None:
        for layer in range(draws.operations.operator.shape[1]):
            arrays += [part[:, layer] for part in draws.operations]
    crops = [np.ascontiguousarray(array[crop::num_crops]) for crop in range(num_crops) for array in arrays]
    return (box_start, box_shape, *crops)


def _bounding_boxes(draws: Draws, num_crops: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the smallest box that holds all windows of each file: [n, 2] int32 top and left, height and width."""
    start, shape = (array.reshape(-1, num_crops, 2) for array in (draws.crop_start, draws.crop_shape))
    first = start.min(axis=1)
    return first, (start + shape).max(axis=1) - first


def eval_loader(
    manifest: Manifest,
    batches: Sequence[tuple[np.ndarray, np.ndarray]],
    config: DataConfig,
    device: torch.device,
    bad: BadImages | None = None,
) -> Loader:
    """Build the loader of evaluation batches, for any number of passes.

    Args:
        manifest: the images.
        batches: for each batch its images [B] and whether each counts [B], as ``sampler.eval_batches`` returns them.
        config, device, bad: as for ``train_loader``.

    Raises:
        ValueError: a GPU setting on a rank without a GPU.
    """

    def plans() -> Iterator[BatchPlan]:
        for indices, valid in batches:
            yield BatchPlan(
                indices,
                valid,
                _eval_geometry(manifest.sizes_of(indices), config),
            )

    build_pipeline = _pipeline_builder(_eval_graph, build_resize, manifest, config, device)
    bad = BadImages() if bad is None else bad
    return Loader(build_pipeline, plans, manifest, config.image_size, device, bad)


def _eval_geometry(sizes: np.ndarray, config: DataConfig) -> tuple[np.ndarray, ...]:
    """Compute the region of each file that torchvision's Resize and CenterCrop keep.

    The shorter side becomes floor(image_size / crop_pct). The longer one keeps the aspect ratio and is rounded down,
    or with ``squash`` becomes as long as the shorter one. The crop's offset is rounded as Python rounds, half to even.

    Of an image that is long and thin only the surroundings of this region are decoded and resized: all of a file of 1 x
    60,000 pixels would become 256 x 15 million.

    Args:
        sizes: [B, 2] height and width of the files.

    Returns:
        [B, 2] int32 top and left, and height and width of the window to decode; [B, 2] float32 start and end of the
        region that is resized to ``image_size``, as shares of the window.
    """
    image_size, short = config.image_size, int(np.floor(config.image_size / config.crop_pct))
    kept = sizes.astype(np.int64)
    resized = (
        np.full_like(kept, short) if config.crop_mode == "squash" else short * kept // kept.min(axis=1, keepdims=True)
    )
    offset = np.round((resized - image_size) / 2)
    scale = sizes / resized
    first, last = offset * scale, (offset + image_size) * scale
    reach = np.ceil(_FILTER_REACH * np.maximum(scale, 1)) + 1
    is_thin = resized.max(axis=1, keepdims=True) > _THIN * short
    start = np.where(is_thin, np.maximum(np.floor(first - reach), 0), 0)
    end = np.where(is_thin, np.minimum(np.ceil(last + reach), sizes), sizes)
    shape = end - start
    region = (first - start) / shape, (last - start) / shape
    return start.astype(np.int32), shape.astype(np.int32), *(edge.astype(np.float32) for edge in region)


def _pipeline_builder(
    graph: Callable[..., Any],
    build_resizing: Callable[..., Any],
    manifest: Manifest,
    config: DataConfig,
    device: torch.device,
    **arguments: Any,
) -> BuildPipeline:
    """Return a function that builds the pipeline of ``graph`` from its source and the number of prefetched batches."""
    on_gpu = config.device == "gpu" or (config.device == "auto" and device.type == "cuda")
    if on_gpu and device.type != "cuda":
        raise ValueError("data.device is gpu, but this rank trains on the CPU; set data.device to auto or cpu")
    decoder: dict[str, Any] = {"device": "mixed" if on_gpu else "cpu", **DECODER_ARGUMENTS}
    if config.hw_decoder_load is not None:
        if not on_gpu:
            raise ValueError("data.hw_decoder_load: there is no GPU decoder on the CPU; set it to null")
        decoder["hw_decoder_load"] = config.hw_decoder_load

    def build(source: Any, prefetch: int = config.prefetch) -> Any:
        pipeline = graph(
            source=source,
            config=config,
            decoder=decoder,
            resize=build_resizing(config.interpolation, config.image_size, on_gpu, config.num_threads),
            from_files=manifest.spans is None,
            **arguments,
            batch_size=MAX_BATCH,  # each batch has the size that the source gives it
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
    source: Any, config: DataConfig, decoder: dict[str, Any], resize: ResizeCrops, from_files: bool, recipe: Recipe
) -> Any:
    """Decode the box of each image that holds its crops; resize, flip and augment each crop."""
    num_crops, affine = recipe.config.num_crops, recipe.config.affine
    num_layers = recipe.policy.num_layers if recipe.policy else 0
    of_crop = 3 + (affine is not None) + 3 * num_layers  # feeds
    encoded, start, shape, *feeds = fn.external_source(source=source, num_outputs=3 + num_crops * of_crop, batch=True)
    encoded = _read_files(encoded) if from_files else encoded
    decoded = decode_window(encoded, decoder, start, shape)
    crops = resize(decoded, feeds[::of_crop], feeds[1::of_crop])
    augmented = [
        _augment(crop, feeds[number * of_crop + 2 : (number + 1) * of_crop], config, affine)
        for number, crop in enumerate(crops)
    ]
    if num_crops == 1:
        return _normalise(augmented[0], config)
    return _normalise(fn.stack(*augmented, axis_name="F"), config, "FCHW")


def _read_files(paths: Any) -> Any:
    """Read files. By default DALI maps them, and one that is cut meanwhile ends the process with SIGBUS."""
    return fn.io.file.read(paths, dont_use_mmap=True)


def _augment(images: Any, feeds: Sequence[Any], config: DataConfig, affine: AffineConfig | None) -> Any:
    """Flip images and apply the operations of their recipe, as ``_train_feeds`` arranges them."""
    flip, *feeds = feeds
    images = fn.flip(images, horizontal=flip)
    if affine is not None:
        matrix, *feeds = feeds
        images = warp(images, matrix, fill=affine.fill)
    red, green, blue = (round(255 * channel) for channel in config.mean)
    while feeds:
        operator, strength, matrix, *feeds = feeds
        images = apply_layer(images, operator, strength, matrix, fill=(red, green, blue))
    return images


@pipeline_def
def _eval_graph(source: Any, config: DataConfig, decoder: dict[str, Any], resize: Resize, from_files: bool) -> Any:
    """Decode a window of each image, and resize the region of it that is evaluated."""
    encoded, start, shape, *region = fn.external_source(source=source, num_outputs=5, batch=True)
    encoded = _read_files(encoded) if from_files else encoded
    images = decode_window(encoded, decoder, start, shape)
    images = resize(images, *region)
    return _normalise(images, config)


def _normalise(images: Any, config: DataConfig, layout: str = "CHW") -> Any:
    """Subtract the mean, divide by the standard deviation: uint8 with the channel last -> float32 in ``layout``."""
    return fn.crop_mirror_normalize(
        images,
        dtype=types.FLOAT,
        output_layout=layout,
        mean=[255 * channel for channel in config.mean],
        std=[255 * channel for channel in config.std],
    )
