"""The teacher (the paper's ancestry model) and the loss ``(1 - alpha) CE + alpha tau^2 KL(teacher || student)``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sws_dist import model_file
from sws_dist.config import DistillConfig
from sws_dist.models import create_model


class LossParts(NamedTuple):
    """Scalars of one micro-batch. ``distill`` is 0 without a teacher."""

    total: Tensor
    labels: Tensor
    distill: Tensor


class Teacher(nn.Module):
    """A frozen classifier that sees the student's images under its own normalisation.

    Kept outside the DeepSpeed engine: it has no gradient, no optimizer state and no place in checkpoints.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float], own: dict[str, Sequence[float]]):
        """mean, std: how the student's images are normalised; own: the teacher's ``mean`` and ``std``."""
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        ours, theirs = torch.tensor([mean, std]), torch.tensor([list(own["mean"]), list(own["std"])])
        # (x * std + mean - mean') / std'  =  x * scale + shift
        self.register_buffer("scale", (ours[1] / theirs[1]).view(1, -1, 1, 1))
        self.register_buffer("shift", ((ours[0] - theirs[0]) / theirs[1]).view(1, -1, 1, 1))
        self.same_pixels = bool(torch.allclose(ours, theirs))

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W], normalised for the student -> logits [B, classes]."""
        return self.model(images if self.same_pixels else images * self.scale + self.shift)


def load_teacher(
    config: DistillConfig,
    num_classes: int,
    classes: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
    image_size: int,
) -> Teacher | None:
    """The configured teacher with its local weights, or None where none is configured.

    Raises:
        ValueError: unknown model, missing or unfit weights, or other labels than the data's.
    """
    if config.teacher is None:
        return None
    if Path(config.teacher).suffix == ".safetensors":
        info, weights = model_file.load(config.teacher)
        if info.num_classes == num_classes and info.classes and list(classes) != info.classes:
            raise ValueError(
                f"distill.teacher {config.teacher}: its {num_classes} classes are named otherwise than the data's"
            )
        model, source = info.build(), config.teacher
        own = {key: info.pixels[key] for key in ("mean", "std")} if info.pixels else {"mean": mean, "std": std}
    else:
        if config.teacher_weights is None:
            raise ValueError(
                f"distill.teacher {config.teacher}: set distill.teacher_weights to a local file of its weights; "
                "nothing is fetched from a hub"
            )
        weights = model_file.load_foreign(config.teacher_weights)
        labels = model_file.num_labels(config.teacher, weights, num_classes)
        model, source = create_model(config.teacher, num_classes=labels), config.teacher_weights
        weights = model_file.filtered(model, weights)
        own = {key: model.pretrained_cfg[key] for key in ("mean", "std")}
    found = getattr(model, "num_classes", num_classes)
    if found != num_classes:
        raise ValueError(
            f"distill.teacher {config.teacher} knows {found} labels, the data has {num_classes}; "
            "fit a teacher to these data first (a run config with a timm model.name does it)"
        )
    model_file.load_into(model, weights, source)
    expected = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if expected is not None and tuple(expected) != (image_size, image_size):
        raise ValueError(
            f"distill.teacher {config.teacher} takes {expected[0]} pixels, data.image_size is {image_size}"
        )
    return Teacher(model, mean, std, own)


class DistillationLoss:
    """Label loss and teacher loss, kept apart for the log.

    ``soft``: tau^2 KL(teacher || student) at temperature tau (Hinton et al. 2015). ``hard``: cross-entropy with
    the teacher's most likely label (DeiT, section 4). ``reduction``: ``batchmean`` divides the KL by the batch,
    ``elements`` by batch x classes, as the paper's released code does.
    """

    def __init__(self, config: DistillConfig) -> None:
        self.config = config

    def __call__(self, logits: Tensor, targets: Tensor, teacher_logits: Tensor | None) -> LossParts:
        """logits, teacher_logits [B, C]; targets [B] class numbers or [B, C] soft labels."""
        logits = logits.float()
        labels = F.cross_entropy(logits, targets)
        if teacher_logits is None:
            return LossParts(labels, labels.detach(), torch.zeros_like(labels.detach()))
        distill = self._teacher_term(logits, teacher_logits.float())
        alpha = self.config.alpha
        # alpha = 1 must not multiply the labels' term by 0: 0 x inf is not a number
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
