"""Score a model, counting every image exactly once on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sws_dist.data.loader import Batch
from sws_dist.distributed.collectives import sum_over_ranks
from sws_dist.errors import RunError


@dataclass(frozen=True)
class Scores:
    """Scores over ``images`` images: top-1 and top-5 as shares in [0, 1], and the mean cross-entropy."""

    top1: float
    top5: float
    loss: float
    images: int


@dataclass(frozen=True)
class Predictions:
    """Logits of this rank's images, each once: ``indices`` [n] in the manifest, ``logits`` [n, classes] float32."""

    indices: np.ndarray
    logits: np.ndarray


@torch.no_grad()
def evaluate(
    model: Callable[[Tensor], Tensor],
    batches: Iterable[Batch],
    dtype: torch.dtype,
    predictions: list[Predictions] | None = None,
) -> Scores:
    """Score all ranks' ``batches``. A collective.

    Sums are kept in float64 and added up over the ranks once, at the end.

    Args:
        model: [B, 3, H, W] -> logits [B, classes].
        dtype: of the model's input.
        predictions: collects this rank's logits, if given.

    Raises:
        RunError: none of the images can be read.
    """
    sums: Tensor | None = None
    for batch in batches:
        logits = model(batch.images.to(dtype)).float()
        valid = torch.from_numpy(batch.valid).to(logits.device)
        sums = _sums(logits, batch.labels, valid) + (0 if sums is None else sums)
        if predictions is not None:
            predictions.append(Predictions(batch.indices[batch.valid], logits[valid].cpu().numpy()))
    assert sums is not None, "an evaluation without batches"
    top1, top5, loss, images = sum_over_ranks(sums).tolist()
    if not images:
        raise RunError("none of the images to be scored can be read; is the data still there?")
    return Scores(top1 / images, top5 / images, loss / images, int(images))


def _sums(logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
    """Sum up one batch: [hits in the first, hits in the first five, loss, images], float64."""
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    loss = F.cross_entropy(logits, labels, reduction="none")
    columns = torch.stack(
        [best[:, 0].double(), best.any(dim=1).double(), loss.double(), torch.ones_like(loss).double()]
    )
    return (columns * valid).sum(dim=1)
