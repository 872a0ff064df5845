"""Build DeepSpeed's engine, take its steps, and bring the model in line with its fp32 masters.

``zero/`` is the one place that knows DeepSpeed's inside, with the names of DeepSpeed 0.19
(tests/distributed/test_deepspeed_names.py checks that each of them exists): ``config.py`` and ``schema.py`` its JSON,
``partition.py`` where the masters lie, ``shard_writer.py`` how shards are written.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from functools import wraps
from typing import Any, NamedTuple

import deepspeed
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.utils import logger as deepspeed_logger
from deepspeed.utils import set_z3_leaf_modules
from torch import Tensor, nn

from sws_dist.config.schema import OptimConfig
from sws_dist.distributed.collectives import gather_rows, gather_scalars
from sws_dist.distributed.phase_timer import REDUCE, PhaseTimer
from sws_dist.models import LinearStage, Stage
from sws_dist.optim import hidden_matrices, parameter_groups
from sws_dist.zero.config import MONITORS, precision_of
from sws_dist.zero.loss_scale import current_scale, may_overflow, scale_loss, stay_at_minimum, unscale_norm
from sws_dist.zero.muon import MatrixPiece, Muon
from sws_dist.zero.partition import fragments, fragments_and_gaps, master_keys, master_weights, whole_shapes
from sws_dist.zero.protocol import ZeroEngine


def connect_deepspeed() -> None:
    """Let DeepSpeed use the process group that this process has joined. A collective."""
    # On CPUs DeepSpeed would compile an operator that only its inference uses: minutes where others compile too, and
    # for ever where a killed run has left the compiler's lock behind.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)


def build_engine(model: nn.Module, ds: dict[str, Any], optim: OptimConfig) -> ZeroEngine:
    """Build the DeepSpeed engine around ``model``. A collective.

    The learning rate is 0 until the trainer sets it, before each step. DeepSpeed's own log is reduced to warnings.

    Args:
        ds: the resolved DeepSpeed config (``config.resolve_deepspeed_config``).
    """
    deepspeed_logger.setLevel(logging.WARNING)
    if ds["zero_optimization"]["stage"] == 3 and any(isinstance(m, (Stage, LinearStage)) for m in model.modules()):
        # Gather a stage's weights once a pass, not once for each of its layers and repeats.
        set_z3_leaf_modules(model, [Stage, LinearStage])
    optimizer = _optimizer(optim, model)
    own = {key: value for key, value in ds.items() if key not in MONITORS}  # see monitor.py
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=own)
    optimizer.state.clear()  # in fp16 and bf16 DeepSpeed begins stage 0 with a step: its gradients and its lr are 0
    if ds["zero_optimization"]["stage"] == 0 and precision_of(ds) == "fp32":
        # DeepSpeed's own clipping fails where a skipped step has left no gradient.
        engine.clip_fp32_gradients = lambda: nn.utils.clip_grad_norm_(model.parameters(), engine.gradient_clipping())
    stay_at_minimum(engine)
    if isinstance(optimizer, Muon):
        optimizer.place_matrices(_matrix_pieces(engine, hidden_matrices(model)))
    return engine


def _optimizer(config: OptimConfig, model: nn.Module) -> torch.optim.Optimizer:
    arguments: dict[str, Any] = {"lr": 0.0, "betas": config.betas, "eps": config.eps}
    if config.name == "muon":
        matrices = hidden_matrices(model)
        if not matrices:
            raise ValueError(
                "optim.name: muon is for the weights of the Linear layers inside a model's blocks, and "
                f"{type(model).__name__} has none; use adamw"
            )
        groups = parameter_groups(model, config.weight_decay, matrices)
        return Muon(groups, momentum=config.momentum, fused=True, **arguments)
    groups = parameter_groups(model, config.weight_decay)
    if config.name == "adamw":
        return torch.optim.AdamW(groups, fused=True, **arguments)
    if config.name == "cpu_adam":
        return DeepSpeedCPUAdam(groups, adamw_mode=True, **arguments)
    if not torch.cuda.is_available():
        raise ValueError("optim.name: fused_adam needs a GPU; use adamw, or cpu_adam")
    return FusedAdam(groups, adam_w_mode=True, **arguments)


def _matrix_pieces(engine: ZeroEngine, matrices: Mapping[str, int]) -> dict[Tensor, list[MatrixPiece]]:
    """Return this rank's pieces of the matrices, by the masters that hold them. A collective."""
    shapes, masters = whole_shapes(engine), master_keys(engine)
    fragments = [fragment for fragment in fragments_and_gaps(engine) if fragment.name in matrices]
    is_whole = [fragment.numel == math.prod(shapes[fragment.name]) for fragment in fragments]
    is_split = ~gather_rows(torch.tensor(is_whole, dtype=torch.uint8, device=engine.device)).bool().any(0)
    pieces: dict[Tensor, list[MatrixPiece]] = {}
    for fragment, split in zip(fragments, is_split.tolist(), strict=True):
        rows, columns = shapes[fragment.name]
        place = (fragment.start, fragment.numel, fragment.offset) if fragment.numel > 0 else (0, 0, 0)
        piece = MatrixPiece(rows, columns, matrices[fragment.name], *place, is_split=split)
        pieces.setdefault(masters[fragment.flat], []).append(piece)
    return pieces


@torch.no_grad()
def sync_model_from_masters(engine: ZeroEngine) -> None:
    """Copy the masters into the model's parameters, in the model's precision. A collective."""
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
        for low, master in zip(optimizer.fp16_groups_flat, master_weights(engine), strict=True):
            low.copy_(master)
    elif hasattr(optimizer, "fp16_groups"):  # stage 0, fp16 or bf16, any other optimizer
        low_precision = [p for group in optimizer.fp16_groups for p in group]
        for low, master in zip(low_precision, master_weights(engine), strict=True):
            low.data.copy_(master)


BUCKET_REDUCERS = {
    1: "reduce_ipg_grads",
    2: "reduce_ipg_grads",
    3: "_DeepSpeedZeroOptimizer_Stage3__reduce_and_partition_ipg_grads",
}
"""ZeRO stage -> the method of its optimizer that reduces a bucket of gradients, in the midst of backward."""


def time_reduction(engine: ZeroEngine, timer: PhaseTimer) -> None:
    """Let ``timer`` tell the exchange of gradients from the backward pass that DeepSpeed starts it in.

    What a GPU exchanges beside its computation (``overlap_comm``) takes no time of its own and is not counted.
    """
    _count_as_reduction(engine, "allreduce_gradients", timer)
    if (name := BUCKET_REDUCERS.get(engine.zero_optimization_stage())) is not None:
        _count_as_reduction(engine.optimizer, name, timer)


def _count_as_reduction(owner: Any, name: str, timer: PhaseTimer) -> None:
    method = getattr(owner, name)

    @wraps(method)
    def timed(*args: Any, **kwargs: Any) -> Any:
        with timer.phase(REDUCE):
            return method(*args, **kwargs)

    setattr(owner, name, timed)


class StepResult(NamedTuple):
    """The outcome of a step."""

    applied: bool
    """True if the weights were updated."""
    grad_norm: Tensor | float | None
    """The gradient's norm before clipping."""
    overflowed: bool = False
    """True if they were not, since fp16's loss scale was too large, which has fallen: nothing is wrong."""


def backward(engine: ZeroEngine, loss: Tensor) -> None:
    """Add the gradient of a micro-batch. A collective from stage 2 on, and with a step's last micro-batch."""
    engine.backward(scale_loss(engine, loss))


def take_step(engine: ZeroEngine) -> StepResult | None:
    """Take the optimizer's step, unless the gradient is not finite. Returns None between a step's micro-batches.

    DeepSpeed leaves a non-finite step out by itself, on all ranks alike, except at stage 0 in fp32. There each rank
    has the whole gradient, and parameters without one are not touched.
    """
    if not engine.is_gradient_accumulation_boundary():
        engine.step()
        return None
    if engine.zero_optimization_stage() or precision_of(engine.config) != "fp32":
        scale, overflow_expected = current_scale(engine), may_overflow(engine)  # the step may change both
        engine.step()
        applied, norm = engine.was_step_applied(), unscale_norm(engine, engine.get_global_grad_norm(), scale)
        return StepResult(applied, norm, overflowed=overflow_expected and not applied)
    norm = float(nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None]))
    applied = math.isfinite(norm)
    if not applied:
        engine.module.zero_grad(set_to_none=True)
    engine.step()
    return StepResult(applied, norm)


def all_weights_finite(engine: ZeroEngine) -> bool:
    """Return True if every rank's masters are free of infinities and NaN. A collective."""
    own = master_weights(engine)
    finite = torch.stack([torch.isfinite(piece.of(own)).all() for piece in fragments(engine)]).all()
    # With offload the masters lie in host memory, which NCCL does not take.
    return bool(gather_scalars(finite.to(engine.device, torch.uint8)).all())
