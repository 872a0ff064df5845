"""stage against timm's own block and the plain reference, in the interpreter or on the GPU where there is one."""

from dataclasses import replace

import pytest
import timm.models.vision_transformer as vit
import torch

from sws_kernels import StageWeights, common, stage, stage_reference
from tests.kernels.stage_checks import (
    EPS,
    check_accuracy,
    check_bitwise_repeatable,
    check_compiled,
    make_inputs,
    run,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = {"shape": (2, 5, 64), "repeats": 3, "num_heads": 2, "device": DEVICE, "hidden": 128}


def small(dtype=torch.float32, **changes):
    return make_inputs(**(SMALL | {"dtype": dtype} | changes))


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("drop_path", [False, True], ids=["plain", "drop_path"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_accuracy(dtype, drop_path, recompute):
    check_accuracy(small(dtype, drop_path=drop_path), recompute=recompute)


@pytest.mark.parametrize(
    ("shape", "num_heads", "changes"),
    [
        ((1, 50, 96), 3, {"repeats": 1, "drop_path": True}),  # the quickstart's width; an ordinary block
        ((1, 197, 64), 1, {"repeats": 2, "hidden": 96}),
        ((2, 3, 64), 2, {"qkv_bias": False}),
    ],
    ids=["one_repeat", "tokens_197", "no_qkv_bias"],
)
def test_other_shapes(shape, num_heads, changes):
    check_accuracy(small(shape=shape, num_heads=num_heads, **changes))


def _timm_block(inputs):
    """timm's Block with our weights."""
    hidden, width = inputs.weights.w1.shape
    norm = lambda dim, **kwargs: torch.nn.LayerNorm(dim, eps=EPS, **kwargs)  # noqa: E731
    block = vit.Block(width, inputs.num_heads, hidden / width, qkv_bias=True, norm_layer=norm).to(DEVICE)
    with torch.no_grad():
        for parameter, ours in zip(block.parameters(), inputs.weights, strict=True):
            parameter.copy_(ours)
    return block


def test_equals_timm_and_gradients_are_summed_over_unrolled_copies():
    """Against `repeats` copies of timm's block, each with weights of its own."""
    inputs = small()
    copies = [_timm_block(inputs) for _ in range(inputs.repeats)]
    x = y = inputs.x.clone().requires_grad_()
    for block in copies:
        y = block(y)
    y.backward(inputs.dy)
    got = run(inputs, "triton")
    torch.testing.assert_close(got["y"], y.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got["d_x"], x.grad, rtol=1e-5, atol=1e-5)
    for name, *parameters in zip(StageWeights._fields, *(block.parameters() for block in copies), strict=True):
        wanted = sum(parameter.grad for parameter in parameters)
        torch.testing.assert_close(got[f"d_{name}"], wanted, rtol=1e-5, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_weight_gradients_are_summed_in_fp32():
    """8 repeats with nearly equal shares: adding shares rounded to fp16 errs by 1.4 rounding steps here, not 0.5."""
    inputs = small(torch.float16, shape=(1, 4, 32), num_heads=1, hidden=32, repeats=8)
    quiet = (w if name.startswith(("gamma", "beta")) else w * 2.0**-7 for name, w in inputs.weights._asdict().items())
    inputs = replace(inputs, weights=StageWeights(*quiet))
    got, exact = run(inputs, "triton")["d_b2"].double(), run(inputs.double(), "reference")["d_b2"]
    large = exact.abs() > exact.abs().max() / 4
    assert ((got / exact - 1)[large].abs() < 0.9 * torch.finfo(torch.float16).eps).all()


def test_recompute_gives_the_same_gradients():
    inputs = small(drop_path=True)
    kept, again = run(inputs, "triton"), run(inputs, "triton", recompute=True)
    for name, value in kept.items():
        torch.testing.assert_close(again[name], value, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def _num_saved(recompute):
    """Elements of all activations that the graph keeps."""
    inputs = small()
    weights = StageWeights(*(w.detach().requires_grad_() for w in inputs.weights))
    parameters = {w.data_ptr() for w in weights}
    saved = {}

    def pack(tensor):
        if tensor.data_ptr() not in parameters:
            saved[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        stage(inputs.x, weights, inputs.repeats, inputs.num_heads, recompute=recompute, backend="triton")
    return sum(saved.values())


def test_what_is_kept():
    """The docstring's count: 10 tensors of [N, D] a repeat at F = 4 D (here F = 2 D: 8), or 1; and row statistics."""
    rows, width, repeats, num_heads = 10, 64, 3, 2
    assert _num_saved(recompute=False) == repeats * rows * (8 * width + 4 + num_heads)
    assert _num_saved(recompute=True) == repeats * rows * width


def test_dropped_samples_pass_unchanged():
    inputs = small(drop_path=True)
    inputs.scales.zero_()
    got = run(inputs, "triton")
    assert torch.equal(got["y"], inputs.x)
    assert torch.equal(got["d_x"], inputs.dy)
    assert not got["d_w1"].any()


def test_without_gradients_the_output_is_the_same():
    inputs = small(drop_path=True)
    arguments = (inputs.x, inputs.weights, inputs.repeats, inputs.num_heads, EPS, inputs.scales)
    assert torch.equal(stage(*arguments, backend="triton"), run(inputs, "triton")["y"])


def test_under_activation_checkpointing():
    inputs = small(drop_path=True)

    def checkpointed(*arguments, **options):
        return torch.utils.checkpoint.checkpoint(stage, *arguments, use_reentrant=False, **options)

    plain = run(inputs, "triton")
    for name, value in run(inputs, "triton", checkpointed).items():
        assert torch.equal(value, plain[name]), name


def test_strided_inputs_and_gradients():
    """Tokens without the class token, and the expanded gradient of a mean over tokens."""
    inputs = small(shape=(2, 6, 64))
    check_accuracy(replace(inputs, x=inputs.x[:, 1:], dy=inputs.dy[:, :1].expand(2, 5, 64)))


def test_bitwise_repeatable():
    check_bitwise_repeatable(small(drop_path=True))


def test_passes_through_torch_compile():
    check_compiled(small(shape=(1, 3, 32), num_heads=1, hidden=32, drop_path=True), "aot_eager")


@pytest.mark.parametrize("drop_path", [False, True], ids=["plain", "drop_path"])
def test_reference_gradients(drop_path):
    """The oracle itself, against finite differences in fp64."""
    inputs = make_inputs((2, 3, 8), 2, 2, torch.float64, "cpu", hidden=12, drop_path=drop_path)
    leaves = [tensor.requires_grad_() for tensor in (inputs.x, *inputs.weights)]

    def function(x, *weights):
        return stage_reference(x, StageWeights(*weights), 2, 2, EPS, inputs.scales)

    assert torch.autograd.gradcheck(function, leaves)


def test_triton_without_gpu_is_an_error(monkeypatch):
    monkeypatch.setattr(common, "INTERPRETED", False)
    inputs = make_inputs((1, 2, 64), 1, 2, torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"stage: backend='triton' was asked for, but the tensors are on cpu"):
        stage(inputs.x, inputs.weights, 1, 2, backend="triton")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": "cuda"}, "choose 'reference' or 'triton'"),
        ({"repeats": 0}, "repeats of 1 or more"),
        ({"num_heads": 3}, "not divisible by 3 heads"),
        ({"num_heads": 4}, "heads of 32, 64, 128, got 64 and 16"),
        ({"scales": torch.ones(3, 2)}, r"scales must be \[3, 2, 2\]"),
        ({"x": torch.zeros(2, 5, 32)}, r"gamma1 must be \[32\] for x \[2, 5, 32\], got \[64\]"),
    ],
)
def test_wrong_arguments(changes, message):
    inputs = small()
    arguments = {"x": inputs.x, "repeats": 3, "num_heads": 2, "scales": None, "backend": "triton"} | changes
    with pytest.raises(ValueError, match=message):
        stage(weights=inputs.weights, **arguments)
