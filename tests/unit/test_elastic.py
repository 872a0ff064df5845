"""The depth of each step, and what an auxiliary model computes at another depth than its own."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

import sws_dist
from sws_dist.build_models import build_models, build_student
from sws_dist.checkpoint.model_file import save_model_file
from sws_dist.config.loader import load_config
from sws_dist.config.schema import ElasticConfig
from sws_dist.learngene.elastic import ElasticDepth, stage_repeats
from sws_dist.learngene.expand import expand_learngene, untrained_depth
from sws_dist.learngene.file import Learngene, describe_model
from sws_dist.learngene.plan import expansion_plan
from sws_dist.models import SWSVisionTransformer

SCHEDULE = (1, 3, 2)


def elastic(low: int = 3, high: int = 8, seed: int = 0, **config: Any) -> ElasticDepth:
    return ElasticDepth(ElasticConfig(min_depth=low, max_depth=high, **config), SCHEDULE, seed, steps_per_epoch=10.5)


def test_a_draw_is_a_function_of_seed_and_step() -> None:
    draws = [elastic().draw(step) for step in range(50)]
    assert draws == [elastic().draw(step) for step in range(50)]
    assert draws != [elastic(seed=1).draw(step) for step in range(50)]


def test_every_depth_is_drawn_equally_often() -> None:
    counts = elastic().count_steps(6000)
    assert sorted(counts) == [3, 4, 5, 6, 7, 8]
    assert counts.total() == 6000
    # Five standard deviations of a binomial with p = 1/6 are 144.
    assert all(abs(count - 1000) < 144 for count in counts.values())


def test_sandwich() -> None:
    draws = [elastic(rule="sandwich").draw(step) for step in range(3000)]
    assert set(draws[0::3]) == {3}
    assert set(draws[1::3]) == {8}
    assert set(draws[2::3]) == {3, 4, 5, 6, 7, 8}


def test_the_own_depth_alone_at_first() -> None:
    draws = [elastic(start_epoch=2).draw(step) for step in range(200)]
    assert set(draws[:21]) == {6}
    assert draws[21:] == [elastic().draw(step) for step in range(21, 200)]
    with pytest.raises(ValueError, match="the model has 6 layers of its own, which lies outside min_depth 3 to max_d"):
        elastic(high=5, start_epoch=2)
    with pytest.raises(ValueError, match=r"start_epoch 9: no depth would be drawn in train\.epochs 8"):
        load_config("quickstart/auxiliary", ["model.elastic.start_epoch=9", "train.epochs=8"])


def test_a_stage_without_a_layer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at depth 2 the even plan gives the 3 stages \[1, 1, 0\] layers"):
        elastic(low=2)
    config = ElasticConfig(min_depth=3, max_depth=9, plan="proportional")
    with pytest.raises(ValueError, match=r"at depth 3 the proportional plan gives the 3 stages \[0, 2, 1\] layers"):
        ElasticDepth(config, (1, 6, 2), 0, steps_per_epoch=10)
    with pytest.raises(ValidationError, match="min_depth 9 is above max_depth 8"):
        elastic(low=9)


@pytest.mark.parametrize("kind", ["even", "proportional"])
@pytest.mark.parametrize("depth", [4, 6, 9])
@pytest.mark.parametrize("branch_scaling", [0.0, 1.0])
def test_at_any_depth_the_auxiliary_model_is_the_descendant(kind: str, depth: int, branch_scaling: float) -> None:
    torch.manual_seed(0)
    geometry = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_heads": 2, "num_classes": 10}
    auxiliary = SWSVisionTransformer(schedule=SCHEDULE, branch_scaling=branch_scaling, **geometry).eval()
    info = describe_model(auxiliary, "learngene")
    plan = expansion_plan(SCHEDULE, depth, kind)
    described, weights = expand_learngene(info, auxiliary.state_dict(), plan)
    descendant = described.build().eval()
    descendant.load_state_dict(weights)
    images = torch.randn(2, 3, 32, 32)
    auxiliary.set_repeats(stage_repeats(SCHEDULE, depth, kind))
    if branch_scaling:  # multiplied into the weights, not with what they give
        torch.testing.assert_close(auxiliary(images), descendant(images))
    else:
        assert torch.equal(auxiliary(images), descendant(images))
    auxiliary.set_repeats(SCHEDULE)
    assert sum(len(stage.drop_rates) for stage in auxiliary.blocks) == 6


def test_branches_are_scaled_by_the_number_of_repeats() -> None:
    """A stage of 1 layer that runs twice, one of 3 that runs 3 times, one of 2 that runs once."""
    geometry = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_heads": 2, "num_classes": 10}
    model = SWSVisionTransformer(schedule=SCHEDULE, branch_scaling=1.0, **geometry)
    model.set_repeats((2, 3, 1))
    assert [stage.branch_scale for stage in model.blocks] == [0.5, 1.0, 2.0]
    described, weights = expand_learngene(describe_model(model, "learngene"), model.state_dict(), (0, 0, 1, 1, 1, 2))
    assert described.kwargs["branch_scaling"] == 0
    for layer, (stage, scale) in enumerate([(0, 0.5), (0, 0.5), (1, 1.0), (1, 1.0), (1, 1.0), (2, 2.0)]):
        for name, tensor in model.blocks[stage].state_dict().items():
            is_output = name.startswith(("attn.proj", "mlp.fc2"))
            assert torch.equal(weights[f"blocks.{layer}.{name}"], tensor * (scale if is_output else 1))
    model.set_repeats((1, 1, 4))
    plain = SWSVisionTransformer(schedule=SCHEDULE, **geometry)
    plain.load_state_dict(model.state_dict())
    learngene = Learngene(describe_model(plain, "learngene"), plain.state_dict())
    given = sws_dist.expand(learngene, 6, plan=(0, 1, 2, 2, 2, 2), branch_scaling=1.0)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(given.eval()(images), model.eval()(images))
    scaled = model(images)
    for block in model.blocks:
        block.branch_scale = 1.0
    assert not torch.allclose(model(images), scaled, rtol=1e-2), "the scales are of no effect here"


def test_drop_path_grows_along_the_drawn_depth() -> None:
    model = SWSVisionTransformer(schedule=SCHEDULE, drop_path_rate=0.3, img_size=32, embed_dim=32, num_heads=2)
    model.set_repeats((2, 1, 1))
    assert [len(stage.drop_rates) for stage in model.blocks] == [2, 1, 1]
    assert [rate for stage in model.blocks for rate in stage.drop_rates] == pytest.approx([0, 0.1, 0.2, 0.3])
    for wrong in ((1, 2), (0, 0, 0), (1, -1, 2)):
        with pytest.raises(ValueError, match=re.escape(f"repeats {list(wrong)}")):
            model.set_repeats(wrong)


def test_a_depth_that_was_not_trained_is_said() -> None:
    model = SWSVisionTransformer(schedule=SCHEDULE, img_size=32, embed_dim=32, num_heads=2)
    info = describe_model(model, "learngene", trained_depths=[3, 8])
    assert [untrained_depth(info, depth) is None for depth in (2, 3, 8, 9)] == [False, True, True, False]
    assert "trained at 3 to 8 layers" in str(untrained_depth(info, 9))
    assert "trained at 6 layers alone" in str(
        untrained_depth(describe_model(model, "learngene", trained_depths=[6, 6]), 8)
    )
    assert untrained_depth(describe_model(model, "learngene"), 8) is None
    assert "9 needs fine-tuning before it is used" in str(untrained_depth(info, 9))
    scaled = replace(info, kwargs=info.kwargs | {"branch_scaling": 1.0})
    assert "9 has branches scaled for that depth; its score shows" in str(untrained_depth(scaled, 9))


def test_counts_are_of_the_steps_taken() -> None:
    draws = Counter(elastic().draw(step) for step in range(100))
    assert elastic().count_steps(100) == draws


def test_branch_scaling_has_one_place(tmp_path: Path) -> None:
    """And weights of a model that was trained at many depths go on with the scaling that they were trained with."""
    config = load_config("quickstart/auxiliary", ["model.kwargs.branch_scaling=1"])
    with pytest.raises(ValueError, match=r"with model\.elastic it is model\.elastic\.branch_scaling"):
        build_student(config, 10)
    config = load_config("quickstart/auxiliary")
    model = build_student(config, 10)
    info = describe_model(model, "learngene", trained_depths=[5, 15])
    file = save_model_file(tmp_path / "gene.safetensors", info, model.state_dict())
    others = [f"model.initial_checkpoint={file}", "distill.teacher=null", "train.eval_depths=[5]"]
    build_models(
        load_config("quickstart/auxiliary", others), list("0123456789"), torch.device("cpu"), torch.float32, {}, 100
    )
    without = load_config("quickstart/auxiliary", [*others, "model.elastic=null"])
    with pytest.raises(ValueError, match=r"branch_scaling: 1\.0 in the file, 0\.0 in the config"):
        build_models(without, list("0123456789"), torch.device("cpu"), torch.float32, {}, 100)


@pytest.mark.parametrize(("plan", "warned"), [("even", True), ("proportional", False)])
def test_another_plan_than_the_trained_one_is_said(plan: str, warned: bool, caplog: pytest.LogCaptureFixture) -> None:
    """A learngene keeps the plan that it was trained with: descendants of another one were never trained."""
    changes = ["data.root=unused", "distill.teacher=null", "model.schedule=[1, 3, 2]", "train.eval_depths=[]"]
    changes.append("model.elastic={min_depth: 6, max_depth: 9, plan: proportional}")
    config = load_config("quickstart/auxiliary", changes)
    parts = build_models(config, [str(i) for i in range(10)], torch.device("cpu"), torch.float32, {}, 100)
    learngene = Learngene(parts.info, parts.student.state_dict())
    with caplog.at_level("WARNING", "sws_dist"):
        sws_dist.expand(learngene, 8, plan=plan)
    assert ("was trained with the proportional plan, which has other layers at a depth of 8" in caplog.text) is warned
