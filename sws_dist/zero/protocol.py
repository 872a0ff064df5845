"""Declare the members of DeepSpeed's engine that this trainer uses, for type checkers."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn


class ZeroEngine(Protocol):
    """A ``deepspeed.DeepSpeedEngine``, as far as this trainer uses it.

    ``module`` is the model, ``config`` the resolved DeepSpeed config, ``global_rank`` this process's rank,
    ``device`` what it computes on, which is also where collectives take tensors (masters may lie elsewhere: offload).
    ``optimizer`` stays untyped: DeepSpeed has a class of its own for each ZeRO stage and precision.
    """

    module: nn.Module
    optimizer: Any
    config: dict[str, Any]
    global_rank: int
    device: torch.device

    def __call__(self, images: Tensor) -> Tensor: ...
    def train(self) -> Any: ...
    def eval(self) -> Any: ...
    def backward(self, loss: Tensor) -> Any: ...
    def step(self) -> None: ...
    def zero_optimization_stage(self) -> int: ...
    def gradient_accumulation_steps(self) -> int: ...
    def is_gradient_accumulation_boundary(self) -> bool: ...
    def was_step_applied(self) -> bool: ...
    def get_global_grad_norm(self) -> Tensor | float | None: ...
