"""Define the cases of mlp, which arithmetic limits."""

from collections.abc import Iterator
from functools import partial

from torch import Tensor
from torch.nn import functional as F

from benchmarks.kernels.measure import Machine, Size
from benchmarks.kernels.operator_case import OperatorCase, Provider, label, tupled, work
from sws_kernels import mlp, mlp_reference


def eager(x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, fc1_weight, fc1_bias)), fc2_weight, fc2_bias)


def cases(machine: Machine, size: Size) -> Iterator[OperatorCase]:
    width, hidden = size.width, 4 * size.width

    def inputs() -> tuple[list[Tensor], list[Tensor]]:
        first = machine.normal(hidden, width, deviation=width**-0.5), machine.normal(hidden)
        second = machine.normal(width, hidden, deviation=hidden**-0.5), machine.normal(width)
        return [machine.normal(*size.stream), *first, *second], [machine.normal(*size.stream)]

    forward = 2 * 2 * size.batch * size.tokens * width * hidden
    yield OperatorCase(
        operator="mlp",
        label=label(machine, *size.stream),
        inputs=inputs,
        providers={
            "triton": Provider(tupled(partial(mlp, backend="triton"))),
            "eager": Provider(tupled(eager)),
            "compile": Provider(tupled(machine.compile(eager))),
        },
        reference=tupled(mlp_reference),
        num_flops=work(forward, 2 * forward),
    )
