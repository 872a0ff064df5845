"""Find the fp32 masters of a DeepSpeed engine, and which part of which parameter each holds.

Whatever the ZeRO stage and the precision, the weights that the optimizer updates are fp32 tensors of this rank, its
*masters*: the parameters themselves (stage 0, fp32), fp32 copies (stage 0, bf16 and fp16), or this rank's flat
shard of them (stages 1, 2, 3). The optimizer's moments and the moving average are laid out as the masters are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import torch
from torch import Tensor

from sws_dist.zero.muon import MOMENTUM, Muon
from sws_dist.zero.protocol import ZeroEngine

ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")


def master_weights(engine: ZeroEngine) -> list[Tensor]:
    """Return the fp32 tensors that this rank's optimizer updates, in a fixed order."""
    return [flat.data for flat in master_keys(engine)]


def master_keys(engine: ZeroEngine) -> list[Tensor]:
    """Return the masters as the optimizer knows them: the members of its groups, and keys of its state."""
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        return optimizer.fp32_partitioned_groups_flat
    if engine.zero_optimization_stage() > 0:
        return optimizer.single_partition_of_fp32_groups
    return [p for group in optimizer.param_groups for p in group["params"]]


@dataclass(frozen=True)
class Fragment:
    """Locate a piece of a parameter: its elements ``start`` to ``start + numel``, flattened, are the elements
    ``offset`` to ``offset + numel`` of master ``flat``."""

    name: str
    start: int
    numel: int
    flat: int
    offset: int

    def of(self, flats: Sequence[Tensor] | Mapping[int, Tensor]) -> Tensor:
        """Return the piece, [numel], as a view into ``flats``: the masters, or whatever is laid out as they are."""
        return flats[self.flat].view(-1).narrow(0, self.offset, self.numel)


def whole_shapes(engine: ZeroEngine) -> dict[str, list[int]]:
    """Return the shape of every parameter, in the model's order. Under ZeRO-3 a parameter's own shape is empty."""
    return {name: list(getattr(p, "ds_shape", p.shape)) for name, p in engine.module.named_parameters()}


def fragments(engine: ZeroEngine) -> list[Fragment]:
    """List the pieces of parameters that this rank's masters hold. Padding belongs to none.

    At stages 1, 2 and 3 every element of every parameter lies on exactly one rank; at stage 0 each rank has all.
    """
    return [piece for piece in fragments_and_gaps(engine) if piece.numel > 0]


def fragments_and_gaps(engine: ZeroEngine) -> list[Fragment]:
    """List one piece of every parameter, in the same order on all ranks; ``numel`` is 0 or less where there is none."""
    stage = engine.zero_optimization_stage()
    return list({0: _whole_parameters, 1: _flat_slices, 2: _flat_slices, 3: _zero3_slices}[stage](engine))


def _zero3_slices(engine: ZeroEngine) -> Iterator[Fragment]:
    """Yield each parameter's slice of this rank: equal slices, one a rank, of which the last ones may be padded."""
    for name, p in engine.module.named_parameters():
        parameter_id = engine.optimizer.get_param_id(p)
        flat, offset, size = engine.optimizer.grad_position[parameter_id]
        start = engine.global_rank * size
        yield Fragment(name, start, min(size, p.ds_numel - start), flat, offset)  # type: ignore[attr-defined]


def _flat_slices(engine: ZeroEngine) -> Iterator[Fragment]:
    """Yield this rank's slices of parameters: a group's lie end to end, cut into equal slices, one a rank.

    DeepSpeed's own record of this (``_hp_mapping``) ignores the order that ``round_robin_gradients`` gives them.
    """
    optimizer, names = engine.optimizer, {id(p): name for name, p in engine.module.named_parameters()}
    for flat, params in enumerate(optimizer.round_robin_bit16_groups):
        size = optimizer.partition_size[flat]
        first = engine.global_rank * size
        for p, at in zip(params, optimizer.round_robin_bit16_offsets[flat], strict=True):
            start, stop = max(first - at, 0), min(first + size - at, p.numel())
            yield Fragment(names[id(p)], start, stop - start, flat, at + start - first)


def _whole_parameters(engine: ZeroEngine) -> Iterator[Fragment]:
    """Yield whole parameters, in masters of one parameter each, or of all of a group."""
    optimizer = engine.optimizer
    names = {id(p): name for name, p in engine.module.named_parameters()}
    # In fp16 and bf16 the groups of the model's own parameters; in fp32 there are no others.
    groups = getattr(optimizer, "fp16_groups", None) or [group["params"] for group in optimizer.param_groups]
    if hasattr(optimizer, "fp16_groups_flat"):  # a fused optimizer
        for flat, group in enumerate(groups):
            ends = accumulate(p.numel() for p in group)
            for p, end in zip(group, ends, strict=True):
                yield Fragment(names[id(p)], 0, p.numel(), flat, end - p.numel())
    else:
        for flat, p in enumerate(chain.from_iterable(groups)):
            yield Fragment(names[id(p)], 0, p.numel(), flat, 0)


def optimizer_moments(engine: ZeroEngine) -> dict[str, dict[int, Tensor]]:
    """Return the optimizer's moments by name and by the number of the master that each is laid out like.

    Adam has two for each master, Muon one for those of matrices; before the first step there are none.
    """
    inner = inner_optimizer(engine)
    found: dict[str, dict[int, Tensor]] = {}
    for number, flat in enumerate(master_keys(engine)):
        for name in _moment_names(inner, flat) if flat in inner.state else ():
            found.setdefault(name, {})[number] = inner.state[flat][name]
    return found


def optimizer_steps(engine: ZeroEngine) -> int:
    """Return the number of the optimizer's steps: fewer than the run's where fp16 skipped some."""
    state = inner_optimizer(engine).state
    # DeepSpeed's FusedAdam counts at the last parameter of a group alone.
    return max((int(state[flat]["step"]) for flat in master_keys(engine) if flat in state), default=0)


def init_optimizer_state(engine: ZeroEngine, steps: int) -> None:
    """Give the optimizer moments of zero and a count of ``steps``, as if it had taken them."""
    inner = inner_optimizer(engine)
    for flat in master_keys(engine):
        # torch's fused AdamW counts on the device, the others count in Python.
        names, is_torchs = _moment_names(inner, flat), isinstance(inner, torch.optim.AdamW)
        count = torch.tensor(float(steps), device=flat.device) if is_torchs and names == ADAM_MOMENTS else steps
        inner.state[flat] = {"step": count} | {name: torch.zeros_like(flat.data) for name in names}


def _moment_names(optimizer: torch.optim.Optimizer, flat: Tensor) -> tuple[str, ...]:
    return (MOMENTUM,) if isinstance(optimizer, Muon) and optimizer.has_matrices(flat) else ADAM_MOMENTS


def inner_optimizer(engine: ZeroEngine) -> torch.optim.Optimizer:
    """Return the optimizer proper, inside DeepSpeed's wrapper where there is one."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)
