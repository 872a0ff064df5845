"""Define when a kernel's results are right, for all operators, in the interpreter and on a GPU. Needs torch only."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Inputs = dict[str, Any]  # tensors by name, groups of them, and plain arguments
Tensors = dict[str, Tensor]


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Let torch.empty return NaN, so that an element which a kernel forgets to write cannot pass by luck."""
    settings: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        settings.fill_uninitialized_memory = before[1]


def assert_as_accurate(got: Tensors, same_dtype: Tensors, exact: Tensors) -> None:
    """Assert that `got` is at most twice as far from `exact` as PyTorch's operator in the same dtype, each tensor.

    same_dtype: PyTorch's results in the kernel's dtypes. exact: the reference's results in fp64 from the same inputs.
    Half a rounding step of the largest value is added to twice PyTorch's largest error, for where PyTorch is lucky.
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


@dataclass(frozen=True)
class Checks:
    """Check one operator through its three implementations, which take the same arguments.

    run: (inputs, implementation, **options) -> outputs and gradients by name.
    triton: the kernels. pytorch: PyTorch's own operators. reference: the formula, which is run in fp64.
    """

    run: Callable[..., Tensors]
    triton: Any
    pytorch: Any
    reference: Any

    def accuracy(self, inputs: Inputs, *, triton: dict[str, Any] | None = None, **options: Any) -> None:
        """Compare Triton with PyTorch in the same dtypes, both against the reference in fp64; no input may change.

        triton: options of the kernels only.
        """
        before = pytree.tree_map_only(Tensor, Tensor.clone, inputs)
        got = self.run(inputs, self.triton, **options, **(triton or {}))
        pairs = zip(pytree.tree_leaves(inputs), pytree.tree_leaves(before), strict=True)
        assert all(torch.equal(x, old) for x, old in pairs if isinstance(x, Tensor)), "an input was changed"
        exact = self.run(in_fp64(inputs), self.reference, **options)
        assert_as_accurate(got, self.run(inputs, self.pytorch, **options), exact)

    def bitwise_repeatable(self, inputs: Inputs) -> None:
        """Run the kernels twice; every bit must be the same."""
        assert_equal(self.run(inputs, self.triton), self.run(inputs, self.triton))

    def compiled(self, inputs: Inputs, compiler: str, *, relative: float = 0.0) -> None:
        """Run under torch.compile, which must keep the operator whole (no graph break).

        relative: how far a result may then be from the one without torch.compile, by norms; 0 asks for equal bits.
        """
        torch.compiler.reset()
        compiled = torch.compile(self.triton, backend=compiler, fullgraph=True)
        got, eager = self.run(inputs, compiled), self.run(inputs, self.triton)
        if not relative:
            assert_equal(got, eager)
        for name, value in got.items():
            distance = (value.float() - eager[name].float()).norm() / eager[name].float().norm()
            assert distance <= relative, f"{name}: {distance:.3g}"

    def cuda_graph(self, inputs: Inputs, changed: Iterable[str]) -> None:
        """Capture the operator once and replay it on new contents of the ``changed`` inputs: equal bits."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.run(inputs, self.triton)  # compiles, which capture does not allow
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = self.run(inputs, self.triton)
        for name in changed:
            inputs[name].mul_(-0.5)
        graph.replay()
        assert_equal(captured, self.run(inputs, self.triton))


def in_fp64(inputs: Inputs) -> Inputs:
    """Return the inputs with every tensor in fp64."""
    return pytree.tree_map_only(Tensor, Tensor.double, inputs)


def assert_equal(got: Tensors, expected: Tensors) -> None:
    """Assert that both have the same tensors, bit for bit."""
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name
