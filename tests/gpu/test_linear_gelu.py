"""mlp on a GPU: bf16, a training step's shapes, CUDA graphs, Inductor, offsets past 2^31."""

import pytest
import torch

if not torch.cuda.is_available():
    # At module level, so that triton is not imported here: without a GPU, tests/kernels must choose how.
    pytest.skip("no CUDA device: torch.cuda.is_available() is False", allow_module_level=True)

from sws_kernels.linear_gelu import linear_gelu_backward, linear_gelu_forward
from tests.kernels.mlp_checks import check_accuracy, check_bitwise_repeatable, check_compiled, make_inputs, run
from tests.kernels.numerics import check_cuda_graph, poisoned_memory

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHAPES = [
    *[((256, 196), 192, 768), ((64, 197), 384, 1536), ((64, 196), 768, 3072)],  # ViT
    *[((7, 50), 96, 384), ((3, 50), 320, 1280), ((1, 1), 64, 256), ((2, 577), 1024, 4096)],
]


@pytest.fixture(autouse=True)
def _poisoned_memory():
    with poisoned_memory():
        yield


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy(shape, dtype):
    check_accuracy(make_inputs(*shape, dtype, DEVICE))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_backward_repeats_the_forward(dtype):
    """h is not kept: the backward's must be the forward's to the bit."""
    inputs = make_inputs((64, 196), 384, 1536, dtype, DEVICE)
    h, z = linear_gelu_forward(inputs["x"], inputs["w1"], inputs["b1"], True)
    assert torch.equal(h.view_as(z), linear_gelu_backward(inputs["dy"], inputs["w2"], z)[1])


@pytest.mark.skipif(torch.cuda.get_device_capability()[0] != 9, reason="persistent programs are for Hopper")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("width", [192, 384, 768])
def test_persistent_programs_compute_the_same(width, dtype):
    """More tiles than multiprocessors, the last ones not full."""
    inputs = make_inputs((64, 197), width, 4 * width, dtype, DEVICE)
    h, z = linear_gelu_forward(inputs["x"], inputs["w1"], inputs["b1"], True)
    results = (h, z), linear_gelu_backward(inputs["dy"], inputs["w2"], z)
    persistent = (
        linear_gelu_forward(inputs["x"], inputs["w1"], inputs["b1"], True, persistent=True),
        linear_gelu_backward(inputs["dy"], inputs["w2"], z, persistent=True),
    )
    for got, want in zip(sum(persistent, ()), sum(results, ()), strict=True):
        torch.testing.assert_close(got.float(), want.float(), rtol=1e-2, atol=1e-3)


def test_bitwise_repeatable():
    check_bitwise_repeatable(make_inputs((64, 197), 384, 1536, torch.bfloat16, DEVICE))


def test_passes_through_inductor():
    check_compiled(make_inputs((8, 196), 384, 1536, torch.bfloat16, DEVICE), "inductor")


def test_cuda_graph():
    inputs = make_inputs((8, 196), 384, 1536, torch.bfloat16, DEVICE)
    check_cuda_graph(lambda: run(inputs, "triton"), (inputs["x"], inputs["dy"]))


def test_offsets_past_int32():
    """The last rows of [N, F] tensors of more than 2^31 elements, where 32-bit offsets would wrap."""
    width, hidden, last = 64, 3072, 128
    num_rows = (2**31 // hidden + 2 * last) // last * last  # the last rows are a tile of their own
    needed = 2 * 6 * num_rows * hidden  # bytes: z, h, dz and h again in bf16, and room
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free GPU memory")
    inputs = make_inputs((num_rows,), width, hidden, torch.bfloat16, DEVICE)
    h, z = linear_gelu_forward(inputs["x"], inputs["w1"], inputs["b1"], True)
    wanted_h, wanted_z = linear_gelu_forward(inputs["x"][-last:], inputs["w1"], inputs["b1"], True)
    assert torch.equal(h[-last:], wanted_h)
    assert torch.equal(z[-last:], wanted_z)
    dz, h, _ = linear_gelu_backward(inputs["dy"], inputs["w2"], z)
    wanted_dz, wanted_h, _ = linear_gelu_backward(inputs["dy"][-last:], inputs["w2"], wanted_z)
    assert torch.equal(h[-last:], wanted_h)
    assert torch.equal(dz[-last:], wanted_dz)
