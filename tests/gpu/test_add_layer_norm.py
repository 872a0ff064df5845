"""Test add_layer_norm on a GPU: bf16, a training step's shapes, CUDA graphs, Inductor, offsets past 2^31."""

import pytest
import torch

if not torch.cuda.is_available():
    # At module level, so that the module imports and asks nothing that needs a GPU.
    pytest.skip("no CUDA device: torch.cuda.is_available() is False", allow_module_level=True)

from sws_kernels import add_layer_norm, add_layer_norm_reference
from tests.kernels.checks.add_layer_norm import check, make_inputs

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("nan_memory")]
DEVICE = "cuda"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHAPES = [
    *[(256, 196, 192), (64, 197, 384), (64, 196, 768)],  # ViT, where no column is masked
    *[(7, 50, 640), (3, 50, 1024), (2, 197, 3072), (1, 1, 64)],
]


@pytest.mark.parametrize("drop_path", [False, True], ids=["plain", "drop_path"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy(shape: tuple[int, int, int], dtype: torch.dtype, drop_path: bool) -> None:
    check.accuracy(make_inputs(shape, dtype, DEVICE, drop_path=drop_path))


@pytest.mark.parametrize("residual_dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_fp32_parameters(residual_dtype: torch.dtype) -> None:
    """Mixed precision usually has fp32 masters, a bf16 branch, and either residual stream."""
    inputs = make_inputs(
        (16, 196, 384), torch.bfloat16, DEVICE,
        drop_path=True, residual_dtype=residual_dtype, parameter_dtype=torch.float32,
    )  # fmt: skip
    check.accuracy(inputs)


def test_bitwise_repeatable() -> None:
    check.bitwise_repeatable(make_inputs((64, 197, 384), torch.bfloat16, DEVICE, drop_path=True))


def test_passes_through_inductor() -> None:
    check.compiled(make_inputs((8, 196, 384), torch.bfloat16, DEVICE, drop_path=True), "inductor")


def test_cuda_graph() -> None:
    inputs = make_inputs((8, 196, 384), torch.bfloat16, DEVICE, drop_path=True)
    check.cuda_graph(inputs, ("residual", "d_normed"))


def test_offsets_past_int32() -> None:
    """The last rows of a tensor of more than 2^31 elements are right, where 32-bit offsets would wrap."""
    tokens, width, last = 2**31 // 768 + 64, 768, 32
    needed = 12 * tokens * width  # bytes: 4 tensors in bf16, and room
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free GPU memory")
    torch.manual_seed(0)
    residual, branch = torch.randn(2, 1, tokens, width, device=DEVICE, dtype=torch.bfloat16)
    weight, bias = torch.randn(2, width, device=DEVICE, dtype=torch.bfloat16)
    results = add_layer_norm(residual, branch, weight, bias, backend="triton")
    expected = add_layer_norm_reference(residual[:, -last:], branch[:, -last:], weight, bias)
    for got, want in zip(results, expected, strict=True):
        torch.testing.assert_close(got[:, -last:], want)
