"""Orthogonalise the momentum of hidden weight matrices, whole at every ZeRO stage (Muon); AdamW does the rest.

Momentum and Nesterov's step are elementwise, so they run on the flat masters as DeepSpeed has cut them. Only the
orthogonalisation needs a whole matrix: where no rank holds all of one, the ranks sum their pieces of it, in bf16, in
which the iteration runs anyway.

DeepSpeed 0.19.8 has a Muon of its own, which is not used: it orthogonalises while gradients are reduced, so that
gradients are clipped, and their norm is taken, after it; it does nothing at stage 0 in fp16 and bf16 with a fused
optimizer, splits no heads there, refuses ZeRO-3 unless ``reduce_scatter`` is off, and keeps bf16 momentum at stage 2.

Method: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024), with the scale of Liu et al.,
"Muon is Scalable for LLM Training" (arXiv 2502.16982), equation 4, at which AdamW's learning rates stay right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

MOMENTUM = "momentum_buffer"
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
ADAMW_RMS = 0.2
"""The root mean square of AdamW's updates, to which those of Muon are scaled."""


@torch.no_grad()
def orthogonalize(matrices: Tensor) -> Tensor:
    """Move the singular values of each matrix close to 1, by five Newton-Schulz iterations.

    Args:
        matrices: [count, rows, columns].

    Returns:
        The same shape, bf16; on CPUs fp32. Singular values end between 0.7 and 1.2, except of directions that hardly
        occur.
    """
    a, b, c = COEFFICIENTS
    x = matrices.bfloat16()
    if x.device.type == "cpu":
        x = x.float()  # many CPUs have no instructions for bf16, and are 15 times slower in it
    is_tall = x.shape[1] > x.shape[2]
    if is_tall:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


@dataclass(frozen=True)
class MatrixPiece:
    """This rank's piece of a matrix: its elements ``start`` to ``start + numel``, flattened, lie in a master from
    element ``offset`` on. ``numel`` is 0 where the rank has none."""

    rows: int
    columns: int
    blocks: int
    """Number of equal blocks of rows, each of which is orthogonalised by itself: the heads of a fused qkv weight."""
    start: int
    numel: int
    offset: int
    is_split: bool
    """True if no rank holds the whole matrix."""

    @property
    def scale(self) -> float:
        """Return what gives an orthogonal block the root mean square of AdamW's updates."""
        return ADAMW_RMS * math.sqrt(max(self.rows // self.blocks, self.columns))

    def of(self, flat: Tensor) -> Tensor:
        """Return the piece, [numel], as a view into its master, or into whatever is laid out as that is."""
        return flat.view(-1).narrow(0, self.offset, self.numel)


class Muon(torch.optim.AdamW):
    """Update the groups that have ``muon: True`` by orthogonalised momentum, and the others by AdamW.

    ``lr`` and the decoupled ``weight_decay`` mean the same for both: a weight shrinks by ``lr x weight_decay`` a step,
    and an update of Muon is ``lr x 0.2 sqrt(max(rows, columns))`` times an orthogonal matrix. Gradients are clipped
    before, by DeepSpeed.

    Args:
        groups: parameter groups; each needs the key ``muon``.
        momentum: averaging factor of the gradients of the groups of matrices.
        adamw: arguments of ``torch.optim.AdamW``.
    """

    def __init__(self, groups: list[dict[str, Any]], momentum: float, **adamw: Any) -> None:
        super().__init__(groups, **adamw)
        self.momentum = momentum
        self._pieces: dict[Tensor, list[MatrixPiece]] = {}

    def place_matrices(self, pieces: Mapping[Tensor, list[MatrixPiece]]) -> None:
        """Tell where the matrices lie: the pieces of each master, in an order that is the same on all ranks."""
        self._pieces = dict(pieces)

    def has_matrices(self, master: Tensor) -> bool:
        """Return True if ``master`` belongs to a group of matrices."""
        return master in self._pieces

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update the parameters that have gradients. A collective where a matrix is split over ranks."""
        assert closure is None
        if not self._pieces:
            return  # DeepSpeed steps once while it builds stage 0, with gradients of zero
        groups = self.param_groups
        for group in groups:
            if group["muon"]:
                for master in group["params"]:
                    if master.grad is not None:
                        self._update(master, master.grad, group["lr"], group["weight_decay"])
        self.param_groups = [group for group in groups if not group["muon"]]
        try:
            super().step()
        finally:
            self.param_groups = groups

    def _update(self, master: Tensor, gradient: Tensor, lr: float, weight_decay: float) -> None:
        state = self.state[master]
        if not state:
            state.update(step=0, **{MOMENTUM: torch.zeros_like(master)})
        state["step"] += 1
        average = state[MOMENTUM].lerp_(gradient, 1 - self.momentum)
        direction = gradient.lerp(average, self.momentum)  # Nesterov's
        master.mul_(1 - lr * weight_decay)
        for piece in self._pieces[master]:
            own = piece.of(direction)
            whole = _sum_pieces(piece, own) if piece.is_split else own
            if piece.numel:
                update = orthogonalize(whole.view(piece.blocks, -1, piece.columns)).reshape(-1)
                piece.of(master).add_(update.narrow(0, piece.start, piece.numel), alpha=-lr * piece.scale)


def _sum_pieces(piece: MatrixPiece, own: Tensor) -> Tensor:
    """Return the whole matrix, [rows x columns] in bf16, of which each rank holds a piece. A collective."""
    whole = torch.zeros(piece.rows * piece.columns, dtype=torch.bfloat16, device=own.device)
    whole.narrow(0, piece.start, piece.numel).copy_(own)
    dist.all_reduce(whole)
    return whole
