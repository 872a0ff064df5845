"""Compare mlp with PyTorch on small shapes: in the interpreter, or on the GPU where there is one."""

from typing import Any

import pytest
import torch

from sws_kernels import common, mlp, mlp_reference
from tests.kernels.checks.mlp import LEAVES, check, make_inputs, run, triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    ("rows", "width", "hidden"), [((2, 50), 192, 128), ((1, 197), 64, 96), ((1, 1), 96, 384)], ids=str
)
def test_accuracy(rows: tuple[int, ...], width: int, hidden: int, dtype: torch.dtype) -> None:
    check.accuracy(make_inputs(rows, width, hidden, dtype, DEVICE))


def test_strided_inputs_and_gradients() -> None:
    inputs = make_inputs((2, 9), 64, 96, torch.float32, DEVICE)
    inputs["x"] = inputs["x"][:, 1:]
    inputs["dy"] = inputs["dy"][:, :1].expand(2, 8, 64)
    inputs["fc1_weight"] = inputs["fc1_weight"].t().contiguous().t()
    inputs["fc2_weight"] = inputs["fc2_weight"].t().contiguous().t()
    check.accuracy(inputs)


def test_empty_batch() -> None:
    results = run(make_inputs((0, 5), 64, 96, torch.float32, DEVICE), triton)
    assert results["y"].shape == (0, 5, 64)
    assert not any(results[f"d_{name}"].any() for name in LEAVES)


def test_bitwise_repeatable() -> None:
    check.bitwise_repeatable(make_inputs((2, 50), 64, 96, torch.float16, DEVICE))


def test_opcheck() -> None:
    """Schema, fake implementations, autograd registration and tracing agree with what the operators do."""
    inputs = make_inputs((2, 3), 64, 96, torch.float32, DEVICE)
    leaves = [inputs[name].requires_grad_() for name in LEAVES]
    x, fc1_weight, fc1_bias, fc2_weight, fc2_bias = (leaf.detach() for leaf in leaves)
    forward, backward = torch.ops.sws_kernels.mlp.default, torch.ops.sws_kernels.mlp_backward.default
    torch.library.opcheck(forward, (*leaves, True))
    _, z = forward(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, True)
    torch.library.opcheck(backward, (inputs["dy"], x, fc1_weight, fc2_weight, z))


def test_passes_through_torch_compile() -> None:
    check.compiled(make_inputs((2, 3), 64, 96, torch.float32, DEVICE), "aot_eager")


def test_reference() -> None:
    """The reference agrees with PyTorch's operators, and its gradients with finite differences, in fp64."""
    inputs = make_inputs((3, 2), 8, 12, torch.float64, "cpu")
    leaves = [inputs[name].requires_grad_() for name in LEAVES]
    torch.testing.assert_close(mlp_reference(*leaves), check.pytorch(*leaves))
    assert torch.autograd.gradcheck(mlp_reference, leaves)


def _call(dtype: torch.dtype = torch.float32, device: str = DEVICE, **changes: Any) -> torch.Tensor:
    inputs = make_inputs((2, 3), 64, 96, dtype, device) | changes
    return mlp(*(inputs[name] for name in LEAVES), backend=inputs.get("backend", "triton"))


def test_triton_without_gpu_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "INTERPRETED", False)
    with pytest.raises(ValueError, match=r"mlp: backend='triton' was asked for, but the tensors are on cpu"):
        _call(device="cpu")


def test_interpreter_refuses_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "INTERPRETED", True)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1 takes float32, float16, got bfloat16"):
        _call(dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": "cuda"}, "choose 'reference' or 'triton'"),
        ({"fc2_weight": torch.zeros(96, 64)}, r"fc2_weight must be \[64, 96\]"),
        (
            {"fc1_bias": torch.zeros(96, dtype=torch.float16, device=DEVICE)},
            "one dtype, got x float32.*fc1_bias float16",
        ),
        ({"fc1_bias": torch.zeros(96, device="meta")}, "on one device, found"),
    ],
)
def test_wrong_arguments(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _call(**changes)


@pytest.mark.parametrize(("width", "hidden"), [(48, 96), (64, 80)])
def test_unsupported_width(width: int, hidden: int) -> None:
    inputs = make_inputs((1,), width, hidden, torch.float32, DEVICE)
    with pytest.raises(ValueError, match=rf"divisible by 32, got fc1_weight \[{hidden}, {width}\]"):
        mlp(*(inputs[name] for name in LEAVES), backend="triton")
