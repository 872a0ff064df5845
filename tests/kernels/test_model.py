"""Test what model.kernels chooses where, and that the model computes the same with and without the kernels."""

from __future__ import annotations

from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import nn

from sws_dist.config.schema import OperatorsConfig
from sws_dist.models import create_model
from sws_dist.models.kernel_backend import ALL_AUTO, Kernels, select_kernels
from sws_kernels import common
from sws_kernels.providers import TABLES

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
SMALL: dict[str, Any] = {
    "schedule": [2, 1], "img_size": 16, "patch_size": 8, "embed_dim": 64, "num_heads": 2, "mlp_ratio": 2.0,
    "num_classes": 4,
}  # fmt: skip


RIVALS = OperatorsConfig(
    attention="triton" if DEVICE.type == "cuda" else "flash", linear_gelu="torch", add_layer_norm="torch"
)  # flash takes no fp32 on a GPU


def model_with(kernels: Kernels, operators: OperatorsConfig = ALL_AUTO, **changes: Any) -> Any:
    torch.manual_seed(0)
    model = create_model("sws_vit", **(SMALL | changes)).to(DEVICE)
    for parameter in model.parameters():  # the initial biases and norms would hide mistakes
        nn.init.normal_(parameter, std=0.2)
    select_kernels(kernels, model, DEVICE, torch.float32, operators)
    return model


def results(model: Any) -> dict[str, torch.Tensor]:
    """Return logits and all gradients, with drop-path drawn from one seed."""
    torch.manual_seed(1)
    images = torch.randn(3, 3, 16, 16).to(DEVICE)
    torch.manual_seed(2)
    logits = model(images)
    logits.square().sum().backward()
    return {"logits": logits.detach()} | {name: p.grad for name, p in model.named_parameters()}


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"drop_path_rate": 0.5},
        {"class_token": True, "qkv_bias": False, "norm_eps": 1e-3},
        {"schedule": [1, 1]},
        {"branch_scaling": 1.0, "drop_path_rate": 0.5},
    ],
    ids=["plain", "drop_path", "class_token", "descendant", "branch_scaling"],
)
def test_the_model_is_the_same(changes: dict[str, Any]) -> None:
    """This includes drop-path: the kernels' scales are the numbers that timm draws."""
    found, expected = model_with("triton", **changes), model_with("reference", **changes)
    if "branch_scaling" in changes:
        for model in (found, expected):
            model.set_repeats([1, 2])
            assert model.blocks[0].branch_scale != 1
    assert_close(results(found), results(expected))
    found.eval()
    expected.eval()
    images = torch.randn(2, 3, 16, 16, device=DEVICE)
    torch.testing.assert_close(found(images), expected(images), rtol=1e-4, atol=1e-4)
    features, plain = (model.forward_intermediates(images, intermediates_only=True) for model in (found, expected))
    torch.testing.assert_close(features, plain, rtol=1e-4, atol=1e-4)


def test_gradient_checkpointing_recomputes_inside_the_stage() -> None:
    model = model_with("triton", drop_path_rate=0.5)
    expected = results(model)
    again = model_with("triton", drop_path_rate=0.5)
    again.set_grad_checkpointing(True)
    assert all(stage.recompute for stage in again.blocks)
    assert not again.grad_checkpointing, "timm would run each stage a third time"
    assert_close(results(again), expected)


def test_rivals_train_an_elastic_model_the_same() -> None:
    """With drop-path, at a depth that is not the model's own, and with activations that are computed again."""
    found, expected = (
        model_with(kernels, operators, branch_scaling=1.0, drop_path_rate=0.5)
        for kernels, operators in (("triton", RIVALS), ("reference", ALL_AUTO))
    )
    assert found.blocks[0].providers.linear_gelu == "torch"
    found.set_grad_checkpointing(True)
    for model in (found, expected):
        model.set_repeats([1, 2])
    assert_close(results(found), results(expected))


def test_a_mask_is_refused() -> None:
    model = model_with("triton")
    with pytest.raises(ValueError, match=r"model\.kernels: the Triton kernels attend to all tokens"):
        model.blocks[0](torch.zeros(1, 4, 64, device=DEVICE), is_causal=True)


def choose(kernels: Kernels, device: torch.device = CUDA, dtype: Any = torch.bfloat16, **changes: Any) -> str:
    name, operators = changes.pop("name", "sws_vit"), changes.pop("operators", ALL_AUTO)
    model = create_model(name, **((SMALL | changes) if name == "sws_vit" else {}))
    return select_kernels(kernels, model, device, dtype, operators)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Let PyTorch report a GPU with an H100's compute capability."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Some GPU")
    return monkeypatch


def test_auto_takes_triton_on_a_gpu_and_says_so(gpu: pytest.MonkeyPatch) -> None:
    assert choose("auto") == "kernels: Triton's"
    assert choose("reference") == "kernels: PyTorch's"


def test_an_operator_has_the_provider_that_was_asked_for(gpu: pytest.MonkeyPatch) -> None:
    operators = OperatorsConfig(attention="cudnn", add_layer_norm="torch")
    for kernels in ("auto", "triton"):
        said = choose(kernels, operators=operators)
        assert said == "kernels: Triton's, but attention by cudnn, add_layer_norm by torch"
    with pytest.raises(ValueError, match=r"model\.operators: cudnn's attention takes fp16 and bf16, not fp32; choose"):
        choose("auto", dtype=torch.float32, operators=operators)
    with pytest.raises(ValueError, match=r"model\.operators needs the Triton kernels, but the device is cpu; leave"):
        choose("auto", CPU, operators=operators)


def test_the_config_names_the_providers_that_there_are() -> None:
    types = get_type_hints(OperatorsConfig)
    assert {key: set(get_args(kind)) for key, kind in types.items()} == {
        operator: {"auto", *table} for operator, table in TABLES.items()
    }


def test_auto_on_a_cpu_takes_pytorch_and_says_why() -> None:
    assert choose("auto", CPU) == "kernels: PyTorch's (the device is cpu)"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"name": "resnet10t"}, "ResNet is not one of our models"),
        ({"name": "tleg_vit"}, "the weights of a TLEG model's layers are sums"),
        ({"embed_dim": 48}, "width 48 and MLP width 96 are not both divisible by 32"),
        ({"embed_dim": 96, "num_heads": 2}, "heads of 48 are not of 32, 64, 128"),
        ({"attn_drop_rate": 0.1}, "the model has dropout"),
    ],
)
def test_models_that_the_kernels_do_not_compute(gpu: Any, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=rf"model\.kernels: triton was asked for, but .*{reason}"):
        choose("triton", **changes)
    assert choose("auto", **changes).startswith("kernels: PyTorch's (")


def test_an_old_gpu(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    with pytest.raises(ValueError, match=r"triton was asked for, but Some GPU has compute capability 7\.5, below 8\.0"):
        choose("triton")
    assert "PyTorch's" in choose("auto")


def test_triton_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "INTERPRETED", False)
    with pytest.raises(ValueError, match=r"model\.kernels: triton was asked for, but the device is cpu"):
        choose("triton", CPU, torch.float32)
    monkeypatch.setattr(common, "INTERPRETED", True)
    assert choose("triton", CPU, torch.float32) == "kernels: Triton's"
    with pytest.raises(ValueError, match=r"TRITON_INTERPRET=1 takes no bf16"):
        choose("triton", CPU, torch.bfloat16)
