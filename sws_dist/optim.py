"""Group the parameters for weight decay and for Muon."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn


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
