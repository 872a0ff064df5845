"""Follow a data set that was moved while a run was stopped: the run goes on with its own list, at the new place."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np

from sws_dist.config.resume import changed_keys
from sws_dist.config.schema import RunConfig
from sws_dist.data.manifest import Manifest
from sws_dist.errors import ConfigError

PLACES = ("data.root", "data.train_split", "data.val_split", "data.classes")
"""The keys that say where the images are and what they are called."""


def is_data_moved(own: RunConfig, now: RunConfig, train: Manifest) -> bool:
    """Return True if a config leads to another place than the run's own did.

    Args:
        train: the run's own list of training images. A relative ``data.root`` leads elsewhere in another folder.
    """
    root = Path(os.path.abspath(now.data.root))
    return not changed_keys(own, now).keys().isdisjoint(PLACES) or (
        not Path(now.data.root).is_absolute() and not train.folder.is_relative_to(root)
    )


def follow_move(own: tuple[Manifest, Manifest], now: tuple[Manifest, Manifest]) -> tuple[Manifest, Manifest]:
    """Return a run's own lists of training and validation images, read from where the new ones are.

    Raises:
        ConfigError: there are other images, by names, sizes or labels.
    """
    for before, after in zip(own, now, strict=True):
        difference = _first_difference(before, after)
        if difference is not None:
            raise ConfigError(
                f"{after.folder}: not the images that this run began with, from {before.folder} ({difference}); a run "
                "goes on only with the same images. Set data.root to where they are, or begin a new run"
            )
    train, val = (dataclasses.replace(before, folder=after.folder) for before, after in zip(own, now, strict=True))
    return train, val


def _first_difference(before: Manifest, after: Manifest) -> str | None:
    """Say how two lists of images differ; None if they do not."""
    if len(before) != len(after):
        return f"{len(after)} images instead of {len(before)}"
    if tuple(before.classes) != tuple(after.classes):
        return "other classes"
    names = zip(before.paths, after.paths, strict=True)
    renamed = next(((one, other) for one, other in names if one != other), None)
    if renamed is not None:
        return f"{renamed[1]} instead of {renamed[0]}"
    resized = np.flatnonzero((np.asarray(before.sizes) != np.asarray(after.sizes)).any(axis=1))
    if len(resized):
        first = int(resized[0])
        (old_height, old_width), (height, width) = before.sizes[first].tolist(), after.sizes[first].tolist()
        return f"{before.paths[first]} has {height} x {width} pixels instead of {old_height} x {old_width}"
    if not np.array_equal(before.labels, after.labels):
        return "other labels"
    if tuple(before.shards) != tuple(after.shards) or not _equal_spans(before.spans, after.spans):
        return "other shards"
    return None


def _equal_spans(one: np.ndarray | None, other: np.ndarray | None) -> bool:
    return one is other or (one is not None and other is not None and np.array_equal(one, other))
