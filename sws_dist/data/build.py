"""Build the input of a run from its config: image lists, their order, and what reads, draws and mixes them."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from sws_dist.config.schema import DataConfig, RunConfig
from sws_dist.data import manifest, pipeline, sampler
from sws_dist.data.bad_images import BadImages
from sws_dist.data.draws import Recipe
from sws_dist.data.holdout import hold_out
from sws_dist.data.labels import read_classes
from sws_dist.data.loader import Loader
from sws_dist.data.manifest import Manifest
from sws_dist.data.mixup import Mixing
from sws_dist.data.sampler import TrainOrder
from sws_dist.data.tar_shards import SampleKeys

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataParts:
    """The images of a run, their order, and what is drawn for them."""

    train: Manifest
    val: Manifest
    order: TrainOrder
    recipe: Recipe
    mixing: Mixing
    bad_train: BadImages
    bad_val: BadImages
    val_loader: Loader
    num_val_batches: int
    """Of an evaluation on one rank."""


def list_images(config: DataConfig) -> tuple[Manifest, Manifest]:
    """List training and validation images; with ``val_share`` both are of the training split."""
    classes = read_classes(config.classes) if config.classes else None
    keys = SampleKeys(config.image_extensions, config.label_key)
    scan = partial(
        manifest.load_scanned if config.trust_manifest else manifest.scan,
        config.root,
        max_bad_share=config.max_bad_share,
        keys=keys,
        lists=Path(config.lists) if config.lists else None,
    )
    train = scan(config.train_split, classes)
    if config.val_share is not None:
        return hold_out(train, config.val_share, config.val_seed)
    return train, scan(config.val_split, train.classes)


def build_data(
    config: RunConfig, train: Manifest, val: Manifest, rank: int, world_size: int, device: torch.device
) -> DataParts:
    """Build what reads, draws and mixes the images of one rank."""
    bad_val = BadImages(val.bad)
    batches = sampler.eval_batches(len(val), rank, world_size, config.train.eval_batch)
    return DataParts(
        train=train,
        val=val,
        order=build_order(config, train, (rank, world_size)),
        recipe=Recipe(config.augment, config.data.image_size),
        mixing=Mixing(config.augment, len(train.classes), config.train.seed),
        bad_train=BadImages(train.bad),
        bad_val=bad_val,
        val_loader=pipeline.eval_loader(val, batches, config.data, device, bad_val),
        num_val_batches=len(batches),
    )


def build_order(config: RunConfig, images: Manifest, share: tuple[int, int] = (0, 1)) -> TrainOrder:
    """Return the order of the training images.

    Args:
        share: rank and world size: the positions that will be asked for.

    Raises:
        ValueError: a shard window over images that are not in shards.
    """
    shards = None if images.spans is None else images.spans[:, 0]
    window = config.data.shuffle_shards
    if window is not None and shards is None:
        raise ValueError(f"data.shuffle_shards {window}: {images.folder} holds no tar shards; set it to null")
    repeats, crops = config.augment.num_repeats, config.augment.num_crops
    if left := config.train.epochs % crops:
        log.warning(
            f"train.epochs {config.train.epochs} is no multiple of augment.num_crops {crops}: the last pass over the "
            f"images ends after {left} of its {crops} epochs, before it has shown all of them"
        )
    return TrainOrder(len(images), config.train.seed, repeats, crops, shards, window, share)
