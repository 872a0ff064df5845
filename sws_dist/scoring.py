"""Score a model: every image counts exactly once, on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sws_dist.atomic import atomic_write
from sws_dist.data.loader import Batch
from sws_dist.data.manifest import Manifest
from sws_dist.distributed.collectives import sum_over_ranks
from sws_dist.errors import RunError


@dataclass(frozen=True)
class Scores:
    """Scores of a model over ``images`` images."""

    top1: float
    """Share of the images, in [0, 1], whose label has the largest logit."""
    top5: float
    """Share of the images whose label is among the five largest logits."""
    loss: float
    """Mean cross-entropy."""
    images: int


@dataclass(frozen=True)
class Predictions:
    """One rank's logits, each image once."""

    indices: np.ndarray
    """[n], of the images in the manifest."""
    logits: np.ndarray
    """[n, classes], float32."""

    @classmethod
    def of(cls, batch: Batch, logits: Tensor) -> Predictions:
        """Keep the logits of the images of a batch that count."""
        return cls(batch.indices[batch.valid], logits.cpu().numpy()[batch.valid])


@torch.no_grad()
def score_batches(
    model: Callable[[Tensor], Tensor],
    batches: Iterable[Batch],
    dtype: torch.dtype,
    observe: Callable[[Batch, Tensor], None] | None = None,
) -> Scores:
    """Compute top-1, top-5 and loss over the batches of all ranks. A collective.

    Sums are kept in float64 and added up over the ranks once, at the end.

    Args:
        model: maps images [batch, 3, height, width] to logits [batch, classes].
        dtype: of the images that ``model`` takes.
        observe: called with each batch of this rank and its logits, [batch, classes] float32.

    Raises:
        RunError: on every rank; no image could be read.
    """
    sums: Tensor | None = None
    for batch in batches:
        logits = model(batch.images.to(dtype)).float()
        valid = torch.from_numpy(batch.valid).to(logits.device)
        sums = _sums(logits, batch.labels, valid) + (0 if sums is None else sums)
        if observe is not None:
            observe(batch, logits)
    assert sums is not None, "an evaluation without batches"
    top1, top5, loss, images = sum_over_ranks(sums).tolist()
    if not images:
        raise RunError("none of the images to be scored can be read; is the data still there?")
    return Scores(top1 / images, top5 / images, loss / images, int(images))


def _sums(logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
    """Return [hits in the first, hits in the first five, summed loss, images] of one batch, in float64."""
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    loss = F.cross_entropy(logits, labels, reduction="none")
    columns = torch.stack(
        [best[:, 0].double(), best.any(dim=1).double(), loss.double(), torch.ones_like(loss).double()]
    )
    return (columns * valid).sum(dim=1)


def save_predictions(path: str | Path, predictions: Iterable[Predictions], images: Manifest) -> Path:
    """Write arrays ``path``, ``label`` and ``logits`` to an ``.npz`` file, one row an image in the manifest's order."""
    parts = list(predictions)
    indices = np.concatenate([part.indices for part in parts])
    logits = np.concatenate([part.logits for part in parts])
    order = np.argsort(indices)
    rows = indices[order]
    arrays = {"path": np.array([images.paths[i] for i in rows]), "label": images.labels[rows], "logits": logits[order]}

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez(file, **arrays)

    return atomic_write(path, write)
