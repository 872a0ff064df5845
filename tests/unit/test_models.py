"""The one model class: a stage's repeats are what unrolled copies compute, and timm's habits hold."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from sws_dist.build_models import build_models
from sws_dist.config.schema import DataConfig, ModelConfig, RunConfig
from sws_dist.models import Stage, SWSVisionTransformer, create_model, geometry
from sws_dist.models.flops import forward_flops
from sws_dist.models.geometry import timm_arguments, timm_call

SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "num_heads": 2, "num_classes": 10}


def shared(**changes: Any) -> SWSVisionTransformer:
    torch.manual_seed(0)
    return create_model("sws_vit", **(SMALL | {"schedule": [2, 1, 3]} | changes))


def unrolled(model: SWSVisionTransformer) -> nn.Module:
    """Plain timm with a copy of each stage's layer at each position."""
    positions = [stage for stage, repeats in enumerate(model.schedule) for _ in range(repeats)]
    name, arguments = timm_arguments(geometry(model) | {"schedule": [1] * len(positions)})
    plain = timm.create_model(name, **arguments)
    weights = {k: v for k, v in model.state_dict().items() if not k.startswith("blocks.")}
    for layer, stage in enumerate(positions):
        weights |= {f"blocks.{layer}.{k}": v for k, v in model.blocks[stage].state_dict().items()}
    plain.load_state_dict(weights, strict=True)
    return plain


def gradients(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(images).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("size", "auxiliary", "descendant"), [("tiny", 2.60, None), ("small", 9.63, 22.05), ("base", 36.95, 86.57)]
)
def test_parameter_counts_are_the_published_ones(size: str, auxiliary: float, descendant: float | None) -> None:
    def millions(name: str, **kwargs: Any) -> float:
        with torch.device("meta"):
            return round(sum(p.numel() for p in create_model(name, **kwargs).parameters()) / 1e6, 2)

    assert millions(f"sws_aux_{size}_patch16_224") == auxiliary
    if descendant is not None:
        assert abs(millions(f"sws_des_{size}_patch16_224", depth=12) - descendant) <= 0.05


@pytest.mark.parametrize("options", [{}, {"class_token": True}, {"qkv_bias": False, "norm_eps": 1e-5}])
def test_a_shared_stage_is_its_unrolled_copies(options: dict[str, Any]) -> None:
    """Logits, and each shared gradient is the sum over its copies'."""
    model = shared(**options)
    plain = unrolled(model)
    images = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(model(images), plain(images), rtol=0, atol=1e-5)
    ours, theirs = gradients(model, images), gradients(plain, images)
    positions = [stage for stage, repeats in enumerate(model.schedule) for _ in range(repeats)]
    for name, gradient in ours.items():
        if not name.startswith("blocks."):
            torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-4)
            continue
        _, stage, rest = name.split(".", 2)
        total = sum(theirs[f"blocks.{layer}.{rest}"] for layer, s in enumerate(positions) if s == int(stage))
        torch.testing.assert_close(gradient, total, rtol=1e-4, atol=1e-4)


def test_geometry_rebuilds_the_model() -> None:
    model = shared(class_token=True, norm_eps=1e-5, mlp_ratio=2.0)
    again = create_model("sws_vit", **geometry(model))
    again.load_state_dict(model.state_dict(), strict=True)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.eval()(images), again.eval()(images))


def test_a_ratio_that_floats_do_not_hold_gives_the_same_width_again() -> None:
    model = shared(embed_dim=352, num_heads=11, mlp_ratio=2.6667)
    hidden = model.blocks[0].mlp.fc1.out_features
    assert int(352 * (hidden / 352)) == hidden - 1
    assert create_model("sws_vit", **geometry(model)).blocks[0].mlp.fc1.out_features == hidden


def test_the_line_for_timm_builds_the_plain_model() -> None:
    from functools import partial

    model = shared(schedule=[1, 1], norm_eps=1e-5)
    plain = eval(timm_call(geometry(model), 10), {"timm": timm, "torch": torch, "partial": partial})
    plain.load_state_dict(model.state_dict(), strict=True)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.eval()(images), plain.eval()(images), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="expand the learngene first"):
        timm_call(geometry(shared()), 10)


def test_drop_path_grows_over_positions() -> None:
    model = shared(drop_path_rate=0.5)
    rates = [rate for stage in model.blocks for rate in stage.drop_rates]
    torch.testing.assert_close(torch.tensor(rates), torch.linspace(0, 0.5, 6))
    assert geometry(model) == geometry(shared())


def test_drop_path_keeps_the_expected_branch() -> None:
    """At rate p each sample's branch is dropped with chance p, else divided by 1 - p."""
    torch.manual_seed(1)
    stage = Stage(dim=64, num_heads=2)
    nn.init.zeros_(stage.mlp.fc2.weight)  # leaves attention's branch alone
    nn.init.zeros_(stage.mlp.fc2.bias)
    x = torch.randn(256, 4, 64)
    branch = stage.eval()(x) - x
    stage.drop_rates = (0.25,)
    dropped = stage.train()(x) - x
    ratio = (dropped * branch).sum((1, 2)) / branch.square().sum((1, 2))
    kept = ratio > 0.5
    assert 0.65 < kept.float().mean() < 0.85  # 256 coins: three standard deviations are 0.08
    torch.testing.assert_close(ratio, kept / 0.75, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("drop_path_rate", [0.0, 0.3])
def test_activation_checkpointing_changes_no_gradient(drop_path_rate: float) -> None:
    model = shared(drop_path_rate=drop_path_rate)
    images = torch.randn(4, 3, 32, 32)
    torch.manual_seed(5)
    plain = gradients(model, images)
    model.set_grad_checkpointing(True)
    torch.manual_seed(5)
    again = gradients(model, images)
    assert plain.keys() == again.keys()
    for name in plain:
        assert torch.equal(plain[name], again[name]), name


def test_a_model_that_cannot_recompute_is_named() -> None:
    config = RunConfig(
        "unused", ModelConfig("selecsls42", grad_checkpointing=True), DataConfig("unused", image_size=64)
    )
    with pytest.raises(ValueError, match="grad_checkpointing: selecsls42 cannot recompute its activations"):
        build_models(config, ("a", "b"), torch.device("cpu"), torch.float32, {}, 100)


def test_torch_compile_gives_the_same_gradients() -> None:
    model = shared()
    images = torch.randn(4, 3, 32, 32)
    plain = gradients(model, images)
    model.compile(backend="aot_eager", fullgraph=True)
    for name, gradient in gradients(model, images).items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-4, atol=1e-4)


def test_timms_habits() -> None:
    model = timm.create_model("sws_aux_tiny_patch16_224", num_classes=0)
    assert isinstance(model, SWSVisionTransformer)
    assert model(torch.zeros(1, 3, 224, 224)).shape == (1, 192)
    model.reset_classifier(5)
    assert model(torch.zeros(1, 3, 224, 224)).shape == (1, 5)
    features = timm.create_model("sws_des_tiny_patch16_224", depth=4, features_only=True, out_indices=[1, 3])
    assert [f.shape for f in features(torch.zeros(1, 3, 224, 224))] == [(1, 192, 14, 14)] * 2
    assert "pos_embed" in model.no_weight_decay()


def test_positions_and_not_blocks_cost_flops() -> None:
    build = {s: forward_flops(lambda s=s: create_model("sws_vit", **SMALL, schedule=s), 32) for s in ((2, 2), (1,) * 4)}
    assert build[2, 2] == build[1, 1, 1, 1]
    # by hand: 16 tokens of 64; a layer is 12 D^2 multiply-adds a token and 2 T^2 D of attention
    tokens, width = 16, 64
    layer = 2 * (12 * width**2 * tokens + 2 * tokens**2 * width)
    ends = 2 * (tokens * width * 3 * 8 * 8 + width * 10)
    assert build[2, 2] == 4 * layer + ends


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"schedule": [2, 0]}, "1 or more for each stage"),
        ({"schedule": []}, "1 or more for each stage"),
        ({"schedule": [2, 2], "depth": 4}, "contradicts schedule"),
        ({"widht": 3}, "widht"),
        ({"init_values": 1e-5}, "init_values are not for our models; known: .*embed_dim"),
        ({"act_layer": "relu"}, "act_layer"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        create_model("sws_vit", **(SMALL | arguments))


def test_unknown_models_are_named_with_near_ones() -> None:
    with pytest.raises(ValueError, match=r"no model 'sws_aux_smal_patch16_224'.*sws_aux_small"):
        create_model("sws_aux_smal_patch16_224")
