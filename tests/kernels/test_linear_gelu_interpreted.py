"""mlp and its GELU: against erf in fp64, small shapes, in the interpreter or on the GPU where there is one."""

import pytest
import torch
import triton
import triton.language as tl

from sws_kernels import common, mlp, mlp_reference
from sws_kernels.linear_gelu import linear_gelu_backward, linear_gelu_forward, normal_cdf, normal_pdf
from tests.kernels.mlp_checks import LEAVES, check_accuracy, check_bitwise_repeatable, check_compiled, make_inputs, run

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
HOPPER = DEVICE == "cpu" or torch.cuda.get_device_capability()[0] == 9  # the interpreter plays one
SHAPES = [  # rows, width, hidden
    ((1, 196), 64, 256),  # the second row tile not full
    ((2, 50), 192, 128),  # three steps of 64
    ((1, 1), 96, 384),  # one row; steps of 32
    ((3,), 320, 96),  # the column tile not full; no tokens
]


@triton.jit
def _gelu_kernel(z_ptr, cdf_ptr, pdf_ptr, EXACT: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    z = tl.load(z_ptr + at)
    tl.store(cdf_ptr + at, normal_cdf(z, EXACT))
    tl.store(pdf_ptr + at, normal_pdf(z))


@pytest.mark.parametrize(("exact", "bound"), [(True, 1.2e-7), (False, 7.4e-5)], ids=["erf", "polynomial"])
def test_normal_distribution_against_fp64(exact, bound):
    """The stated bounds, on 65,536 points that reach far into both tails."""
    z = torch.linspace(-8, 8, 65_536, device=DEVICE)
    cdf, pdf = torch.empty_like(z), torch.empty_like(z)
    _gelu_kernel[(1,)](z, cdf, pdf, exact, z.numel())
    z, cdf = z.double(), cdf.double()
    truth = torch.special.ndtr(z)
    density = torch.exp(-z * z / 2) / (2 * torch.pi) ** 0.5
    assert (cdf - truth).abs().max() <= bound
    assert (pdf - density).abs().max() <= 1.2e-7
    assert (z * cdf - z * truth).abs().max() <= 4 * bound  # GELU, as docs/kernels.md states it
    gradient = cdf + z * pdf.double() - truth - z * density
    assert gradient.abs().max() <= bound + 2e-7
    if not exact:
        assert not cdf[z < -3.86].any()
        assert (cdf[z > 3.86] == 1).all()
        relative = (cdf / truth - 1).abs()
        assert (relative[z > -1] < 2.0**-11).all()  # half a rounding step of fp16
        assert (relative[z > -1.7] < 2.0**-9).all()  # and of bf16


def test_huge_values_stay_finite():
    """1e4 is an fp16 number: the polynomial must not be evaluated there."""
    z = torch.tensor([-6e4, -1e4, -100.0, 100.0, 1e4, 6e4], dtype=torch.float16, device=DEVICE)
    x = torch.zeros(2, 32, dtype=torch.float16, device=DEVICE)
    weight = torch.zeros(32, 32, dtype=torch.float16, device=DEVICE)
    bias = torch.zeros(32, dtype=torch.float16, device=DEVICE)
    bias[:6] = z
    h, _ = linear_gelu_forward(x, weight, bias, True)
    assert torch.equal(h[0, :6], torch.nn.functional.relu(z))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy(shape, dtype):
    check_accuracy(make_inputs(*shape, dtype, DEVICE))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_backward_repeats_the_forward(dtype):
    """h is not kept: the backward's must be the forward's to the bit. And without `save` nothing is kept."""
    inputs = make_inputs((130,), 64, 96, dtype, DEVICE)
    h, z = linear_gelu_forward(inputs["x"], inputs["w1"], inputs["b1"], True)
    _, again, _ = linear_gelu_backward(inputs["dy"], inputs["w2"], z)
    assert torch.equal(h, again)
    unsaved, nothing = linear_gelu_forward(inputs["x"], inputs["w1"], inputs["b1"], False)
    assert torch.equal(h, unsaved)
    assert nothing.numel() == 0


@pytest.mark.skipif(not HOPPER, reason="persistent programs are for Hopper (and the interpreter)")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_persistent_programs_compute_the_same(shape, dtype):
    """Tile by tile the same arithmetic: equal bits where no tile is wider, and every tile is done."""
    inputs = make_inputs(*shape, dtype, DEVICE)
    for got, want in zip(
        linear_gelu_forward(inputs["x"], inputs["w1"], inputs["b1"], True, persistent=True),
        linear_gelu_forward(inputs["x"], inputs["w1"], inputs["b1"], True),
        strict=True,
    ):
        torch.testing.assert_close(got, want)
    z = want
    for got, want in zip(
        linear_gelu_backward(inputs["dy"], inputs["w2"], z, persistent=True),
        linear_gelu_backward(inputs["dy"], inputs["w2"], z),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


def test_strided_inputs_and_gradients():
    inputs = make_inputs((2, 9), 64, 96, torch.float32, DEVICE)
    inputs["x"] = inputs["x"][:, 1:]
    inputs["dy"] = inputs["dy"][:, :1].expand(2, 8, 64)
    inputs["w1"] = inputs["w1"].t().contiguous().t()
    inputs["w2"] = inputs["w2"].t().contiguous().t()
    check_accuracy(inputs)


def test_more_row_tiles_than_a_group():
    """The order of programs: every tile once, also in a last group that is not full."""
    inputs = make_inputs((9 * 64 + 1,), 32, 96, torch.float32, DEVICE)
    got = mlp(*(inputs[name] for name in LEAVES), backend="triton")
    torch.testing.assert_close(got, mlp_reference(*(inputs[name] for name in LEAVES)))


def test_empty_batch():
    results = run(make_inputs((0, 5), 64, 96, torch.float32, DEVICE), "triton")
    assert results["y"].shape == (0, 5, 64)
    assert not any(results[f"d_{name}"].any() for name in ("w1", "b1", "w2", "b2"))


def test_bitwise_repeatable():
    check_bitwise_repeatable(make_inputs((2, 50), 64, 96, torch.float16, DEVICE))


def test_opcheck():
    """Schema, fake implementations, autograd registration and tracing agree with what the operators do."""
    inputs = make_inputs((2, 3), 64, 96, torch.float32, DEVICE)
    leaves = [inputs[name].requires_grad_() for name in LEAVES]
    x, w1, b1, w2, _ = (leaf.detach() for leaf in leaves)
    operators = torch.ops.sws_kernels
    torch.library.opcheck(operators.mlp.default, (*leaves, True))
    for save in (True, False):
        torch.library.opcheck(operators.linear_gelu.default, (x, w1, b1, save))
    z = operators.linear_gelu(x, w1, b1, True)[1]
    torch.library.opcheck(operators.linear_gelu_backward.default, (inputs["dy"], w2, z))
    torch.library.opcheck(operators.mlp_backward.default, (inputs["dy"], x, w1, w2, z))


def test_passes_through_torch_compile():
    check_compiled(make_inputs((2, 3), 64, 96, torch.float32, DEVICE), "aot_eager")


def test_reference_gradients():
    """The oracle itself, against finite differences in fp64."""
    inputs = make_inputs((3, 2), 8, 12, torch.float64, "cpu")
    assert torch.autograd.gradcheck(mlp_reference, [inputs[name].requires_grad_() for name in LEAVES])


def _call(**changes):
    inputs = make_inputs((2, 3), 64, 96, torch.float32, DEVICE) | changes
    backend = inputs.pop("backend", "triton")
    return mlp(*(inputs[name] for name in LEAVES), backend=backend)


def test_triton_without_gpu_is_an_error(monkeypatch):
    monkeypatch.setattr(common, "INTERPRETED", False)
    inputs = make_inputs((2, 3), 64, 96, torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"mlp: backend='triton' was asked for, but the tensors are on cpu"):
        mlp(*(inputs[name] for name in LEAVES), backend="triton")


def test_interpreter_refuses_bf16(monkeypatch):
    monkeypatch.setattr(common, "INTERPRETED", True)
    inputs = make_inputs((2, 3), 64, 96, torch.bfloat16, DEVICE)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1 takes float32, float16, got bfloat16"):
        mlp(*(inputs[name] for name in LEAVES), backend="triton")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": "cuda"}, "choose 'reference' or 'triton'"),
        ({"w2": torch.zeros(96, 64)}, r"w2 must be \[64, 96\]"),
        ({"b1": torch.zeros(96, dtype=torch.float16, device=DEVICE)}, "one dtype, got x float32.*b1 float16"),
        ({"b1": torch.zeros(96, device="meta")}, "on one device, found"),
    ],
)
def test_wrong_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        _call(**changes)


@pytest.mark.parametrize(("width", "hidden"), [(48, 96), (64, 80)])
def test_unsupported_width(width, hidden):
    inputs = make_inputs((1,), width, hidden, torch.float32, DEVICE)
    with pytest.raises(ValueError, match=rf"divisible by 32, got w1 \[{hidden}, {width}\]"):
        mlp(*(inputs[name] for name in LEAVES), backend="triton")
