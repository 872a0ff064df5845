"""TODO: say what this module does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def master_weights(engine: Any) -> list[Tensor]:
    """The fp32 tensors that this rank's optimizer updates, in a fixed order."""
    return [flat.data for flat in _flats(engine)]


def _flats(engine: Any) -> list[Tensor]:
    """The masters as the optimizer knows them: the keys of its state."""
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        return optimizer.fp32_partitioned_groups_flat
    if engine.zero_optimization_stage() > 0:
        return optimizer.single_partition_of_fp32_groups
    return [p for group in optimizer.param_groups for p in group["params"]]


@dataclass(frozen=True)
class Fragment:
    """Where a piece of a parameter lies: its elements ``start`` to ``start + numel``, flattened, are the elements
    ``offset`` to ``offset + numel`` of master ``flat``."""

    name: str
    shape: tuple[int, ...]
    start: int
    numel: int
    flat: int
    offset: int

    def of(self, flats: Sequence[Tensor]) -> Tensor:
        """[numel], a view into one of ``flats``: the masters, or whatever is laid out as they are."""
        return flats[self.flat].view(-1).narrow(0, self.offset, self.numel)


def fragments(engine: Any) -> list[Fragment]:
    """What this rank's masters hold of which parameter. Padding belongs to none.

    At stages 1, 2 and 3 every element of every parameter lies on exactly one rank; at stage 0 each rank has all.
    """
    optimizer, stage, rank = engine.optimizer, engine.zero_optimization_stage(), engine.global_rank
    named = dict(engine.module.named_parameters())
    if stage == 3:
        # Each parameter is cut into equal slices, one a rank; the last ones may be padded.
        pieces = []
        for name, p in named.items():
            flat, offset, size = optimizer.grad_position[optimizer.get_param_id(p)]
            numel = min(size, p.ds_numel - rank * size)
            pieces.append(Fragment(name, tuple(p.ds_shape), rank * size, numel, flat, offset))
        return [piece for piece in pieces if piece.numel > 0]
    names = {id(p): name for name, p in named.items()}
    if stage > 0:
        # A group's parameters are laid end to end and cut into equal slices, one a rank.
        pieces = []
        for flat, params in enumerate(optimizer.round_robin_bit16_groups):
            first, size = rank * optimizer.partition_size[flat], optimizer.partition_size[flat]
            for p, at in zip(params, optimizer.round_robin_bit16_offsets[flat], strict=True):
                start, stop = max(first - at, 0), min(first + size - at, p.numel())
                pieces.append(Fragment(names[id(p)], tuple(p.shape), start, stop - start, flat, at + start - first))
        return [piece for piece in pieces if piece.numel > 0]
    if hasattr(optimizer, "fp16_groups_flat"):  # fp16 or bf16, a fused optimizer
        pieces = []
        for flat, params in enumerate(optimizer.fp16_groups):
            offset = 0
            for p in params:
                pieces.append(Fragment(names[id(p)], tuple(p.shape), 0, p.numel(), flat, offset))
                offset += p.numel()
        return pieces
    # fp16 or bf16 with any other optimizer: a master a parameter; fp32: the parameters themselves.
    groups = getattr(optimizer, "fp16_groups", None) or [group["params"] for group in optimizer.param_groups]
    params = [p for group in groups for p in group]
    return [Fragment(names[id(p)], tuple(p.shape), 0, p.numel(), flat, 0) for flat, p in enumerate(params)]


MOMENTS = ("exp_avg", "exp_avg_sq")


def optimizer_moments(engine: Any) -> dict[str, list[Tensor]]:
    """Adam's two moments, each laid out like the masters; empty before the first step."""
    states = [_inner(engine).state[flat] for flat in _flats(engine) if flat in _inner(engine).state]
    if not states:
        return {}
    return {name: [state[name] for state in states] for name in MOMENTS}


def optimizer_steps(engine: Any) -> int:
    """Steps of the optimizer: fewer than the run's where fp16 skipped some."""
    state: Any = _inner(engine).state
    first = _flats(engine)[0]
    return int(state[first]["step"]) if first in state else 0


def init_optimizer_state(engine: Any, steps: int) -> None:
    """Give the optimizer moments of zero and a past of ``steps``, as if it had taken them."""
    inner = _inner(engine)
    for flat in _flats(engine):
        # torch's fused AdamW counts on the device, DeepSpeed's optimizers count in Python.
        count = torch.tensor(float(steps), device=flat.device) if type(inner) is torch.optim.AdamW else steps
        inner.state[flat] = {"step": count} | {name: torch.zeros_like(flat.data) for name in MOMENTS}


def _inner(engine: Any) -> torch.optim.Optimizer:
    """The optimizer proper, inside DeepSpeed's wrapper where there is one."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)
