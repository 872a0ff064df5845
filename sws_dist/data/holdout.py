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
        Training and validation images, both with all classes. The training images carry the bad files and the notes,
        and repeat what the list repeats.

    Raises:
        ValueError: no class has two images.
    """
    draws = np.array([_draw(seed, path) for path in images.paths], dtype=np.uint64)
    # What a list repeats is one image: it must not stand on both sides. These are sorted by their draws.
    drawn, first = np.unique(draws, return_index=True)
    labels = images.labels[first]
    counts = np.bincount(labels, minlength=len(images.classes))
    held_of_class = np.where(counts > 1, np.clip(np.rint(share * counts), 1, counts - 1), 0).astype(np.int64)
    if not held_of_class.any():
        raise ValueError(
            f"data.val_share {share:g}: no class of {images.folder} has two images, one of them to hold out"
        )
    is_held = _rank_within_class(labels, counts) < held_of_class[labels]
    train = _select(images, np.flatnonzero(~np.isin(draws, drawn[is_held])))
    val = _select(images, np.sort(first[is_held]))  # each once: copies would weigh an image in the score
    note = f"{len(val)} of {len(drawn)} images are held out for validation (data.val_share {share:g} of each class)"
    if repeated := len(images) - len(drawn):
        note += f"; validation has each once, though {repeated} lines of the list repeat an image"
    if single := [images.classes[label] for label in np.flatnonzero(counts == 1)]:
        note += f"; none of the {len(single)} class(es) with a single image: {', '.join(single[:5])}"
    return dataclasses.replace(train, notes=(*images.notes, note)), dataclasses.replace(val, bad=(), notes=())


def _rank_within_class(labels: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return how many images of its own class come before each image.

    Args:
        labels: [N].
        counts: [classes], images of each class.
    """
    by_class = np.argsort(labels, kind="stable")
    begins = np.cumsum(counts) - counts  # of each class in this order
    ranks = np.empty_like(by_class)
    ranks[by_class] = np.arange(len(labels)) - np.repeat(begins, counts)
    return ranks


def _select(images: Manifest, rows: np.ndarray) -> Manifest:
    return dataclasses.replace(images, **images.select_rows(rows), sizes=images.sizes[rows])


def _draw(seed: int, path: str) -> int:
    return int.from_bytes(
        hashlib.blake2b(f"{seed} {path}".encode(errors="surrogateescape"), digest_size=8).digest(), "big"
    )
