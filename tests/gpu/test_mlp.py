"""Test mlp on a GPU: bf16, a training step's shapes, CUDA graphs, Inductor."""

import pytest
import torch

if not torch.cuda.is_available():
    # At module level, so that the module imports and asks nothing that needs a GPU.
    pytest.skip("no CUDA device: torch.cuda.is_available() is False", allow_module_level=True)

from tests.kernels.checks.mlp import check, make_inputs

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("nan_memory")]
DEVICE = "cuda"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
Shape = tuple[tuple[int, int], int, int]
SHAPES: list[Shape] = [
    *[((256, 196), 192, 768), ((64, 197), 384, 1536), ((64, 196), 768, 3072)],  # ViT
    *[((7, 50), 96, 384), ((3, 50), 320, 1280), ((1, 1), 64, 256), ((2, 577), 1024, 4096)],
]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy(shape: Shape, dtype: torch.dtype) -> None:
    check.accuracy(make_inputs(*shape, dtype, DEVICE))


def test_bitwise_repeatable() -> None:
    check.bitwise_repeatable(make_inputs((64, 197), 384, 1536, torch.bfloat16, DEVICE))


def test_passes_through_inductor() -> None:
    check.compiled(make_inputs((8, 196), 384, 1536, torch.bfloat16, DEVICE), "inductor")


def test_cuda_graph() -> None:
    check.cuda_graph(make_inputs((8, 196), 384, 1536, torch.bfloat16, DEVICE), ("x", "dy"))
