"""Inputs and checks of mlp, shared by the interpreter's tests and the GPU's."""

import torch
from torch import Tensor

from sws_kernels.mlp import mlp
from tests.kernels import numerics
from tests.kernels.numerics import Tensors

LEAVES = ("x", "w1", "b1", "w2", "b2")


def make_inputs(rows: tuple[int, ...], width: int, hidden: int, dtype: torch.dtype, device: str) -> Tensors:
    """The operator's tensors [*rows, D] / [F, D] / [F] / [D, F] / [D], and a gradient of its output.

    z = x w1^T + b1 has a deviation of 1.5, so that GELU's tails are reached.
    """
    generator = torch.Generator().manual_seed(width + hidden + sum(rows))

    def normal(*size: int, deviation: float = 1.0) -> Tensor:
        return (deviation * torch.randn(size, generator=generator)).to(device, dtype)

    return {
        "x": normal(*rows, width),
        "w1": normal(hidden, width, deviation=1.4 * width**-0.5),
        "b1": normal(hidden, deviation=0.5),
        "w2": normal(width, hidden, deviation=hidden**-0.5),
        "b2": normal(width),
        "dy": normal(*rows, width),
    }


def run(inputs: Tensors, backend: str, function=mlp) -> Tensors:
    """The output and the five gradients, by name."""
    leaves = [inputs[name].detach().requires_grad_() for name in LEAVES]
    y = function(*leaves, backend=backend)
    gradients = torch.autograd.grad(y, leaves, inputs["dy"])
    return {"y": y.detach(), **{f"d_{name}": d for name, d in zip(LEAVES, gradients, strict=True)}}


def check_accuracy(inputs: Tensors) -> None:
    numerics.check_accuracy(run, inputs)


def check_bitwise_repeatable(inputs: Tensors) -> None:
    numerics.check_bitwise_repeatable(run, inputs)


def check_compiled(inputs: Tensors, compiler: str) -> None:
    numerics.check_compiled(run, inputs, mlp, compiler)
