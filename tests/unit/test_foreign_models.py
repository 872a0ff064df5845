"""What is said beside the weights of another program: a folder's ``config.json``, a training script's arguments."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from sws_dist.build_models import build_models
from sws_dist.checkpoint.load_model import load_model
from sws_dist.checkpoint.open_model import open_model
from sws_dist.cli.finetune import model_settings
from sws_dist.config.schema import DataConfig, DistillConfig, ModelConfig, RunConfig
from sws_dist.distill.teacher import load_teacher
from sws_dist.export.source import open_source
from sws_dist.inference import input_config
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
