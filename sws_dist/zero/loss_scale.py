"""Scale the loss of fp16, and keep the scale's state over resumes.

DeepSpeed has a class of its own for static and for dynamic scales at stages 1 to 3, and one for both at stage 0.
"""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor

from sws_dist.zero.config import precision_of
from sws_dist.zero.protocol import ZeroEngine

STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")

log = logging.getLogger(__name__)


def scale_loss(engine: ZeroEngine, loss: Tensor) -> Tensor:
    """Return the loss that ``engine.backward`` is to be given.

    At stages 1 to 3 DeepSpeed 0.19.8 multiplies it by fp16's scale itself. At stage 0 it only divides the gradient.
    """
    return loss.float() * current_scale(engine) if _is_left_out(engine) else loss


def unscale_norm(engine: ZeroEngine, norm: Tensor | float | None, scale: float) -> Tensor | float | None:
    """Return the gradient's norm, which one optimizer of DeepSpeed's states of the scaled gradient.

    Args:
        scale: the loss scale of the step that the norm is of.
    """
    is_fused = hasattr(engine.optimizer, "fp16_groups_flat")
    return norm / scale if norm is not None and _is_left_out(engine) and not is_fused else norm


def current_scale(engine: ZeroEngine) -> float:
    """Return the scale of the loss; 1 in bf16 and fp32."""
    return float(_scaler(engine).cur_scale) if precision_of(engine.config) == "fp16" else 1.0


def may_overflow(engine: ZeroEngine) -> bool:
    """Return True if a gradient may overflow though nothing is wrong: a dynamic scale of fp16, which can still fall."""
    if precision_of(engine.config) != "fp16" or not _is_dynamic(engine):
        return False
    scaler = _scaler(engine)
    return bool(scaler.cur_scale > (scaler.min_scale if hasattr(scaler, "min_scale") else scaler.min_loss_scale))


def stay_at_minimum(engine: ZeroEngine) -> None:
    """Let the scale stay at its minimum where DeepSpeed would end in an ``Exception``: ``NonFiniteGuard`` decides."""
    if precision_of(engine.config) == "fp16" and hasattr(_scaler(engine), "raise_error_at_min_scale"):
        _scaler(engine).raise_error_at_min_scale = False


def loss_scaler_state(engine: ZeroEngine) -> dict[str, float]:
    """Return what a dynamic scale remembers; empty for a static one, and in bf16 and fp32."""
    if precision_of(engine.config) != "fp16" or not _is_dynamic(engine):
        return {}
    return {name: float(getattr(_scaler(engine), name)) for name in STATE if hasattr(_scaler(engine), name)}


def load_loss_scaler_state(engine: ZeroEngine, state: dict[str, float]) -> None:
    """Restore what ``loss_scaler_state`` returned, if the scale is dynamic now and was then."""
    if precision_of(engine.config) != "fp16":
        return
    scaler, is_dynamic = _scaler(engine), _is_dynamic(engine)
    was_dynamic = "last_overflow_iter" in state  # earlier checkpoints hold static scales too
    if is_dynamic and was_dynamic:
        for name in filter(lambda name: hasattr(scaler, name), state):
            setattr(scaler, name, state[name] if name == "cur_scale" else int(state[name]))
    elif is_dynamic or was_dynamic:
        now, then = ("dynamic", "static") if is_dynamic else ("static", "dynamic")
        log.info(
            "fp16's loss scale is %s and begins at %g: the %s one of the checkpoint is not taken",
            now,
            scaler.cur_scale,
            then,
        )


def _is_left_out(engine: ZeroEngine) -> bool:
    return engine.zero_optimization_stage() == 0 and precision_of(engine.config) == "fp16"


def _is_dynamic(engine: ZeroEngine) -> bool:
    scaler = _scaler(engine)
    return bool(scaler.dynamic if hasattr(scaler, "dynamic") else scaler.dynamic_loss_scale)


def _scaler(engine: ZeroEngine) -> Any:
    return getattr(engine.optimizer, "loss_scaler", None) or engine.optimizer.loss_scale_config
