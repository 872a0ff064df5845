"""Compare stage with timm's own block and the reference, in the interpreter or on the GPU where there is one."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import timm.models.vision_transformer as vit
import torch

from sws_kernels import Providers, StageWeights, common, stage, stage_reference
from sws_kernels.providers import TRITON
from tests.kernels.checks.numerics import Inputs, assert_equal, in_fp64
from tests.kernels.checks.stage import EPS, arguments, check, make_inputs, one_rival_each, run, triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL: dict[str, Any] = {"shape": (2, 5, 64), "repeats": 2, "num_heads": 2, "device": DEVICE, "hidden": 128}
TINY: dict[str, Any] = {"shape": (2, 3, 32), "repeats": 2, "num_heads": 1, "device": DEVICE, "hidden": 64}


RIVALS = Providers("triton" if DEVICE == "cuda" else "flash", "torch", "torch")  # flash takes no fp32 on a GPU


def small(dtype: torch.dtype = torch.float32, **changes: Any) -> Inputs:
    return make_inputs(**(SMALL | {"dtype": dtype} | changes))


def tiny(dtype: torch.dtype = torch.float32, **changes: Any) -> Inputs:
    """Return inputs for what does not depend on the shape: the interpreter takes 20 to 50 ms a program."""
    return make_inputs(**(TINY | {"dtype": dtype} | changes))


@pytest.mark.parametrize(
    ("dtype", "drop_path", "recompute"),
    [
        (torch.float32, False, False),
        (torch.float32, True, True),
        (torch.float16, True, False),
        (torch.float16, False, True),
    ],
    ids=["fp32-plain-saved", "fp32-drop_path-recomputed", "fp16-drop_path-saved", "fp16-plain-recomputed"],
)
def test_accuracy(dtype: torch.dtype, drop_path: bool, recompute: bool) -> None:
    check.accuracy(small(dtype, drop_path=drop_path, repeats=3), triton={"recompute": recompute})


@pytest.mark.parametrize(
    ("shape", "num_heads", "changes"),
    [
        ((1, 50, 96), 3, {"repeats": 1, "drop_path": True}),  # the quickstart's width; an ordinary block
        ((1, 197, 64), 1, {"hidden": 96, "dtype": torch.float16}),
        ((2, 3, 64), 2, {"qkv_bias": False}),
    ],
    ids=["one_repeat", "tokens_197", "no_qkv_bias"],
)
def test_other_shapes(shape: tuple[int, int, int], num_heads: int, changes: dict[str, Any]) -> None:
    check.accuracy(small(shape=shape, num_heads=num_heads, **changes))


@pytest.mark.parametrize("providers", [p for p in one_rival_each() if p.attention != "cudnn"], ids=str)
def test_a_rival_computes_an_operator(providers: Providers) -> None:
    """Its results are as exact; without gradients, and with activations that are computed again, they do not change."""
    inputs = tiny(torch.float16, drop_path=True)
    check.accuracy(inputs, triton={"providers": providers})
    got = run(inputs, triton, providers=providers)
    assert torch.equal(triton(*arguments(inputs), providers=providers), got["y"])
    torch.testing.assert_close(run(inputs, triton, providers=providers, recompute=True), got)


def test_rivals_compute_all_operators_in_half_precision() -> None:
    check.accuracy(tiny(torch.float16), triton={"providers": Providers("flash", "torch", "torch")})


def _timm_block(inputs: Inputs) -> vit.Block:
    """Return timm's Block with our weights."""
    hidden, width = inputs["weights"].fc1_weight.shape
    norm = lambda dim, **kwargs: torch.nn.LayerNorm(dim, eps=EPS, **kwargs)  # noqa: E731
    block = vit.Block(width, inputs["num_heads"], hidden / width, qkv_bias=True, norm_layer=norm).to(DEVICE)
    with torch.no_grad():
        for parameter, ours in zip(block.parameters(), inputs["weights"], strict=True):
            parameter.copy_(ours)
    return block


def test_equals_timm_and_gradients_are_summed_over_unrolled_copies() -> None:
    """Compare with `repeats` copies of timm's block, each with weights of its own."""
    inputs = small(repeats=3)
    copies = [_timm_block(inputs) for _ in range(inputs["repeats"])]
    x = y = inputs["x"].clone().requires_grad_()
    for block in copies:
        y = block(y)
    y.backward(inputs["dy"])
    got = run(inputs, triton)
    torch.testing.assert_close(got["y"], y.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got["d_x"], x.grad, rtol=1e-5, atol=1e-5)
    for name, *parameters in zip(StageWeights._fields, *(block.parameters() for block in copies), strict=True):
        expected = sum(parameter.grad for parameter in parameters)
        torch.testing.assert_close(got[f"d_{name}"], expected, rtol=1e-5, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_weight_gradients_are_summed_in_fp32() -> None:
    """The shares of 8 repeats are nearly equal: adding shares rounded to fp16 errs by 1.4 rounding steps, not 0.5."""
    inputs = small(torch.float16, shape=(1, 4, 32), num_heads=1, hidden=32, repeats=8)
    weights = inputs["weights"]._asdict().items()
    inputs["weights"] = StageWeights(*(w if name.startswith("norm") else w * 2.0**-7 for name, w in weights))
    exact = run(in_fp64(inputs), check.reference)["d_fc2_bias"]
    got = run(inputs, triton)["d_fc2_bias"].double()
    large = exact.abs() > exact.abs().max() / 4
    assert ((got / exact - 1)[large].abs() < 0.9 * torch.finfo(torch.float16).eps).all()


def test_recompute_gives_the_same_gradients() -> None:
    inputs = tiny(drop_path=True)
    saved, again = run(inputs, triton), run(inputs, triton, recompute=True)
    for name, value in saved.items():
        torch.testing.assert_close(again[name], value, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def _num_saved(inputs: Inputs, recompute: bool) -> int:
    """Return the number of elements of all activations that the graph saves."""
    weights = StageWeights(*(w.detach().requires_grad_() for w in inputs["weights"]))
    parameters = {w.data_ptr() for w in weights}
    saved = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in parameters:
            saved[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        triton(*arguments(inputs | {"weights": weights}), recompute=recompute)
    return sum(saved.values())


def test_what_is_saved() -> None:
    """A repeat saves 10 tensors of [N, D] at F = 4 D (here F = 2 D, so 8) and row statistics, or 1 tensor."""
    rows, width, repeats, num_heads = 6, 32, 2, 1
    assert _num_saved(tiny(), recompute=False) == repeats * rows * (8 * width + 4 + num_heads)
    assert _num_saved(tiny(), recompute=True) == repeats * rows * width


def test_dropped_samples_pass_unchanged() -> None:
    inputs = tiny(drop_path=True)
    inputs["scales"].zero_()
    got = run(inputs, triton)
    assert torch.equal(got["y"], inputs["x"])
    assert torch.equal(got["d_x"], inputs["dy"])
    assert not got["d_fc1_weight"].any()


def test_without_gradients_the_output_is_the_same() -> None:
    inputs = tiny(drop_path=True)
    assert torch.equal(triton(*arguments(inputs)), run(inputs, triton)["y"])


def test_under_activation_checkpointing() -> None:
    inputs = tiny(drop_path=True)

    def checkpointed(*args: Any) -> torch.Tensor:
        return torch.utils.checkpoint.checkpoint(triton, *args, use_reentrant=False)

    assert_equal(run(inputs, checkpointed), run(inputs, triton))


def test_strided_inputs_and_gradients() -> None:
    """The input is tokens without the class token; the gradient is the expanded one of a mean over tokens."""
    inputs = tiny(shape=(2, 6, 32))
    check.accuracy(inputs | {"x": inputs["x"][:, 1:], "dy": inputs["dy"][:, :1].expand(2, 5, 32)})


def test_bitwise_repeatable() -> None:
    check.bitwise_repeatable(tiny(drop_path=True))


@pytest.mark.parametrize("providers", [TRITON, RIVALS], ids=["triton", "rivals"])
def test_passes_through_torch_compile(providers: Providers) -> None:
    checks = replace(check, triton=partial(triton, providers=providers))
    checks.compiled(tiny(drop_path=True), "aot_eager")


@pytest.mark.parametrize("drop_path", [False, True], ids=["plain", "drop_path"])
def test_reference(drop_path: bool) -> None:
    """The reference agrees with PyTorch's operators, and its gradients with finite differences, in fp64."""
    inputs = make_inputs((2, 3, 8), 2, 2, torch.float64, "cpu", hidden=12, drop_path=drop_path)
    torch.testing.assert_close(stage_reference(*arguments(inputs)), check.pytorch(*arguments(inputs)))
    leaves = [tensor.requires_grad_() for tensor in (inputs["x"], *inputs["weights"])]

    def function(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        return stage_reference(x, StageWeights(*weights), 2, 2, EPS, inputs["scales"])

    assert torch.autograd.gradcheck(function, leaves)


def test_triton_without_gpu_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "INTERPRETED", False)
    with pytest.raises(ValueError, match=r"stage: backend='triton' was asked for, but the tensors are on cpu"):
        triton(*arguments(tiny(device="cpu")))


@pytest.mark.skipif(DEVICE == "cuda", reason="for a machine without a GPU")
def test_cudnn_without_gpu_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"stage: cudnn's attention needs a GPU, and the device is cpu"):
        triton(*arguments(tiny()), providers=Providers(attention="cudnn"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": "cuda"}, "choose 'reference' or 'triton'"),
        ({"providers": Providers(linear_gelu="gpu")}, r"linear_gelu has no provider 'gpu' \(it has triton, torch\)"),
        ({"repeats": 0}, "repeats of 1 or more"),
        ({"num_heads": 3}, "not divisible by 3 heads"),
        ({"num_heads": 4}, "heads of 32, 64, 128, got 64 and 16"),
        ({"scales": torch.ones(3, 2)}, r"scales must be \[3, 2, 2\]"),
        ({"x": torch.zeros(2, 5, 32)}, r"norm1_weight must be \[32\] for x \[2, 5, 32\], got \[64\]"),
    ],
)
def test_wrong_arguments(changes: dict[str, Any], message: str) -> None:
    inputs = small()
    keywords = {"x": inputs["x"], "repeats": 3, "num_heads": 2, "scales": None, "backend": "triton"} | changes
    with pytest.raises(ValueError, match=message):
        stage(weights=inputs["weights"], **keywords)
