"""A checkpoint goes on at another world size and another ZeRO stage; its shards hold the same numbers everywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sws_dist.checkpoint.checkpoint import export_weights, read_state
from sws_dist.checkpoint.model_file import read_model_info
from sws_dist.checkpoint.safetensors_stream import tensor_entry, write_safetensors
from sws_dist.checkpoint.shards import ShardReader
from tests import runs
from tests.distributed.reshard_worker import reshard
from tests.launching import Job, losses

RUN = """
output: unused
model: MODEL
data: {root: ROOT, image_size: 32, crop_pct: 1.0, num_threads: 1}
augment: {mixup: 0.8, num_repeats: 3}
optim: {lr: 3e-3, lr_batch: null, ema_decay: 0.9}
train: {epochs: 2, global_batch: 24, log_every: 1, eval_every: 2}
checkpoint: {every: 2, keep_last: 9}
"""
MODEL = "{name: sws_vit, schedule: [2, 1], drop_path: 0.2, kwargs: {patch_size: 8, embed_dim: 36, num_heads: 2}}"
# Twelve micro-batches of two images however they are spread: the draws of mixup and drop-path stay the same too.
SPREAD = {1: 12, 2: 6, 3: 4, 4: 3}
STEPS = 6  # of 24 images: two epochs of 80
FIRST = "step-00000002"


def ds(stage: int, ranks: int, precision: str | None = None) -> dict[str, object]:
    zero = {"stage": stage, "reduce_bucket_size": 20_000}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 100  # some parameters stay whole, some do not
    if stage == 2:
        zero["round_robin_gradients"] = True  # parameters then lie in another order than the model's
    low = {precision: {"enabled": True}} if precision else {}
    return {"zero_optimization": zero, "gradient_accumulation_steps": SPREAD[ranks], **low}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, few_digits: Path) -> Path:
    folder = tmp_path_factory.mktemp("portable")
    run = RUN.replace("ROOT", str(few_digits))
    (folder / "run.yaml").write_text(run.replace("MODEL", MODEL))
    (folder / "resnet.yaml").write_text(run.replace("MODEL", "{name: test_resnet}").replace(", ema_decay: 0.9", ""))
    return folder


def job(folder: Path, name: str, stage: int, ranks: int, resume: str | None = None, **sets: object) -> Job:
    return Job(folder / "run.yaml", folder / name, ds(stage, ranks), sets, resume)


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    """Never interrupted on 4 ranks at ZeRO-3; and as 4 ranks at ZeRO-3, 3 at ZeRO-1, and back."""
    until = "train.max_steps"
    runs.train_all([job(folder, "whole", 3, 4), job(folder, "parts", 3, 4, **{until: 2})], 4)
    runs.train_all([job(folder, "parts", 1, 3, "auto", **{until: 4})], 3)
    runs.train_all([job(folder, "parts", 3, 4, "auto")], 4)
    return folder


def test_the_loss_curve_goes_on(trained: Path) -> None:
    whole, parts = losses(trained / "whole"), losses(trained / "parts")
    assert len(whole) == len(parts) == STEPS
    np.testing.assert_allclose(parts, whole, rtol=0, atol=1e-5)
    assert np.abs(np.diff(whole)).min() > 1e-4, "a step missed or taken twice would not show"


@pytest.mark.parametrize("name", ["learngene", "learngene_ema"])
def test_final_weights_are_those_of_the_undisturbed_run(trained: Path, name: str) -> None:
    whole, parts = (load_file(trained / run / f"{name}.safetensors") for run in ("whole", "parts"))
    for key, tensor in whole.items():
        torch.testing.assert_close(parts[key], tensor, rtol=0, atol=1e-4)


def test_each_file_of_weights_states_its_own_score(trained: Path) -> None:
    metrics = json.loads((trained / "whole" / "metrics.json").read_text())
    for name, score in (("learngene", metrics["top1"]), ("learngene_ema", metrics["top1_ema"])):
        assert read_model_info(trained / "whole" / f"{name}.safetensors").provenance["top1"] == score


def test_the_cost_counts_the_ranks_that_each_start_had(trained: Path) -> None:
    whole, parts = (json.loads((trained / run / "metrics.json").read_text()) for run in ("whole", "parts"))
    assert whole["rank_seconds"] == pytest.approx(4 * whole["seconds"], abs=0.01)
    assert 3 * parts["seconds"] < parts["rank_seconds"] < 4 * parts["seconds"] - 0.01


def test_the_change_is_said(folder: Path, trained: Path) -> None:
    sets = {"train.max_steps": 3, "output": str(folder / "said")}
    resume = str(trained / "parts" / "checkpoints" / FIRST)
    one = Job(folder / "run.yaml", folder / "said", ds(2, 1) | {"gradient_accumulation_steps": 4}, sets, resume)
    done = runs.train(one, ranks=1)
    assert done.returncode == 0, done.stdout
    for line in ("world_size 1; the checkpoint was written with 4", "zero_stage 2", "num_micros 4"):
        assert f"going on with {line}" in done.stdout


# ---- every layout holds the same numbers ----


def content(folder: Path) -> dict[str, torch.Tensor]:
    """Everything that a checkpoint holds, whole."""
    state = read_state(folder)
    with ShardReader(folder / name for name in state.files) as reader:
        kinds = [kind for kind in ("weight", "exp_avg", "exp_avg_sq", "average") if reader.has(kind)]
        found = {
            f"{kind}/{name}": reader.read(kind, name, 0, int(np.prod(shape)))
            for kind in kinds
            for name, shape in state.shapes.items()
        }
        return found | {f"buffer/{e.name}": e.read() for e in reader.entries({}, "weight", torch.float32)}


LAYOUTS = [(stage, ranks, precision) for ranks in (1, 2, 3) for stage in (0, 1, 2, 3) for precision in (None, "bf16")]


@pytest.fixture(scope="module")
def copies(trained: Path, folder: Path) -> Path:
    """The checkpoint of 4 ranks at ZeRO-3, loaded into other layouts and saved again; and one with buffers."""
    run, source = folder / "run.yaml", str(trained / "parts" / "checkpoints" / FIRST)
    for ranks in (2, 1, 3):
        layouts = [(stage, precision) for stage, its_ranks, precision in LAYOUTS if its_ranks == ranks]
        jobs = [
            Job(run, folder / f"copy-{ranks}-{stage}-{precision}", ds(stage, ranks, precision), {}, source)
            for stage, precision in layouts
        ]
        resnet = folder / "resnet.yaml", folder / f"resnet-{ranks}"
        if ranks == 2:
            runs.train_all([Job(*resnet, ds(1, 2), {"train.max_steps": 2})], 2)
        if ranks == 3:
            jobs.append(Job(*resnet, ds(3, 3), {}, str(folder / "resnet-2" / "checkpoints" / FIRST)))
        reshard(jobs, ranks)
    return folder


@pytest.mark.parametrize(("stage", "ranks", "precision"), LAYOUTS)
def test_a_copy_through_another_layout_is_exact(
    trained: Path, copies: Path, stage: int, ranks: int, precision: str | None
) -> None:
    wanted = content(trained / "parts" / "checkpoints" / FIRST)
    copied = copies / f"copy-{ranks}-{stage}-{precision}" / "checkpoints" / FIRST
    state = read_state(copied)
    assert (state.zero_stage, state.world_size, state.precision) == (stage, ranks, precision or "fp32")
    assert state.optimizer_steps == 2
    found = content(copied)
    assert found.keys() == wanted.keys()
    assert len({key.partition("/")[0] for key in wanted}) == 4, "weights, two moments, moving average"
    assert not [key for key in wanted if not torch.equal(found[key], wanted[key])]


def test_buffers_come_along(copies: Path) -> None:
    wanted = content(copies / "resnet-2" / "checkpoints" / FIRST)
    found = content(copies / "resnet-3" / "checkpoints" / FIRST)
    assert any(key.startswith("buffer/") and key.endswith("running_var") for key in wanted)
    for key, tensor in wanted.items():  # averaged over the ranks before saving: (x + x + x) / 3 is x but for rounding
        torch.testing.assert_close(found[key], tensor, rtol=1e-6, atol=0, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("by", [1, -1])
def test_a_shifted_slice_would_be_seen(trained: Path, tmp_path: Path, by: int) -> None:
    """Negative control: one rank's pieces, said to begin one element later or earlier."""
    source = trained / "parts" / "checkpoints" / FIRST
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    file = tmp_path / "shard-00001-of-00004.safetensors"
    with safe_open(file, framework="pt") as opened:
        starts = json.loads(opened.metadata()["starts"])
    save_file(load_file(file), file, {"starts": json.dumps({name: start + by for name, start in starts.items()})})
    wanted = content(source)
    try:
        found = content(tmp_path)
    except ValueError:  # a gap between two pieces
        return
    assert any(not torch.equal(found[key], wanted[key]) for key in wanted)


# ---- export ----


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of all tensors that operators have returned and that somebody still holds.

    The process's resident memory would also show what the allocator keeps for later.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._storages = {key: kept for key, kept in self._storages.items() if not kept[0].expired()}
        self.peak = max(self.peak, sum(numel for _, numel in self._storages.values()))
        return out


NUMEL, NAMES = 1 << 14, [f"layer{i}" for i in range(40)]
ONE_TENSOR = 4 * NUMEL


@pytest.fixture
def large(trained: Path, tmp_path: Path) -> Path:
    """A checkpoint of forty tensors in two shards."""
    source = trained / "parts" / "checkpoints" / FIRST / "state.json"
    state = json.loads(source.read_text()) | {"shapes": {name: [NUMEL // 4, 4] for name in NAMES}, "files": {}}
    half = NUMEL // 2
    for rank in range(2):
        entries = [tensor_entry(f"weight/{n}", torch.full((half,), float(i + rank))) for i, n in enumerate(NAMES)]
        starts = json.dumps(dict.fromkeys(NAMES, rank * half))
        written = write_safetensors(tmp_path / f"{rank}.safetensors", entries, {"starts": starts})
        state["files"][f"{rank}.safetensors"] = vars(written)
    (tmp_path / "state.json").write_text(json.dumps(state))
    return tmp_path


def test_exporting_holds_one_tensor_at_a_time(large: Path) -> None:
    """At most the last tensor with its copy in bf16, and the next one with the half that is being read: not forty."""
    out = large / "out.safetensors"
    with LiveTensors() as live:
        export_weights(large, out, dtype=torch.bfloat16)
    assert ONE_TENSOR <= live.peak <= 3 * ONE_TENSOR
    weights = load_file(out)
    assert weights.keys() == set(NAMES)
    assert weights["layer7"].dtype == torch.bfloat16
    half = NUMEL // 2
    assert torch.equal(weights["layer7"].float().flatten()[[0, half - 1, half, -1]], torch.tensor([7.0, 7, 8, 8]))


def test_holding_all_tensors_would_be_seen(large: Path) -> None:
    """Negative control for the count."""
    state = read_state(large)
    with LiveTensors() as live, ShardReader(large / name for name in state.files) as reader:
        held = [entry.read() for entry in reader.entries(state.shapes, "weight", torch.bfloat16)]
    assert len(held) == len(NAMES)
    assert live.peak >= len(NAMES) * ONE_TENSOR
