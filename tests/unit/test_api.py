"""The public functions: what they return, and what they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": "5"}, "depth '5': a descendant has a whole number of layers, from 1 to 1000"),
        ({"depth": True}, "depth True"),
        ({"depth": 10**5}, "depth 100000"),
        ({"depth": 3, "plan": [0.0, 1.0, 2.0]}, r"plan \[0\.0, 1\.0, 2\.0\]: expected even"),
        ({"depth": 3, "plan": "0,1,2"}, r"plan '0,1,2': .* \(in Python a list\)"),
        ({"depth": 3, "plan": None}, "plan None: expected even"),
        ({"depth": 3, "num_classes": 0}, "num_classes 0: expected a whole number from 1"),
        ({"depth": 3, "image_size": (32, 48)}, r"image_size \(32, 48\): expected a whole number from 8 to 8192"),
        ({"depth": 3, "image_size": 36}, "images of 36 x 36 pixels are no whole number of patches of 8 x 8"),
        ({"depth": 3, "branch_scaling": -1}, "branch_scaling -1: expected a number from 0 to 2"),
        ({"depth": 3, "branch_scaling": float("nan")}, "branch_scaling nan"),
    ],
)
def test_an_expansion_that_cannot_be(learngene: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sws_dist.expand(learngene, **arguments)


def test_a_plan_may_be_an_array(learngene: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = sws_dist.expand(learngene, 3, plan=torch.tensor([0, 1, 2])).state_dict()
    expected = sws_dist.expand(learngene, 3, plan=[0, 1, 2]).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert "drops stages" not in caplog.text


@pytest.mark.parametrize(
    ("depths", "options", "message"),
    [
        (8, {}, r"depths 8: expected a list of numbers of layers, such as \[6, 9, 12\]"),
        ([8, 0], {}, "depth 0"),
        ([8], {"predictions": "p.npz"}, "evaluate_depths takes no predictions"),
        ([8], {"use_ema": False}, "evaluate_depths takes no use_ema"),
    ],
)
@pytest.mark.usefixtures("temporary_group")
def test_depths_that_cannot_be_scored(learngene: Path, depths: Any, options: dict[str, Any], message: str) -> None:
    """They are refused before anything is scored: there are no images here."""
    with pytest.raises(ValueError, match=message):
        sws_dist.evaluate_depths(sws_dist.load_learngene(learngene), "no_such_folder", depths, **options)


@pytest.mark.parametrize("overrides", ["train.epochs=3", [("train.epochs", 3)]])
def test_overrides_that_are_no_list_of_strings(overrides: Any) -> None:
    with pytest.raises(ValueError, match=r"overrides .* expected a list of strings, such as \[.train.epochs=3.\]"):
        sws_dist.load_config("auxiliary_small", overrides)
