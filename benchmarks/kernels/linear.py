"""Define the cases of a block's four products with their biases, to which `linear_gelu` has to come near."""

from collections.abc import Iterator
from functools import partial

from torch import Tensor
from torch.nn import functional as F

from benchmarks.kernels.measure import Machine, Size
from benchmarks.kernels.operator_case import OperatorCase, Provider, blas, label, tupled, work


def cases(machine: Machine, size: Size) -> Iterator[OperatorCase]:
    width = size.width
    for name, inner, out in (
        *(("qkv", width, 3 * width), ("proj", width, width)),
        *(("fc1", width, 4 * width), ("fc2", 4 * width, width)),
    ):
        yield _case(machine, size, name, inner, out)


def _case(machine: Machine, size: Size, name: str, inner: int, out: int) -> OperatorCase:
    def inputs() -> tuple[list[Tensor], list[Tensor]]:
        x, d_out = machine.normal(size.batch, size.tokens, inner), machine.normal(size.batch, size.tokens, out)
        return [x, machine.normal(out, inner, deviation=inner**-0.5), machine.normal(out)], [d_out]

    forward = 2 * size.batch * size.tokens * inner * out
    return OperatorCase(
        operator="linear",
        label=f"{name} {label(machine, size.batch * size.tokens, inner, out)}",
        inputs=inputs,
        providers={
            "cuBLAS": Provider(tupled(F.linear), partial(blas, "cublas")),
            "cuBLASLt": Provider(tupled(F.linear), partial(blas, "cublaslt")),
            "compile": Provider(tupled(machine.compile(F.linear))),
        },
        reference=tupled(F.linear),
        num_flops=work(forward, 2 * forward),
    )
