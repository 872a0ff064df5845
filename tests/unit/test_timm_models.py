"""The cases of timm's own tests/test_models.py, on the names that we register, and features counted by layers."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.models import get_notrace_functions, get_notrace_modules
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from sws_dist.learngene.expand import expand_learngene, plan_layers
from sws_dist.learngene.file import describe_model
from sws_dist.models import SWSVisionTransformer, create_model, geometry
from sws_dist.models.geometry import timm_arguments

SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 8}
NARROW: dict[str, Any] = SMALL | {"embed_dim": 64, "num_heads": 2}
MODELS = {
    "sws_aux_tiny_patch16_224": SMALL | {"schedule": [2, 1, 1, 2, 1]},
    "sws_des_tiny_patch16_224": SMALL | {"depth": 4},
    "sws_vit": NARROW | {"schedule": [2, 1, 3]},
    "tleg_vit": NARROW | {"depth": 5},
}
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))

every_model = pytest.mark.parametrize("name", MODELS)


def build(name: str, **arguments: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model(name, **MODELS[name], **arguments)


def unrolled(model: SWSVisionTransformer) -> Any:
    """Return plain timm's ViT with as many layers as the model runs."""
    info = describe_model(model, "learngene")
    layers = plan_layers(info, sum(model.schedule))
    found, weights = expand_learngene(info, model.state_dict(), layers)
    name, arguments = timm_arguments(found.kwargs | {"num_classes": found.num_classes})
    plain = timm.create_model(name, **arguments).eval()
    plain.load_state_dict(weights, strict=True)
    return plain


def assert_same(found: Any, expected: Any) -> None:
    """Compare what two models return: tensors in tuples, lists and dictionaries of the same kind."""
    assert type(found) is type(expected)
    if isinstance(found, Tensor):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        return
    keys = found if isinstance(found, dict) else range(len(expected))
    assert len(found) == len(expected)
    for key in keys:
        assert_same(found[key], expected[key])


@every_model
def test_backward_reaches_every_parameter(name: str) -> None:
    model = build(name, num_classes=42).train()
    outputs = model(IMAGES)
    assert outputs.shape == (2, 42)
    outputs.mean().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]


@every_model
def test_default_configuration_names_the_models_parts(name: str) -> None:
    model = build(name).eval()
    weights, known = model.state_dict(), model.default_cfg
    assert f"{known['classifier']}.weight" in weights
    assert f"{known['first_conv']}.weight" in weights
    assert model.forward_features(IMAGES).shape == (2, 16, model.num_features)
    model.reset_classifier(0)
    assert model(IMAGES).shape == (2, model.num_features)
    model.reset_classifier(0, "")
    assert model(IMAGES).shape == (2, 16, model.num_features)


@every_model
def test_features_only(name: str) -> None:
    model, whole = build(name, features_only=True).eval(), build(name).eval()
    depth = sum(whole.schedule)
    assert model.feature_info.channels() == [whole.embed_dim] * 3
    assert model.feature_info.reduction() == [8] * 3
    assert model.feature_info.out_indices == (depth - 3, depth - 2, depth - 1)
    assert_same(model(IMAGES), whole.forward_intermediates(IMAGES, 3, intermediates_only=True))


@every_model
def test_intermediates_without_an_index_end_in_the_models_features(name: str) -> None:
    model = build(name).eval()
    tokens, features = model.forward_intermediates(IMAGES, output_fmt="NLC")
    assert len(features) == sum(model.schedule) == len(model.feature_info)
    torch.testing.assert_close(tokens, model.forward_features(IMAGES))
    torch.testing.assert_close(model.norm(features[-1]), tokens)


@every_model
@pytest.mark.parametrize("train", [False, True])
def test_fx_traces_what_the_model_computes(name: str, train: bool) -> None:
    model = build(name, num_classes=42).train(train)
    arguments = {"leaf_modules": get_notrace_modules(), "autowrap_functions": get_notrace_functions()}
    nodes = [names[-1] for names in get_graph_node_names(model, tracer_kwargs=arguments)]
    traced = create_feature_extractor(model, None, *([node] for node in nodes), tracer_kwargs=arguments).train(train)
    (outputs,) = traced(IMAGES).values()
    torch.testing.assert_close(outputs, model(IMAGES))
    outputs.mean().backward()
    assert not [n for n, p in traced.named_parameters() if p.grad is None]


def test_a_tracer_that_would_lose_tlegs_slopes_is_refused() -> None:
    with pytest.raises(ValueError, match="has to take LinearStage as a leaf"):
        torch.fx.symbolic_trace(build("tleg_vit"))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"indices": 2},
        {"indices": [0, 2, -1], "norm": True},
        {"indices": [1, 3], "stop_early": True, "intermediates_only": True},
        {"output_fmt": "NLC", "return_prefix_tokens": True},
        {"indices": [4], "output_dict": True, "return_prefix_tokens": True},
        {"output_dict": True, "intermediates_only": True},
    ],
)
@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize("name", ["sws_vit", "tleg_vit"])
def test_features_are_those_of_the_unrolled_model(name: str, class_token: bool, options: dict[str, Any]) -> None:
    model = build(name, class_token=class_token).eval()
    plain = unrolled(model)
    assert_same(model.forward_intermediates(IMAGES, **options), plain.forward_intermediates(IMAGES, **options))
    assert_same(model.get_intermediate_layers(IMAGES, 2), plain.get_intermediate_layers(IMAGES, 2))


@pytest.mark.parametrize("name", ["sws_vit", "tleg_vit"])
def test_pruned_models_keep_the_features(name: str) -> None:
    model, plain = build(name).eval(), unrolled(build(name)).eval()
    indices = [0, 2]
    expected = plain.forward_intermediates(IMAGES, indices, intermediates_only=True)
    assert model.prune_intermediate_layers(indices, prune_norm=True) == indices
    assert len(model.blocks) == (2 if name == "sws_vit" else 1)
    assert_same(model.forward_intermediates(IMAGES, indices, intermediates_only=True), expected)


def test_an_elastic_model_has_the_features_of_the_depth_that_it_runs_at() -> None:
    model = build("sws_vit").eval()
    model.set_repeats([1, 2, 1])
    other = create_model("sws_vit", **(geometry(model) | {"schedule": [1, 2, 1]})).eval()
    other.load_state_dict(model.state_dict())
    assert [info["module"] for info in model.feature_info] == ["blocks.0", "blocks.1", "blocks.1", "blocks.2"]
    assert_same(model.forward_intermediates(IMAGES), unrolled(other).forward_intermediates(IMAGES))


def test_features_are_compiled_and_recomputed_alike() -> None:
    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = build("sws_vit")

        def forward(self, images: Tensor) -> list[Tensor]:
            return self.model.forward_intermediates(images, [1, 4], intermediates_only=True)

    features = Features()
    expected = features(IMAGES)
    assert_same(torch.compile(features, backend="eager", fullgraph=True)(IMAGES), expected)
    features.model.set_grad_checkpointing(True)
    assert_same(features(IMAGES), expected)
