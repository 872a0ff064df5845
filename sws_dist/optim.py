"""Group the parameters for weight decay and for Muon, and compute the learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from torch import nn

from sws_dist.config.schema import OptimConfig


def parameter_groups(
    model: nn.Module, weight_decay: float, matrices: Collection[str] | None = None
) -> list[dict[str, Any]]:
    """Split the parameters into decayed and undecayed ones, as torch's optimizers take them.

    Biases, norms and what the model names in ``no_weight_decay`` (position embedding) do not decay.

    Args:
        matrices: names of the parameters for Muon, which then have a group of their own; ``muon`` marks the groups.
    """
    named = getattr(model, "no_weight_decay", None)
    exempt = named() if callable(named) else set()
    hidden: list[nn.Parameter] = []
    decay: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            shape = getattr(parameter, "ds_shape", parameter.shape)  # under ZeRO-3 a parameter's own shape is empty
            is_exempt = len(shape) <= 1 or name in exempt
            (hidden if name in (matrices or ()) else no_decay if is_exempt else decay).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": hidden, "weight_decay": weight_decay, "muon": True},
        {"params": decay, "weight_decay": weight_decay, "muon": False},
        {"params": no_decay, "weight_decay": 0.0, "muon": False},
    ]
    return [group for group in groups if group["params"]]


def hidden_matrices(model: nn.Module) -> dict[str, int]:
    """Find the matrices that Muon updates: the trained weights of the Linear layers inside ``blocks``.

    Patch and position embeddings, tokens, norms, biases, convolutions and the head are not among them.

    Returns:
        The parameters' names, each with the number of blocks of rows that are orthogonalised by themselves: a fused
        ``qkv`` weight has the queries, keys and values of each head below one another, any other weight is one block.
    """
    found = {}
    for path, module in model.named_modules():
        if "blocks" not in path.split("."):
            continue
        for name, layer in module.named_children():
            if isinstance(layer, nn.Linear) and layer.weight.requires_grad:
                heads = getattr(module, "num_heads", None) if name == "qkv" else None
                found[f"{path}.{name}.weight"] = 3 * heads if heads else 1
    return found


class LRSchedule:
    """Compute the learning rate: linear warm-up, then cosine to ``min_lr``, both per step.

    It is a pure function of the step, so there is no state to save.

    Args:
        config: rates and warm-up; ``lr`` scales with ``global_batch / lr_batch``.
        steps_per_epoch: may be a fraction; epochs do not have to end with a step.
        total_steps: number of steps of the whole run.
    """

    def __init__(self, config: OptimConfig, global_batch: int, steps_per_epoch: float, total_steps: int) -> None:
        self.peak = config.lr * (global_batch / config.lr_batch if config.lr_batch else 1.0)
        self.warmup_lr, self.min_lr = config.warmup_lr, min(config.min_lr, self.peak)
        self.total_steps = total_steps
        self.warmup_steps = min(round(config.warmup_epochs * steps_per_epoch), total_steps)

    def __call__(self, step: int) -> float:
        """Return the rate of the update that takes the weights from ``step`` to ``step + 1``."""
        if step < self.warmup_steps:
            return self.warmup_lr + (self.peak - self.warmup_lr) * step / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return self.min_lr + (self.peak - self.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
