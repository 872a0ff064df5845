"""Define the cases of add_layer_norm, which memory limits."""

from collections.abc import Iterator
from functools import partial

from torch import Tensor
from torch.nn import functional as F

from benchmarks.kernels import rivals
from benchmarks.kernels.measure import Machine, Size
from benchmarks.kernels.operator_case import OperatorCase, Provider, label, work
from sws_kernels import add_layer_norm, add_layer_norm_reference


def eager(residual: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    new_residual = residual + branch
    return new_residual, F.layer_norm(new_residual, weight.shape, weight, bias, 1e-6)


def cases(machine: Machine, size: Size) -> Iterator[OperatorCase]:
    def inputs() -> tuple[list[Tensor], list[Tensor]]:
        streams = [machine.normal(*size.stream) for _ in range(4)]
        return [*streams[:2], machine.normal(size.width), machine.normal(size.width)], streams[2:]

    stream = size.batch * size.tokens * size.width * machine.dtype.itemsize
    yield OperatorCase(
        operator="add_layer_norm",
        label=label(machine, *size.stream),
        inputs=inputs,
        providers={
            "triton": Provider(partial(add_layer_norm, backend="triton")),
            "eager": Provider(eager),
            "eager add, Liger's LayerNorm": Provider(rivals.liger_add_layer_norm),
            "eager add, QuACK's LayerNorm": Provider(rivals.quack_add_layer_norm),
            "compile": Provider(machine.compile(eager)),
        },
        reference=add_layer_norm_reference,
        num_bytes=work(4 * stream, 4 * stream),
    )
