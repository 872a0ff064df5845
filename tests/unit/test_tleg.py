"""TLEG's auxiliary model and learngene, and descendants picked from a model whose layers share nothing."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

import sws_dist
from sws_dist.checkpoint.load_model import load_model
from sws_dist.checkpoint.model_file import save_model_file
from sws_dist.cli.finetune import model_settings
from sws_dist.learngene.expand import expand_learngene, plan_layers, untrained_depth
from sws_dist.learngene.file import describe_model, load_learngene, read_learngene_header
from sws_dist.learngene.plan import expansion_plan
from sws_dist.models import SWSVisionTransformer, TLEGVisionTransformer, create_model, geometry
from sws_dist.models.geometry import timm_arguments

SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_heads": 2, "num_classes": 10}
DEPTH = 4
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def randomise(model: SWSVisionTransformer) -> SWSVisionTransformer:
    """Give every parameter a random value, norms and biases too."""
    torch.manual_seed(3)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def tleg(**changes: Any) -> SWSVisionTransformer:
    return randomise(create_model("tleg_vit", **(SMALL | {"depth": DEPTH} | changes))).double().eval()


def built_by_hand(state: dict[str, Tensor], depth: int, **changes: Any) -> torch.nn.Module:
    """Return timm's plain ViT with the weights that the paper's formula gives each layer."""
    name, arguments = timm_arguments(geometry(create_model("sws_vit", **(SMALL | {"depth": depth} | changes))))
    plain = timm.create_model(name, **arguments).double().eval()
    weights = {key: tensor for key, tensor in state.items() if not key.startswith("blocks.")}
    for i in range(depth):
        for key in plain.blocks[0].state_dict():
            theta_a, theta_b = state[f"blocks.0.base.{key}"], state[f"blocks.0.slope.{key}"]
            weights[f"blocks.{i}.{key}"] = theta_a + i / depth * theta_b
    plain.load_state_dict(weights, strict=True)
    return plain


@pytest.fixture
def file(tmp_path: Path) -> Path:
    model = tleg().float()
    about = {"preprocessing": {"image_size": 32}, "trained_depths": [DEPTH, DEPTH], "classes": list("abcdefghij")}
    return save_model_file(
        tmp_path / "learngene.safetensors", describe_model(model, "learngene", **about), model.state_dict()
    )


@pytest.fixture
def unshared(tmp_path: Path) -> Path:
    """A finished run's model of six layers that share nothing."""
    model = randomise(create_model("sws_vit", **SMALL, depth=6))
    info = describe_model(model, "model", preprocessing={"image_size": 32}, classes=list("abcdefghij"))
    return save_model_file(tmp_path / "model.safetensors", info, model.state_dict())


# ---- the model ----


@pytest.mark.parametrize("options", [{}, {"class_token": True}, {"qkv_bias": False, "norm_eps": 1e-5}])
def test_layers_are_those_of_the_formula(options: dict[str, Any]) -> None:
    model = tleg(**options)
    plain = built_by_hand(model.state_dict(), DEPTH, **options)
    torch.testing.assert_close(model(IMAGES), plain(IMAGES), rtol=1e-12, atol=1e-12)


def test_gradients_are_the_sums_over_the_layers() -> None:
    """A gets each layer's gradient, B each layer's times i / L."""
    model = tleg()
    plain = built_by_hand(model.state_dict(), DEPTH)
    for each in (model, plain):
        each(IMAGES).square().sum().backward()
    layers = [dict(block.named_parameters()) for block in plain.blocks]
    stage = model.blocks[0]
    for key, parameter in stage.base.named_parameters():
        torch.testing.assert_close(parameter.grad, sum(layer[key].grad for layer in layers))
    for key, parameter in stage.slope.named_parameters():
        expected = sum(i / DEPTH * layer[key].grad for i, layer in enumerate(layers))
        torch.testing.assert_close(parameter.grad, expected)
    torch.testing.assert_close(model.pos_embed.grad, plain.pos_embed.grad)


def test_recomputed_activations_change_nothing() -> None:
    """Nor the draws of drop-path, in which the layers differ from each other."""
    found = []
    for recompute in (False, True):
        model = tleg(drop_path_rate=0.4).train()
        model.set_grad_checkpointing(recompute)
        torch.manual_seed(0)
        logits = model(IMAGES)
        logits.square().sum().backward()
        found.append([logits, *(parameter.grad for parameter in model.parameters())])
    for plain, recomputed in zip(*found, strict=True):
        assert torch.equal(plain, recomputed)


def test_drop_path_grows_over_the_layers() -> None:
    model = tleg(drop_path_rate=0.3)
    assert model.blocks[0].drop_rates == pytest.approx((0, 0.1, 0.2, 0.3))
    torch.manual_seed(0)
    assert not torch.equal(model.train()(IMAGES), model.eval()(IMAGES))


def test_the_first_layer_starts_as_timms_and_the_norms_do_not_grow() -> None:
    stage = create_model("tleg_vit", **SMALL).blocks[0]
    assert len(stage.drop_rates) == 12
    assert torch.equal(stage.base.norm2.weight, torch.ones(32))
    assert torch.equal(stage.slope.norm1.weight, torch.zeros(32))
    assert torch.equal(stage.slope.norm2.weight, torch.zeros(32))
    for weights in (stage.base, stage.slope):
        assert weights.mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert not weights.mlp.fc1.bias.any()


def test_stages_are_refused() -> None:
    for wrong in ({"schedule": [2, 2]}, {"schedule": [3], "depth": 4}):
        with pytest.raises(ValueError, match="a TLEG model has no stages; give depth alone"):
            create_model("tleg_vit", **SMALL, **wrong)


# ---- the learngene ----


def test_a_file_rebuilds_the_auxiliary_model(file: Path) -> None:
    learngene = load_learngene(file)
    assert learngene.info.name == "tleg_vit"
    assert learngene.schedule == (DEPTH,)
    model = load_model(file).eval()
    assert isinstance(model, TLEGVisionTransformer)
    assert torch.equal(model(IMAGES.float()), tleg().float()(IMAGES.float()))


def test_a_learngene_is_opened_at_another_image_size(file: Path) -> None:
    own = load_model(file).pos_embed
    larger = load_model(file, image_size=48)
    assert torch.equal(larger.pos_embed, timm.layers.resample_abs_pos_embed(own, [6, 6], num_prefix_tokens=0))


@pytest.mark.parametrize(("depth", "branch_scaling"), [(1, 0), (2, 0), (DEPTH, 0), (9, 0), (9, 1)])
def test_a_descendant_is_the_auxiliary_model_of_its_depth(depth: int, branch_scaling: float) -> None:
    model = tleg(branch_scaling=branch_scaling)
    info = describe_model(model, "learngene")
    described, weights = expand_learngene(info, model.state_dict(), plan_layers(info, depth))
    descendant = described.build().double().eval()
    descendant.load_state_dict(weights, strict=True)
    assert described.name == "sws_vit"
    assert described.provenance["plan"] == "linear"
    model.set_repeats((depth,))
    if branch_scaling:
        assert model.blocks[0].branch_scale == pytest.approx(DEPTH / 9)
        torch.testing.assert_close(descendant(IMAGES), model(IMAGES))
    else:
        assert torch.equal(descendant(IMAGES), model(IMAGES))
    storage = [tensor.data_ptr() for tensor in weights.values()]
    assert len(storage) == len(set(storage)), "two layers share their memory"


def test_another_size_and_other_labels(file: Path) -> None:
    model = sws_dist.expand(file, depth=3, num_classes=4, image_size=48)
    assert model(torch.zeros(1, 3, 48, 48)).shape == (1, 4)
    expected = load_learngene(file).weights
    slope = expected["blocks.0.slope.mlp.fc2.bias"]
    torch.testing.assert_close(model.blocks[2].mlp.fc2.bias, expected["blocks.0.base.mlp.fc2.bias"] + 2 / 3 * slope)


def test_a_depth_that_was_not_trained_is_said(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        sws_dist.expand(file, depth=7)
    assert "trained at 4 layers alone: a descendant of 7 needs fine-tuning" in caplog.text
    assert "drop" not in caplog.text


@pytest.mark.parametrize("plan", ["proportional", "spaced", [0] * DEPTH])
def test_a_plan_is_refused(file: Path, plan: Any) -> None:
    with pytest.raises(ValueError, match="TLEG's layers are not copied from stages"):
        sws_dist.expand(file, DEPTH, plan=plan)


def test_half_a_learngene_is_refused(file: Path) -> None:
    info, weights = load_learngene(file)
    del weights["blocks.0.slope.norm1.bias"]
    save_model_file(file, info, weights)
    with pytest.raises(ValueError, match=r"blocks.0.slope.norm1.bias: missing in the learngene"):
        sws_dist.expand(file, DEPTH)


def test_fine_tuning_a_learngene_makes_an_ordinary_descendant(file: Path) -> None:
    args = argparse.Namespace(weights=file, depth=6, model=None, no_ema=False, image_size=None)
    sets = model_settings(args)
    assert (sets["model.name"], sets["model.depth"]) == ("sws_vit", 6)
    assert sets["model.initial_learngene"] == str(file)


# ---- layers of a model that shares nothing ----


def test_spaced_layers() -> None:
    ones = (1,) * 12
    assert expansion_plan(ones, 5, "spaced") == (0, 2, 4, 7, 9)
    assert expansion_plan(ones, 6, "spaced") == (0, 2, 4, 6, 8, 10)
    assert expansion_plan(ones, 12, "spaced") == tuple(range(12))
    assert expansion_plan(ones, 18, "spaced") == (0, 0, 1, 2, 2, 3, 4, 4, 5, 6, 6, 7, 8, 8, 9, 10, 10, 11)
    assert expansion_plan((3, 3, 4, 3, 3), 7, "spaced") == (0, 0, 1, 2, 2, 3, 4)


@pytest.mark.parametrize(
    ("plan", "depth", "layers"),
    [("spaced", 4, [0, 1, 3, 4]), ([0, 5], 2, [0, 5]), ("spaced", 8, [0, 0, 1, 2, 3, 3, 4, 5])],
)
def test_layers_of_a_model_are_picked(unshared: Path, plan: Any, depth: int, layers: list[int]) -> None:
    model = sws_dist.expand(unshared, depth, plan=plan)
    source = load_learngene(unshared).weights
    for layer, picked in enumerate(layers):
        for key, tensor in model.blocks[layer].state_dict().items():
            assert torch.equal(tensor, source[f"blocks.{picked}.{key}"])


def test_picked_layers_need_tuning_and_are_not_said_to_be_dropped(
    unshared: Path, caplog: pytest.LogCaptureFixture
) -> None:
    info = read_learngene_header(unshared).info
    assert untrained_depth(info, 6) is None
    with caplog.at_level(logging.INFO):
        sws_dist.expand(unshared, 3, plan="spaced")
    assert "trained at 6 layers alone: a descendant of 3 needs fine-tuning" in caplog.text
    assert "drops" not in caplog.text


@pytest.mark.parametrize("plan", ["even", "proportional"])
def test_a_model_is_not_taken_for_a_learngene(unshared: Path, plan: str) -> None:
    with pytest.raises(ValueError, match="holds a model, not a learngene: its 6 layers share nothing; the plan spaced"):
        sws_dist.expand(unshared, 3, plan=plan)
