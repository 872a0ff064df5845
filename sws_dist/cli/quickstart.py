"""Run the whole method on real images, GPU or none: teacher, auxiliary model, descendants, report.

Each step is an ordinary command, printed before it runs; what is already there is not done again, and a run that
was interrupted goes on where it stopped. Data and runs are written to the current folder.

examples:
  sws quickstart                                    # seed 0, into runs/quickstart; make quickstart in a checkout
  sws quickstart --seed 1 --output runs/quickstart-1
"""

from __future__ import annotations

import itertools
import logging
import os
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from sws_dist import source_tree
from sws_dist.cli.common import make_parser, parse_args, print_result
from sws_dist.errors import RunError

DATA = Path("data/quickstart")
DEPTHS = (5, 8, 10, 12)  # the auxiliary model has 5 stages and 10 layers

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Step:
    """One command, and the file whose presence says that it is done."""

    title: str
    command: tuple[str, ...]
    done: Path
    log_file: Path | None = None
    """Where the command's output goes; None: to the terminal."""


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"), help="folder for all runs")
    parser.add_argument("--seed", type=int, default=0, help="of every run (default 0)")
    args = parse_args(parser)
    quiet = ("--quiet",) if args.quiet else ()
    out, begun = args.output, time.monotonic()
    teacher, auxiliary = out / "teacher", out / "auxiliary"
    taught = f"distill.teacher={teacher}/model.safetensors"
    num_gpus = count_gpus()
    ranks = min(2, num_gpus) or 2  # without a GPU two ranks share the CPU
    if not num_gpus:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or each process warns that it finds no other

    python = Path(sys.executable).name
    perform(Step("the data", (python, "-m", "sws_dist.data.digits", str(DATA)), DATA / "train"))
    perform(train("1. a teacher", "teacher", teacher, args.seed, *quiet, ranks=ranks))
    perform(train("2. the auxiliary model", "auxiliary", auxiliary, args.seed, *quiet, sets=[taught], ranks=ranks))
    log.info("\n# 3. the learngene, expanded to four depths")
    for depth in DEPTHS:
        file = out / f"depth{depth}" / "expanded.safetensors"
        options = ("--learngene", f"{auxiliary}/learngene.safetensors", "--depth", str(depth), "--out", str(file))
        perform(Step("", (*sws("expand"), *options, *quiet), file))
    log.info("\n# 4. descendants, each beside the same model from random weights; two runs at a time")
    with ThreadPoolExecutor(max_workers=2) as pool:
        list(pool.map(perform, descendants(out, args.seed)))
    perform(Step("5. the report", (*sws("report"), "--runs", str(out), *quiet), out / "always made anew"))
    log.info(f"\nfinished in {time.monotonic() - begun:.0f} s")
    tensorboard = "tensorboard" if shutil.which("tensorboard") else f"{Path(sys.executable).parent}/tensorboard"
    print_result(f"the report   {out}/report.md, {out}/report.png\nevery curve  {tensorboard} --logdir {out}")


def count_gpus() -> int:
    """Count the GPUs that training would use."""
    import torch  # takes seconds: not before the command line is known to be right

    return 0 if os.environ.get("DS_ACCELERATOR") == "cpu" else torch.cuda.device_count()


def in_checkout() -> bool:
    """Return True in the top folder of a checkout, whose scripts and configs are then named by their paths."""
    return not source_tree.is_installed() and Path.cwd() == source_tree.PACKAGE.parent


def sws(command: str) -> tuple[str, ...]:
    """Return how a user starts a command: ``sws expand``, or ``python launcher/expand.py`` in a checkout."""
    return (Path(sys.executable).name, f"launcher/{command}.py") if in_checkout() else ("sws", command)


def train(
    title: str,
    config: str,
    output: Path,
    seed: int,
    *options: str,
    sets: list[str] | tuple[str, ...] = (),
    ranks: int = 1,
    port: int = 0,
) -> Step:
    """Return a training run through DeepSpeed's launcher.

    Args:
        config: the name of one of the quickstart's configs.
        sets: config overrides.
        port: with a port of its own, the run may take place beside others; its output goes into a file.
    """
    if in_checkout():
        program = ["launcher/train.py", "--config", f"configs/runs/quickstart/{config}.yaml"]
        program += ["--deepspeed_config", "configs/deepspeed/zero2.json"]
    else:
        program = ["--module", "sws_dist.cli.train", "--config", f"quickstart/{config}", "--deepspeed_config", "zero2"]
    command = ["deepspeed", "--quiet", "--num_accelerators", str(ranks)]
    command += ["--master_port", str(port)] if port else []
    command += program
    for override in (f"output={output}", f"train.seed={seed}", *sets):
        command += ["--set", override]
    command += ["--resume", "auto", *options]
    return Step(title, tuple(command), output / "metrics.json", output.with_suffix(".log") if port else None)


def descendants(out: Path, seed: int) -> list[Step]:
    """Return three runs a depth: expanded and fine-tuned, from scratch with the same recipe or with the full budget."""
    ports = itertools.count(29501)
    steps = []
    for depth in sorted(DEPTHS, reverse=True):  # the long ones first, so that both workers end together
        folder, layers = out / f"depth{depth}", f"model.depth={depth}"
        expanded = f"model.initial_checkpoint={folder}/expanded.safetensors"
        steps += [
            train("", "scratch_full", folder / "scratch_full", seed, sets=[layers], port=next(ports)),
            train("", "scratch", folder / "scratch", seed, sets=[layers], port=next(ports)),
            train("", "descendant", folder / "tuned", seed, sets=[layers, expanded], port=next(ports)),
        ]
    return steps


def perform(step: Step) -> None:
    """Log a step's command and run it, unless it is done.

    Raises:
        RunError: the command failed.
    """
    if step.title:
        log.info(f"\n# {step.title}")
    if step.done.exists():
        log.info(f"# {step.done} is there")
        return
    log.info(f"$ {shlex.join(step.command)}" + (f" > {step.log_file}" if step.log_file else ""))
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    if step.log_file is None:
        code = subprocess.run(step.command, env=environment).returncode
    else:
        environment.setdefault("OMP_NUM_THREADS", "1")  # runs side by side must not fight for the cores
        step.log_file.parent.mkdir(parents=True, exist_ok=True)
        with step.log_file.open("a") as file:
            code = subprocess.run(step.command, env=environment, stdout=file, stderr=subprocess.STDOUT).returncode
    if code:
        seen = f"; see {step.log_file}" if step.log_file else ""
        raise RunError(f"this command ended with exit code {code}{seen}:\n  {shlex.join(step.command)}")
