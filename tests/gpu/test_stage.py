"""Test stage on a GPU: bf16, a training step's shapes, CUDA graphs, Inductor."""

import pytest
import torch

if not torch.cuda.is_available():
    # At module level, so that the module imports and asks nothing that needs a GPU.
    pytest.skip("no CUDA device: torch.cuda.is_available() is False", allow_module_level=True)

from sws_kernels import Providers
from tests.kernels.checks.stage import check, make_inputs, one_rival_each

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("nan_memory")]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHAPES = [  # [B, T, D], heads: ViT-Ti, S and B, the quickstart, the longest sequence
    *[((64, 196, 192), 3), ((16, 197, 384), 6), ((8, 196, 768), 12)],
    *[((8, 50, 96), 3), ((1, 577, 256), 2)],
]


@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recomputed"])
@pytest.mark.parametrize("drop_path", [False, True], ids=["plain", "drop_path"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("shape", "num_heads"), SHAPES, ids=str)
def test_accuracy(
    shape: tuple[int, int, int], num_heads: int, dtype: torch.dtype, drop_path: bool, recompute: bool
) -> None:
    inputs = make_inputs(shape, 3, num_heads, dtype, "cuda", drop_path=drop_path)
    check.accuracy(inputs, triton={"recompute": recompute})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("providers", one_rival_each(), ids=str)
def test_rivals(providers: Providers, dtype: torch.dtype) -> None:
    inputs = make_inputs((16, 196, 384), 3, 6, dtype, "cuda", drop_path=True)
    check.accuracy(inputs, triton={"providers": providers})


def test_bitwise_repeatable() -> None:
    check.bitwise_repeatable(make_inputs((16, 196, 384), 3, 6, torch.bfloat16, "cuda", drop_path=True))


def test_passes_through_inductor() -> None:
    """Inductor may round PyTorch's parts of the stage otherwise."""
    inputs = make_inputs((8, 196, 384), 3, 6, torch.bfloat16, "cuda", drop_path=True)
    check.compiled(inputs, "inductor", relative=0.02)


def test_cuda_graph() -> None:
    inputs = make_inputs((8, 196, 192), 3, 3, torch.bfloat16, "cuda", drop_path=True)
    check.cuda_graph(inputs, ("x", "dy"))
