"""Hold out a share of the training images for validation, the same at each start."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np

from sws_dist.data.manifest import Manifest


def hold_out(images: Manifest, share: float, seed: int) -> tuple[Manifest, Manifest]:
    """Split a list of images into training and validation images, class by class.

    A hash of ``seed`` and an image's path decides. So the split depends neither on the order of the list nor on ranks,
    and nearly all images stay on their side when others are added.

    Args:
        share: of each class's images, rounded; of two images or more at least one goes to each side.

    Returns:
        Training and validation images, both with all classes. The training images carry the bad files and the notes.

    Raises:
        ValueError: no class has two images.
    """
    draws = np.array([_draw(seed, path) for path in images.paths], dtype=np.uint64)
    # What a list repeats is one image: it must not stand on both sides.
    drawn, first = np.unique(draws, return_index=True)
    labels = images.labels[first]
    counts = np.bincount(labels, minlength=len(images.classes))
    held = np.where(counts > 1, np.clip(np.rint(share * counts), 1, counts - 1), 0).astype(np.int64)
    if not held.any():
        raise ValueError(
            f"data.val_share {share:g}: no class of {images.folder} has two images, one of them to hold out"
        )
    order = np.argsort(labels, kind="stable")  # by class, and by draw within it
    place = np.arange(len(drawn)) - np.repeat(np.cumsum(counts) - counts, counts)
    is_held = np.isin(draws, drawn[order[place < np.repeat(held, counts)]])
    note = (
        f"{is_held.sum()} of {len(images)} images are held out for validation (data.val_share {share:g} of each class)"
    )
    if single := [images.classes[label] for label in np.flatnonzero(counts == 1)]:
        note += f"; none of the {len(single)} class(es) with a single image: {', '.join(single[:5])}"
    train, val = (
        dataclasses.replace(images, **images.select_rows(rows), sizes=images.sizes[rows])
        for rows in (np.flatnonzero(~is_held), np.flatnonzero(is_held))
    )
    return dataclasses.replace(train, notes=(*images.notes, note)), dataclasses.replace(val, bad=(), notes=())


def _draw(seed: int, path: str) -> int:
    return int.from_bytes(
        hashlib.blake2b(f"{seed} {path}".encode(errors="surrogateescape"), digest_size=8).digest(), "big"
    )
