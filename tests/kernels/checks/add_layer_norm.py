"""Make the inputs and the checks of add_layer_norm."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from sws_kernels.add_layer_norm import add_layer_norm, add_layer_norm_reference
from tests.kernels.checks.numerics import Checks, Inputs, Tensors

EPS = 1e-6
LEAVES = ("residual", "branch", "weight", "bias")


def make_inputs(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: str,
    *,
    drop_path: bool = False,
    residual_dtype: torch.dtype | None = None,
    parameter_dtype: torch.dtype | None = None,
) -> Inputs:
    """Return the operator's tensors [B, T, D], [D] and [B], and a gradient for each of its two outputs."""
    generator = torch.Generator().manual_seed(sum(shape))
    num_samples, _, width = shape

    def normal(*size: int, of: torch.dtype) -> Tensor:
        return torch.randn(size, generator=generator).to(device, of)

    residual_dtype, parameter_dtype = residual_dtype or dtype, parameter_dtype or dtype
    inputs = {
        "residual": normal(*shape, of=residual_dtype) + 0.5,  # with a mean of 0, a wrong mean would go unseen
        "branch": normal(*shape, of=dtype),
        "weight": 1 + 0.5 * normal(width, of=parameter_dtype),
        "bias": normal(width, of=parameter_dtype),
        "d_new_residual": normal(*shape, of=residual_dtype),
        "d_normed": normal(*shape, of=dtype),
    }
    if drop_path:  # every third sample is dropped; 1/0.75 is inexact in every dtype
        kept = torch.arange(num_samples) % 3 != 1
        inputs["scale"] = (kept / 0.75).to(device, torch.float32)
    return inputs


def pytorch(
    residual: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Compute the operator by PyTorch's operators in the tensors' dtypes."""
    scaled = branch if scale is None else branch * scale.to(branch.dtype)[:, None, None]
    new_residual = (residual + scaled).to(residual.dtype)
    dtype = torch.promote_types(new_residual.dtype, weight.dtype)  # layer_norm takes one dtype; the wider loses nothing
    normed = F.layer_norm(new_residual.to(dtype), weight.shape, weight.to(dtype), bias.to(dtype), eps)
    return new_residual, normed.to(branch.dtype)


def run(inputs: Inputs, function: Callable[..., tuple[Tensor, Tensor]]) -> Tensors:
    """Return both outputs and the four gradients by name."""
    leaves = [inputs[name].detach().requires_grad_() for name in LEAVES]
    outputs = function(*leaves, EPS, inputs.get("scale"))
    gradients = torch.autograd.grad(outputs, leaves, (inputs["d_new_residual"], inputs["d_normed"]))
    named = {"new_residual": outputs[0], "normed": outputs[1]}
    named |= {f"d_{name}": gradient for name, gradient in zip(LEAVES, gradients, strict=True)}
    return {name: value.detach() for name, value in named.items()}


triton = partial(add_layer_norm, backend="triton")
check = Checks(run, triton, pytorch, add_layer_norm_reference)
