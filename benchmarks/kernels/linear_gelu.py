"""Define the cases of linear_gelu's forward and backward, which arithmetic limits."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.kernels import rivals
from benchmarks.kernels.measure import Machine, Size
from benchmarks.kernels.operator_case import FORWARD, OperatorCase, Provider, blas, label
from sws_kernels.linear_gelu import (
    linear_gelu_backward,
    linear_gelu_backward_reference,
    linear_gelu_forward,
    linear_gelu_reference,
)


def cases(machine: Machine, size: Size) -> Iterator[OperatorCase]:
    yield _forward_case(machine, size)
    yield _backward_case(machine, size)


def _forward_case(machine: Machine, size: Size) -> OperatorCase:
    """Return the MLP's first half, which also leaves z for the backward; PyTorch's call of cuBLASLt leaves none."""
    inner, hidden, rows = size.width, 4 * size.width, size.batch * size.tokens

    def inputs() -> tuple[list[Tensor], list[Tensor]]:
        first = machine.normal(hidden, inner, deviation=inner**-0.5), machine.normal(hidden)
        return [machine.normal(rows, inner), *first], []

    def eager(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        z = F.linear(x, weight, bias)
        return F.gelu(z), z

    def epilogue(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return (torch._addmm_activation(bias, x, weight.t(), use_gelu=True),)  # GELU by tanh

    return OperatorCase(
        operator="linear_gelu",
        label=label(machine, rows, inner, hidden),
        inputs=inputs,
        providers={
            "triton": Provider(partial(linear_gelu_forward, save=True)),
            "eager": Provider(eager),
            "cuBLASLt GELU_AUX_BIAS": Provider(rivals.cublaslt_linear_gelu()),
            "QuACK": Provider(rivals.quack_linear_gelu),
            "cuBLASLt epilogue, without z": Provider(epilogue, partial(blas, "cublaslt")),
            "compile": Provider(machine.compile(eager)),
        },
        reference=linear_gelu_reference,
        num_flops={FORWARD: 2 * rows * inner * hidden},
    )


def _backward_case(machine: Machine, size: Size) -> OperatorCase:
    """Return the second layer's input gradient times GELU', the first layer's bias gradient, and GELU(z) again."""
    inner, hidden, rows = size.width, 4 * size.width, size.batch * size.tokens

    def inputs() -> tuple[list[Tensor], list[Tensor]]:
        weight = machine.normal(inner, hidden, deviation=inner**-0.5)
        return [machine.normal(rows, inner), weight, machine.normal(rows, hidden)], []

    def eager(dy: Tensor, weight: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        dz = torch.ops.aten.gelu_backward(dy @ weight, z)
        return dz, F.gelu(z), dz.sum(dim=0, dtype=torch.float32)

    return OperatorCase(
        operator="linear_gelu_backward",
        label=label(machine, rows, inner, hidden),
        inputs=inputs,
        providers={
            "triton": Provider(linear_gelu_backward),
            "eager": Provider(eager),
            "cuBLASLt DGELU_BGRAD, eager GELU": Provider(rivals.cublaslt_linear_gelu_backward()),
            "QuACK": Provider(rivals.quack_linear_gelu_backward),
            "compile": Provider(machine.compile(eager)),
        },
        reference=linear_gelu_backward_reference,
        num_flops={FORWARD: 2 * rows * inner * hidden},
    )
