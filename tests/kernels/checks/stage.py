"""Make the inputs and the checks of stage."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sws_kernels.providers import TABLES, TRITON, Providers
from sws_kernels.stage import StageWeights, stage, stage_reference
from tests.kernels.checks import add_layer_norm, mlp, packed_attention
from tests.kernels.checks.numerics import Checks, Inputs, Tensors

EPS = 1e-6


def make_inputs(
    shape: tuple[int, int, int],
    repeats: int,
    num_heads: int,
    dtype: torch.dtype,
    device: str,
    *,
    hidden: int | None = None,
    drop_path: bool = False,
    qkv_bias: bool = True,
) -> Inputs:
    """Return the stage's arguments for x [B, T, D] and a gradient dy.

    The weights have sizes that a trained network might have, so that every branch matters.
    """
    generator = torch.Generator().manual_seed(sum(shape) + repeats)
    num_samples, _, width = shape
    hidden = hidden or 4 * width

    def normal(*size: int, deviation: float = 1.0) -> Tensor:
        return (deviation * torch.randn(size, generator=generator)).to(device, dtype)

    def linear(out: int, inner: int) -> tuple[Tensor, Tensor]:
        return normal(out, inner, deviation=inner**-0.5), normal(out, deviation=0.2)

    def norm() -> tuple[Tensor, Tensor]:
        return 1 + normal(width, deviation=0.2), normal(width, deviation=0.2)

    weights = StageWeights(
        *norm(), *linear(3 * width, width), *linear(width, width), *norm(), *linear(hidden, width),
        *linear(width, hidden),
    )  # fmt: skip
    if not qkv_bias:
        weights = weights._replace(qkv_bias=None)
    scales = None
    if drop_path:  # dropped here and there; 1/0.75 is inexact in every dtype
        kept = torch.arange(repeats * 2 * num_samples).view(repeats, 2, num_samples) % 3 != 1
        scales = (kept / 0.75).to(device, torch.float32)
    x, dy = normal(*shape), normal(*shape)
    return {"x": x, "weights": weights, "repeats": repeats, "num_heads": num_heads, "scales": scales, "dy": dy}


def arguments(inputs: Inputs) -> tuple[Any, ...]:
    """Return the positional arguments of `stage`."""
    return *(inputs[name] for name in ("x", "weights", "repeats", "num_heads")), EPS, inputs["scales"]


def pytorch(
    x: Tensor, weights: StageWeights, repeats: int, num_heads: int, eps: float, scales: Tensor | None
) -> Tensor:
    """Compute the stage by PyTorch's operators in the tensors' dtype."""
    w, width = weights, x.shape[2]
    normed = F.layer_norm(x, (width,), w.norm1_weight, w.norm1_bias, eps)
    for r in range(repeats):
        scale1, scale2 = (None, None) if scales is None else scales[r]
        qkv = F.linear(normed, w.qkv_weight, w.qkv_bias).unflatten(2, (3, num_heads, width // num_heads))
        branch = F.linear(packed_attention.pytorch(qkv), w.proj_weight, w.proj_bias)
        x, normed = add_layer_norm.pytorch(x, branch, w.norm2_weight, w.norm2_bias, eps, scale1)
        branch = mlp.pytorch(normed, w.fc1_weight, w.fc1_bias, w.fc2_weight, w.fc2_bias)
        x, normed = add_layer_norm.pytorch(x, branch, w.norm1_weight, w.norm1_bias, eps, scale2)
    return x


def run(inputs: Inputs, function: Callable[..., Tensor], **options: Any) -> Tensors:
    """Return the output and all gradients by name."""
    x = inputs["x"].detach().requires_grad_()
    weights = StageWeights._make(None if w is None else w.detach().requires_grad_() for w in inputs["weights"])
    y = function(*arguments(inputs | {"x": x, "weights": weights}), **options)
    leaves = {"x": x} | {name: w for name, w in weights._asdict().items() if w is not None}
    gradients = torch.autograd.grad(y, list(leaves.values()), inputs["dy"])
    return {"y": y.detach(), **{f"d_{name}": d for name, d in zip(leaves, gradients, strict=True)}}


def one_rival_each() -> list[Providers]:
    """Return stages whose operators are Triton's but for one, for each operator and provider."""
    return [
        TRITON._replace(**{operator: name}) for operator, table in TABLES.items() for name in table if name != "triton"
    ]


triton = partial(stage, backend="triton")
check = Checks(run, triton, pytorch, stage_reference)
