"""Make the inputs and the checks of linear_gelu: its forward, and its backward, which starts from the forward's z."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from sws_kernels.linear_gelu import (
    linear_gelu_backward,
    linear_gelu_backward_reference,
    linear_gelu_forward,
    linear_gelu_reference,
)
from tests.kernels.checks import mlp
from tests.kernels.checks.numerics import Checks, Inputs, Tensors

Functions = tuple[Callable[..., tuple[Tensor, ...]], Callable[..., tuple[Tensor, ...]]]  # forward, backward


def make_inputs(rows: tuple[int, ...], width: int, hidden: int, dtype: torch.dtype, device: str) -> Inputs:
    """Return mlp's tensors, of which linear_gelu takes x, fc1's, fc2_weight and dy, and z [N, F] for the backward."""
    inputs = mlp.make_inputs(rows, width, hidden, dtype, device)
    z = F.linear(inputs["x"], inputs["fc1_weight"], inputs["fc1_bias"])
    return inputs | {"z": z.flatten(0, -2)}


def pytorch_forward(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the forward by PyTorch's operators in the tensors' dtype."""
    z = F.linear(x, weight, bias)
    return F.gelu(z), z.flatten(0, -2)


def pytorch_backward(dy: Tensor, weight: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the backward by PyTorch's operators in the tensors' dtype."""
    dz = torch.ops.aten.gelu_backward(dy.flatten(0, -2) @ weight, z)
    return dz, F.gelu(z), dz.sum(dim=0, dtype=torch.promote_types(dz.dtype, torch.float32))


def run(inputs: Inputs, functions: Functions) -> Tensors:
    """Return the results of forward and backward by name."""
    forward, backward = functions
    h, z = forward(inputs["x"], inputs["fc1_weight"], inputs["fc1_bias"])
    dz, h_again, d_bias = backward(inputs["dy"], inputs["fc2_weight"], inputs["z"])
    return {"h": h, "z": z, "dz": dz, "h_again": h_again, "d_bias": d_bias}


triton = partial(linear_gelu_forward, save=True), linear_gelu_backward
references = linear_gelu_reference, linear_gelu_backward_reference
check = Checks(run, triton, (pytorch_forward, pytorch_backward), references)
