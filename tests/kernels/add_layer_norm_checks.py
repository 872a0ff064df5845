"""Inputs and checks of add_layer_norm, shared by the interpreter's tests and the GPU's."""

import torch
from torch import Tensor

from sws_kernels.add_layer_norm import add_layer_norm
from tests.kernels import numerics
from tests.kernels.numerics import Tensors

EPS = 1e-6
GRADIENTS = ("d_residual", "d_branch", "dgamma", "dbeta")


def make_inputs(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: str,
    *,
    drop_path: bool = False,
    residual_dtype: torch.dtype | None = None,
    parameter_dtype: torch.dtype | None = None,
) -> Tensors:
    """The operator's tensors [B, T, D] / [D] / [B], and a gradient for each of its two outputs."""
    generator = torch.Generator().manual_seed(sum(shape))
    num_samples, _, width = shape

    def normal(*size: int, of: torch.dtype) -> Tensor:
        return torch.randn(size, generator=generator).to(device, of)

    residual_dtype, parameter_dtype = residual_dtype or dtype, parameter_dtype or dtype
    inputs = {
        "residual": normal(*shape, of=residual_dtype) + 0.5,  # a mean of its own, or a wrong mean goes unseen
        "branch": normal(*shape, of=dtype),
        "gamma": 1 + 0.5 * normal(width, of=parameter_dtype),
        "beta": normal(width, of=parameter_dtype),
        "d_new_residual": normal(*shape, of=residual_dtype),
        "d_normed": normal(*shape, of=dtype),
    }
    if drop_path:  # every third sample dropped; 1/0.75 is inexact in every dtype
        kept = torch.arange(num_samples) % 3 != 1
        inputs["scale"] = (kept / 0.75).to(device, torch.float32)
    return inputs


def run(inputs: Tensors, backend: str, function=add_layer_norm) -> Tensors:
    """Both outputs and the four gradients, by name."""
    leaves = [inputs[name].detach().requires_grad_() for name in ("residual", "branch", "gamma", "beta")]
    outputs = function(*leaves, EPS, inputs.get("scale"), backend=backend)
    gradients = torch.autograd.grad(outputs, leaves, (inputs["d_new_residual"], inputs["d_normed"]))
    named = {"new_residual": outputs[0], "normed": outputs[1], **dict(zip(GRADIENTS, gradients, strict=True))}
    return {name: value.detach() for name, value in named.items()}


def check_accuracy(inputs: Tensors) -> None:
    numerics.check_accuracy(run, inputs)


def check_bitwise_repeatable(inputs: Tensors) -> None:
    numerics.check_bitwise_repeatable(run, inputs)


def check_compiled(inputs: Tensors, compiler: str) -> None:
    numerics.check_compiled(run, inputs, add_layer_norm, compiler)
