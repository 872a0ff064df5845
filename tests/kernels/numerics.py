"""What "right" means for a kernel. For all operators, on the interpreter and on a GPU; imports no triton."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Run = Callable[..., Tensors]  # (inputs, backend, operator) -> outputs and gradients by name


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """torch.empty returns NaN, so that an element which a kernel forgets to write cannot pass by luck."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


def assert_as_accurate(got: Tensors, same_dtype: Tensors, exact: Tensors) -> None:
    """`got` is at most twice as far from `exact` as PyTorch's operator in the same dtype is, each tensor.

    same_dtype: PyTorch's results in the kernel's dtypes; exact: PyTorch's in fp64 from the same inputs. To
    twice PyTorch's largest error comes half a rounding step of the largest value, where PyTorch is lucky.
    """
    assert got.keys() == same_dtype.keys() == exact.keys()
    for name, value in got.items():
        theirs, truth = same_dtype[name], exact[name]
        assert value.shape == truth.shape, name
        assert value.dtype == theirs.dtype, name
        assert value.isfinite().all(), f"{name}: {(~value.isfinite()).sum()} elements are not finite"
        error = (value.double() - truth).abs().max().item()
        allowed = 2 * (theirs.double() - truth).abs().max().item()
        allowed += 0.5 * torch.finfo(value.dtype).eps * truth.abs().max().item()
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def check_accuracy(run: Run, inputs: Tensors) -> None:
    """Triton against PyTorch in the same dtypes, both against fp64; and no input is written to."""
    before = {name: value.clone() for name, value in inputs.items()}
    got = run(inputs, "triton")
    for name, value in inputs.items():
        assert torch.equal(value, before[name]), f"{name} was changed"
    exact = run({name: value.double() for name, value in inputs.items()}, "reference")
    assert_as_accurate(got, run(inputs, "reference"), exact)


def check_bitwise_repeatable(run: Run, inputs: Tensors) -> None:
    first, second = run(inputs, "triton"), run(inputs, "triton")
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def check_compiled(run: Run, inputs: Tensors, operator: Callable[..., Any], compiler: str) -> None:
    """torch.compile keeps the operator whole (no graph break) and changes no bit of it."""
    torch.compiler.reset()
    compiled = torch.compile(operator, backend=compiler, fullgraph=True)
    eager = run(inputs, "triton")
    for name, value in run(inputs, "triton", compiled).items():
        assert torch.equal(value, eager[name]), name


def check_cuda_graph(run: Callable[[], Tensors], changed: Iterable[Tensor]) -> None:
    """Captured once and replayed on new contents of its inputs' memory, ``run`` gives what it gives uncaptured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # compiles, which capture does not allow
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for value in changed:
        value.mul_(-0.5)
    graph.replay()
    for name, value in run().items():
        assert torch.equal(value, captured[name]), name
