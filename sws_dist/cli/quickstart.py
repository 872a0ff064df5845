"""The whole road on real images, GPU or none: teacher, auxiliary model, learngene, descendants, report.

Each step is an ordinary command, printed before it runs; what is already there is not done again, and a run that
was interrupted goes on where it stopped.

examples:
  make quickstart                                   # seed 0, into runs/quickstart
  python launcher/quickstart.py --seed 1 --output runs/quickstart-1
"""

from __future__ import annotations

import itertools
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from sws_dist.cli.common import make_parser, parse_args
from sws_dist.errors import RunError

DATA = Path("data/quickstart")
CONFIGS = Path("configs/runs/quickstart")
DEPTHS = (5, 8, 10, 12)  # the auxiliary model has 5 stages and 10 layers


@dataclass(frozen=True)
class Step:
    """One command, and the file whose presence says that it is done."""

    title: str
    command: tuple[str, ...]
    done: Path
    log: Path | None = None
    """Where its output goes; None: to the terminal."""


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"), help="folder for all runs")
    parser.add_argument("--seed", type=int, default=0, help="of every run (default 0)")
    args = parse_args(parser)
    out, begun = args.output, time.monotonic()
    teacher, auxiliary = out / "teacher", out / "auxiliary"
    taught = f"distill.teacher={teacher}/model.safetensors"

    ranks = min(2, torch.cuda.device_count()) or 2  # without a GPU two ranks share the CPU

    python = Path(sys.executable).name
    perform(Step("the data", (python, "-m", "sws_dist.data.digits", str(DATA)), DATA / "train"))
    perform(train("1. a teacher", "teacher", teacher, args.seed, ranks=ranks))
    perform(train("2. the auxiliary model", "auxiliary", auxiliary, args.seed, taught, ranks=ranks))
    print("\n# 3. the learngene, expanded to four depths", flush=True)
    for depth in DEPTHS:
        file = out / f"depth{depth}" / "expanded.safetensors"
        command = (python, "launcher/expand.py", "--learngene", f"{auxiliary}/learngene.safetensors")
        perform(Step("", (*command, "--depth", str(depth), "--out", str(file)), file))
    print("\n# 4. descendants, each beside the same model from random weights; two runs at a time", flush=True)
    with ThreadPoolExecutor(max_workers=2) as pool:
        list(pool.map(perform, descendants(out, args.seed)))
    perform(Step("5. the report", (python, "launcher/report.py", "--runs", str(out)), out / "always made anew"))
    print(
        f"\nfinished in {time.monotonic() - begun:.0f} s\n"
        f"  the report     {out}/report.md, {out}/report.png\n"
        f"  every curve    {Path(sys.executable).parent}/tensorboard --logdir {out}",
        flush=True,
    )


def train(title: str, config: str, output: Path, seed: int, *overrides: str, ranks: int = 1, port: int = 0) -> Step:
    """A training run through DeepSpeed's launcher; with a port of its own it may run beside others, into a log."""
    command = ["deepspeed", "--num_accelerators", str(ranks)]
    command += ["--master_port", str(port)] if port else []
    command += ["launcher/train.py"]
    command += ["--config", f"{CONFIGS}/{config}.yaml", "--deepspeed_config", "configs/deepspeed/zero2.json"]
    sets = [f"output={output}", f"train.seed={seed}", *overrides]
    command += [part for override in sets for part in ("--set", override)]
    command += ["--resume", "auto"]
    return Step(title, tuple(command), output / "metrics.json", output.with_suffix(".log") if port else None)


def descendants(out: Path, seed: int) -> list[Step]:
    """For each depth: expanded and fine-tuned; from scratch with the same recipe; from scratch with the full budget."""
    ports = itertools.count(29501)
    steps = []
    for depth in sorted(DEPTHS, reverse=True):  # the long ones first, so that both workers end together
        folder, layers = out / f"depth{depth}", f"model.depth={depth}"
        expanded = f"model.initial_checkpoint={folder}/expanded.safetensors"
        steps += [
            train("", "scratch_full", folder / "scratch_full", seed, layers, port=next(ports)),
            train("", "scratch", folder / "scratch", seed, layers, port=next(ports)),
            train("", "descendant", folder / "tuned", seed, layers, expanded, port=next(ports)),
        ]
    return steps


def perform(step: Step) -> None:
    """Print a step's command and run it, unless it is done."""
    if step.title:
        print(f"\n# {step.title}", flush=True)
    if step.done.exists():
        print(f"# {step.done} is there", flush=True)
        return
    print(f"$ {shlex.join(step.command)}" + (f" > {step.log}" if step.log else ""), flush=True)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    if step.log is None:
        code = subprocess.run(step.command, env=environment).returncode
    else:
        environment.setdefault("OMP_NUM_THREADS", "1")  # runs side by side must not fight for the cores
        step.log.parent.mkdir(parents=True, exist_ok=True)
        with step.log.open("a") as log:
            code = subprocess.run(step.command, env=environment, stdout=log, stderr=subprocess.STDOUT).returncode
    if code:
        seen = f"; see {step.log}" if step.log else ""
        raise RunError(f"this command ended with exit code {code}{seen}:\n  {shlex.join(step.command)}")
