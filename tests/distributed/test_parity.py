"""The same steps whatever the ZeRO stage and however the global batch is spread: against a plain PyTorch loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sws_dist.checkpoint.checkpoint import read_state
from sws_dist.checkpoint.model_file import ModelInfo, save_model_file
from sws_dist.checkpoint.shards import ShardReader
from sws_dist.config.loader import load_config
from sws_dist.config.lr_schedule import LRSchedule
from sws_dist.data import manifest, pipeline, sampler
from sws_dist.data.draws import Recipe
from sws_dist.data.mixup import Mixing, erase
from sws_dist.distill.teacher import load_teacher
from sws_dist.learngene.elastic import ElasticDepth
from sws_dist.models import create_model
from sws_dist.models.losses import DistillationLoss
from sws_dist.optim import parameter_groups
from sws_dist.seed import seed_everything
from tests import runs
from tests.launching import Job, log, losses

STEPS = 5
STAGES = (0, 1, 2, 3)

# Everything at once: sharing, a drawn depth, drop-path, erasing, mixing, a teacher, clipping, averaging.
RUN = """
output: unused
model:
  name: sws_vit
  schedule: [2, 1, 2]
  elastic: {min_depth: 3, max_depth: 7}
  drop_path: 0.1
  kwargs: {patch_size: 8, embed_dim: 64, num_heads: 2, weight_init: jax}
data: {root: ROOT, image_size: 32, crop_pct: 1.0, num_threads: 1}
augment: {hflip: 0.5, re_prob: 0.25, mixup: 0.8, cutmix: 1.0, smoothing: 0.1}
distill: {teacher: TEACHER, alpha: 0.7, tau: 2.0}
optim: {lr: 3e-3, lr_batch: null, weight_decay: 0.1, warmup_epochs: 0.4, ema_decay: 0.7}
train: {epochs: 1, global_batch: 16, log_every: 1, seed: 3}
"""
CLIPPING = 0.2  # of the five gradients, four are larger


def deepspeed_config(stage: int, micro: int = 8, **extra: Any) -> dict[str, Any]:
    zero = {"stage": stage, "reduce_bucket_size": 20_000}  # several buckets, even for this little model
    return {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_clipping": CLIPPING,
        "zero_optimization": zero,
        **extra,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, few_digits: Path) -> Path:
    """A config, and a teacher with random weights: distillation does not ask whether it is right."""
    folder = tmp_path_factory.mktemp("parity")
    torch.manual_seed(0)
    teacher = create_model("resnet10t", num_classes=10)
    info = ModelInfo("model", "resnet10t", {}, 10, {"mean": [0.5] * 3, "std": [0.5] * 3})
    save_model_file(folder / "teacher.safetensors", info, teacher.state_dict())
    text = RUN.replace("ROOT", str(few_digits)).replace("TEACHER", str(folder / "teacher.safetensors"))
    (folder / "run.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def plain(folder: Path) -> dict[str, Any]:
    """The reference: one process, no DeepSpeed, torch's own AdamW, gradients summed by hand."""
    run = load_config(folder / "run.yaml")
    train_set = manifest.scan(run.data.root, "train")
    classes, seed, batch = train_set.classes, run.train.seed, run.train.global_batch
    seed_everything(seed)
    model = create_model(
        "sws_vit",
        schedule=[2, 1, 2],
        drop_path_rate=0.1,
        branch_scaling=1.0,
        img_size=32,
        num_classes=10,
        **run.model.kwargs,
    )
    teacher = load_teacher(run.distill, classes, run.data)
    assert teacher is not None
    groups = parameter_groups(model, run.optim.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=run.optim.betas, eps=run.optim.eps)
    schedule = LRSchedule(run.optim, batch, len(train_set) / batch, run.train.epochs, STEPS)
    assert run.model.elastic is not None
    elastic = ElasticDepth(run.model.elastic, (2, 1, 2), seed, len(train_set) / batch)
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    mixing, loss_of = Mixing(run.augment, 10, seed), DistillationLoss(run.distill)
    positions = [sampler.micro_batch_positions(s, batch, m, 2) for s in range(STEPS) for m in range(2)]
    order = sampler.TrainOrder(len(train_set), seed)
    cpu = torch.device("cpu")
    loader = pipeline.train_loader(train_set, order, positions, Recipe(run.augment, 32), seed, run.data, cpu)
    found: dict[str, Any] = {"losses": [], "norms": []}
    model.train()
    for index, micro in enumerate(loader):
        seed_everything(seed, micro.position)
        images = erase(micro.images, micro.erase)
        images, targets = mixing(images, micro.labels, micro.position)
        model.set_repeats(elastic.repeats(elastic.draw(index // 2)))
        loss = loss_of(model(images), targets, teacher(images)).total
        (loss / 2).backward()
        if index % 2 == 0:
            first = loss.item()
            continue
        found["losses"].append((first + loss.item()) / 2)
        for group in optimizer.param_groups:
            group["lr"] = schedule(index // 2)
        norms = {f"norms/gradient/{part}": norm for part, norm in norms_by_part(model, "grad").items()}
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIPPING)
        optimizer.step()
        norms |= {f"norms/weights/{part}": norm for part, norm in norms_by_part(model, "data").items()}
        found["norms"].append(norms)
        optimizer.zero_grad()
        for name, p in model.named_parameters():
            average[name].lerp_(p.detach(), 1 - min(0.7, (1 + index // 2) / (10 + index // 2)))
    assert len({elastic.draw(step) for step in range(STEPS)}) > 2, "too few depths for this comparison to mean anything"
    found["weights"] = {name: p.detach().clone() for name, p in model.named_parameters()}
    found["average"] = average
    found["exp_avg"] = {name: optimizer.state[p]["exp_avg"].clone() for name, p in model.named_parameters()}
    return found


def norms_by_part(model: torch.nn.Module, what: str) -> dict[str, float]:
    """Return the norm of the weights (``data``) or gradients (``grad``) of each block, and of what is in none."""
    squares: dict[str, float] = {}
    for name, p in model.named_parameters():
        words = name.split(".")
        part = ".".join(words[:2]) if words[0] == "blocks" else words[0]
        squares[part] = squares.get(part, 0.0) + float(getattr(p, what).double().square().sum())
    return {part: square**0.5 for part, square in squares.items()}


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    """All runs, in two groups of ranks: two ranks, and one that accumulates two micro-batches."""
    for ranks in (2, 1):
        jobs = [Job(folder / "run.yaml", folder / f"ranks{ranks}-zero{s}", deepspeed_config(s)) for s in STAGES]
        if ranks == 2:
            low = {"bf16": {"enabled": True}}
            jobs += [Job(folder / "run.yaml", folder / f"bf16-zero{s}", deepspeed_config(s, **low)) for s in STAGES]
        runs.train_all(jobs, ranks)
    return folder


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("ranks", [1, 2])
def test_losses_equal_plain_pytorch(trained: Path, plain: dict[str, Any], stage: int, ranks: int) -> None:
    np.testing.assert_allclose(losses(trained / f"ranks{ranks}-zero{stage}"), plain["losses"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("file", "expected"), [("learngene", "weights"), ("learngene_ema", "average")])
def test_final_weights_equal_plain_pytorch(
    trained: Path, plain: dict[str, Any], stage: int, ranks: int, file: str, expected: str
) -> None:
    found = load_file(trained / f"ranks{ranks}-zero{stage}" / f"{file}.safetensors")
    assert found.keys() == plain[expected].keys()
    for name, tensor in plain[expected].items():
        # Adam divides by the root of tiny second moments: rounding of 1e-7 in a gradient may show as 1e-4 of a step.
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("ranks", [1, 2])
def test_gradients_equal_plain_pytorch(trained: Path, plain: dict[str, Any], stage: int, ranks: int) -> None:
    """By way of Adam's first moment, which is a weighted sum of the clipped gradients of all steps."""
    saved = trained / f"ranks{ranks}-zero{stage}" / "checkpoints" / f"step-{STEPS:08d}"
    with ShardReader(saved / name for name in read_state(saved).files) as reader:
        for name, moment in plain["exp_avg"].items():
            found = reader.read("exp_avg", name, 0, moment.numel()).reshape(moment.shape)
            tolerance = 1e-4 * moment.abs().max().item()
            torch.testing.assert_close(found, moment, rtol=0, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_follows_fp32_with_fp32_masters(trained: Path, plain: dict[str, Any], stage: int) -> None:
    output = trained / f"bf16-zero{stage}"
    np.testing.assert_allclose(losses(output), plain["losses"], rtol=0.05)
    assert read_state(output / "checkpoints" / f"step-{STEPS:08d}").optimizer_steps == STEPS
    head = load_file(output / "learngene.safetensors")["head.weight"]
    assert head.dtype == torch.float32
    assert not torch.equal(head, head.bfloat16().float()), "the saved weights are the rounded ones, not the masters"


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("ranks", [1, 2])
def test_norms_by_part_equal_plain_pytorch(trained: Path, plain: dict[str, Any], stage: int, ranks: int) -> None:
    """Before clipping, which takes place in this run, and of the weights after the step."""
    entries = [entry for entry in log(trained / f"ranks{ranks}-zero{stage}") if "train/loss" in entry]
    assert {entry["train/grad_norm"] > CLIPPING for entry in entries} == {True, False}
    for entry, expected in zip(entries, plain["norms"], strict=True):
        found = {name: value for name, value in entry.items() if name.startswith("norms/")}
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)
        parts = [value for name, value in found.items() if name.startswith("norms/gradient/")]
        assert np.linalg.norm(parts) == pytest.approx(entry["train/grad_norm"], rel=1e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_the_time_of_a_step_is_split(trained: Path, stage: int) -> None:
    """On two ranks, at each stage, gradients are reduced in backward and after it; both are told from it."""
    entries = [entry for entry in log(trained / f"ranks2-zero{stage}") if "train/loss" in entry]
    phases = {name.removeprefix("time/") for name in entries[-1] if name.startswith("time/")}
    assert phases == {"data", "to_device", "augment", "teacher", "forward", "backward", "reduce", "optimizer", "other"}
    for entry in entries:
        step_ms = sum(value for name, value in entry.items() if name.startswith("time/"))
        assert step_ms < 1000 * 16 / entry["perf/images_per_s"]  # which has the wait for the line's means as well
        assert entry["time/reduce"] > 0.01
        assert entry["time/backward"] > 0.5


def test_the_comparison_can_fail(trained: Path, plain: dict[str, Any]) -> None:
    """Negative control: another micro-batch order, which a wrong sampler would give, is far outside the tolerance."""
    assert abs(np.array(plain["losses"][:-1]) - np.array(plain["losses"][1:])).max() > 1e-3
