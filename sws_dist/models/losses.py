"""Compute the distillation loss ``(1 - alpha) CE + alpha tau^2 KL(teacher || student)``."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sws_dist.config.schema import DistillConfig


class LossParts(NamedTuple):
    """Losses of one micro-batch, all []. ``distill`` is 0 without a teacher."""

    total: Tensor
    labels: Tensor
    distill: Tensor


class DistillationLoss:
    """Combine label loss and teacher loss, which are kept apart for the log.

    ``soft``: tau^2 KL(teacher || student) at temperature tau (Hinton et al. 2015). ``hard``: cross-entropy with
    the teacher's most likely label (DeiT, section 4). ``reduction``: ``batchmean`` divides the KL by the batch,
    ``elements`` by batch x classes, as the paper's released code does.
    """

    def __init__(self, config: DistillConfig) -> None:
        self.config = config

    def __call__(self, logits: Tensor, targets: Tensor, teacher_logits: Tensor | None) -> LossParts:
        """Compute the loss of logits, teacher_logits [B, C]; targets are [B] class numbers or [B, C] soft labels."""
        logits = logits.float()
        labels = F.cross_entropy(logits, targets)
        if teacher_logits is None:
            return LossParts(labels, labels.detach(), torch.zeros_like(labels.detach()))
        distill = self._teacher_term(logits, teacher_logits.float())
        alpha = self.config.alpha
        # alpha = 1 must not multiply the labels' term by 0: 0 x inf is NaN
        total = distill if alpha == 1 else (1 - alpha) * labels + alpha * distill
        return LossParts(total, labels.detach(), distill.detach())

    def _teacher_term(self, logits: Tensor, teacher_logits: Tensor) -> Tensor:
        if self.config.kind == "hard":
            return F.cross_entropy(logits, teacher_logits.argmax(dim=1))
        tau = self.config.tau
        kl = F.kl_div(
            F.log_softmax(logits / tau, dim=1),
            F.log_softmax(teacher_logits / tau, dim=1),
            reduction="sum",
            log_target=True,
        )
        return kl * tau**2 / (logits.numel() if self.config.reduction == "elements" else logits.shape[0])
