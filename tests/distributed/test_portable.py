"""A checkpoint goes on at another world size and another ZeRO stage; its shards hold the same numbers everywhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sws_dist.checkpoint.checkpoint import read_state
from sws_dist.checkpoint.safetensors_stream import tensor_entry, write_safetensors
from sws_dist.checkpoint.shards import ShardReader
from tests.launching import REPOSITORY, Job, losses, train, train_all

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
def runs(folder: Path) -> Path:
    """Never interrupted on 4 ranks at ZeRO-3; and as 4 ranks at ZeRO-3, 3 at ZeRO-1, and back."""
    until = "train.max_steps"
    train_all([job(folder, "whole", 3, 4), job(folder, "parts", 3, 4, **{until: 2})], 4, folder)
    train_all([job(folder, "parts", 1, 3, "auto", **{until: 4})], 3, folder)
    train_all([job(folder, "parts", 3, 4, "auto")], 4, folder)
    return folder


def test_the_loss_curve_goes_on(runs: Path) -> None:
    whole, parts = losses(runs / "whole"), losses(runs / "parts")
    assert len(whole) == len(parts) == STEPS
    np.testing.assert_allclose(parts, whole, rtol=0, atol=1e-5)
    assert np.abs(np.diff(whole)).min() > 1e-4, "a step missed or taken twice would not show"


@pytest.mark.parametrize("name", ["learngene", "learngene_ema"])
def test_final_weights_are_those_of_the_undisturbed_run(runs: Path, name: str) -> None:
    whole, parts = (load_file(runs / run / f"{name}.safetensors") for run in ("whole", "parts"))
    for key, tensor in whole.items():
        torch.testing.assert_close(parts[key], tensor, rtol=0, atol=1e-4)


def test_the_change_is_said(folder: Path, runs: Path) -> None:
    sets = {"train.max_steps": 3, "output": str(folder / "said")}
    resume = str(runs / "parts" / "checkpoints" / FIRST)
    one = Job(folder / "run.yaml", folder / "said", ds(2, 1) | {"gradient_accumulation_steps": 4}, sets, resume)
    done = train(one, ranks=1)
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
def copies(runs: Path, folder: Path) -> Path:
    """The checkpoint of 4 ranks at ZeRO-3, loaded into other layouts and saved again; and one with buffers."""
    run, source = folder / "run.yaml", str(runs / "parts" / "checkpoints" / FIRST)
    for ranks in (2, 1, 3):
        layouts = [(stage, precision) for stage, its_ranks, precision in LAYOUTS if its_ranks == ranks]
        jobs = [
            Job(run, folder / f"copy-{ranks}-{stage}-{precision}", ds(stage, ranks, precision), {}, source)
            for stage, precision in layouts
        ]
        resnet = folder / "resnet.yaml", folder / f"resnet-{ranks}"
        if ranks == 2:
            train_all([Job(*resnet, ds(1, 2), {"train.max_steps": 2})], 2, folder)
        if ranks == 3:
            jobs.append(Job(*resnet, ds(3, 3), {}, str(folder / "resnet-2" / "checkpoints" / FIRST)))
        train_all(jobs, ranks, folder, module="tests.distributed.relayout")
    return folder


@pytest.mark.parametrize(("stage", "ranks", "precision"), LAYOUTS)
def test_a_copy_through_another_layout_is_exact(
    runs: Path, copies: Path, stage: int, ranks: int, precision: str | None
) -> None:
    wanted = content(runs / "parts" / "checkpoints" / FIRST)
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
def test_a_shifted_slice_would_be_seen(runs: Path, tmp_path: Path, by: int) -> None:
    """Negative control: one rank's pieces, said to begin one element later or earlier."""
    source = runs / "parts" / "checkpoints" / FIRST
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

EXPORT = """
import re, sys, threading, time
from pathlib import Path
import torch
from sws_dist import checkpoint

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

peak, before, done = 0, anonymous(), False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.001)
thread = threading.Thread(target=watch); thread.start()
checkpoint.export(Path(sys.argv[1]), Path(sys.argv[2]), dtype=torch.bfloat16)
done = True; thread.join()
print(peak - before)
"""


def test_exporting_holds_one_tensor_at_a_time(runs: Path, tmp_path: Path) -> None:
    """Forty tensors of 4 MiB from two shards: the memory is a few tensors', not the model's 160 MiB."""
    numel, names = 1 << 20, [f"layer{i}" for i in range(40)]
    source = runs / "parts" / "checkpoints" / FIRST / "state.json"
    state = json.loads(source.read_text()) | {"shapes": {name: [numel // 4, 4] for name in names}, "files": {}}
    half = numel // 2
    for rank in range(2):
        entries = [tensor_entry(f"weight/{n}", torch.full((half,), float(i + rank))) for i, n in enumerate(names)]
        starts = json.dumps(dict.fromkeys(names, rank * half))
        written = write_safetensors(tmp_path / f"{rank}.safetensors", entries, {"starts": starts})
        state["files"][f"{rank}.safetensors"] = vars(written)
    (tmp_path / "state.json").write_text(json.dumps(state))
    out = tmp_path / "out.safetensors"
    done = subprocess.run(
        [sys.executable, "-c", EXPORT, str(tmp_path), str(out)],
        cwd=REPOSITORY, env=os.environ, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    taken = int(done.stdout.splitlines()[-1])
    assert taken < 8 * 4 * numel, f"{taken / 2**20:.0f} MiB"
    weights = load_file(out)
    assert list(weights) == names or set(weights) == set(names)
    assert weights["layer7"].dtype == torch.bfloat16
    assert torch.equal(weights["layer7"].float().flatten()[[0, half - 1, half, -1]], torch.tensor([7.0, 7, 8, 8]))
