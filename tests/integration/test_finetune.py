"""``sws finetune``: any weights, one's own class folders, one command."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from sws_dist.checkpoint.model_file import load_model_file, save_model_file
from sws_dist.data.manifest import Manifest
from sws_dist.learngene.file import describe_model
from sws_dist.models import SWSVisionTransformer, create_model
from tests import ranks

PREPROCESSING = {"mean": [0.5] * 3, "std": [0.5] * 3, "image_size": 32, "crop_pct": 1.0, "interpolation": "bicubic"}


@pytest.fixture
def own(tmp_path: Path, digits_root: Path) -> Path:
    """Class folders without a split: 20 images of each of four classes."""
    for digit, name in zip("3580", ("three", "five", "eight", "a zero"), strict=True):
        (tmp_path / "own" / name).mkdir(parents=True)
        for file in sorted((digits_root / "train" / digit).iterdir())[:20]:
            shutil.copy(file, tmp_path / "own" / name)
    return tmp_path / "own"


def finetune(*arguments: str | Path, world: int = 1) -> subprocess.CompletedProcess[str]:
    return ranks.script("launcher/finetune.py", *map(str, arguments), world=world)


def learngene(path: Path) -> Path:
    torch.manual_seed(0)
    model = SWSVisionTransformer(schedule=(2, 1), img_size=32, patch_size=8, embed_dim=32, num_heads=2, num_classes=7)
    info = describe_model(model, "learngene", preprocessing=PREPROCESSING, classes=list("abcdefg"))
    return save_model_file(path, info, model.state_dict())


def test_a_learngene_then_its_descendant_on_class_folders(tmp_path: Path, own: Path) -> None:
    """On two ranks from a learngene, then from what that has written."""
    file, output = learngene(tmp_path / "learngene.safetensors"), tmp_path / "first"
    options = ("--data", own, "--epochs", "2", "--val-share", "0.2")
    done = finetune("--from", file, "--depth", "4", "--output", output, *options, world=2)
    assert done.returncode == 0, done.stdout
    assert "16 of 80 images are held out for validation (data.val_share 0.2 of each class)" in done.stdout
    assert "the head is new: 4 classes, the learngene knows 7" in done.stdout
    metrics = json.loads((output / "metrics.json").read_text())
    assert f"its accuracy  {100 * metrics['top1']:.2f} % of 16 validation images" in done.stdout
    info, weights = load_model_file(output / "model.safetensors")
    assert info.classes == ["a zero", "eight", "five", "three"]
    assert info.kwargs["schedule"] == [1] * 4
    held = Manifest.load(output / "images-val.safetensors").paths

    more = ("--output", tmp_path / "second", "--lr", "1e-12", "--batch", "64", "--set", "optim.warmup_lr=0")
    done = finetune("--from", output / "model.safetensors", *options, *more)
    assert done.returncode == 0, done.stdout
    assert "the head is" not in done.stdout, "its classes are known"
    assert Manifest.load(tmp_path / "second" / "images-val.safetensors").paths == held
    _, again = load_model_file(tmp_path / "second" / "model.safetensors")
    for name, tensor in weights.items():
        torch.testing.assert_close(again[name], tensor, rtol=0, atol=1e-6)

    shutil.rmtree(own / "five")
    scores = tmp_path / "scores.json"
    command = ("--checkpoint", output / "model.safetensors", "--data", own, "--json", scores)
    done = ranks.script("launcher/evaluate.py", *map(str, command))
    assert done.returncode == 0, done.stdout
    assert "has 3 of the 4 classes" in done.stdout
    assert json.loads(scores.read_text())["images"] == 60


def test_a_timm_checkpoint_on_train_and_valid(tmp_path: Path, own: Path) -> None:
    shutil.copytree(own, tmp_path / "data" / "train")
    shutil.copytree(own, tmp_path / "data" / "valid")
    shutil.copytree(own, tmp_path / "data" / "test")
    vit = create_model("test_vit")
    torch.save({"state_dict": vit.state_dict(), "state_dict_ema": vit.state_dict()}, tmp_path / "vit.pth.tar")
    done = finetune(
        *("--from", tmp_path / "vit.pth.tar", "--model", "test_vit", "--data", tmp_path / "data", "--epochs", "1"),
        *("--image-size", "32", "--output", tmp_path / "run", "--no-ema"),
    )
    assert done.returncode == 0, done.stdout
    for line in (
        "data: not used: test",
        "the weights of state_dict are taken, not the averaged ones (state_dict_ema)",
        "pos_embed resampled from (1, 101, 64) to (1, 5, 64)",
        "warning: the head is new",
        "80 training and 80 validation images in 4 classes",
    ):
        assert line in done.stdout
    info, _ = load_model_file(tmp_path / "run" / "model.safetensors")
    assert (info.name, info.kwargs, info.num_classes) == ("test_vit", {"img_size": 32}, 4)
    assert info.preprocessing["mean"] == list(vit.pretrained_cfg["mean"])
    assert info.preprocessing["image_size"] == 32


def test_mistakes_end_in_one_message(tmp_path: Path, own: Path) -> None:
    file = learngene(tmp_path / "learngene.safetensors")
    vit = tmp_path / "vit.pth"
    torch.save(create_model("test_vit").state_dict(), vit)
    model = ("--model", "test_vit")
    (tmp_path / "one" / "only").mkdir(parents=True)
    shutil.copy(next((own / "five").iterdir()), tmp_path / "one" / "only")
    (tmp_path / "splits" / "training").mkdir(parents=True)
    (tmp_path / "splits" / "valid").mkdir()
    cases = {
        ("--from", vit, "--data", own): "does not say which model it is of; name it with --model",
        ("--from", vit, "--data", own, "--model", "tets_vit"): "timm has no model 'tets_vit'",
        ("--from", vit, "--data", own, *model, "--depth", "3"): "only a learngene can be expanded",
        ("--from", file, "--data", own, *model): "says that it is of sws_vit",
        ("--from", tmp_path / "nothing.pth", "--data", own): "nothing.pth: no such file",
        ("--from", vit, *model, "--data", tmp_path / "nowhere"): "there is no such folder",
        ("--from", vit, *model, "--data", tmp_path / "one"): "holds one class (only); at least two are needed",
        ("--from", vit, *model, "--data", tmp_path / "splits"): "holds training, valid, but no train",
        ("--from", file, "--data", own, "--set", "optim.lrr=1"): "did you mean optim.lr?",
        (
            "--from",
            file,
            "--data",
            own,
            "--val-share",
            "nan",
        ): "argument --val-share: 'nan': expected a number",
        ("--from", file, "--data", own, "--epochs", "0"): "argument --epochs: '0': expected a whole number from 1",
    }
    for arguments, message in cases.items():
        done = finetune(*arguments, "--output", tmp_path / "run")
        assert done.returncode == (2 if "argument --" in message else 1), done.stdout
        assert "Traceback" not in done.stdout, done.stdout
        assert done.stdout.count("error: ") == 1, done.stdout
        assert message in done.stdout, done.stdout
    assert not (tmp_path / "run").exists()
