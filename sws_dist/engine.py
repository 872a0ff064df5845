"""All that this trainer knows of DeepSpeed's inside: building the engine, its fp32 masters and their place.

Whatever the ZeRO stage and the precision, the weights that the optimizer updates are fp32 tensors of this rank,
its *masters*: the parameters themselves (stage 0, fp32), fp32 copies (stage 0, bf16 and fp16), or this rank's flat
shard of them (stages 1, 2, 3). The names below are those of DeepSpeed 0.19.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import deepspeed
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.utils import logger as deepspeed_logger
from deepspeed.utils import set_z3_leaf_modules
from torch import Tensor, nn

from sws_dist import comm, ds_config
from sws_dist.config import OptimConfig
from sws_dist.models import Stage
from sws_dist.optim import parameter_groups


def build(model: nn.Module, ds: dict[str, Any], optim: OptimConfig) -> deepspeed.DeepSpeedEngine:
    """The DeepSpeed engine around ``model``; ``ds`` is what ``ds_config.resolve`` returned.

    The learning rate is set by the trainer before each step. DeepSpeed's own chatter is reduced to warnings.
    """
    deepspeed_logger.setLevel(logging.WARNING)
    if ds["zero_optimization"]["stage"] == 3 and any(isinstance(m, Stage) for m in model.modules()):
        # Gather a stage's weights once a pass, not once for each of its layers and repeats.
        set_z3_leaf_modules(model, [Stage])
    engine, *_ = deepspeed.initialize(model=model, optimizer=_optimizer(optim, model), config=ds)
    return engine


def _optimizer(config: OptimConfig, model: nn.Module) -> torch.optim.Optimizer:
    groups = parameter_groups(model, config.weight_decay)
    arguments: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    if config.name == "adamw":
        return torch.optim.AdamW(groups, fused=True, **arguments)
    if config.name == "cpu_adam":
        return DeepSpeedCPUAdam(groups, adamw_mode=True, **arguments)
    if not torch.cuda.is_available():
        raise ValueError("optim.name: fused_adam needs a GPU; use adamw, or cpu_adam")
    return FusedAdam(groups, adam_w_mode=True, **arguments)


def masters(engine: Any) -> list[Tensor]:
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


def moments(engine: Any) -> dict[str, list[Tensor]]:
    """Adam's two moments, each laid out like the masters; empty before the first step."""
    states = [_inner(engine).state[flat] for flat in _flats(engine) if flat in _inner(engine).state]
    if not states:
        return {}
    return {name: [state[name] for state in states] for name in MOMENTS}


def steps_taken(engine: Any) -> int:
    """Steps of the optimizer: fewer than the run's where fp16 skipped some."""
    state: Any = _inner(engine).state
    first = _flats(engine)[0]
    return int(state[first]["step"]) if first in state else 0


def begin_moments(engine: Any, steps: int) -> None:
    """Give the optimizer moments of zero and a past of ``steps``, as if it had taken them."""
    inner = _inner(engine)
    for flat in _flats(engine):
        # torch's fused AdamW counts on the device, DeepSpeed's optimizers count in Python.
        count = torch.tensor(float(steps), device=flat.device) if type(inner) is torch.optim.AdamW else steps
        inner.state[flat] = {"step": count} | {name: torch.zeros_like(flat.data) for name in MOMENTS}


def _inner(engine: Any) -> torch.optim.Optimizer:
    """The optimizer proper, inside DeepSpeed's wrapper where there is one."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def loss_scaler(engine: Any) -> dict[str, float]:
    """What fp16's loss scaling remembers; empty in bf16 and fp32."""
    if ds_config.precision(engine.config) != "fp16":
        return {}
    scaler = _scaler(engine)
    return {name: float(getattr(scaler, name)) for name in SCALER if hasattr(scaler, name)}


def set_loss_scaler(engine: Any, state: dict[str, float]) -> None:
    for name, value in state.items():
        setattr(_scaler(engine), name, value if name == "cur_scale" else int(value))


def _scaler(engine: Any) -> Any:
    return getattr(engine.optimizer, "loss_scaler", None) or engine.optimizer.loss_scale_config


@torch.no_grad()
def publish(engine: Any) -> None:
    """Make the model's parameters what the masters say. A collective."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        # The prologue partitions everything, the epilogue gathers the persistent parameters anew: without them
        # those would keep their old values.
        optimizer.checkpoint_event_prologue()
        for group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        optimizer.checkpoint_event_epilogue()
    elif stage > 0:
        optimizer.update_lp_params()
    elif hasattr(optimizer, "fp16_groups_flat"):  # stage 0, fp16 or bf16, a fused optimizer
        for low, master in zip(optimizer.fp16_groups_flat, masters(engine), strict=True):
            low.copy_(master)
    elif hasattr(optimizer, "fp16_groups"):  # stage 0, fp16 or bf16, any other optimizer
        low_precision = [p for group in optimizer.fp16_groups for p in group]
        for low, master in zip(low_precision, masters(engine), strict=True):
            low.data.copy_(master)


class Taken(NamedTuple):
    """What became of a step: whether the weights were updated, and the gradient's norm before clipping."""

    applied: bool
    grad_norm: Tensor | float | None


def step(engine: Any) -> Taken | None:
    """The optimizer's step, unless the gradient is not finite; None between the micro-batches of a step.

    DeepSpeed leaves such a step out by itself, on all ranks alike, but at stage 0 in fp32. There each rank has the
    whole gradient, and parameters without one are not touched.
    """
    if not engine.is_gradient_accumulation_boundary():
        engine.step()
        return None
    if engine.zero_optimization_stage() or ds_config.precision(engine.config) != "fp32":
        engine.step()
        return Taken(engine.was_step_applied(), engine.get_global_grad_norm())
    norm = float(nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None]))
    applied = math.isfinite(norm)
    if not applied:
        engine.module.zero_grad(set_to_none=True)
    engine.step()
    return Taken(applied, norm)


def all_finite(engine: Any) -> bool:
    """Whether every rank's masters are free of infinities and NaN. A collective."""
    own = masters(engine)
    finite = torch.stack([torch.isfinite(piece.of(own)).all() for piece in fragments(engine)]).all()
    return bool(comm.gather_scalars(finite.to(torch.uint8)).all())
