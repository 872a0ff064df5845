"""Muon under every ZeRO stage, against a plain PyTorch loop with ``torch.optim.Muon`` and ``torch.optim.AdamW``.

The iteration multiplies the rounding to bf16 of directions that hardly occur by hundreds, so matrices agree
within some percent of the way that they have moved, and no better.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sws_dist.checkpoint.checkpoint import read_state
from sws_dist.checkpoint.shards import ShardReader
from sws_dist.config.schema import OptimConfig
from sws_dist.distributed.init import init_distributed
from sws_dist.models import create_model
from sws_dist.optim import hidden_matrices
from sws_dist.zero import muon
from sws_dist.zero.engine import backward, build_engine, connect_deepspeed, take_step
from sws_dist.zero.norms import NormMeter
from sws_dist.zero.partition import fragments, master_weights
from tests import ranks, runs
from tests.distributed.reshard_worker import reshard
from tests.launching import Job, losses

STEPS, BATCH, CLIPPING, LR = 4, 8, 0.5, 0.02
NON_FINITE = 99
"""A step whose gradients are NaN; it is to leave no trace."""
OPTIM = OptimConfig(name="muon", weight_decay=0.1, momentum=0.9)
STAGES = (0, 1, 2, 3)
NUM_HEADS = 2


def build_model() -> Any:
    """Two stages of unequal use, with wide, tall and square matrices, and norms and biases that are trained."""
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "num_heads": NUM_HEADS, "num_classes": 5}
    return create_model("sws_vit", schedule=[2, 1], class_token=True, **sizes)


def batch_of(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(BATCH, 3, 16, 16, generator=generator) * (torch.nan if step == NON_FINITE else 1)
    return images, torch.randint(5, (BATCH,), generator=generator)


def train_plainly(split_heads: bool = True) -> dict[str, Tensor]:
    """Train without DeepSpeed. Each head's rows of a qkv weight are a parameter of their own, in the same memory."""
    model = build_model()
    matrices, muons, adams = hidden_matrices(model), [], []
    for name, p in model.named_parameters():
        if name in matrices:
            muons += [
                (nn.Parameter(rows), p, i) for i, rows in enumerate(p.data.chunk(matrices[name] if split_heads else 1))
            ]
        else:
            is_decayed = name in ("patch_embed.proj.weight", "head.weight")
            adams.append({"params": [p], "weight_decay": 0.1 if is_decayed else 0.0})
    first = torch.optim.Muon([rows for rows, _, _ in muons], LR, 0.1, 0.9, adjust_lr_fn="match_rms_adamw")
    second = torch.optim.AdamW(adams, LR)
    for step in range(STEPS):
        images, labels = batch_of(step)
        nn.functional.cross_entropy(model(images), labels).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIPPING)
        for rows, p, i in muons:
            rows.grad = p.grad.chunk(p.shape[0] // rows.shape[0])[i]
        with patch.object(Tensor, "bfloat16", lambda values: values.to(torch.bfloat16).float()):
            first.step()  # on CPUs our iteration rounds to bf16, and runs in fp32
        second.step()
        model.zero_grad()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def train_sharded(runs: list[tuple[int, str]]) -> list[dict[str, Any]]:
    """Train at each (ZeRO stage, precision). Returns this rank's pieces of the weights, and what it orthogonalised."""
    init_distributed(60)
    connect_deepspeed()
    return [_train(stage, precision) for stage, precision in runs]


def _train(stage: int, precision: str) -> dict[str, Any]:
    world = torch.distributed.get_world_size()
    accumulation = 2 // world
    ds = {
        "train_batch_size": BATCH,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": CLIPPING,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 2000},
        "bf16": {"enabled": precision == "bf16"},
    }
    engine = build_engine(build_model(), ds, OPTIM)
    counts, original = [], muon.orthogonalize
    muon.orthogonalize = lambda matrices: counts.append(len(matrices)) or original(matrices)
    torch.optim.AdamW([nn.Parameter(torch.zeros(1))])  # from now on torch calls hooks in AdamW's step and in Muon's
    meter = NormMeter(engine)
    norms = []
    for step in (0, NON_FINITE, *range(1, STEPS)):
        images, labels = (part.chunk(2) for part in batch_of(step))
        for group in engine.optimizer.param_groups:
            group["lr"] = LR
        for micro in range(accumulation):
            own = micro * world + torch.distributed.get_rank()
            backward(engine, nn.functional.cross_entropy(engine(images[own].to(_dtype(engine))).float(), labels[own]))
            meter.arm()
            result = take_step(engine)
        assert result is not None
        assert result.applied == (step != NON_FINITE)
        if result.applied:
            norms.append(float(result.grad_norm or 0))
            parts = meter.gradient_norms(norms[-1])
            assert sum(norm**2 for norm in parts.values()) ** 0.5 == pytest.approx(norms[-1], rel=1e-2)
    muon.orthogonalize = original
    masters = master_weights(engine)
    pieces = [(p.name, p.start, p.of(masters).clone()) for p in fragments(engine)]
    return {"pieces": pieces, "counts": counts, "norms": norms}


def _dtype(engine: Any) -> torch.dtype:
    return next(engine.module.parameters()).dtype


def whole_weights(found: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Put the ranks' pieces together."""
    shapes = {name: p.shape for name, p in build_model().named_parameters()}
    whole = {name: torch.full((shape.numel(),), torch.nan) for name, shape in shapes.items()}
    for each in found:
        for name, start, values in each["pieces"]:
            whole[name][start : start + len(values)] = values
    return {name: values.view(shapes[name]) for name, values in whole.items()}


RUNS = [(stage, precision) for stage in STAGES for precision in ("fp32", "bf16")]


@pytest.fixture(scope="module")
def trained() -> dict[tuple[int, int, str], list[dict[str, Any]]]:
    """World size, stage and precision -> what each rank returns."""
    found = {world: ranks.run(train_sharded, RUNS, world=world) for world in (1, 2)}
    return {(world, *run): [own[i] for own in found[world]] for world in found for i, run in enumerate(RUNS)}


@pytest.fixture(scope="module")
def plain() -> dict[str, Tensor]:
    return train_plainly()


def distance(found: dict[str, Tensor], expected: dict[str, Tensor], name: str) -> float:
    """Return how far a weight is off, as a share of the way that it has moved."""
    start = dict(build_model().named_parameters())[name]
    return ((found[name] - expected[name]).norm() / (expected[name] - start.detach()).norm()).item()


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("world", [1, 2])
def test_weights_equal_plain_pytorch(trained: Any, plain: dict[str, Tensor], world: int, stage: int) -> None:
    found, matrices = whole_weights(trained[world, stage, "fp32"]), hidden_matrices(build_model())
    far = {name: d for name in plain if (d := distance(found, plain, name)) > (0.1 if name in matrices else 2e-3)}
    assert not far


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_follows_fp32(trained: Any, stage: int) -> None:
    found, expected = (whole_weights(trained[2, stage, precision]) for precision in ("bf16", "fp32"))
    assert max(distance(found, expected, name) for name in hidden_matrices(build_model())) < 0.5


def test_the_comparison_can_fail(plain: dict[str, Tensor]) -> None:
    """Negative control: the iteration over all heads at once is far outside the tolerance."""
    assert distance(train_plainly(split_heads=False), plain, "blocks.0.attn.qkv.weight") > 0.3


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_every_matrix_is_orthogonalised_once_a_step(trained: Any, stage: int, precision: str) -> None:
    """On one rank each; on two, below stage 3, only those that are cut in two are on both. Accumulation adds none."""
    blocks = sorted(hidden_matrices(build_model()).values())
    alone = trained[1, stage, precision][0]["counts"]
    assert sorted(alone) == sorted(blocks * STEPS)
    both = [len(own["counts"]) for own in trained[2, stage, precision]]
    if stage in (0, 3):
        assert both == [len(alone)] * 2
    else:
        assert len(alone) <= sum(both) <= len(alone) + STEPS


@pytest.mark.parametrize("stage", STAGES)
def test_the_norm_is_that_of_the_gradient(trained: Any, stage: int) -> None:
    model = build_model()
    images, labels = batch_of(0)
    nn.functional.cross_entropy(model(images), labels).backward()
    expected = float(nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
    assert expected > CLIPPING
    assert trained[2, stage, "fp32"][0]["norms"][0] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 8, 32), (2, 40, 12)])
def test_orthogonalising_gives_what_torch_gives(shape: tuple[int, ...]) -> None:
    from torch.optim._muon import _zeropower_via_newtonschulz

    torch.manual_seed(0)
    matrices = torch.randn(shape)
    for found, matrix in zip(muon.orthogonalize(matrices), matrices, strict=True):
        expected = _zeropower_via_newtonschulz(matrix, muon.COEFFICIENTS, muon.ITERATIONS, 1e-7)
        torch.testing.assert_close(found, expected.float(), rtol=0, atol=0.03)
        values = torch.linalg.svdvals(found)
        assert values.min() > 0.3
        assert values.max() < 1.3


RUN = """
output: unused
model: {name: sws_vit, schedule: [2, 1], kwargs: {patch_size: 8, embed_dim: 36, num_heads: 2}}
data: {root: ROOT, image_size: 32, crop_pct: 1.0, num_threads: 1}
optim: {name: muon, lr: 3e-3, lr_batch: null, ema_decay: 0.9, schedule: wsd, decay_epochs: 1}
train: {epochs: 2, global_batch: 16, log_every: 1}
checkpoint: {keep_last: 1, keep_best: false}
"""
STABLE = "step-00000005"  # of five steps an epoch


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory, few_digits: Path) -> Job:
    """A run of two epochs, the second of which is the decay, on two ranks at ZeRO-3."""
    folder = tmp_path_factory.mktemp("short")
    (folder / "run.yaml").write_text(RUN.replace("ROOT", str(few_digits)))
    job = Job(folder / "run.yaml", folder / "short", {"zero_optimization": {"stage": 3}})
    runs.train_all([job], 2)
    return job


def state_of(checkpoint: Path) -> dict[str, Tensor]:
    """Return every weight, moment and average of a checkpoint, whole."""
    shapes = read_state(checkpoint).shapes
    found = {}
    with ShardReader(checkpoint / name for name in read_state(checkpoint).files) as reader:
        for name, shape in shapes.items():
            is_matrix = name.startswith("blocks.") and len(shape) == 2
            for kind in ("weight", "average", *(["momentum_buffer"] if is_matrix else ["exp_avg", "exp_avg_sq"])):
                found[f"{kind}/{name}"] = reader.read(kind, name, 0, torch.Size(shape).numel())
    return found


@pytest.mark.parametrize("stage", [0, 1])
def test_a_checkpoint_fits_another_layout(short: Job, tmp_path: Path, stage: int) -> None:
    before = short.output / "checkpoints" / STABLE
    ds = {"zero_optimization": {"stage": stage}}
    reshard([Job(short.config, tmp_path / "other", ds, resume=str(before))], 1)
    found, expected = state_of(tmp_path / "other" / "checkpoints" / STABLE), state_of(before)
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []
    assert all(values.abs().max() > 0 for key, values in expected.items() if "momentum" in key)


def test_a_stable_checkpoint_goes_on_to_another_length(short: Job, tmp_path: Path) -> None:
    """The last checkpoint before the decay is kept, and leads to three epochs, as if they had been planned."""
    kept = sorted(path.name for path in (short.output / "checkpoints").iterdir())
    assert kept == [STABLE, "step-00000010"]
    three = {"train.epochs": 3}
    ds = {"zero_optimization": {"stage": 2}}
    before = str(short.output / "checkpoints" / STABLE)
    long = Job(short.config, tmp_path / "long", ds, three, before)
    planned = Job(short.config, tmp_path / "planned", short.ds, three)
    runs.train_all([planned, long], 2)
    np.testing.assert_allclose(losses(long.output), losses(planned.output)[5:], atol=5e-3)
    late = replace(long, output=tmp_path / "late", resume=str(short.output / "checkpoints" / "step-00000010"))
    for job, said in (
        (
            late,
            "its length may change from a checkpoint before its decay, and this config has train.epochs 3 (it was 2)",
        ),
        (replace(long, output=tmp_path / "adamw", sets={"optim.name": "adamw"}), 'optim.name "adamw" (it was "muon")'),
    ):
        done = runs.train(job, ranks=1)
        assert done.returncode == 1
        assert said in done.stdout


def test_a_model_without_blocks_is_refused(few_digits: Path, tmp_path: Path) -> None:
    text = f"output: unused\nmodel: {{name: test_resnet}}\ndata: {{root: {few_digits}, image_size: 32}}\n"
    (tmp_path / "run.yaml").write_text(text + "optim: {name: muon}\ntrain: {global_batch: 16}\n")
    done = runs.train(Job(tmp_path / "run.yaml", tmp_path / "run", {}), ranks=1)
    assert done.returncode == 1
    assert "error: optim.name: muon is for the weights of the Linear layers inside a model's blocks" in done.stdout
