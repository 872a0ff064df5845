"""Review an evaluation: which images have the largest losses, and which classes are taken for which."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sws_dist.data.loader import Batch
from sws_dist.data.mixup import denormalise
from sws_dist.distributed.collectives import gather_on_rank0, gather_rows

NUM_WORST = 16


class Guesses(NamedTuple):
    """A model's guesses for n images, and how wrong they are."""

    losses: Tensor
    """[n] float32, cross-entropy; -1 for an image that does not count."""
    labels: Tensor
    """[n] int64."""
    guesses: Tensor
    """[n] int64: the class with the largest logit."""
    indices: Tensor
    """[n] int64: the images' places in the manifest."""
    images: Tensor
    """[n, 3, S, S]."""

    def take(self, rows: Tensor) -> Guesses:
        """Return the guesses at ``rows``, [m] int64 or [n] bool."""
        return Guesses(*(column[rows] for column in self))

    def worst(self) -> Guesses:
        """Return the guesses with the largest losses, the largest first."""
        return self.take(self.losses.topk(min(NUM_WORST, len(self.losses))).indices)


class Review:
    """Collect what an evaluation's batches show, on this rank.

    Args:
        mean, std: how the images are normalised.
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        self._mean, self._std = mean, std
        self._worst: Guesses | None = None
        self._pairs: list[Tensor] = []

    def add(self, batch: Batch, logits: Tensor) -> None:
        """Add a batch and its logits, [B, classes] float32. Images that do not count are left out."""
        valid = torch.from_numpy(batch.valid).to(logits.device)
        indices = torch.from_numpy(batch.indices).to(logits.device)
        guesses = logits.argmax(dim=1)
        losses = F.cross_entropy(logits, batch.labels, reduction="none").nan_to_num(nan=torch.inf)
        losses = losses.masked_fill(~valid, -1.0)
        self._pairs.append(torch.stack([batch.labels, guesses])[:, valid])
        worst = Guesses(losses, batch.labels, guesses, indices, batch.images).worst()
        if self._worst is not None:
            columns = zip(self._worst, worst, strict=True)
            worst = Guesses(*(torch.cat(pair) for pair in columns)).worst()
        self._worst = worst

    def gather_worst(self) -> Guesses | None:
        """Return the images with the largest losses of all ranks on rank 0, as pixels (uint8). A collective.

        Only they are sent.
        """
        assert self._worst is not None
        own = torch.full([NUM_WORST], -1.0, device=self._worst.losses.device)
        own[: len(self._worst.losses)] = self._worst.losses
        everywhere = gather_rows(own).flatten()
        least = everywhere.topk(NUM_WORST).values[-1].clamp(min=0)
        due = self._worst.take(self._worst.losses >= least)
        pixels = denormalise(due.images, self._mean, self._std)
        found = gather_on_rank0([column.cpu() for column in due._replace(images=pixels)])
        if found is None:
            return None
        return Guesses(*(torch.cat(columns) for columns in zip(*found, strict=True))).worst()

    def gather_confusion(self, num_classes: int) -> np.ndarray | None:
        """Count on rank 0 how many images of each label are taken for each class. A collective.

        Returns:
            [labels, guesses] int64; None on other ranks.
        """
        found = gather_on_rank0(torch.cat(self._pairs, dim=1).cpu().numpy())
        if found is None:
            return None
        labels, guesses = np.concatenate(found, axis=1)
        return np.bincount(labels * num_classes + guesses, minlength=num_classes**2).reshape(num_classes, num_classes)
