"""stage on a GPU: bf16, a training step's shapes, CUDA graphs, Inductor."""

import pytest
import torch

if not torch.cuda.is_available():
    # At module level, so that triton is not imported here: without a GPU, tests/kernels must choose how.
    pytest.skip("no CUDA device: torch.cuda.is_available() is False", allow_module_level=True)

from tests.kernels.numerics import check_cuda_graph, poisoned_memory
from tests.kernels.stage_checks import check_accuracy, check_bitwise_repeatable, check_compiled, make_inputs, run

pytestmark = pytest.mark.gpu
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHAPES = [  # [B, T, D], heads: ViT-Ti, S and B, the quickstart, the longest sequence
    *[((64, 196, 192), 3), ((16, 197, 384), 6), ((8, 196, 768), 12)],
    *[((8, 50, 96), 3), ((1, 577, 256), 2)],
]


@pytest.fixture(autouse=True)
def _poisoned_memory():
    with poisoned_memory():
        yield


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("drop_path", [False, True], ids=["plain", "drop_path"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("shape", "num_heads"), SHAPES, ids=str)
def test_accuracy(shape, num_heads, dtype, drop_path, recompute):
    check_accuracy(make_inputs(shape, 3, num_heads, dtype, "cuda", drop_path=drop_path), recompute=recompute)


def test_bitwise_repeatable():
    check_bitwise_repeatable(make_inputs((16, 196, 384), 3, 6, torch.bfloat16, "cuda", drop_path=True))


def test_passes_through_inductor():
    check_compiled(make_inputs((8, 196, 384), 3, 6, torch.bfloat16, "cuda", drop_path=True), "inductor")


def test_cuda_graph():
    inputs = make_inputs((8, 196, 192), 3, 3, torch.bfloat16, "cuda", drop_path=True)
    check_cuda_graph(lambda: run(inputs, "triton"), (inputs.x, inputs.dy))
