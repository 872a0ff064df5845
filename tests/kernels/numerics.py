"""What "right" means for a kernel. For all operators, on the interpreter and on a GPU; imports no triton."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


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
