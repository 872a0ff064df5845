"""Ask the teacher, the paper's ancestry model: what it says of a micro-batch, and how it is loaded."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from sws_dist.checkpoint.foreign_model import describe_file, describe_timm_folder, is_same_model
from sws_dist.checkpoint.load_model import load_model
from sws_dist.class_names import known_names, own_names
from sws_dist.config.schema import DataConfig, DistillConfig
from sws_dist.data.loader import Batch
from sws_dist.models import create_model
from sws_dist.models.flops import forward_flops
from sws_dist.models.image_size import image_size_arguments, require_image_size

log = logging.getLogger(__name__)

Normalisation = tuple[Sequence[float], Sequence[float]]
"""Mean and standard deviation of each channel."""


class Teacher(Protocol):
    """Something that knows the teacher's logits: the model itself, or a folder of stored ones (``stored.py``)."""

    failure: Exception | None
    """Why this rank's logits cannot be had any more; they are then NaN, so that all ranks stop together."""

    def logits(self, images: Tensor, batch: Batch) -> Tensor:
        """Return the logits [B, classes] of a micro-batch, each image's up to a constant, which no loss sees.

        Args:
            images: [B, 3, H, W], as the student sees them: normalised for the student, erased and mixed.
            batch: what they were made from.
        """


class OnlineTeacher(nn.Module):
    """A frozen classifier that sees the student's images under its own normalisation.

    It is kept outside the DeepSpeed engine: it has no gradient, no optimizer state and no place in checkpoints.

    Args:
        model: the classifier, [B, 3, H, W] -> [B, classes].
        given: how the student's images are normalised.
        own: how the teacher wants them normalised.
    """

    scale: Tensor
    shift: Tensor
    failure: Exception | None = None

    def __init__(self, model: nn.Module, given: Normalisation, own: Normalisation) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        ours, theirs = torch.tensor([list(part) for part in given]), torch.tensor([list(part) for part in own])
        # (x * std + mean - mean') / std'  =  x * scale + shift
        self.register_buffer("scale", (ours[1] / theirs[1]).view(1, -1, 1, 1))
        self.register_buffer("shift", ((ours[0] - theirs[0]) / theirs[1]).view(1, -1, 1, 1))
        self.same_normalisation = bool(torch.allclose(ours, theirs))

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Classify images [B, 3, H, W], normalised for the student: logits [B, classes]."""
        return self.model(images if self.same_normalisation else images * self.scale + self.shift)

    def logits(self, images: Tensor, batch: Batch) -> Tensor:
        """Classify a micro-batch; see ``Teacher.logits``."""
        return self(images)


def load_teacher(config: DistillConfig, classes: Sequence[str], data: DataConfig) -> OnlineTeacher | None:
    """Load the configured teacher with its local weights. Returns None where none is configured.

    Args:
        classes: the labels' names.
        data: how the student's images are normalised, and their size.

    Raises:
        ValueError: unknown model, missing or unfit weights, or other labels than the data's.
    """
    if config.teacher is None:
        return None
    num_classes, size = len(classes), data.image_size
    if is_model_file(config.teacher):
        model = load_model(config.teacher, image_size=size)
        info = describe_file(config.teacher)
        own = (info.preprocessing if info else {}) or {"mean": data.mean, "std": data.std}
    else:
        model = load_model(weights_file(config), config.teacher, image_size=size, use_ema=config.teacher_ema)
        own = model.pretrained_cfg
    if model.num_classes != num_classes:
        raise ValueError(
            f"distill.teacher {config.teacher} knows {model.num_classes} labels, the data has {num_classes}; "
            "fit a teacher to these data first (sws finetune does it)"
        )
    _compare_labels(model, config.teacher, classes)
    require_image_size(model, f"distill.teacher {config.teacher}", size)
    return OnlineTeacher(model, (data.mean, data.std), (own["mean"], own["std"]))


def _compare_labels(model: nn.Module, teacher: str, classes: Sequence[str]) -> None:
    """Check that the labels which a teacher knows are the data's, in their order, as far as their names are known."""
    names = known_names(model, classes)
    if names == tuple(classes):
        return
    if own_names(model) is not None:
        raise ValueError(
            f"distill.teacher {teacher}: its {len(classes)} classes are named otherwise than the data's, or in another "
            "order"
        )
    if names is not None and set(names) == set(classes):
        log.warning(
            f"distill.teacher {teacher}: the data's classes are ImageNet's in another order than timm's models have "
            "them; its labels are taken for the data's all the same, in their order"
        )
    else:
        log.info(
            f"distill.teacher {teacher} does not say what its labels are called: they are taken for the data's, in "
            "their order"
        )


def count_teacher_flops(config: DistillConfig, image_size: int) -> int | None:
    """Count the operations of the teacher for one image: 0 without a teacher, None if torch cannot count them."""
    if config.teacher is None:
        return 0
    try:
        return forward_flops(partial(build_teacher, config, image_size), image_size)
    except Exception:  # some timm models do not run on the meta device; a figure of the report is not worth a run
        return None


def build_teacher(config: DistillConfig, image_size: int) -> nn.Module:
    """Build the configured teacher with random weights, for images of this size."""
    assert config.teacher is not None
    if is_model_file(config.teacher):
        info = describe_file(config.teacher)
        if info is None:
            raise ValueError(f"distill.teacher {config.teacher} does not say which model it is of")
        return info.build(**image_size_arguments(info.name, image_size))
    about = describe_timm_folder(Path(config.teacher_weights).parent) if config.teacher_weights else None
    kwargs = about.kwargs if about and is_same_model(about.name, config.teacher) else {}
    return create_model(config.teacher, **(kwargs | image_size_arguments(config.teacher, image_size)))


def weights_file(config: DistillConfig) -> Path:
    """Return the file of the configured teacher's weights.

    Raises:
        ValueError: it is a timm model, and ``distill.teacher_weights`` is not given.
    """
    assert config.teacher is not None
    file = config.teacher if is_model_file(config.teacher) else config.teacher_weights
    if file is None:
        raise ValueError(
            f"distill.teacher {config.teacher}: set distill.teacher_weights to a local file of its weights; "
            "nothing is fetched from a hub"
        )
    return Path(file)


def is_model_file(teacher: str) -> bool:
    """Return True if ``distill.teacher`` is a file of this trainer, and no timm name."""
    return Path(teacher).suffix == ".safetensors"
