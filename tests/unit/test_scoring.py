"""Scores against their definitions, each image once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sws_dist.data.loader import Batch
from sws_dist.errors import RunError
from sws_dist.scoring import Predictions, score_batches


def batch(logits: torch.Tensor, labels: torch.Tensor, valid: list[bool], first: int = 0) -> Batch:
    return Batch(logits, labels, np.arange(first, first + len(labels)), np.array(valid))


def test_scores_count_valid_images_only() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(40, 10), torch.randint(10, (40,))
    valid = [True] * 17 + [False] * 3
    batches = [batch(logits[:20], labels[:20], [True] * 20), batch(logits[20:], labels[20:], valid, first=20)]
    predictions: list[Predictions] = []

    def keep(batch: Batch, logits: torch.Tensor) -> None:
        predictions.append(Predictions.of(batch, logits))

    scores = score_batches(lambda images: images, batches, torch.float32, keep)
    logits, labels = logits[:37], labels[:37]
    best = logits.argsort(dim=1, descending=True)
    assert scores.images == 37
    assert scores.top1 == pytest.approx((best[:, 0] == labels).double().mean().item())
    assert scores.top5 == pytest.approx((best[:, :5] == labels[:, None]).any(dim=1).double().mean().item())
    assert scores.loss == pytest.approx(F.cross_entropy(logits, labels).item())
    assert np.concatenate([p.indices for p in predictions]).tolist() == list(range(37))


def test_fewer_than_five_classes() -> None:
    scores = score_batches(lambda x: x, [batch(torch.eye(3), torch.arange(3), [True] * 3)], torch.float32)
    assert (scores.top1, scores.top5) == (1.0, 1.0)


def test_nothing_that_can_be_read_is_an_error() -> None:
    with pytest.raises(RunError, match="none of the images"):
        score_batches(lambda x: x, [batch(torch.eye(3), torch.arange(3), [False] * 3)], torch.float32)
