"""Test column_sum and its relatives on small shapes: in the interpreter, or on the GPU where there is one."""

import pytest
import torch

from sws_kernels.add_layer_norm import add_layer_norm_backward, add_layer_norm_forward, layer_norm_forward, scaled_add
from sws_kernels.column_sum import column_sum, scale_and_sum, sum_partials

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", [(1, 32), (70, 96), (257, 300), (1000, 128)], ids=str)
def test_column_sum(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = normal(*shape, dtype=dtype)
    for tensor in (x, x.t().contiguous().t()):  # also where the rows are not contiguous
        torch.testing.assert_close(column_sum(tensor), x.double().sum(0).float(), rtol=1e-5, atol=1e-4)


def test_sum_partials() -> None:
    """The second stage takes any number of programs' shares, and several sums at once."""
    for shape in ((1, 32), (600, 40), (3, 528, 64)):
        partials = normal(*shape)
        torch.testing.assert_close(sum_partials(partials), partials.double().sum(-2).float(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_scale_and_sum(dtype: torch.dtype) -> None:
    x, scale = normal(5, 7, 96, dtype=dtype), torch.tensor([0.0, 1.25, 0.0, 1.25, 1.25], device=DEVICE)
    scaled, sums = scale_and_sum(x, scale)
    expected = x * scale[:, None, None].to(dtype)
    torch.testing.assert_close(scaled, expected)
    torch.testing.assert_close(sums, (x.double() * scale[:, None, None]).sum((0, 1)).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_parts_of_the_norm(dtype: torch.dtype) -> None:
    """LayerNorm alone and the add alone are what the whole computes; its backward gives the norm's output again."""
    x, branch, d_sum, d_normed = (normal(5, 7, 96, dtype=dtype, seed=i) for i in range(4))
    weight, bias = normal(96, dtype=dtype), normal(96, dtype=dtype, seed=9)
    scale = torch.tensor([0.0, 1.25, 0.0, 1.25, 1.25], device=DEVICE)
    added, normed, mean, rstd = add_layer_norm_forward(x, branch, scale, weight, bias, 1e-6)
    assert torch.equal(scaled_add(x, branch, scale), added)
    for found, expected in zip(layer_norm_forward(added, weight, bias, 1e-6), (normed, mean, rstd), strict=True):
        assert torch.equal(found, expected)

    plain = add_layer_norm_backward(d_sum, d_normed, added, scale, weight, mean, rstd)
    assert plain.normed.numel() == plain.d_branch_sum.numel() == 0
    full = add_layer_norm_backward(d_sum, d_normed, added, scale, weight, mean, rstd, bias)
    for found, expected in zip(full[:4], plain[:4], strict=True):
        assert torch.equal(found, expected)
    torch.testing.assert_close(full.normed, normed)
    expected_sum = full.d_branch.double().sum((0, 1)).float()
    torch.testing.assert_close(
        full.d_branch_sum, expected_sum, rtol=2e-3, atol=2e-2 if dtype == torch.float16 else 1e-4
    )
    unscaled = add_layer_norm_backward(d_sum, d_normed, added, None, weight, mean, rstd, bias)
    torch.testing.assert_close(
        unscaled.d_branch_sum, unscaled.d_residual.double().sum((0, 1)).float(), rtol=2e-3, atol=2e-2
    )


def test_opcheck() -> None:
    """Schema, fake implementations and tracing agree with what the operators do."""
    x, scale, weight = normal(2, 3, 64), normal(2), normal(64)
    operators = torch.ops.sws_kernels
    torch.library.opcheck(operators.column_sum.default, (x[0],))
    torch.library.opcheck(operators.scale_and_sum.default, (x, scale))
    torch.library.opcheck(operators.scaled_add.default, (x, x, scale))
    torch.library.opcheck(operators.layer_norm.default, (x, weight, weight, 1e-6))
