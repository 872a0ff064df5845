"""Models and images of different size: the model is built for the images, or one message says what to set."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sws_dist.build_models import build_models
from sws_dist.config.schema import DataConfig, ModelConfig, RunConfig
from sws_dist.models import create_model
from sws_dist.models.evaluation_mode import evaluation_mode
from sws_dist.models.image_size import image_size_arguments, require_image_size

CLASSES = ("a", "b", "c")


def run(name: str, image_size: int, **kwargs: object) -> RunConfig:
    return RunConfig("unused", ModelConfig(name, kwargs=kwargs), DataConfig(root="unused", image_size=image_size))


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "levit_128s", "swin_tiny_patch4_window7_224"])
def test_a_student_is_built_for_its_images_and_its_file_says_so(name: str) -> None:
    parts = build_models(run(name, 96), CLASSES, torch.device("cpu"), torch.float32, {}, 100)
    images = torch.zeros(2, 3, 96, 96)
    assert parts.student.eval()(images).shape == (2, 3)
    assert parts.student.training is False
    again = parts.info.build().eval()
    again.load_state_dict(parts.student.state_dict(), strict=True)
    torch.testing.assert_close(again(images), parts.student(images), rtol=0, atol=0)
    assert parts.info.kwargs == ({} if name == "test_resnet" else {"img_size": 96})


def test_a_student_that_takes_no_such_images() -> None:
    config = run("vit_tiny_patch16_224", 96, img_size=160)
    with pytest.raises(
        ValueError, match=r"model\.name vit_tiny\S+ takes no images of 96 x 96 pixels .* made for 224: set"
    ):
        build_models(config, CLASSES, torch.device("cpu"), torch.float32, {}, 100)
    dynamic = replace(config, model=ModelConfig("vit_tiny_patch16_224", kwargs={"dynamic_img_size": True}))
    assert build_models(dynamic, CLASSES, torch.device("cpu"), torch.float32, {}, 100).flops.student > 0
    with pytest.raises(ValueError, match=r"vit_tiny_patch16_224"):  # not one patch of 16
        build_models(run("vit_tiny_patch16_224", 8), CLASSES, torch.device("cpu"), torch.float32, {}, 100)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_classes": 5}, "num_classes in model.kwargs: a model has a label for each class of the data, 3"),
        ({"in_chans": 1}, r"takes images of 1 channel\(s\) \(in_chans\); all images are read as RGB"),
        ({"global_pool": ""}, r"answers one image with an array of shape \[1, 37, 3\], and its num_classes is 3"),
        ({"features_only": True}, "answers one image with a list, .* no classifier"),
    ],
)
def test_a_student_that_does_not_tell_the_classes_of_the_images_apart(kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_models(run("vit_tiny_patch16_224", 96, **kwargs), CLASSES, torch.device("cpu"), torch.float32, {}, 100)


def test_the_operations_of_a_model_that_expands_its_parameters_are_counted() -> None:
    """As PiT does with its class token: the counter ended in an AssertionError, and with it the run."""
    parts = build_models(run("pit_ti_224", 96), CLASSES, torch.device("cpu"), torch.float32, {}, 100)
    assert parts.flops.student > 1e6


def test_the_check_leaves_a_model_as_it_was() -> None:
    model = create_model("test_resnet").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.layer1.eval()
    require_image_size(model, "it", 64)
    assert (model.training, model.layer1.training, model.layer2.training) == (True, False, True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for name in ("no_such_model", "test_vit.no_such_tag"):
        with pytest.raises(ValueError, match="no_such"):
            image_size_arguments(name, 64)


def test_nothing_that_an_evaluation_has_computed_outlives_it() -> None:
    model = create_model("levit_128s", num_classes=3, img_size=96).eval()
    with evaluation_mode(model), torch.no_grad():
        model(torch.zeros(1, 3, 96, 96))
        caches = [module for module in model.modules() if getattr(module, "attention_bias_cache", None)]
        assert caches  # of the attention's biases, which training changes
    assert not any(module.attention_bias_cache for module in caches)


def test_the_number_of_layers_stands_in_the_files_of_any_model() -> None:
    config = run("vit_tiny_patch16_224", 32)
    config = replace(config, model=replace(config.model, depth=2))
    parts = build_models(config, CLASSES, torch.device("cpu"), torch.float32, {}, 100)
    assert len(parts.info.build().blocks) == len(parts.student.blocks) == 2


def test_a_model_that_is_scored_at_many_depths_is_compiled_by_stages() -> None:
    """Compiled as a whole, it would have a graph for each depth, and at some number of them none any more."""
    config = run("sws_vit", 32, patch_size=16, embed_dim=16, num_heads=2)
    model = replace(config.model, schedule=(2, 2), compile=True)
    config = replace(config, model=model, train=replace(config.train, eval_depths=(3, 6)))
    student = build_models(config, CLASSES, torch.device("cpu"), torch.float32, {}, 100).student
    assert student._compiled_call_impl is None
    assert all(stage._compiled_call_impl is not None for stage in student.blocks)
