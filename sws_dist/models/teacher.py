"""TODO: say what this module does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


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
