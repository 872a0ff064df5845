"""Compare add_layer_norm with PyTorch on small shapes: in the interpreter, or on the GPU where there is one."""

from typing import Any

import pytest
import torch

from sws_kernels import add_layer_norm, add_layer_norm_reference, common
from tests.kernels.checks.add_layer_norm import EPS, LEAVES, check, make_inputs, run, triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

SHAPES = [
    (1, 197, 192),  # 3 x 2^k: no column is masked; the last tile of rows is not full
    (4, 50, 384),  # tiles of 8 rows cross from one sample to the next
    (1, 21, 768),  # tiles of 4 rows
    (1, 5, 96),  # 3 x 32, the quickstart's width
    (3, 5, 64),  # chunks of 32 columns, the third one empty
    (2, 3, 320),  # the third chunk is half full
    (1, 1, 1024),  # a power of two; one row
]


@pytest.mark.parametrize("drop_path", [False, True], ids=["plain", "drop_path"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy(shape: tuple[int, int, int], dtype: torch.dtype, drop_path: bool) -> None:
    check.accuracy(make_inputs(shape, dtype, DEVICE, drop_path=drop_path))


@pytest.mark.parametrize(
    ("residual_dtype", "dtype", "parameter_dtype"),
    [
        (torch.float32, torch.float16, torch.float32),
        (torch.float16, torch.float16, torch.float32),
        (torch.float16, torch.float32, torch.float16),
    ],
)
def test_mixed_dtypes(residual_dtype: torch.dtype, dtype: torch.dtype, parameter_dtype: torch.dtype) -> None:
    inputs = make_inputs((2, 9, 192), dtype, DEVICE, residual_dtype=residual_dtype, parameter_dtype=parameter_dtype)
    check.accuracy(inputs)


def test_strided_inputs_and_gradients() -> None:
    """Inputs are tokens without the class token; a gradient is the expanded one of a mean over tokens."""
    inputs = make_inputs((2, 9, 192), torch.float32, DEVICE)
    inputs["residual"] = inputs["residual"][:, 1:]
    inputs["branch"] = inputs["branch"].transpose(0, 1).contiguous().transpose(0, 1)[:, 1:]
    inputs["d_new_residual"] = inputs["d_new_residual"][:, :1].expand(2, 8, 192)
    inputs["d_normed"] = inputs["d_normed"][:, 1:]
    check.accuracy(inputs)


def test_one_stream_unused() -> None:
    """After the last block only `normed` is read, so the other stream's gradient does not exist."""
    inputs = make_inputs((2, 5, 192), torch.float32, DEVICE)
    gradients = {}
    for backend in ("triton", "reference"):
        residual = inputs["residual"].clone().requires_grad_()
        _, normed = _call(inputs, residual=residual, backend=backend)
        (gradients[backend],) = torch.autograd.grad(normed, residual, inputs["d_normed"])
    torch.testing.assert_close(gradients["triton"], gradients["reference"])


def test_large_mean_keeps_its_variance() -> None:
    """With mean 1000 and deviation 1, E[x^2] - E[x]^2 would lose the variance in fp32."""
    inputs = make_inputs((1, 4, 192), torch.float32, DEVICE)
    inputs["residual"] += 1000
    check.accuracy(inputs)


def test_normalises_the_stream_as_stored() -> None:
    """fp16 near 100 rounds by 1/32. LayerNorm must see the rounded values, or the backward is of another function."""
    inputs = make_inputs((1, 4, 192), torch.float16, DEVICE)
    inputs["residual"] += 100
    results = {name: value.double() for name, value in run(inputs, triton).items()}
    weight, bias = inputs["weight"].double(), inputs["bias"].double()
    expected = torch.nn.functional.layer_norm(results["new_residual"], (192,), weight, bias, EPS)
    torch.testing.assert_close(results["normed"], expected, rtol=1e-3, atol=1e-3)  # fp16 rounds by 5e-4


def test_empty_batch() -> None:
    results = run(make_inputs((0, 5, 192), torch.float32, DEVICE), triton)
    assert results["normed"].shape == (0, 5, 192)
    assert not results["d_weight"].any()
    assert not results["d_bias"].any()


def test_bitwise_repeatable() -> None:
    check.bitwise_repeatable(make_inputs((2, 50, 192), torch.float32, DEVICE, drop_path=True))


@pytest.mark.parametrize("drop_path", [False, True], ids=["plain", "drop_path"])
def test_opcheck(drop_path: bool) -> None:
    """Schema, fake implementations, autograd registration and tracing agree with what the operators do."""
    inputs = make_inputs((2, 3, 64), torch.float32, DEVICE, drop_path=drop_path)
    scale = inputs.get("scale")
    residual, branch, weight, bias = (inputs[name].requires_grad_() for name in LEAVES)
    forward = torch.ops.sws_kernels.add_layer_norm.default
    torch.library.opcheck(forward, (residual, branch, scale, weight, bias, EPS))
    with torch.no_grad():
        new_residual, _, mean, rstd = forward(residual, branch, scale, weight, bias, EPS)
    gradients = (inputs["d_new_residual"], inputs["d_normed"])
    backward = torch.ops.sws_kernels.add_layer_norm_backward.default
    for also in (None, bias.detach()):
        torch.library.opcheck(backward, (*gradients, new_residual, scale, weight.detach(), also, mean, rstd))


def test_passes_through_torch_compile() -> None:
    check.compiled(make_inputs((2, 3, 64), torch.float32, DEVICE, drop_path=True), "aot_eager")


@pytest.mark.parametrize("drop_path", [False, True], ids=["plain", "drop_path"])
def test_reference(drop_path: bool) -> None:
    """The reference agrees with PyTorch's layer_norm, and its gradients with finite differences, in fp64."""
    inputs = make_inputs((3, 2, 8), torch.float64, "cpu", drop_path=drop_path)
    found, expected = run(inputs, check.reference), run(inputs, check.pytorch)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda m, n=name: f"{n}: {m}")
    leaves = [inputs[name].requires_grad_() for name in LEAVES]
    assert torch.autograd.gradcheck(lambda *x: add_layer_norm_reference(*x, eps=EPS, scale=inputs.get("scale")), leaves)


def test_dropped_sample_passes_unchanged() -> None:
    inputs = make_inputs((3, 4, 64), torch.float32, DEVICE, drop_path=True)
    results = run(inputs, triton)
    assert inputs["scale"][1] == 0
    assert torch.equal(results["new_residual"][1], inputs["residual"][1])
    assert not results["d_branch"][1].any()


def _call(inputs: dict[str, Any], **changes: Any) -> tuple[torch.Tensor, torch.Tensor]:
    arguments = {name: inputs.get(name) for name in (*LEAVES, "scale")} | {"backend": "triton"} | changes
    return add_layer_norm(**arguments)


def test_triton_without_gpu_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no silent fallback: the message names what was asked for and the device that was found."""
    monkeypatch.setattr(common, "INTERPRETED", False)
    with pytest.raises(ValueError, match=r"backend='triton' was asked for, but the tensors are on cpu"):
        _call(make_inputs((1, 2, 64), torch.float32, "cpu"))


def test_interpreter_refuses_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "INTERPRETED", True)
    with pytest.raises(ValueError, match=r"TRITON_INTERPRET=1 takes float32, float16, got bfloat16"):
        _call(make_inputs((1, 2, 64), torch.bfloat16, DEVICE))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": "cuda"}, "choose 'reference' or 'triton'"),
        ({"branch": torch.zeros(1, 2, 128)}, r"got \[2, 3, 64\] and \[1, 2, 128\]"),
        ({"weight": torch.zeros(65)}, r"must be \[64\]"),
        ({"scale": torch.zeros(3)}, r"scale must be \[2\]"),
        ({"scale": torch.ones(2, requires_grad=True)}, "need no gradient"),
        ({"scale": torch.ones(2, device="meta")}, "on one device, found"),
    ],
)
def test_wrong_arguments(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _call(make_inputs((2, 3, 64), torch.float32, DEVICE), **changes)


@pytest.mark.parametrize("width", [80, 3136])
def test_unsupported_width(width: int) -> None:
    with pytest.raises(ValueError, match=f"divisible by 32 up to 3072, got {width}"):
        _call(make_inputs((1, 1, width), torch.float32, DEVICE))
