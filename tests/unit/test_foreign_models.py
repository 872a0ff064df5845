"""What is said beside the weights of another program: a folder's ``config.json``, a training script's arguments."""

from __future__ import annotations

import argparse
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from sws_dist.build_models import build_models
from sws_dist.checkpoint.load_model import load_initial_weights, load_model
from sws_dist.checkpoint.open_model import open_model
from sws_dist.cli.finetune import model_settings
from sws_dist.config.schema import DataConfig, DistillConfig, ModelConfig, RunConfig
from sws_dist.distill.teacher import load_teacher
from sws_dist.export.source import open_source
from sws_dist.inference import input_config
from sws_dist.models import create_model
from tests.unit.test_foreign_weights import VIT, same, saved, weights_of

ANIMALS = ("cat", "dog", "eel")
IMAGES = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _log_all(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "sws_dist")


def build_with_four_heads(**overlay: Any) -> Any:
    """Build a model of timm that is not as its name usually is; the shapes of its weights are."""
    torch.manual_seed(0)
    model = timm.create_model(VIT, num_classes=3, num_heads=4, pretrained_cfg_overlay=overlay).eval()
    nn.init.normal_(model.head.weight)
    return model


def write_hub_folder(folder: Path) -> Any:
    """Write what timm puts on the Hub. Returns the model."""
    about: dict[str, Any] = {"mean": (0.1,) * 3, "std": (0.9,) * 3, "crop_pct": 1.0, "interpolation": "bilinear"}
    model = build_with_four_heads(**about, label_names=ANIMALS, num_classes=3)
    timm.models.save_for_hf(model, folder, model_args={"num_heads": 4}, safe_serialization="both")
    return model


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_file_and_its_folder_give_the_same_model(tmp_path: Path, file: str) -> None:
    expected = write_hub_folder(tmp_path)
    for model in (open_model(tmp_path), open_model(tmp_path / file), open_source(tmp_path / file).model):
        assert torch.equal(model.eval()(IMAGES), expected(IMAGES))
        config = input_config(model, "it", tmp_path)
        assert (config.mean, config.std, config.crop_pct) == ((0.1,) * 3, (0.9,) * 3, 1.0)
        assert (config.interpolation, config.image_size) == ("bilinear", 160)
        assert tuple(model.pretrained_cfg["label_names"]) == ANIMALS
    assert open_source(tmp_path / file).config["model_args"]["num_heads"] == 4


def settings_of(weights: Path, model: str | None = None) -> dict[str, Any]:
    return model_settings(argparse.Namespace(weights=weights, model=model, depth=None, no_ema=False, image_size=None))


def test_a_folder_of_timms_is_fine_tuned_as_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_hub_folder(tmp_path)
    for sets in (settings_of(tmp_path), settings_of(tmp_path / "model.safetensors", f"{VIT}.r160_in1k")):
        assert (sets["model.name"], sets["model.kwargs"]["num_heads"]) == (VIT, 4)
        assert sets["model.initial_checkpoint"] == str(tmp_path / "model.safetensors")
        assert (sets["data.mean"], sets["data.crop_pct"], sets["data.interpolation"]) == ([0.1] * 3, 1.0, "bilinear")
        assert sets["data.image_size"] == 160
    data = DataConfig(root="unused", image_size=160)
    config = RunConfig("unused", ModelConfig(VIT, initial_checkpoint=str(tmp_path / "model.safetensors")), data)
    build_models(config, ("dog", "cat", "eel"), torch.device("cpu"), torch.float32, {}, 100)
    assert "its model was built with num_heads: 4, this run's is not (model.kwargs)" in caplog.text
    assert "its images were normalised by mean [0.1, 0.1, 0.1]" in caplog.text
    assert "the rows of its head are put into the order of the data's classes" in caplog.text


def test_a_teachers_file_is_read_as_its_folder_says(tmp_path: Path) -> None:
    expected = write_hub_folder(tmp_path)
    file, data = (
        str(tmp_path / "model.safetensors"),
        DataConfig("unused", image_size=160, mean=(0.1,) * 3, std=(0.9,) * 3),
    )
    for config in (DistillConfig(teacher=VIT, teacher_weights=file), DistillConfig(teacher=file)):
        teacher = load_teacher(config, ANIMALS, data)
        assert teacher is not None
        assert torch.equal(teacher(IMAGES), expected(IMAGES))
        assert teacher.same_normalisation


def test_a_config_of_another_model_is_not_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_hub_folder(tmp_path)
    weights = weights_of("test_vit2")
    model = load_model(saved(tmp_path / "other.pth", weights), "test_vit2")
    assert same(model, weights)
    assert model.pretrained_cfg["mean"] == timm.get_pretrained_cfg("test_vit2").mean
    assert f"says of {VIT} is not read for test_vit2" in caplog.text
    with pytest.raises(ValueError, match=r"its head knows 5 labels, but config\.json beside it names 3"):
        load_model(saved(tmp_path / "other.pth", weights_of(num_classes=5)))


def test_timms_own_training_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = build_with_four_heads()
    args: dict[str, Any] = {"model": VIT, "model_kwargs": {"num_heads": 4}, "mean": [0.1] * 3, "std": [0.9], "gp": None}
    args |= {"crop_pct": 0.8, "interpolation": "bilinear", "img_size": 160, "input_size": None, "num_classes": 3}
    content = {"arch": VIT, "state_dict": expected.state_dict(), "args": argparse.Namespace(**args)}
    model = open_model(saved(tmp_path / "a.pth.tar", content)).eval()
    assert torch.equal(model(IMAGES), expected(IMAGES))
    config = input_config(model, "it", tmp_path)
    assert (config.mean, config.std, config.crop_pct) == ((0.1,) * 3, (0.9,) * 3, 0.8)
    assert config.interpolation == "bilinear"
    assert settings_of(tmp_path / "a.pth.tar")["model.kwargs"] == {"num_heads": 4}
    pooled = timm.create_model(VIT, num_classes=3, global_pool="avg").eval()
    args |= {"model_kwargs": {"act_layer": Path("x")}, "gp": "avg", "interpolation": "random", "mean": [0.1, 0.2]}
    content |= {"state_dict": pooled.state_dict(), "args": argparse.Namespace(**args)}
    model = open_model(saved(tmp_path / "b.pth.tar", content)).eval()
    assert torch.equal(model(IMAGES), pooled(IMAGES))
    assert model.pretrained_cfg["mean"] == [0.5] * 3
    for key in ("model_kwargs {'act_layer'", "interpolation 'random'", "mean [0.1, 0.2]"):
        assert f"its training script's {key}" in caplog.text


# ---- timm's own conversion -------------------------------------------------------------------------------------------


def test_flexivit_is_resampled_as_timm_does_it(tmp_path: Path) -> None:
    """timm binds another interpolation for it than for other ViTs."""
    arguments = {"depth": 1, "embed_dim": 64, "num_heads": 2, "num_classes": 3}
    small = timm.create_model("flexivit_small", **arguments)
    nn.init.normal_(small.pos_embed)
    timm.models.save_for_hf(small, tmp_path, model_args=arguments, safe_serialization=True)
    file = tmp_path / "model.safetensors"
    for more in ({"img_size": 160}, {"img_size": 160, "patch_size": 20}):
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"model_args": arguments | more}))
        overlay = {"file": str(file), "num_classes": 3}
        expected = timm.create_model("flexivit_small", True, pretrained_cfg_overlay=overlay, **arguments, **more)
        assert same(load_model(file, image_size=160), expected.state_dict())


def test_an_official_crossvit_file(tmp_path: Path) -> None:
    """timm renames it by a function inside the one that builds the model."""
    weights = weights_of("crossvit_tiny_240")
    official = {re.sub(r"^(pos_embed|cls_token)_", r"\1.", name): tensor for name, tensor in weights.items()}
    assert "pos_embed.0" in official
    assert same(load_model(saved(tmp_path / "a.pth", {"model": official}), "crossvit_tiny_240"), weights)


def test_shvits_names_are_not_taken_for_official_levits(tmp_path: Path) -> None:
    weights = weights_of("shvit_s1", num_classes=3)
    assert same(load_model(saved(tmp_path / "a.pth", weights), "shvit_s1"), weights)


def test_a_head_behind_a_layer_that_timm_drops(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """timm's ViTs of ImageNet-21k once had a layer between the pooling and the head."""
    weights = weights_of(num_classes=3)
    file = saved(tmp_path / "a.pth", weights | {"pre_logits.fc.weight": torch.ones(2), "pre_logits.fc.bias": IMAGES})
    with pytest.raises(ValueError, match=r"its head was trained behind a layer .* \(pre_logits\), so its logits would"):
        load_model(file, VIT)
    assert "timm's conversion leaves out: pre_logits.fc.weight, pre_logits.fc.bias" in caplog.text
    model = create_model(VIT, num_classes=3)
    own = model.head.weight.clone()
    load_initial_weights(model, file, ANIMALS, 160)
    assert torch.equal(model.head.weight, own)
    assert torch.equal(model.norm.weight, weights["norm.weight"])
    assert f"the head is new: {file} has one that was trained behind a layer" in caplog.text


def test_what_timm_leaves_out_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = weights_of("eva02_tiny_patch14_224", num_classes=3, depth=1, embed_dim=32, num_heads=2)
    file = saved(tmp_path / "a.pth", weights | {"rope.freqs_cos": torch.ones(2)})
    model = create_model("eva02_tiny_patch14_224", num_classes=3, depth=1, embed_dim=32, num_heads=2)
    load_initial_weights(model, file, ANIMALS, 224)
    assert same(model, weights)
    assert "timm's conversion leaves out: rope.freqs_cos" in caplog.text


def test_patches_of_another_size_are_refused(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"embed_dim": 64, "num_heads": 2, "depth": 1, "class_token": True, "num_classes": 3}
    file = saved(tmp_path / "a.pth", weights_of("sws_vit", img_size=64, patch_size=16, **sizes))
    for name, more in (("sws_vit", {}), ("vit_tiny_patch16_224", {"patch_size": 8})):
        model = create_model(name, img_size=64, **(sizes | {"patch_size": 8} | more))
        with pytest.raises(ValueError, match="is of a model with patches of 16x16 pixels, and this one's are 8x8"):
            load_initial_weights(model, file, ANIMALS, 64)
