"""Wrap the teacher, the paper's ancestry model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

Normalisation = tuple[Sequence[float], Sequence[float]]
"""Mean and standard deviation of each channel."""


class Teacher(nn.Module):
    """A frozen classifier that sees the student's images under its own normalisation.

    It is kept outside the DeepSpeed engine: it has no gradient, no optimizer state and no place in checkpoints.

    Args:
        model: the classifier, [B, 3, H, W] -> [B, classes].
        given: how the student's images are normalised.
        own: how the teacher wants them normalised.
    """

    scale: Tensor
    shift: Tensor

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
