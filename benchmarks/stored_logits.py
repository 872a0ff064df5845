"""Measure what stored teacher logits cost and save: bytes an image, seconds a step, and the effect of keeping few.

    python benchmarks/stored_logits.py --runs runs/stored --out benchmarks/results/stored_logits.json

Trains the quickstart's auxiliary model (digits, 10 epochs) with its teacher online, then with the logits of each number
of classes. All begin with the same weights and see the same images. `make quickstart` writes data and teacher. It takes
some ten minutes of two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from sws_dist.atomic import atomic_write_json
from sws_dist.distill.shards import LogitsFolder
from sws_dist.provenance import collect_provenance

ROOT = Path(__file__).parents[1]
EPOCHS = 10
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
    results = {"online": train(args.runs / "online", sets)}
    for k in args.top_k:
        logits = (args.runs / f"logits-{k}").resolve()
        perform("launcher/teach.py", sets, "--out", str(logits), "--top-k", str(k))
        results[f"top {k}"] = describe(logits) | train(args.runs / f"top{k}", sets | {"distill.logits": logits})
    print(json.dumps(results, indent=2))
    if args.out:
        atomic_write_json(args.out, collect_provenance() | {"epochs": EPOCHS, "results": results})


def train(output: Path, sets: dict[str, Any]) -> dict[str, float]:
    """Train one auxiliary model, unless it is there. Returns its seconds a step, its first loss and its top-1."""
    if not (output / "metrics.json").is_file():
        sets = sets | {"output": output.resolve(), "train.log_every": 1, "train.eval_every": EPOCHS}
        perform("launcher/train.py", sets, "--deepspeed_config", "configs/deepspeed/zero0.json", "--resume", "auto")
    log = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    steps = [entry for entry in log if "train/loss" in entry]
    metrics = json.loads((output / "metrics.json").read_text())
    return {
        "ms_per_step": round(1000 * 32 / median(entry["perf/images_per_s"] for entry in steps), 2),
        "first_loss": round(steps[0]["train/loss"], 5),
        "top1": round(100 * metrics["top1"], 2),
        "gflop": round(metrics["flops"] / 1e9),
    }


def describe(path: Path) -> dict[str, float]:
    """Return the bytes of an image on the disk, and the mean probability that is spread over the classes left out."""
    folder = LogitsFolder.open(path)
    shards = [folder.read(epoch) for epoch in range(EPOCHS)]
    num_bytes = sum(folder.shard(epoch).stat().st_size for epoch in range(EPOCHS))
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
