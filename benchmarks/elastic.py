"""Measure what decides how good descendants are: how the auxiliary model is trained, and how they are fine-tuned.

    python benchmarks/elastic.py digits --out benchmarks/results/elastic.json --chart docs/elastic.png
    python benchmarks/elastic.py clothes --seeds 0 --variants study to_ten --out benchmarks/results/ablations.json
    python benchmarks/elastic.py characters --seeds 0 --out benchmarks/results/characters.json
    python benchmarks/elastic.py optimizers --seeds 0 --out benchmarks/results/optimizers.json
    python benchmarks/elastic.py tuning --seeds 0 --out benchmarks/results/tuning.json

Each variant of an experiment is one config with some keys changed. It is trained once for each seed, and scored after
the last epoch. An auxiliary model is scored at every depth from 5 to 16, as its expanded descendants would be. A run
that is there is not trained again. Each takes two to ten minutes of one core. `make quickstart` writes the data and the
teacher of the digits, `make study` those of the clothes (Fashion-MNIST), `sws study --data-set characters --output
runs/study-characters` those of the characters, whose runs take half an hour.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from sws_dist.atomic import atomic_write_json
from sws_dist.config.loader import load_config

ROOT = Path(__file__).parents[1]
DEPTHS = tuple(range(5, 17))
WIDE = {"min_depth": 5, "max_depth": 15}
OWN = {"min_depth": 5, "max_depth": 10}
NARROW = {"min_depth": 5, "max_depth": 12, "branch_scaling": 0}


@dataclass(frozen=True)
class Variant:
    """A name for people, and the config's keys that differ."""

    label: str
    sets: dict[str, Any]


@dataclass(frozen=True)
class Experiment:
    """A config, its data and teacher, and what is varied: name of a run's folder -> variant."""

    config: str
    data: str
    teacher: str
    variants: dict[str, Variant]
    own_depth: int = 10
    depths: tuple[int, ...] = DEPTHS
    sets: dict[str, Any] = field(default_factory=dict)
    """Keys of the config that differ in all variants."""
    learngene: str | None = None
    """The one that is fine-tuned; None where auxiliary models are trained."""


def clothes(variants: dict[str, Variant], depths: tuple[int, ...] = DEPTHS) -> Experiment:
    data, teacher = "data/fashion-mnist-6000", "runs/study/seed0/teacher"
    return Experiment("study/auxiliary", data, teacher, variants, depths=depths, sets={"model.elastic": WIDE})


def tune(rate: str, epochs: int) -> Variant:
    """Return the study's fine-tuning at another rate, for other epochs, a fifth of which is its warm-up."""
    sets = {"optim.lr": float(rate), "train.epochs": epochs, "optim.warmup_epochs": epochs / 5}
    return Variant(f"{epochs} epoch{'s' * (epochs > 1)} at {rate}", sets)


EXPERIMENTS = {
    "digits": Experiment(
        "quickstart/auxiliary",
        "data/quickstart",
        "runs/quickstart/teacher",
        {
            "fixed": Variant("one depth, 10", {"model.elastic": None}),
            "uniform": Variant("5 to 12 layers", {"model.elastic": NARROW}),
            "sandwich": Variant("5 to 12 layers, sandwich", {"model.elastic": NARROW | {"rule": "sandwich"}}),
            "wide": Variant("5 to 15 layers", {"model.elastic": WIDE | {"branch_scaling": 0}}),
            "scaled": Variant("5 to 15 layers, branches scaled", {"model.elastic": WIDE}),
            "to_ten": Variant("5 to 10 layers, branches scaled", {"model.elastic": OWN}),
        },
    ),
    "clothes": clothes(
        {
            "study": Variant("5 distinct layers, trained at 5 to 15 layers with the teacher", {}),
            "to_ten": Variant("trained at 5 to 10 layers", {"model.elastic": OWN}),
            "to_eight": Variant("trained at 5 to 8 layers", {"model.elastic": {"min_depth": 5, "max_depth": 8}}),
            "one_depth": Variant(
                "trained at 10 layers alone, branches scaled", {"model.elastic": None, "model.kwargs.branch_scaling": 1}
            ),
            "unscaled": Variant("branches not scaled", {"model.elastic": WIDE | {"branch_scaling": 0}}),
            "sandwich": Variant("smallest, largest and a random depth in turn", {"model.elastic.rule": "sandwich"}),
            "two_stages": Variant("2 stages of 5 layers", {"model.schedule": [5, 5]}),
            "three_stages": Variant("3 stages of 3, 4 and 3 layers", {"model.schedule": [3, 4, 3]}),
            "middle": Variant("schedule 1-2-4-2-1, expanded evenly", {"model.schedule": [1, 2, 4, 2, 1]}),
            "proportional": Variant(
                "schedule 1-2-4-2-1, expanded in proportion",
                {
                    "model.schedule": [1, 2, 4, 2, 1],
                    "model.elastic.plan": "proportional",
                    "model.elastic.min_depth": 8,
                },
            ),
            "untaught": Variant("no teacher", {"distill.teacher": None}),
            "elements": Variant("loss divided by the classes too", {"distill.reduction": "elements"}),
            "averaged": Variant("moving average of the weights, 0.995", {"optim.ema_decay": 0.995}),
            "short": Variant("5 epochs", {"train.epochs": 5}),
            "long": Variant("20 epochs", {"train.epochs": 20}),
        }
    ),
    "characters": Experiment(
        "study/auxiliary",
        "data/characters-30000",
        "runs/study-characters/seed0/teacher",
        {
            "fixed": Variant("trained at 10 layers alone", {"model.elastic": None}),
            "one_depth": Variant(
                "trained at 10 layers alone, branches scaled", {"model.elastic": None, "model.kwargs.branch_scaling": 1}
            ),
            "auxiliary": Variant("trained at 5 to 10 layers", {}),
            "late": Variant("at 10 layers for seven epochs, then at 5 to 10", {"model.elastic.start_epoch": 7}),
            "fixed_6": Variant("six epochs, trained at 10 layers alone", {"model.elastic": None, "train.epochs": 6}),
            "auxiliary_6": Variant("six epochs, trained at 5 to 10 layers", {"train.epochs": 6}),
            "late_6": Variant(
                "six epochs, four at 10 layers, then at 5 to 10", {"train.epochs": 6, "model.elastic.start_epoch": 4}
            ),
        },
        depths=(5, 8, 10, 12, 16),
        sets={"model.elastic": OWN, "train.epochs": 10, "augment.hflip": 0},
    ),
    "optimizers": clothes(
        {
            f"{name}_{rate}_{epochs}": Variant(
                f"{title}, {rate}, {epochs} epochs",
                {"optim.name": name, "optim.lr": float(rate), "train.epochs": epochs},
            )
            for name, title, rate, lengths in (
                ("muon", "Muon", "3e-3", (5, 10, 20)),
                ("adamw", "AdamW", "1e-3", (5, 10, 20)),
                ("adamw", "AdamW", "2e-3", (10,)),
            )
            for epochs in lengths
        },
        depths=(5, 8, 10, 12, 16),
    ),
    "tuning": Experiment(
        "study/tuned",
        "data/fashion-mnist-6000",
        "runs/study/seed0/teacher",
        {f"{rate}_{epochs}": tune(rate, epochs) for epochs in (1, 5, 10) for rate in ("1e-4", "3e-4")},
        own_depth=12,
        depths=(12,),
        learngene="runs/study/seed0/auxiliary",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--runs", type=Path, help="folder for all runs (default: runs/EXPERIMENT)")
    parser.add_argument("--data", type=Path, help="default: where quickstart and study write it")
    parser.add_argument("--teacher", type=Path, help="its model.safetensors (default: where they write it)")
    parser.add_argument("--learngene", type=Path, help="the one that is fine-tuned (default: where they write it)")
    parser.add_argument("--variants", nargs="+", help="some of the experiment's (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, on one core each")
    parser.add_argument("--out", type=Path, help="write the results here as JSON, beside other variants that it holds")
    parser.add_argument("--chart", type=Path, help="draw three variants of the digits here")
    args = parser.parse_args()
    experiment = EXPERIMENTS[args.experiment]
    if unknown := set(args.variants or ()) - set(experiment.variants):
        parser.error(f"--variants: {args.experiment} has no {', '.join(sorted(unknown))}")
    folder = args.runs or Path("runs") / args.experiment
    data = args.data or Path(experiment.data)
    teacher = args.teacher or Path(experiment.teacher) / "model.safetensors"

    def train_one(name: str, seed: int) -> dict[str, Any]:
        sets = {"data.root": str(data.resolve()), "distill.teacher": str(teacher.resolve()), "train.seed": seed}
        sets |= experiment.sets
        if experiment.learngene:
            learngene = args.learngene or Path(experiment.learngene) / "learngene.safetensors"
            sets |= {"model.initial_learngene": str(learngene.resolve()), "model.depth": experiment.own_depth}
        return train(folder / f"{name}-{seed}", experiment, sets | experiment.variants[name].sets)

    with ThreadPoolExecutor(args.jobs) as pool:
        due = {
            name: [pool.submit(train_one, name, seed) for seed in args.seeds]
            for name in args.variants or experiment.variants
        }
        runs = {name: [future.result() for future in futures] for name, futures in due.items()}
    results = {name: summarise(experiment, name, found) for name, found in runs.items()}
    print(table(results, experiment.depths))
    if args.out:
        first = next(iter(runs.values()))[0]
        written = {key: first[key] for key in ("versions", "hardware")} | {"depths": experiment.depths}
        before = json.loads(args.out.read_text())["variants"] if args.out.is_file() else {}
        atomic_write_json(args.out, written | {"variants": before | results})
    if args.chart:
        draw(results, args.chart)


def train(output: Path, experiment: Experiment, sets: dict[str, Any]) -> dict[str, Any]:
    """Train one model, unless it is there. Returns what its ``metrics.json`` holds."""
    metrics = output / "metrics.json"
    if not metrics.is_file():
        epochs = sets.get("train.epochs") or load_config(experiment.config).train.epochs
        sets = sets | {
            "output": str(output.resolve()),
            "train.eval_every": epochs,
            "checkpoint.every": epochs,
            "train.eval_depths": [depth for depth in experiment.depths if depth != experiment.own_depth],
        }
        command = [sys.executable, "launcher/train.py", "--config", f"configs/runs/{experiment.config}.yaml"]
        command += ["--deepspeed_config", "configs/deepspeed/zero0.json", "--resume", "auto"]
        command += [word for key, value in sets.items() for word in ("--set", f"{key}={json.dumps(value)}")]
        environment = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **os.environ}
        output.parent.mkdir(parents=True, exist_ok=True)
        with output.with_suffix(".log").open("w") as log:
            subprocess.run(command, cwd=ROOT, check=True, env=environment, stdout=log, stderr=subprocess.STDOUT)
    return json.loads(metrics.read_text())


def summarise(experiment: Experiment, name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return top-1 in percent by depth for each seed, the mean operations of the training, and where it was made."""
    last = [run["history"][-1] for run in runs]
    averaged = any(key.startswith("val_ema") for key in last[0])
    keys = ["" if depth == experiment.own_depth else f"_depth{depth}" for depth in experiment.depths]
    top1 = [[round(100 * point[f"val{'_ema' * averaged}{key}/top1"], 2) for key in keys] for point in last]
    return {
        "label": experiment.variants[name].label,
        "seeds": [run["seed"] for run in runs],
        "top1": top1,
        "pflop": round(mean(run["flops"] for run in runs) / 1e15, 5),
        "commits": sorted({run["commit"] for run in runs}),
    }


def table(results: dict[str, dict[str, Any]], depths: tuple[int, ...]) -> str:
    """Return the results as a table in Markdown: the mean over the seeds at some depths, and over all depths."""
    shown = [depth for depth in (5, 8, 10, 12, 16) if depth in depths]
    rows = [
        f"| variant | {' | '.join(map(str, shown))} | mean of all {len(depths)} | PFLOP |",
        "|---|" + "--:|" * (len(shown) + 2),
    ]
    for result in results.values():
        means = [mean(seeds) for seeds in zip(*result["top1"], strict=True)]
        cells = [f"{means[depths.index(depth)]:.1f}" for depth in shown] + [f"{mean(means):.1f}"]
        rows.append(f"| {result['label']} | {' | '.join(cells)} | {result['pflop']:.4f} |")
    return "\n".join(rows)


def draw(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw accuracy against depth: each seed as a point, their mean as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 3.8))
    colours = {"fixed": "#888888", "wide": "#1f77b4", "to_ten": "#2ca02c"}
    for name, colour in colours.items():
        seeds = results[name]["top1"]
        axes.plot(DEPTHS, [mean(column) for column in zip(*seeds, strict=True)], color=colour)
        for seed in seeds:
            axes.plot(DEPTHS, seed, "o", color=colour, markersize=3, alpha=0.6)
        axes.plot([], [], "o-", color=colour, markersize=3, label=f"trained at {results[name]['label']}")
    axes.set(xlabel="layers of the descendant", ylabel="validation top-1 (%), untuned", xticks=list(DEPTHS))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
