"""Compare linear_gelu with PyTorch, and its GELU with erf in fp64: in the interpreter, or on a GPU if there is one."""

import pytest
import torch
import triton
import triton.language as tl

from sws_kernels.linear_gelu import linear_gelu_backward, linear_gelu_forward
from sws_kernels.linear_gelu_kernels import normal_cdf, normal_pdf
from tests.kernels.checks.linear_gelu import check, make_inputs, run

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
Shape = tuple[tuple[int, ...], int, int]
SHAPES: list[Shape] = [  # rows, width, hidden
    ((1, 196), 64, 256),  # the second row tile is not full
    ((2, 50), 192, 128),  # three steps of 64
    ((1, 1), 96, 384),  # one row; steps of 32
    ((3,), 320, 96),  # the column tile is not full; no tokens
]


@triton.jit
def _gelu_kernel(z_ptr, cdf_ptr, pdf_ptr, EXACT: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    z = tl.load(z_ptr + at)
    tl.store(cdf_ptr + at, normal_cdf(z, EXACT))
    tl.store(pdf_ptr + at, normal_pdf(z))


@pytest.mark.parametrize(("exact", "bound"), [(True, 1.2e-7), (False, 7.4e-5)], ids=["erf", "polynomial"])
def test_normal_distribution_against_fp64(exact: bool, bound: float) -> None:
    """The stated bounds hold on 65,536 points that reach far into both tails."""
    z = torch.linspace(-8, 8, 65_536, device=DEVICE)
    cdf, pdf = torch.empty_like(z), torch.empty_like(z)
    _gelu_kernel[(1,)](z, cdf, pdf, exact, z.numel())
    z, cdf = z.double(), cdf.double()
    truth = torch.special.ndtr(z)
    density = torch.exp(-z * z / 2) / (2 * torch.pi) ** 0.5
    assert (cdf - truth).abs().max() <= bound
    assert (pdf - density).abs().max() <= 1.2e-7
    assert (z * cdf - z * truth).abs().max() <= 4 * bound  # GELU, as linear_gelu_kernels.py states it
    gradient = cdf + z * pdf.double() - truth - z * density
    assert gradient.abs().max() <= bound + 2e-7
    if not exact:
        assert not cdf[z < -3.86].any()
        assert (cdf[z > 3.86] == 1).all()
        relative = (cdf / truth - 1).abs()
        assert (relative[z > -1] < 2.0**-11).all()  # half a rounding step of fp16
        assert (relative[z > -1.7] < 2.0**-9).all()  # half a rounding step of bf16


def test_huge_values_stay_finite() -> None:
    """1e4 is an fp16 number, and the polynomial must not be evaluated there."""
    z = torch.tensor([-6e4, -1e4, -100.0, 100.0, 1e4, 6e4], dtype=torch.float16, device=DEVICE)
    x = torch.zeros(2, 32, dtype=torch.float16, device=DEVICE)
    weight = torch.zeros(32, 32, dtype=torch.float16, device=DEVICE)
    bias = torch.zeros(32, dtype=torch.float16, device=DEVICE)
    bias[:6] = z
    h, _ = linear_gelu_forward(x, weight, bias, True)
    assert torch.equal(h[0, :6], torch.nn.functional.relu(z))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy(shape: Shape, dtype: torch.dtype) -> None:
    check.accuracy(make_inputs(*shape, dtype, DEVICE))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_backward_repeats_the_forward(dtype: torch.dtype) -> None:
    """h is not saved, so the backward's h must be the forward's to the bit. Without `save` there is no z."""
    inputs = make_inputs((130,), 64, 96, dtype, DEVICE)
    h, z = linear_gelu_forward(inputs["x"], inputs["fc1_weight"], inputs["fc1_bias"], True)
    _, again, _ = linear_gelu_backward(inputs["dy"], inputs["fc2_weight"], z)
    assert torch.equal(h, again)
    unsaved, nothing = linear_gelu_forward(inputs["x"], inputs["fc1_weight"], inputs["fc1_bias"], False)
    assert torch.equal(h, unsaved)
    assert nothing.numel() == 0


def test_more_row_tiles_than_a_group() -> None:
    """The order of programs takes every tile once, also in a last group that is not full."""
    check.accuracy(make_inputs((9 * 64 + 1,), 32, 96, torch.float32, DEVICE))


def test_opcheck() -> None:
    """Schema and fake implementations agree with what the operators do."""
    inputs = make_inputs((2, 3), 64, 96, torch.float32, DEVICE)
    forward, backward = torch.ops.sws_kernels.linear_gelu.default, torch.ops.sws_kernels.linear_gelu_backward.default
    for save in (True, False):
        torch.library.opcheck(forward, (inputs["x"], inputs["fc1_weight"], inputs["fc1_bias"], save))
    torch.library.opcheck(backward, (inputs["dy"], inputs["fc2_weight"], inputs["z"]))


def test_reference() -> None:
    """The references agree with PyTorch's GELU and its derivative in fp64."""
    inputs = make_inputs((3, 2), 8, 12, torch.float64, "cpu")
    found, expected = run(inputs, check.reference), run(inputs, check.pytorch)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda m, n=name: f"{n}: {m}")
