"""Keep the k largest of a teacher's logits in fp16, and build logits of all classes from them again."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

_LEAST = torch.finfo(torch.float16).min


class TopK(NamedTuple):
    """Hold what is kept of the logits of B images over C classes."""

    values: np.ndarray
    """[B, C] float16 where all classes are kept: log-probabilities in the order of the classes. Else [B, k + 1]: those
    of the k most likely classes, and after them the one that each of the others gets."""
    classes: np.ndarray | None
    """[B, k], the smallest unsigned type that fits: the k most likely classes. None where all are kept."""


def keep_top_k(logits: Tensor, k: int, tau: float) -> TopK:
    """Keep the k most likely classes of logits [B, C], as log-probabilities.

    A log-probability is near 0 where it weighs most, and fp16 is finest there. Where k is below C, the probability that
    the other classes have together at temperature ``tau`` is spread evenly over them. With m that probability, an
    image's KL divergence differs from the untruncated one by at most tau^2 m (log(C - k) + the spread of the student's
    log-probabilities among those classes), and its gradient with respect to the student's logits by at most 2 tau m
    (sum of absolute values).
    """
    logp = logits.float().log_softmax(dim=1)
    num_classes = logp.shape[1]
    if k == num_classes:
        return TopK(_to_fp16(logp), None)
    values, classes = logp.topk(k, dim=1)
    others = logp.scatter(1, classes, -torch.inf)
    share = tau * (torch.logsumexp(others / tau, dim=1, keepdim=True) - math.log(num_classes - k))
    return TopK(_to_fp16(torch.cat([values, share], dim=1)), classes.cpu().numpy().astype(index_dtype(num_classes)))


def build_logits(kept: TopK, num_classes: int, device: torch.device) -> Tensor:
    """Build logits [B, C] float32 on ``device`` from what ``keep_top_k`` returned."""
    values = torch.from_numpy(kept.values).to(device).float()
    if kept.classes is None:
        return values
    classes = torch.from_numpy(kept.classes.astype(np.int64)).to(device)
    return values[:, -1:].repeat(1, num_classes).scatter_(1, classes, values[:, :-1])


def index_dtype(count: int) -> np.dtype:
    """Return the smallest unsigned type that holds the numbers from 0 to ``count`` - 1."""
    return np.min_scalar_type(count - 1)


def _to_fp16(logp: Tensor) -> np.ndarray:
    # Not below fp16's range: the KL divergence would multiply a probability of 0 by minus infinity.
    return logp.clamp(min=_LEAST).half().cpu().numpy()
