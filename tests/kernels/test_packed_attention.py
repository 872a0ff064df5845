"""Compare packed_attention with PyTorch on small shapes: in the interpreter, or on the GPU where there is one."""

import math
from typing import Any

import pytest
import torch

from sws_kernels import common, launch_config, packed_attention, packed_attention_reference
from tests.kernels.checks.numerics import assert_equal
from tests.kernels.checks.packed_attention import check, make_inputs, run, triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Shape = tuple[int, int, int, int]  # B, T, H, D

SINGLE_BLOCK: list[Shape] = [  # in fp16 a program has a head; fp32 always takes many blocks
    (1, 196, 1, 64),  # the last tile of queries has 4 rows
    (2, 50, 2, 32),  # tells samples and heads apart
    (1, 100, 1, 128),
    (1, 1, 3, 64),  # one token, whose softmax is 1
]
MANY_BLOCKS: list[Shape] = [(1, 257, 1, 64), (1, 197, 1, 32), (1, 130, 1, 128)]  # in fp16 too


@pytest.mark.parametrize("shape", [*SINGLE_BLOCK, *MANY_BLOCKS], ids=str)
def test_accuracy_in_fp16(shape: Shape) -> None:
    check.accuracy(make_inputs(shape, torch.float16, DEVICE, bias=True))


@pytest.mark.parametrize("shape", [(1, 197, 1, 64), (2, 50, 2, 32), (1, 50, 1, 128), (1, 1, 3, 64)], ids=str)
def test_accuracy_in_fp32(shape: Shape) -> None:
    check.accuracy(make_inputs(shape, torch.float32, DEVICE, bias=True))


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1, 196, 1, 64), torch.float16),
        ((1, 130, 1, 128), torch.float16),
        ((2, 50, 2, 32), torch.float16),
        ((1, 196, 1, 64), torch.float32),
    ],
    ids=str,
)
def test_accuracy_without_bias(shape: Shape, dtype: torch.dtype) -> None:
    check.accuracy(make_inputs(shape, dtype, DEVICE))


def test_577_tokens() -> None:
    """There are ten blocks of keys, the last with one key; the bias has another dtype."""
    check.accuracy(make_inputs((1, 577, 1, 64), torch.float16, DEVICE, bias=True, bias_dtype=torch.float32))


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_single_block_in_fp32(monkeypatch: pytest.MonkeyPatch, bias: bool) -> None:
    """Run the structure that half precision takes in fp32, whose rounding hides nothing."""
    launches = launch_config.packed_attention(50, 32, torch.float16, hopper=True)
    monkeypatch.setattr(launch_config, "packed_attention", lambda *_, **__: launches)
    check.accuracy(make_inputs((2, 50, 2, 32), torch.float32, DEVICE, bias=bias))


def test_given_scale() -> None:
    check.accuracy(make_inputs((1, 50, 1, 32), torch.float16, DEVICE, bias=True), scale=0.05)


@pytest.mark.parametrize("tokens", [50, 300], ids=["single_block", "many_blocks"])
@pytest.mark.parametrize("sign", [1, -1])
def test_large_scores(tokens: int, sign: int) -> None:
    """Scores are near +-10^4, where exp of a score, or of its difference from zero, overflows.

    q and k are multiples of 1/16, so that a score is exact in any order of summation: at this size, one rounding step
    of a score changes a probability by a thousandth, and the test would compare how two libraries sum.
    """
    inputs = make_inputs((1, tokens, 1, 64), torch.float16, DEVICE)
    q, k = (32 + (16 * inputs["qkv"][:, :, i]).round() / 16 for i in (0, 1))
    inputs["qkv"][:, :, 0], inputs["qkv"][:, :, 1] = sign * q, k
    check.accuracy(inputs)


def test_lse() -> None:
    """The backward reads the base-2 logarithm of the sum of exponentials, without k's bias."""
    qkv = make_inputs((2, 50, 2, 32), torch.float32, DEVICE)["qkv"]
    _, lse = torch.ops.sws_kernels.packed_attention(qkv, None, 0.25)
    q, k, _ = qkv.permute(2, 0, 3, 1, 4)
    expected = torch.logsumexp(0.25 * q @ k.transpose(-2, -1), dim=-1) / math.log(2)
    torch.testing.assert_close(lse, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["single_block", "many_blocks"])
def test_key_bias_has_no_effect(dtype: torch.dtype) -> None:
    """The key bias is not read, and its gradient is zero, not noise. All results are the same bit for bit."""
    inputs = make_inputs((1, 40, 1, 32), dtype, DEVICE, bias=True)
    first = run(inputs, triton)
    inputs["bias"][32:64] = float("nan")
    assert_equal(run(inputs, triton), first)
    assert not first["d_bias"][32:64].any()


def test_strided_inputs_and_gradients() -> None:
    """The input is tokens without the class token; the gradient is the expanded one of a mean over tokens."""
    inputs = make_inputs((2, 10, 1, 32), torch.float32, DEVICE)
    inputs["qkv"] = inputs["qkv"][:, 1:]
    inputs["d_out"] = inputs["d_out"][:, :1].expand(2, 9, 32)
    check.accuracy(inputs)


@pytest.mark.parametrize("shape", [(0, 5, 2, 32), (2, 0, 2, 32)], ids=["no_samples", "no_tokens"])
def test_empty(shape: Shape) -> None:
    results = run(make_inputs(shape, torch.float16, DEVICE, bias=True), triton)
    assert results["out"].shape == (*shape[:2], 64)
    assert not results["d_bias"].any()


@pytest.mark.parametrize("shape", [(2, 50, 1, 64), (1, 150, 1, 32)], ids=["single_block", "many_blocks"])
def test_bitwise_repeatable(shape: Shape) -> None:
    check.bitwise_repeatable(make_inputs(shape, torch.float16, DEVICE, bias=True))


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_opcheck(bias: bool) -> None:
    """Schema, fake implementations, autograd registration and tracing agree with what the operators do."""
    inputs = make_inputs((2, 5, 2, 32), torch.float16, DEVICE, bias=bias)
    qkv, added = inputs["qkv"].requires_grad_(), inputs.get("bias")
    if bias:
        added.requires_grad_()
    forward = torch.ops.sws_kernels.packed_attention.default
    torch.library.opcheck(forward, (qkv, added, 0.25))
    with torch.no_grad():
        out, lse = forward(qkv, added, 0.25)
    saved = (qkv.detach(), added.detach() if bias else None, out, lse, 0.25)
    torch.library.opcheck(torch.ops.sws_kernels.packed_attention_backward.default, (inputs["d_out"], *saved))


def test_passes_through_torch_compile() -> None:
    check.compiled(make_inputs((2, 5, 2, 32), torch.float16, DEVICE, bias=True), "aot_eager")


def test_reference() -> None:
    """The reference agrees with PyTorch's attention, and its gradients with finite differences, in fp64."""
    inputs = make_inputs((2, 3, 2, 4), torch.float64, "cpu", bias=True)
    for scale in (None, 0.7):
        expected = check.pytorch(inputs["qkv"], inputs["bias"], scale)
        torch.testing.assert_close(packed_attention_reference(inputs["qkv"], inputs["bias"], scale), expected)
    leaves = [inputs[name].requires_grad_() for name in ("qkv", "bias")]
    assert torch.autograd.gradcheck(lambda *x: packed_attention_reference(*x, scale=0.7), leaves)


def test_triton_without_gpu_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no silent fallback: the message names what was asked for and the device that was found."""
    monkeypatch.setattr(common, "INTERPRETED", False)
    with pytest.raises(ValueError, match=r"backend='triton' was asked for, but the tensors are on cpu"):
        packed_attention(torch.zeros(1, 2, 3, 1, 32), backend="triton")


def test_interpreter_refuses_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "INTERPRETED", True)
    with pytest.raises(ValueError, match=r"TRITON_INTERPRET=1 takes float32, float16, got bfloat16"):
        packed_attention(torch.zeros(1, 2, 3, 1, 32, dtype=torch.bfloat16, device=DEVICE), backend="triton")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": "cuda"}, "choose 'reference' or 'triton'"),
        ({"qkv": torch.zeros(1, 2, 96)}, r"must be \[B, T, 3, H, D\], got \[1, 2, 96\]"),
        ({"qkv": torch.zeros(1, 2, 2, 1, 32)}, r"must be \[B, T, 3, H, D\]"),
        ({"bias": torch.zeros(32)}, r"bias must be \[3\*H\*D\] = \[96\], got \[32\]"),
        ({"bias": torch.zeros(96, device="meta")}, "on one device, found"),
        ({"scale": 0.0}, "scale must be positive and finite, got 0.0"),
        ({"scale": float("nan")}, "scale must be positive and finite, got nan"),
        ({"qkv": torch.zeros(1, 2, 3, 1, 48, device=DEVICE)}, "heads of 32, 64, 128, got D=48"),
        ({"qkv": torch.zeros(1, 1, 1, 1, 1, device=DEVICE).expand(1, 2**25, 3, 1, 32)}, "fewer than 2\\^31"),
    ],
)
def test_wrong_arguments(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        packed_attention(**{"qkv": torch.zeros(1, 2, 3, 1, 32, device=DEVICE), "backend": "triton"} | changes)
