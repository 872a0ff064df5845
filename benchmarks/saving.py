"""Measure how long training stands still for a checkpoint that is written meanwhile, and for one that it waits for.

    python benchmarks/saving.py --millions 100 1000 --out benchmarks/results/saving.json

One rank saves weights and Adam's two moments in fp32, through the trainer's own ``CheckpointWriter``; steps are
products of two matrices. The tensors of a large model share the memory of a part of it, so that the copy alone has full
size: 12 bytes for each parameter, which the machine must have free (and twice as much on the disk).
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from sws_dist.atomic import atomic_write_json
from sws_dist.checkpoint.model_file import ModelInfo
from sws_dist.checkpoint.writer import CheckpointWriter
from sws_dist.config.schema import CheckpointConfig
from sws_dist.distributed.init import World
from sws_dist.distributed.step_sync import StepStatus
from sws_dist.provenance import collect_provenance

PART = 100_000_000
"""Parameters of a tensor."""
STEPS_BEFORE = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--millions", type=int, nargs="+", default=[100, 1000], help="parameters, multiples of 100")
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the checkpoints are written, and deleted again")
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    args = parser.parse_args()
    with suppress(OSError):  # before any other program of the machine
        Path("/proc/self/oom_score_adj").write_text("1000")
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for millions in args.millions:
        for background in (False, True):
            with scratch(args.folder) as folder:
                name = f"{millions} M, {'background' if background else 'waiting'}"
                results[name] = measure(make_engine(millions), folder, background, args.saves)
                print(name, results[name])
    if args.out:
        memory = f", {psutil.virtual_memory().total / 1e9:.0f} GB of memory"
        provenance = collect_provenance()
        provenance["hardware"] = f"{os.cpu_count()} cores, one thread used{memory}; {provenance['hardware']}"
        atomic_write_json(args.out, results | {"measured_with": provenance})


@contextmanager
def scratch(parent: Path | None) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def make_engine(millions: int) -> Any:
    """Return as much of a DeepSpeed engine at stage 0 as is saved: a model, its AdamW, and moments."""
    values = torch.rand(PART)
    model = nn.ParameterList(nn.Parameter(values) for _ in range(millions * 1_000_000 // PART))
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model:
        optimizer.state[parameter] = {"step": torch.tensor(1.0), "exp_avg": values, "exp_avg_sq": values}
    return SimpleNamespace(
        module=model,
        optimizer=optimizer,
        config={"zero_optimization": {"stage": 0}},
        global_rank=0,
        zero_optimization_stage=lambda: 0,
        gradient_accumulation_steps=lambda: 1,
    )


def measure(engine: Any, folder: Path, background: bool, saves: int) -> dict[str, Any]:
    """Save several times, taking steps in between. Returns seconds of each save."""
    world = World(0, 1, 0, torch.device("cpu"), 1)
    config = CheckpointConfig(keep_last=1, keep_best=False, background=background)
    writer = CheckpointWriter(folder, engine, None, world, config, newest=None, before_decay=None)
    info, matrix = ModelInfo("model", "benchmark", {}, 1), torch.rand(512, 512)
    before = [seconds_of_step(matrix) for _ in range(STEPS_BEFORE)]
    stalls, writes, during = [], [], []
    memory = psutil.Process().memory_info().rss
    for number in range(1, saves + 1):
        start = time.perf_counter()
        writer.save(info, describe(number), wait=False)
        stall = time.perf_counter() - start
        while writer.newest is None or writer.newest.name != f"step-{number:08d}":
            during.append(seconds_of_step(matrix))
            begin = time.perf_counter()
            writer.check(StepStatus(number, [0.0], True, False, writer.is_writing, None, []))
            stall += time.perf_counter() - begin
        stalls.append(round(stall, 3))
        writes.append(round(time.perf_counter() - start, 3))
    return {
        "bytes": sum(file.stat().st_size for file in folder.rglob("*.safetensors")),
        "seconds_still": stalls,
        "seconds_until_whole": writes,
        "ms_of_a_step_before": round(1000 * median(before), 2),
        "ms_of_a_step_while_writing": round(1000 * median(during), 2) if during else None,
        "memory_added": psutil.Process().memory_info().rss - memory,
    }


def describe(step: int) -> dict[str, Any]:
    """Return the fields of ``CheckpointState`` that the trainer gives."""
    fields = {"step": step, "epoch": step, "seconds": 0.0, "top1": None, "best_top1": None, "history": []}
    return fields | {"global_batch": 1, "seed": 0, "epoch_size": 1, "total_steps": step}


def seconds_of_step(matrix: Tensor) -> float:
    start = time.perf_counter()
    for _ in range(4):
        matrix @ matrix
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
