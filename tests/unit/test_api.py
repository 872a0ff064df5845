"""The public functions: what they return, and what they refuse."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch

import sws_dist
from sws_dist.checkpoint.model_file import save_model_file
from sws_dist.learngene.file import describe_model
from sws_dist.models import SWSVisionTransformer, geometry
from sws_dist.models.geometry import timm_arguments

GEOMETRY = {"schedule": (2, 1, 2), "img_size": 32, "patch_size": 8, "embed_dim": 32, "num_heads": 2}
PREPROCESSING = {"mean": [0.4] * 3, "std": [0.2] * 3, "image_size": 32, "crop_pct": 1.0, "interpolation": "bicubic"}


@pytest.fixture
def learngene(tmp_path: Path) -> Path:
    model = SWSVisionTransformer(**GEOMETRY, num_classes=10)
    info = describe_model(model, "learngene", preprocessing=PREPROCESSING, classes=[str(digit) for digit in range(10)])
    return save_model_file(tmp_path / "learngene.safetensors", info, model.state_dict())


def test_a_descendant_is_a_plain_timm_model(learngene: Path) -> None:
    source = sws_dist.load_learngene(learngene)
    assert (source.schedule, source.num_parameters) == ((2, 1, 2), sum(t.numel() for t in source.weights.values()))
    model = sws_dist.expand(source, depth=5).eval()  # the auxiliary model's own depth
    name, arguments = timm_arguments(geometry(model))
    plain = timm.create_model(name, **arguments).eval()
    plain.load_state_dict(model.state_dict(), strict=True)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(plain(images), model(images), rtol=0, atol=1e-6)
    auxiliary = source.info.build().eval()
    auxiliary.load_state_dict(source.weights, strict=True)
    torch.testing.assert_close(auxiliary(images), model(images), rtol=0, atol=1e-6)


def test_a_descendant_says_how_it_wants_its_images(learngene: Path) -> None:
    model = sws_dist.expand(learngene, depth=4, plan=[0, 0, 1, 2], num_classes=3, image_size=48)
    found = timm.data.resolve_model_data_config(model)
    assert (found["input_size"], found["mean"], found["crop_pct"]) == ((3, 48, 48), [0.4] * 3, 1.0)
    assert model.pretrained_cfg["label_names"] is None, "the head is new"
    with pytest.raises(ValueError, match="has 4 layers, but the depth is 5"):
        sws_dist.expand(learngene, depth=5, plan=[0, 0, 1, 2])


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    config = sws_dist.load_config("quickstart/teacher", [f"output={tmp_path}"])
    (tmp_path / "metrics.json").write_text('{"top1": 0.5}')
    assert sws_dist.train(config, "zero2", resume="auto") == {"top1": 0.5}


def test_depths_do_not_write_over_each_others_predictions(learngene: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="takes no predictions"):
        sws_dist.evaluate_depths(learngene, tmp_path, [4, 5], predictions=tmp_path / "p.npz")
