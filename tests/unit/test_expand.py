"""Expansion plans, and descendants that compute what they should."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from sws_dist.checkpoint.model_file import ModelInfo
from sws_dist.learngene.expand import expand_learngene, map_weights
from sws_dist.learngene.file import describe_model
from sws_dist.learngene.plan import expansion_plan, parse_plan
from sws_dist.models import create_model
from sws_dist.models.geometry import timm_arguments
from sws_dist.models.vit import PAPER_SCHEDULE

Learngene = tuple[ModelInfo, dict[str, Tensor], Any]


@pytest.fixture(params=[False, True], ids=["pooled", "class_token"])
def learngene(request: pytest.FixtureRequest) -> Learngene:
    """A small auxiliary model with its description and weights; every tensor is random, norms and biases too."""
    torch.manual_seed(2)
    model = create_model(
        "sws_vit", schedule=[2, 1, 3], img_size=32, patch_size=8, embed_dim=64, num_heads=2, num_classes=10,
        class_token=request.param,
    )  # fmt: skip
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    info = describe_model(
        model, "learngene", preprocessing={"image_size": 32, "mean": [0.5] * 3}, classes=list("abcdefghij")
    )
    return info, model.state_dict(), model.eval()


# ---- plans ----


def test_the_published_plan() -> None:
    assert expansion_plan(PAPER_SCHEDULE, 12) == (0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 4, 4)


def test_own_depth_gives_the_own_schedule() -> None:
    assert expansion_plan(PAPER_SCHEDULE, 16) == (0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 4, 4, 4)
    assert expansion_plan(PAPER_SCHEDULE, 16, "proportional") == expansion_plan(PAPER_SCHEDULE, 16)


@pytest.mark.parametrize("kind", ["even", "proportional"])
@pytest.mark.parametrize("schedule", [PAPER_SCHEDULE, (1, 5), (2, 2, 2), (4,)])
def test_every_depth_has_a_fair_plan(schedule: tuple[int, ...], kind: str) -> None:
    for depth in range(1, 3 * sum(schedule)):
        layers = expansion_plan(schedule, depth, kind)
        counts = Counter(layers)
        assert len(layers) == depth
        assert list(layers) == sorted(layers)
        share = [depth / len(schedule) if kind == "even" else depth * r / sum(schedule) for r in schedule]
        if depth != sum(schedule):
            assert all(abs(counts[stage] - exact) < 1 for stage, exact in enumerate(share)), (depth, counts)


@pytest.mark.parametrize(
    ("depth", "kind", "said"),
    [
        (0, "even", "depth 0: a descendant has a whole number of layers"),
        (4, "odd", "expected even, proportional"),
        (3, (0, 1), "has 2 layers, but the depth is 3"),
        (3, (0, 1, 5), "layer 2 takes stage 5; stages are 0 to 4"),
        (3, (0, -1, 2), "layer 1 takes stage -1"),
        (3, (0, 2, 1), "must not decrease"),
    ],
)
def test_bad_plans(depth: int, kind: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        expansion_plan(PAPER_SCHEDULE, depth, kind)


def test_plans_from_the_command_line() -> None:
    assert parse_plan("even") == "even"
    assert parse_plan("spaced") == "spaced"
    assert parse_plan("0,0,1") == (0, 0, 1)
    with pytest.raises(ValueError, match="expected even, proportional, spaced, or stage numbers"):
        parse_plan("0;1")


# ---- descendants ----


def test_own_schedule_gives_the_auxiliarys_logits_in_plain_timm(learngene: Learngene) -> None:
    info, weights, auxiliary = learngene
    described, descendant = expand_learngene(info, weights, expansion_plan((2, 1, 3), 6))
    name, arguments = timm_arguments(described.kwargs | {"num_classes": described.num_classes})
    plain = timm.create_model(name, **arguments).eval()
    plain.load_state_dict(descendant, strict=True)
    images = torch.randn(8, 3, 32, 32)
    torch.testing.assert_close(plain(images), auxiliary(images), rtol=0, atol=1e-5)
    ours = described.build().eval()
    ours.load_state_dict(descendant, strict=True)
    assert torch.equal(ours(images), plain(images))


@pytest.mark.parametrize("depth", [3, 4, 7, 11])
def test_each_layer_is_a_copy_of_its_stage_and_its_own(learngene: Learngene, depth: int) -> None:
    info, weights, _ = learngene
    layers = expansion_plan((2, 1, 3), depth)
    described, descendant = expand_learngene(info, weights, layers)
    for layer, stage in enumerate(layers):
        for part in ("attn.qkv.weight", "mlp.fc2.bias", "norm1.weight"):
            assert torch.equal(descendant[f"blocks.{layer}.{part}"], weights[f"blocks.{stage}.{part}"])
    storage = [t.data_ptr() for name, t in descendant.items() if name.startswith("blocks.")]
    assert len(storage) == len(set(storage)), "two layers still share their memory"
    assert described.provenance["plan"] == list(layers)
    assert described.classes == info.classes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_learngene_is_expanded_in_fp32(learngene: Learngene, dtype: torch.dtype) -> None:
    info, weights, _ = learngene
    half = {name: tensor.to(dtype) for name, tensor in weights.items()}
    options: dict[str, Any] = {"num_classes": 7, "image_size": 48, "branch_scaling": 1.0}
    found, expected = (
        expand_learngene(info, each, expansion_plan((2, 1, 3), 9), **options)[1]
        for each in (half, {name: tensor.float() for name, tensor in half.items()})
    )
    for name, tensor in expected.items():
        assert found[name].dtype is torch.float32
        assert torch.equal(found[name], tensor), name


def test_a_depth_below_the_stages_warns(learngene: Learngene, caplog: pytest.LogCaptureFixture) -> None:
    info, weights, _ = learngene
    expand_learngene(info, weights, expansion_plan((2, 1, 3), 2))
    assert "depth of 2 drops stages [2]" in caplog.text


def test_other_labels_get_a_fresh_head(learngene: Learngene) -> None:
    info, weights, _ = learngene
    described, one = expand_learngene(info, weights, expansion_plan((2, 1, 3), 4), num_classes=7, seed=1)
    state = torch.get_rng_state()
    _, again = expand_learngene(info, weights, expansion_plan((2, 1, 3), 4), num_classes=7, seed=1)
    _, other = expand_learngene(info, weights, expansion_plan((2, 1, 3), 4), num_classes=7, seed=2)
    assert torch.equal(state, torch.get_rng_state()), "expanding disturbs the caller's random state"
    assert one["head.weight"].shape == (7, 64)
    assert torch.equal(one["head.weight"], again["head.weight"])
    assert not torch.equal(one["head.weight"], other["head.weight"])
    assert described.provenance["fresh_head"]
    assert described.classes == []


def test_the_head_is_fresh_where_the_same_number_of_labels_is_called_otherwise(learngene: Learngene) -> None:
    info, weights, _ = learngene
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    model = create_model("sws_vit", **(info.kwargs | {"schedule": [1] * 4}), num_classes=10)

    def fresh(info: ModelInfo, classes: str) -> tuple[str, ...]:
        return map_weights(info, shapes, model, [0, 1, 1, 2], tuple(classes)).fresh

    assert fresh(info, "abcdefghij") == ()
    assert fresh(info, "jabcdefghi") == fresh(info, "0123456789") == ("head.weight", "head.bias")
    assert fresh(replace(info, classes=[]), "jabcdefghi") == (), "its names are unknown"


def test_another_image_size_resamples_the_position_embedding_as_timm_does(learngene: Learngene) -> None:
    info, weights, _ = learngene
    layers = expansion_plan((2, 1, 3), 6)
    described, larger = expand_learngene(info, weights, layers, image_size=64)
    _, same = expand_learngene(info, weights, layers)
    assert described.preprocessing["image_size"] == 64
    name, arguments = timm_arguments(described.kwargs | {"num_classes": 10})
    theirs = timm.create_model(name, **arguments)
    loaded = timm.models.vision_transformer.checkpoint_filter_fn(dict(same), theirs)
    torch.testing.assert_close(larger["pos_embed"], loaded["pos_embed"])
    theirs.load_state_dict(larger, strict=True)
    assert theirs(torch.zeros(1, 3, 64, 64)).shape == (1, 10)
