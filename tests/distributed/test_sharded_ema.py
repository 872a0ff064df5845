"""Test the moving average of sharded weights against the same average of whole weights in one place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sws_dist.config.schema import OptimConfig
from sws_dist.distributed.collectives import gather_on_rank0
from sws_dist.distributed.init import init_distributed
from sws_dist.models import create_model
from sws_dist.seed import seed_everything
from sws_dist.zero.config import precision_of, set_zero3_memory_defaults
from sws_dist.zero.ema import ShardedEMA
from sws_dist.zero.engine import build_engine, connect_deepspeed, sync_model_from_masters
from sws_dist.zero.partition import fragments, master_weights
from tests import ranks

GEOMETRY = {"img_size": 16, "patch_size": 8, "embed_dim": 20, "num_heads": 2, "num_classes": 5}
DECAY = 0.2
LAYOUTS = [(stage, precision) for stage in (0, 1, 2, 3) for precision in ("fp32", "bf16")]


def build(stage: int, precision: str) -> Any:
    world = init_distributed(120)
    connect_deepspeed()
    seed_everything(0)
    model = create_model("sws_vit", schedule=(2, 1), **GEOMETRY)
    ds: dict[str, Any] = {
        "train_batch_size": 2 * world.size,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    if precision == "bf16":
        ds["bf16"] = {"enabled": True}
    if stage == 3:
        set_zero3_memory_defaults(ds["zero_optimization"], sum(p.numel() for p in model.blocks[0].parameters()))
    return build_engine(model, ds, OptimConfig())


def train_step(built: Any, step: int) -> None:
    seed_everything(step, built.global_rank)
    dtype = torch.bfloat16 if precision_of(built.config) == "bf16" else torch.float32
    for group in built.optimizer.param_groups:
        group["lr"] = 1e-2
    built.backward(built(torch.randn(2, 3, 16, 16).to(dtype)).square().mean())
    built.step()


def own_weights(built: Any) -> list[Tensor]:
    """Copy this rank's pieces of the masters, without the padding between them, which is not initialised."""
    masters = master_weights(built)
    return [piece.of(masters).clone() for piece in fragments(built)]


def whole(built: Any, flats: list[Tensor]) -> dict[str, Tensor]:
    """Put every rank's pieces of ``flats`` together, on rank 0."""
    own = [(piece.name, piece.start, piece.of(flats).clone()) for piece in fragments(built)]
    shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in built.module.named_parameters()}
    found = {name: torch.full((shape.numel(),), torch.nan) for name, shape in shapes.items()}
    for pieces in gather_on_rank0(own) or []:
        for name, start, values in pieces:
            found[name][start : start + len(values)] = values
    return {name: flat.reshape(shapes[name]) for name, flat in found.items()}


def logits(built: Any) -> Tensor:
    dtype = torch.bfloat16 if precision_of(built.config) == "bf16" else torch.float32
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    built.eval()
    with torch.no_grad():
        out = built(images)
    built.train()
    return out.clone()


def average_three_steps(stage: int, precision: str) -> dict[str, Any]:
    built = build(stage, precision)
    ema = ShardedEMA(built, DECAY)
    found: dict[str, Any] = {"start": whole(built, master_weights(built)), "steps": []}
    for step in range(3):
        train_step(built, step)
        ema.update(step)
        found["steps"].append(whole(built, master_weights(built)))
    found["average"] = whole(built, ema.average)
    before, found["before"] = own_weights(built), logits(built)
    with ema.applied():
        found["applied"] = logits(built)
        found["masters inside"] = whole(built, master_weights(built))
    found["after"] = logits(built)
    found["restored"] = all(map(torch.equal, own_weights(built), before))
    found["average after"] = whole(built, ema.average)
    train_step(built, 3)  # and training goes on
    return found


def plain_logits(weights: dict[str, Tensor], precision: str) -> Tensor:
    model = create_model("sws_vit", schedule=(2, 1), **GEOMETRY).eval()
    model.load_state_dict(weights)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        return model.to(dtype)(images)


@pytest.mark.parametrize(("stage", "precision"), LAYOUTS)
def test_it_is_the_average_of_the_whole_weights(stage: int, precision: str) -> None:
    found = ranks.run(average_three_steps, stage, precision, world=3)
    main = found[0]
    expected = main["start"]
    for weights, decay in zip(main["steps"], (1 / 10, 2 / 11, DECAY), strict=True):
        expected = {name: torch.lerp(expected[name], weights[name], 1 - decay) for name in weights}
    for name, tensor in expected.items():
        torch.testing.assert_close(main["average"][name], tensor, rtol=0, atol=1e-6)
        assert torch.equal(main["masters inside"][name], main["average"][name])
        assert torch.equal(main["average after"][name], main["average"][name])
    assert any(not torch.equal(main["average"][name], main["steps"][-1][name]) for name in expected)
    # Close, not equal: a CPU's bf16 products may depend on where in memory the weights lie.
    tolerance = {"rtol": 0.016, "atol": 1e-3} if precision == "bf16" else {}
    torch.testing.assert_close(main["applied"], plain_logits(main["average"], precision), **tolerance)
    for each in found:
        torch.testing.assert_close(each["applied"], main["applied"])
        with pytest.raises(AssertionError, match="not close"):  # or the lines above would show nothing
            torch.testing.assert_close(each["applied"], each["before"])
        torch.testing.assert_close(each["after"], each["before"])
        assert each["restored"]


class Interrupted(Exception):
    pass


def fail_inside(stage: int, precision: str) -> tuple[bool, Tensor, Tensor]:
    """Fail while the model holds the average; return whether the masters are as before, and the model's outputs."""
    built = build(stage, precision)
    ema = ShardedEMA(built, DECAY)
    train_step(built, 0)
    before, output = own_weights(built), logits(built)
    with pytest.raises(Interrupted), ema.applied():
        raise Interrupted
    if stage > 0:  # the masters are back; the ranks, all of them there, may bring the model in line
        sync_model_from_masters(built)
    return all(map(torch.equal, own_weights(built), before)), output, logits(built)


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (2, "bf16"), (3, "fp32")])
def test_an_error_inside_puts_the_trained_weights_back(stage: int, precision: str) -> None:
    for restored, before, after in ranks.run(fail_inside, stage, precision):
        assert restored
        torch.testing.assert_close(after, before)
