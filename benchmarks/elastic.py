"""Measure what descendants are worth before any fine-tuning: auxiliary models of one depth and of many.

    python benchmarks/elastic.py --runs runs/elastic --teacher runs/quickstart/teacher/model.safetensors \
        --out benchmarks/results/elastic.json --chart docs/elastic.png

Trains the quickstart's auxiliary model (digits, 30 epochs, 5 stages of 2) once for each rule and seed, and scores it
after the last epoch at every depth from 5 to 16, which is the score of an expanded descendant of that depth. A run that
is there is not trained again. Each takes two to three minutes of one core. `make quickstart` writes data and teacher.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from sws_dist.atomic import atomic_write_json

ROOT = Path(__file__).parents[1]
OWN_DEPTH = 10
DEPTHS = range(5, 17)
RULES = {  # name of a run's folder -> label, model.elastic
    "fixed": ("one depth, 10", None),
    "uniform": ("5 to 12 layers", {"min_depth": 5, "max_depth": 12, "branch_scaling": 0}),
    "sandwich": (
        "5 to 12 layers, sandwich",
        {"min_depth": 5, "max_depth": 12, "rule": "sandwich", "branch_scaling": 0},
    ),
    "wide": ("5 to 15 layers", {"min_depth": 5, "max_depth": 15, "branch_scaling": 0}),
    "scaled": ("5 to 15 layers, branches scaled", {"min_depth": 5, "max_depth": 15}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/elastic"), help="folder for all runs")
    parser.add_argument("--data", type=Path, default=Path("data/quickstart"))
    parser.add_argument("--teacher", type=Path, default=Path("runs/quickstart/teacher/model.safetensors"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    parser.add_argument("--chart", type=Path, help="draw them here")
    args = parser.parse_args()
    found = {
        rule: [train(args.runs / f"{rule}-{seed}", seed, elastic, args.data, args.teacher) for seed in args.seeds]
        for rule, (_, elastic) in RULES.items()
    }
    results = {rule: summarise(runs) for rule, runs in found.items()}
    print(json.dumps(results, indent=2))
    if args.out:
        first = found["fixed"][0]
        origin = {key: first[key] for key in ("versions", "hardware")}
        atomic_write_json(args.out, origin | {"depths": list(DEPTHS), "seeds": args.seeds, "rules": results})
    if args.chart:
        draw(results, args.chart)


def train(output: Path, seed: int, elastic: dict[str, Any] | None, data: Path, teacher: Path) -> dict[str, Any]:
    """Train one auxiliary model, unless it is there. Returns what its ``metrics.json`` holds."""
    metrics = output / "metrics.json"
    if not metrics.is_file():
        sets = {
            "output": output.resolve(),
            "data.root": data.resolve(),
            "distill.teacher": teacher.resolve(),
            "train.seed": seed,
            "train.eval_every": 30,
            "checkpoint.every": 30,
            "train.eval_depths": [depth for depth in DEPTHS if depth != OWN_DEPTH],
            "model.elastic": json.dumps(elastic),
        }
        command = [sys.executable, "launcher/train.py", "--config", "configs/runs/quickstart/auxiliary.yaml"]
        command += ["--deepspeed_config", "configs/deepspeed/zero0.json", "--resume", "auto"]
        command += [word for key, value in sets.items() for word in ("--set", f"{key}={value}")]
        subprocess.run(command, cwd=ROOT, check=True, env={"DS_ACCELERATOR": "cpu", **os.environ})
    return json.loads(metrics.read_text())


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return top-1 in percent by depth, for each seed, the operations of the whole training, and where it was made."""
    keys = ["val/top1" if depth == OWN_DEPTH else f"val_depth{depth}/top1" for depth in DEPTHS]
    top1 = [[round(100 * run["history"][-1][key], 2) for key in keys] for run in runs]
    pflop = round(sum(run["flops"] for run in runs) / len(runs) / 1e15, 4)
    return {"top1": top1, "pflop": pflop, "commits": sorted({run["commit"] for run in runs})}


def draw(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw accuracy against depth: each seed as a point, their mean as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 3.8))
    colours = {"fixed": "#888888", "wide": "#1f77b4", "scaled": "#2ca02c"}
    for rule, colour in colours.items():
        seeds = results[rule]["top1"]
        axes.plot(DEPTHS, [sum(column) / len(column) for column in zip(*seeds, strict=True)], color=colour)
        for seed in seeds:
            axes.plot(DEPTHS, seed, "o", color=colour, markersize=3, alpha=0.6)
        axes.plot([], [], "o-", color=colour, markersize=3, label=f"trained at {RULES[rule][0]}")
    axes.set(xlabel="layers of the descendant", ylabel="validation top-1 (%), untuned", xticks=list(DEPTHS))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
