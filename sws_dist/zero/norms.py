"""Measure the norms of gradients and weights by part of the model, whatever the ZeRO stage: nothing is gathered.

A part is a block (``blocks.3``: in an auxiliary model, a stage), or what stands beside the blocks (``patch_embed``,
``head``). Each rank adds up the squares of the pieces that it holds; their sums are added over the ranks.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from sws_dist.distributed.collectives import sum_over_ranks
from sws_dist.zero.partition import fragments, inner_optimizer, master_keys
from sws_dist.zero.protocol import ZeroEngine

_PART = re.compile(r"[^.]+(\.\d+)?")


def part_of(name: str) -> str:
    """Return the part of the model that a parameter belongs to: ``blocks.3`` for ``blocks.3.attn.qkv.weight``."""
    found = _PART.match(name)
    assert found is not None
    return found[0]


class NormMeter:
    """Measure the norms of a step's gradient, and of the weights.

    DeepSpeed takes the reduced gradients apart and frees them inside its own step. So they are looked at in the moment
    when the optimizer proper is given them, already divided by fp16's loss scale and by the clipping factor.

    Args:
        engine: with all its weights in place.
    """

    def __init__(self, engine: ZeroEngine) -> None:
        self._engine = engine
        self._clipping = float(engine.config.get("gradient_clipping", 0.0))
        self._parts = sorted({part_of(name) for name, _ in engine.module.named_parameters()}, key=_natural)
        self._masters, self._fragments = list(master_keys(engine)), fragments(engine)
        self._device = engine.device
        self._is_armed = False
        self._squares: Tensor | None = None
        self._counted: set[int] = set()
        inner_optimizer(engine).register_step_pre_hook(lambda optimizer, *_: self._add_gradients(optimizer))

    def arm(self) -> None:
        """Measure the gradient of the step that follows."""
        self._is_armed, self._squares = True, None
        self._counted.clear()

    def gradient_norms(self, grad_norm: float | None) -> dict[str, float]:
        """Return the norm of each part of the gradient, before clipping; empty if the step was not taken. A collective.

        Args:
            grad_norm: of the whole gradient before clipping; None: it was not clipped.
        """
        self._is_armed = False
        if self._squares is None:
            return {}
        factor = 1.0
        if grad_norm is not None and self._clipping:
            factor = max(1.0, (grad_norm + 1e-6) / self._clipping)  # as torch and DeepSpeed clip
        return {part: factor * norm for part, norm in self._root_of_sum(self._squares).items()}

    def weight_norms(self) -> dict[str, float]:
        """Return the norm of each part of the weights. A collective."""
        return self._root_of_sum(self._sum_squares([flat.data for flat in self._masters]))

    def _add_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Add the gradients that ``optimizer`` is about to use: DeepSpeed steps one group of them after another."""
        if self._is_armed:
            due = {id(flat) for group in optimizer.param_groups for flat in group["params"]} - self._counted
            self._counted |= due  # Muon's step ends in AdamW's, which may call the hook once more
            squares = self._sum_squares([flat.grad if id(flat) in due else None for flat in self._masters])
            self._squares = squares if self._squares is None else self._squares + squares

    @torch.no_grad()
    def _sum_squares(self, flats: Sequence[Tensor | None]) -> Tensor:
        """Return the sum of squares of each part, [parts] float64, over the pieces of this rank.

        Args:
            flats: laid out like the masters; None: there is nothing to be added.
        """
        sums = torch.zeros(len(self._parts), dtype=torch.float64, device=self._device)
        held = [piece for piece in self._fragments if flats[piece.flat] is not None]
        if not held:
            return sums
        norms = torch._foreach_norm([piece.of(flats) for piece in held])  # type: ignore[arg-type]
        parts = torch.tensor([self._parts.index(part_of(piece.name)) for piece in held])
        squares = torch.stack([norm.to(self._device) for norm in norms]).double().square()
        return sums.index_add(0, parts.to(self._device), squares)

    def _root_of_sum(self, squares: Tensor) -> dict[str, float]:
        if self._engine.zero_optimization_stage() > 0:  # at stage 0 each rank has all
            squares = sum_over_ranks(squares)
        return dict(zip(self._parts, squares.sqrt().tolist(), strict=True))


def _natural(part: str) -> list[tuple[int, str]]:
    """Return a key that sorts ``blocks.10`` behind ``blocks.9``."""
    return [(int(word), "") if word.isdecimal() else (-1, word) for word in part.split(".")]
