"""Make the inputs and the checks of mlp."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from sws_kernels.mlp import mlp, mlp_reference
from tests.kernels.checks.numerics import Checks, Inputs, Tensors

LEAVES = ("x", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")


def make_inputs(rows: tuple[int, ...], width: int, hidden: int, dtype: torch.dtype, device: str) -> Inputs:
    """Return the operator's tensors, x [*rows, D] first, and a gradient of its output.

    The deviation of z = x fc1_weight^T + fc1_bias is 1.5, so that GELU's tails are reached.
    """
    generator = torch.Generator().manual_seed(width + hidden + sum(rows))

    def normal(*size: int, deviation: float = 1.0) -> Tensor:
        return (deviation * torch.randn(size, generator=generator)).to(device, dtype)

    return {
        "x": normal(*rows, width),
        "fc1_weight": normal(hidden, width, deviation=1.4 * width**-0.5),
        "fc1_bias": normal(hidden, deviation=0.5),
        "fc2_weight": normal(width, hidden, deviation=hidden**-0.5),
        "fc2_bias": normal(width),
        "dy": normal(*rows, width),
    }


def pytorch(x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor) -> Tensor:
    """Compute the operator by PyTorch's operators in the tensors' dtype."""
    return F.linear(F.gelu(F.linear(x, fc1_weight, fc1_bias)), fc2_weight, fc2_bias)


def run(inputs: Inputs, function: Callable[..., Tensor]) -> Tensors:
    """Return the output and the five gradients by name."""
    leaves = [inputs[name].detach().requires_grad_() for name in LEAVES]
    y = function(*leaves)
    gradients = torch.autograd.grad(y, leaves, inputs["dy"])
    return {"y": y.detach(), **{f"d_{name}": d for name, d in zip(LEAVES, gradients, strict=True)}}


triton = partial(mlp, backend="triton")
check = Checks(run, triton, pytorch, mlp_reference)
