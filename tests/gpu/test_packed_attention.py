"""Test packed_attention on a GPU: bf16, a training step's shapes, CUDA graphs, Inductor, offsets past 2^31."""

import pytest
import torch

if not torch.cuda.is_available():
    # At module level, so that the module imports and asks nothing that needs a GPU.
    pytest.skip("no CUDA device: torch.cuda.is_available() is False", allow_module_level=True)

from sws_kernels import packed_attention, packed_attention_reference
from tests.kernels.checks.packed_attention import check, make_inputs

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("nan_memory")]
DEVICE = "cuda"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
Shape = tuple[int, int, int, int]
SHAPES = [  # B, T, H, D
    *[(256, 196, 3, 64), (64, 197, 6, 64), (32, 196, 12, 64)],  # ViT-Ti, S, B
    *[(8, 577, 6, 64), (4, 257, 2, 32), (3, 577, 2, 128)],  # blocks of keys
    *[(5, 50, 3, 32), (2, 100, 3, 128), (7, 256, 2, 64), (2, 64, 2, 64), (1, 1, 1, 64)],
]


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy(shape: Shape, dtype: torch.dtype, bias: bool) -> None:
    check.accuracy(make_inputs(shape, dtype, DEVICE, bias=bias))


def test_fp32_bias() -> None:
    """Mixed precision usually has fp32 masters and bf16 activations."""
    check.accuracy(make_inputs((16, 196, 6, 64), torch.bfloat16, DEVICE, bias=True, bias_dtype=torch.float32))


@pytest.mark.parametrize("shape", [(64, 196, 6, 64), (8, 577, 6, 64)], ids=["single_block", "many_blocks"])
def test_bitwise_repeatable(shape: Shape) -> None:
    check.bitwise_repeatable(make_inputs(shape, torch.bfloat16, DEVICE, bias=True))


def test_passes_through_inductor() -> None:
    check.compiled(make_inputs((8, 196, 6, 64), torch.bfloat16, DEVICE, bias=True), "inductor")


@pytest.mark.parametrize("tokens", [196, 577])
def test_cuda_graph(tokens: int) -> None:
    inputs = make_inputs((8, tokens, 6, 64), torch.bfloat16, DEVICE, bias=True)
    check.cuda_graph(inputs, ("qkv", "d_out"))


def test_offsets_past_int32() -> None:
    """The last sample of a tensor of more than 2^31 elements is right, where 32-bit offsets would wrap."""
    tokens, heads, head_dim = 196, 12, 64
    num_samples = 2**31 // (tokens * 3 * heads * head_dim) + 2
    needed = 6 * num_samples * tokens * 3 * heads * head_dim  # bytes: qkv and out in bf16, and room
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free GPU memory")
    torch.manual_seed(0)
    qkv = torch.randn(num_samples, tokens, 3, heads, head_dim, device=DEVICE, dtype=torch.bfloat16)
    got = packed_attention(qkv, backend="triton")
    torch.testing.assert_close(got[-1:], packed_attention_reference(qkv[-1:]), rtol=0.02, atol=0.01)
