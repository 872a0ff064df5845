"""Run the kernels' Triton IR on the CPU by ttsem: every kernel, dtype and tile that launch_config.py can choose.

ttsem executes what Triton's compiler makes of a kernel, with real bf16, and raises KernelFault where two programs race,
an access is out of bounds, or an operation has no defined result. `make test-kernels-ir` runs this.
"""

from itertools import product
from typing import Any

import pytest
import torch

pytest.importorskip("ttsem", reason="needs ttsem and Python 3.12: make test-kernels-ir")

from sws_kernels import launch_config
from sws_kernels.column_sum import column_sum, scale_and_sum, sum_partials
from sws_kernels.linear_gelu import linear_gelu_backward, linear_gelu_forward
from tests.kernels.checks import add_layer_norm, linear_gelu, mlp, packed_attention, stage

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


# ------------------------------------------------------------------------------------ add_layer_norm, column_sum

# Of every width of a chunk, 16 to 1024 columns, one that fills the chunks and one that does not.
NORM_WIDTHS = [32, 96, 64, 192, 160, 384, 320, 768, 640, 1536, 1024, 3072, 2080]


@every_dtype
@pytest.mark.parametrize("drop_path", [False, True], ids=["plain", "drop_path"])
@pytest.mark.parametrize("width", NORM_WIDTHS)
def test_add_layer_norm(width: int, drop_path: bool, dtype: torch.dtype) -> None:
    """Two tiles of rows and a part of a third in the forward; more tiles than programs in the backward."""
    tile = launch_config.add_layer_norm(width)["forward"]["R"]
    shape = (3, max(2, (2 * tile + tile // 2) // 3 + 1), width)
    add_layer_norm.check.accuracy(add_layer_norm.make_inputs(shape, dtype, "cuda", drop_path=drop_path))


@every_dtype
@pytest.mark.parametrize("width", [32, 40, 96, 300])
def test_column_sum(width: int, dtype: torch.dtype) -> None:
    x = torch.randn(3, 90, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    scale = torch.tensor([0.0, 1.25, 1.25])
    close = {"rtol": 1e-5, "atol": 1e-4}
    torch.testing.assert_close(column_sum(x.flatten(0, 1)), x.double().sum((0, 1)).float(), **close)
    scaled, sums = scale_and_sum(x, scale)
    exact = x.double() * scale.double()[:, None, None]
    assert torch.equal(scaled, exact.to(dtype))
    torch.testing.assert_close(sums, exact.sum((0, 1)).float(), **close)
    torch.testing.assert_close(sum_partials(x.float()), x.double().sum(1).float(), **close)


# ------------------------------------------------------------------------------------------- linear_gelu, mlp


@every_dtype
@pytest.mark.parametrize(
    ("rows", "width", "hidden"),
    [(130, 128, 160), (130, 96, 256), (1, 32, 32), (9 * 128 + 1, 32, 160)],
    ids=["steps_of_64", "steps_of_32", "one_row", "groups_of_tiles"],
)
def test_linear_gelu(rows: int, width: int, hidden: int, dtype: torch.dtype) -> None:
    inputs = linear_gelu.make_inputs((rows,), width, hidden, dtype, "cuda")
    linear_gelu.check.accuracy(inputs)
    h, z = linear_gelu_forward(inputs["x"], inputs["fc1_weight"], inputs["fc1_bias"], True)
    assert torch.equal(h, linear_gelu_backward(inputs["dy"], inputs["fc2_weight"], z)[1])
    assert torch.equal(h, linear_gelu_forward(inputs["x"], inputs["fc1_weight"], inputs["fc1_bias"], False)[0])


@every_dtype
def test_mlp(dtype: torch.dtype) -> None:
    mlp.check.accuracy(mlp.make_inputs((2, 70), 64, 160, dtype, "cuda"))


# ------------------------------------------------------------------------------------------- packed_attention

ATTENTION_TOKENS = (150, 100, 50)  # of every number of tokens that chooses its own tiles, a large one


def attention_launches() -> list[Any]:
    """Return (tokens, head_dim, dtype, capability) for every setting of tiles that can be launched."""
    found = {}
    for name, head_dim, tokens, capability in product(DTYPES, (32, 64, 128), ATTENTION_TOKENS, (90, 80)):
        launches = launch_config.packed_attention(tokens, head_dim, DTYPES[name], hopper=capability == 90)
        case = pytest.param(tokens, head_dim, DTYPES[name], capability, id=f"{tokens}x{head_dim}-{name}-sm{capability}")
        found.setdefault((name, str(launches)), case)
    return list(found.values())


@pytest.mark.parametrize(("tokens", "head_dim", "dtype", "capability"), attention_launches(), indirect=["capability"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_packed_attention(tokens: int, head_dim: int, dtype: torch.dtype, capability: int, bias: bool) -> None:
    shape = (2, tokens, 1, head_dim) if bias else (1, tokens, 2, head_dim)  # tells samples, and heads, apart
    packed_attention.check.accuracy(packed_attention.make_inputs(shape, dtype, "cuda", bias=bias))


def test_all_tiles_of_packed_attention_are_run() -> None:
    """No other number of tokens has other tiles."""
    for dtype, head_dim, hopper in product(DTYPES.values(), (32, 64, 128), (True, False)):
        known = [launch_config.packed_attention(t, head_dim, dtype, hopper=hopper) for t in ATTENTION_TOKENS]
        for tokens in range(1, 1100):
            assert launch_config.packed_attention(tokens, head_dim, dtype, hopper=hopper) in known, tokens


# ------------------------------------------------------------------------------------------------------ stage


@every_dtype
@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recomputed"])
def test_stage(recompute: bool, dtype: torch.dtype) -> None:
    inputs = stage.make_inputs((3, 5, 64), 2, 2, dtype, "cuda", hidden=128, drop_path=True)
    stage.check.accuracy(inputs, triton={"recompute": recompute})
