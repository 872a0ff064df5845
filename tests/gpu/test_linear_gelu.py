"""Test linear_gelu on a GPU: bf16, a training step's shapes, offsets past 2^31."""

import pytest
import torch

if not torch.cuda.is_available():
    # At module level, so that the module imports and asks nothing that needs a GPU.
    pytest.skip("no CUDA device: torch.cuda.is_available() is False", allow_module_level=True)

from sws_kernels.linear_gelu import linear_gelu_backward, linear_gelu_forward
from tests.kernels.checks import mlp
from tests.kernels.checks.linear_gelu import check, make_inputs

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("nan_memory")]
DEVICE = "cuda"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("width", [192, 384, 768])
def test_accuracy(width: int, dtype: torch.dtype) -> None:
    check.accuracy(make_inputs((64, 197), width, 4 * width, dtype, DEVICE))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_backward_repeats_the_forward(dtype: torch.dtype) -> None:
    """h is not saved, so the backward's h must be the forward's to the bit."""
    inputs = make_inputs((64, 196), 384, 1536, dtype, DEVICE)
    h, z = linear_gelu_forward(inputs["x"], inputs["fc1_weight"], inputs["fc1_bias"], True)
    assert torch.equal(h.view_as(z), linear_gelu_backward(inputs["dy"], inputs["fc2_weight"], z)[1])


def test_offsets_past_int32() -> None:
    """The last rows of [N, F] tensors of more than 2^31 elements are right, where 32-bit offsets would wrap."""
    width, hidden, last = 64, 3072, 128
    num_rows = (2**31 // hidden + 2 * last) // last * last  # the last rows are a tile of their own
    needed = 2 * 6 * num_rows * hidden  # bytes: z, h, dz and h again in bf16, and room
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free GPU memory")
    inputs = mlp.make_inputs((num_rows,), width, hidden, torch.bfloat16, DEVICE)
    first = inputs["fc1_weight"], inputs["fc1_bias"]
    h, z = linear_gelu_forward(inputs["x"], *first, True)
    expected_h, expected_z = linear_gelu_forward(inputs["x"][-last:], *first, True)
    assert torch.equal(h[-last:], expected_h)
    assert torch.equal(z[-last:], expected_z)
    dz, h, _ = linear_gelu_backward(inputs["dy"], inputs["fc2_weight"], z)
    expected_dz, expected_h, _ = linear_gelu_backward(inputs["dy"][-last:], inputs["fc2_weight"], expected_z)
    assert torch.equal(h[-last:], expected_h)
    assert torch.equal(dz[-last:], expected_dz)
