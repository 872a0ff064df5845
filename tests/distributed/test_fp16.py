"""fp16 at every stage, on the CPU: torch computes it there, and only DeepSpeed and our own check refuse it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator

from sws_dist import prepare
from sws_dist.config.schema import OptimConfig
from sws_dist.distributed.init import init_distributed
from sws_dist.errors import RunError
from sws_dist.models import create_model
from sws_dist.trainer import Trainer
from sws_dist.zero.engine import backward, build_engine, connect_deepspeed, take_step
from sws_dist.zero.loss_scale import current_scale, load_loss_scaler_state, loss_scaler_state
from sws_dist.zero.partition import optimizer_moments
from sws_dist.zero.protocol import ZeroEngine
from tests import ranks, runs
from tests.launching import Job

RUN = """
output: unused
model: {name: sws_vit, schedule: [2, 1], kwargs: {patch_size: 16, embed_dim: 32, num_heads: 2}}
data: {root: ROOT, image_size: 32, crop_pct: 1.0, num_threads: 1}
optim: {lr: 1e-3, lr_batch: null}
train: {epochs: 2, global_batch: 16, log_every: 1, skip_nonfinite: 2}
"""
STAGES = (0, 1, 2, 3)


def allow_fp16() -> None:
    """Let this rank use fp16 on the CPU."""
    get_accelerator().is_fp16_supported = lambda: True
    prepare.check_against_deepspeed = lambda *_: None


def fp16_engine(stage: int, **fp16: Any) -> ZeroEngine:
    ds: dict[str, Any] = {"train_micro_batch_size_per_gpu": 2, "zero_allow_untested_optimizer": True}
    ds |= {"zero_optimization": {"stage": stage}, "fp16": {"enabled": True} | fp16}
    torch.manual_seed(0)
    model = create_model("sws_vit", schedule=[2, 1], img_size=32, patch_size=16, embed_dim=32, num_heads=2)
    return build_engine(model, ds, OptimConfig())


def join() -> None:
    allow_fp16()
    init_distributed(60)
    connect_deepspeed()


# ---- the scale ----


def first_steps(powers: list[int]) -> list[tuple[float, float]]:
    """Return the gradient's norm, and the first moments', of a step at each stage and initial scale."""
    join()
    found = []
    for stage in STAGES:
        for power in powers:
            engine = fp16_engine(stage, initial_scale_power=power)
            backward(engine, engine(torch.ones(2, 3, 32, 32).half()).float().square().mean())
            result = take_step(engine)
            assert result is not None
            assert result.applied
            moments = torch.stack([moment.norm() for moment in optimizer_moments(engine)["exp_avg"].values()])
            found.append((float(result.grad_norm or 0), float(moments.norm())))
    return found


def test_the_gradient_does_not_depend_on_the_scale() -> None:
    """DeepSpeed 0.19.8 leaves the loss unscaled at stage 0, and divides the gradient nevertheless."""
    (found,) = ranks.run(first_steps, [0, 10], world=1)
    for norm, moment in found:
        assert norm == pytest.approx(found[0][0], rel=1e-2)
        assert moment == pytest.approx(found[0][1], rel=1e-2)


def restored_scales(stage: int) -> dict[str, float]:
    """Return the scale after a restore, for what the checkpoint held and what the config says."""
    join()
    dynamic = fp16_engine(stage, initial_scale_power=10)
    static = fp16_engine(stage, loss_scale=128)
    states = {"dynamic": loss_scaler_state(dynamic) | {"cur_scale": 4096.0}, "static": loss_scaler_state(static)}
    states["old static"] = {"cur_scale": 64.0}  # as checkpoints held it before
    found = {}
    for name, state in states.items():
        for now, fp16 in (("dynamic", {"initial_scale_power": 10}), ("static", {"loss_scale": 128})):
            engine = fp16_engine(stage, **fp16)
            load_loss_scaler_state(engine, state)
            found[f"{name}, now {now}"] = current_scale(engine)
    return found


@pytest.mark.parametrize("stage", [0, 2])
def test_a_scale_is_restored_where_it_is_dynamic_and_was(stage: int) -> None:
    (found,) = ranks.run(restored_scales, stage, world=1)
    assert found == {
        "dynamic, now dynamic": 4096,
        "dynamic, now static": 128,
        "static, now dynamic": 1024,
        "static, now static": 128,
        "old static, now dynamic": 1024,
        "old static, now static": 128,
    }


# ---- steps that overflow ----


def overflow(trainer: Trainer, steps: list[int], nan: list[int]) -> None:
    """Let the gradient of some steps overflow on rank 1 while the loss is finite, and the loss of others be NaN."""
    bias = dict(trainer.parts.engine.module.named_parameters())["head.bias"]

    def worsen(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * float("inf") if trainer.parts.world.rank == 1 and trainer.step + 1 in steps else gradient

    bias.register_hook(worsen)
    compute = trainer._compute_losses

    def compute_losses(*arguments: Any, **named: Any) -> Any:
        losses = compute(*arguments, **named)
        return losses._replace(total=losses.total * float("nan")) if trainer.step + 1 in nan else losses

    trainer._compute_losses = compute_losses  # type: ignore[method-assign]


def train(jobs: list[tuple[Job, list[int], list[int]]]) -> list[str]:
    """Return the errors that the jobs end with."""
    allow_fp16()
    said = []
    for job, steps, nan in jobs:
        trainer = runs.trainer(job)
        overflow(trainer, steps, nan)
        with pytest.raises(RunError) as caught:
            trainer.run()
        said.append(str(caught.value))
    return said


def test_overflows_are_expected_only_while_the_scale_falls(tmp_path: Path, few_digits: Path) -> None:
    """From 4 the scale falls to 1 in two steps. What comes then counts, and so does all with a static scale."""
    (tmp_path / "run.yaml").write_text(RUN.replace("ROOT", str(few_digits)))
    falls = {"enabled": True, "initial_scale_power": 2, "hysteresis": 1, "loss_scale_window": 100}
    static = {"enabled": True, "loss_scale": 4}
    kinds: list[tuple[str, dict[str, Any], list[int], list[int], int]] = [
        ("falls", falls, [2, 3, 4, 5, 6], [], 6),
        ("static", static, [2, 3, 4], [], 4),
        # An overflow between losses that are NaN is not counted, and does not begin the count anew.
        ("between", falls | {"initial_scale_power": 4}, [4], [2, 3, 5], 5),
    ]
    jobs = []
    for stage in (0, 2, 3):
        for name, fp16, steps, nan, _ in kinds:
            ds = {"zero_optimization": {"stage": stage}, "fp16": fp16}
            jobs.append((Job(tmp_path / "run.yaml", tmp_path / f"{name}{stage}", ds), steps, nan))
            jobs[-1][0].ds_file()
    for said in ranks.run(train, jobs):
        for (job, _, nan), message in zip(jobs, said, strict=True):
            last = next(last for name, *_, last in kinds if job.output.name.startswith(name))
            what = "the loss is nan" if nan else "the gradient is not finite"
            assert message.startswith(f"{what} at step {last}"), (job.output.name, message)
            assert "after 2 skipped steps (train.skip_nonfinite)" in message
    for stage in (0, 2, 3):
        written = sorted((tmp_path / f"falls{stage}").glob("nonfinite-step-*.json"))
        assert [int(file.stem[-8:]) for file in written] == [4, 5, 6]
