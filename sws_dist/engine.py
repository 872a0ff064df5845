"""All that this trainer knows of DeepSpeed's inside: building the engine, its fp32 masters, whole weights, EMA.

Whatever the ZeRO stage and the precision, the weights that the optimizer updates are fp32 tensors of this rank,
its *masters*: the parameters themselves (stage 0, fp32), fp32 copies (stage 0, bf16 and fp16), or this rank's flat
shard of them (stages 1, 2, 3). The names below are those of DeepSpeed 0.19.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.utils import logger as deepspeed_logger
from deepspeed.utils import safe_get_full_fp32_param, set_z3_leaf_modules
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
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        return [t.data for t in optimizer.fp32_partitioned_groups_flat]
    if engine.zero_optimization_stage() > 0:
        return [t.data for t in optimizer.single_partition_of_fp32_groups]
    return [p.data for group in optimizer.param_groups for p in group["params"]]


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


def grad_norm_before_step(engine: Any) -> float | None:
    """The gradient's norm where DeepSpeed does not take it: at stage 0 in fp32, where each rank has all of it.

    None elsewhere, and between the micro-batches of a step; ``engine.get_global_grad_norm()`` has it after the step.
    """
    if engine.zero_optimization_stage() or ds_config.precision(engine.config) != "fp32":
        return None
    if not engine.is_gradient_accumulation_boundary():
        return None
    return float(nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None]))


def all_finite(engine: Any) -> bool:
    """Whether every rank's masters are free of infinities and NaN. A collective."""
    finite = torch.stack([torch.isfinite(master).all() for master in masters(engine)]).all()
    return bool(comm.gather_scalars(finite.to(torch.uint8)).all())


def full_weights(engine: Any) -> dict[str, Tensor]:
    """The whole model's state dict in fp32 on the CPU of rank 0, and an empty one elsewhere. A collective.

    One parameter is whole at a time; only rank 0 keeps them.
    """
    weights: dict[str, Tensor] = {}
    low_precision = ds_config.precision(engine.config) != "fp32"
    own_masters: dict[int, Tensor] = {}
    if low_precision and engine.zero_optimization_stage() == 0:
        own_masters = _stage0_masters(engine)
    for name, parameter in engine.module.named_parameters():
        whole = own_masters.get(id(parameter))
        if whole is None:
            whole = safe_get_full_fp32_param(parameter)
        if whole is None:  # stage 0, fp32
            whole = parameter.detach()
        if engine.global_rank == 0:
            weights[name] = whole.to("cpu", torch.float32, copy=True).reshape(_shape(parameter))
    if engine.global_rank == 0:
        for name, buffer in engine.module.named_buffers():
            weights[name] = buffer.detach().to("cpu", copy=True)
    return weights


def _stage0_masters(engine: Any) -> dict[int, Tensor]:
    """Each low-precision parameter's fp32 master, by the parameter's id."""
    optimizer = engine.optimizer
    low = [p for group in optimizer.fp16_groups for p in group]
    if hasattr(optimizer, "fp16_groups_flat"):
        flat = zip(optimizer.fp32_groups_flat, optimizer.fp16_groups, strict=True)
        high = [part for whole, group in flat for part in whole.data.split([p.numel() for p in group])]
    else:
        high = masters(engine)
    return {id(p): master for p, master in zip(low, high, strict=True)}


def _shape(parameter: Any) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)  # under ZeRO-3 a parameter's own shape is empty


class ShardedEMA:
    """Exponential moving average of the masters, on each rank for its own shard: no traffic, no whole copy.

    Built after every weight is in place (learngene, initial checkpoint, resume), so it starts from them.
    """

    def __init__(self, engine: Any, decay: float) -> None:
        self.engine, self.decay = engine, decay
        self.average = [master.clone() for master in masters(engine)]

    @torch.no_grad()
    def update(self) -> None:
        torch._foreach_lerp_(self.average, masters(self.engine), 1 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the block the model holds the average. A collective at both ends."""
        trained = [master.clone() for master in masters(self.engine)]
        self._put(self.average)
        yield
        self._put(trained)

    @torch.no_grad()
    def _put(self, values: list[Tensor]) -> None:
        for master, value in zip(masters(self.engine), values, strict=True):
            master.copy_(value)
        publish(self.engine)

    def state(self) -> dict[str, Tensor]:
        return {str(index): tensor for index, tensor in enumerate(self.average)}

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        for index, tensor in enumerate(self.average):
            tensor.copy_(state[str(index)])
