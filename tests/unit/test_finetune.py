"""The settings that ``sws finetune`` chooses, without a run; tests/integration/test_finetune.py trains."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from sws_dist.checkpoint.model_file import save_model_file
from sws_dist.cli.finetune import as_overrides, choose_settings, model_settings, split_settings
from sws_dist.config.loader import load_config
from sws_dist.learngene.file import describe_model
from sws_dist.models import SWSVisionTransformer
from tests.unit.test_sources import jpeg, write_tar

WORLD = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_SIZE": "1", "MASTER_ADDR": "h", "MASTER_PORT": "1"}
OPTIONS: dict[str, Any] = {"output": None, "model": None, "depth": None, "image_size": None, "no_ema": False, "seed": 0}
OPTIONS |= {"val_share": 0.25, "batch": None, "epochs": None, "lr": None}


@pytest.fixture(autouse=True)
def _world(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in WORLD.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    model = SWSVisionTransformer(schedule=(2, 1), img_size=32, patch_size=8, embed_dim=32, num_heads=2, num_classes=7)
    about = {"mean": [0.5] * 3, "std": [0.5] * 3, "image_size": 32, "crop_pct": 1.0, "interpolation": "bicubic"}
    file = tmp_path / "5$HOME 'weights'.safetensors"
    return save_model_file(file, describe_model(model, "learngene", preprocessing=about), model.state_dict())


def test_paths_reach_the_config_as_they_are(tmp_path: Path, weights: Path) -> None:
    data = tmp_path / "a$HOME b" / "~pets"
    for name in ("cat", "dog"):
        (data / name).mkdir(parents=True)
        for number in range(40):
            (data / name / f"{number}.jpg").write_bytes(jpeg())
    args = argparse.Namespace(weights=weights, data=data, overrides=[], **OPTIONS)
    config = load_config("finetune", as_overrides(choose_settings(args)))
    assert (config.data.root, config.data.train_split) == (str(data.parent), "./~pets")
    assert config.model.initial_learngene == str(weights)
    assert config.output == "runs/finetune/~pets"
    assert config.train.global_batch == 4  # of 60 training images, eight steps an epoch
    assert config.train.epochs == 66


def test_the_folder_of_a_finished_run_is_its_weights(tmp_path: Path, weights: Path) -> None:
    (tmp_path / "run").mkdir()
    for name, content in (("config.yaml", b""), ("learngene.safetensors", weights.read_bytes())):
        (tmp_path / "run" / name).write_bytes(content)
    args = argparse.Namespace(weights=tmp_path / "run", **OPTIONS)
    with pytest.raises(ValueError, match="this run is not finished"):
        model_settings(args)
    (tmp_path / "run" / "metrics.json").write_text("{}")
    assert model_settings(args)["model.initial_learngene"] == str(tmp_path / "run" / "learngene.safetensors")


def test_images_in_shards_are_counted_by_the_keys_that_are_set(tmp_path: Path, weights: Path) -> None:
    members = {f"{i}.scan": jpeg() for i in range(8)} | {f"{i}.json": b'{"kind": "k%d"}' % (i % 2) for i in range(8)}
    write_tar(tmp_path / "shards" / "a.tar", members)
    sets = ["data.image_extensions=[scan]", "data.label_key=kind", "data.val_share=0.5"]
    args = argparse.Namespace(weights=weights, data=tmp_path / "shards", overrides=[], **OPTIONS)
    with pytest.raises(ValueError, match="none of the samples in its 1 tar file"):
        choose_settings(args)
    args.overrides = sets
    assert choose_settings(args)["train.epochs"] == 100


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    for name in ("bus", "car", "train", "test"):
        (tmp_path / "vehicles" / name).mkdir(parents=True)
        (tmp_path / "vehicles" / name / "1.jpg").write_bytes(jpeg())
    held_out = {"data.root": str(tmp_path), "data.train_split": "vehicles", "data.val_share": 0.1}
    assert split_settings(tmp_path / "vehicles", 0.1) == held_out
    for split in ("train", "val"):
        (tmp_path / "flat" / split).mkdir(parents=True)
        (tmp_path / "flat" / split / "1.jpg").write_bytes(jpeg())
    flat = {"data.root": str(tmp_path / "flat"), "data.val_split": "val"}
    assert split_settings(tmp_path / "flat", 0.1) == flat  # whose images lie in no class folder, as the run will say
