"""Measure what stored teacher logits cost and save: bytes an image, time a step, and the effect of keeping few.

    python benchmarks/stored_logits.py --runs runs/stored --out benchmarks/results/stored_logits.json

Trains the quickstart's auxiliary model (digits, at its own depth, 10 epochs) with its teacher online, then with the
logits of each number of classes. All begin with the same weights and see the same images. The teacher's part of a step
is timed on its own, in CPU time of one thread, which other programs on the machine disturb little. `make quickstart`
writes data and teacher. It takes some ten minutes of two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from sws_dist.atomic import atomic_write_json
from sws_dist.config.loader import load_config
from sws_dist.data.build import list_images
from sws_dist.data.loader import Batch
from sws_dist.distill.logits_folder import LogitsFolder
from sws_dist.distill.stored import StoredTeacher
from sws_dist.distill.teacher import Teacher, load_teacher
from sws_dist.provenance import collect_provenance

ROOT = Path(__file__).parents[1]
EPOCHS, BATCH = 10, 32
CONFIG = ("--config", "configs/runs/quickstart/auxiliary.yaml")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/stored"), help="folder for all runs")
    parser.add_argument("--data", type=Path, default=Path("data/quickstart"))
    parser.add_argument("--teacher", type=Path, default=Path("runs/quickstart/teacher/model.safetensors"))
    parser.add_argument("--top-k", type=int, nargs="+", default=[10, 3, 1])
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    args = parser.parse_args()
    sets = {"data.root": args.data.resolve(), "distill.teacher": args.teacher.resolve(), "train.epochs": EPOCHS}
    sets |= {"model.elastic": "null", "train.eval_depths": "[]"}
    results = {"online": train(args.runs / "online", sets)}
    torch.set_num_threads(1)
    config = load_config(*CONFIG[1:], [f"{key}={value}" for key, value in sets.items()])
    images, _ = list_images(config.data)
    online = load_teacher(config.distill, images.classes, config.data)
    assert online is not None
    for k in args.top_k:
        logits = (args.runs / f"logits-{k}").resolve()
        perform("launcher/teach.py", sets, "--out", str(logits), "--top-k", str(k))
        results[f"top {k}"] = describe(logits) | train(args.runs / f"top{k}", sets | {"distill.logits": logits})
        stored = StoredTeacher(LogitsFolder.open(logits), images, torch.device("cpu"))
        batches = list(first_batches(LogitsFolder.open(logits)))
        results["online"]["teacher_ms"], results[f"top {k}"]["teacher_ms"] = time_teachers(online, stored, batches)
    print(json.dumps(results, indent=2))
    if args.out:
        atomic_write_json(args.out, collect_provenance() | {"epochs": EPOCHS, "results": results})


def first_batches(folder: LogitsFolder) -> Iterator[Batch]:
    """Yield the micro-batches of the first epoch, with noise in the place of the images: only the time counts."""
    shown = folder.read(0).images.astype(np.int64)
    for start in range(0, len(shown) - BATCH, BATCH):
        indices, valid = shown[start : start + BATCH], np.ones(BATCH, dtype=bool)
        labels = torch.zeros(BATCH, dtype=torch.long)
        positions = np.arange(start, start + BATCH)
        yield Batch(torch.randn(BATCH, 3, 32, 32), labels, indices, valid, positions=positions)


def time_teachers(online: Teacher, stored: Teacher, batches: list[Batch]) -> tuple[float, float]:
    """Return the CPU milliseconds that each teacher takes for a micro-batch: medians, measured in turn."""
    times: tuple[list[float], list[float]] = ([], [])
    for batch in batches:
        for teacher, found in zip((online, stored), times, strict=True):
            start = time.thread_time()
            teacher.logits(batch.images, batch)
            found.append(1000 * (time.thread_time() - start))
    assert stored.failure is None
    return round(median(times[0]), 2), round(median(times[1]), 2)


def train(output: Path, sets: dict[str, Any]) -> dict[str, float]:
    """Train one auxiliary model, unless it is there. Returns its first loss, its top-1 and its counted operations."""
    if not (output / "metrics.json").is_file():
        sets = sets | {"output": output.resolve(), "train.log_every": 1, "train.eval_every": EPOCHS}
        perform("launcher/train.py", sets, "--deepspeed_config", "configs/deepspeed/zero0.json", "--resume", "auto")
    log = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    steps = [entry for entry in log if "train/loss" in entry]
    metrics = json.loads((output / "metrics.json").read_text())
    return {
        "first_loss": round(steps[0]["train/loss"], 5),
        "top1": round(100 * metrics["top1"], 2),
        "gflop": round(metrics["flops"] / 1e9),
    }


def describe(path: Path) -> dict[str, float]:
    """Return the bytes of an image on the disk, and the mean probability that is spread over the classes left out."""
    folder = LogitsFolder.open(path)
    shards = [folder.read(epoch) for epoch in range(EPOCHS)]
    num_bytes = sum(folder.file(epoch).stat().st_size for epoch in range(EPOCHS))
    kept = np.concatenate([shard.kept.values[:, : folder.top_k] for shard in shards]).astype(np.float64)
    return {
        "bytes_per_image": round(num_bytes / (EPOCHS * folder.epoch_size), 1),
        "share_left_out": round(max(0.0, 1 - np.exp(kept).sum(axis=1).mean()), 6),
    }


def perform(script: str, sets: dict[str, Any], *arguments: str) -> None:
    command = [sys.executable, script, *CONFIG, *arguments]
    command += [word for key, value in sets.items() for word in ("--set", f"{key}={value}")]
    subprocess.run(command, cwd=ROOT, check=True, env={"DS_ACCELERATOR": "cpu", **os.environ})


if __name__ == "__main__":
    main()
