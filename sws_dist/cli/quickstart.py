"""Run the whole method on real images, GPU or none: teacher, auxiliary model, descendants, report.

Each step is an ordinary command, printed before it runs; what is already there is not done again, and a run that
was interrupted goes on where it stopped. Data and runs are written to the current folder.

examples:
  sws quickstart                                    # seed 0, into runs/quickstart; make quickstart in a checkout
  sws quickstart --seed 1 --output runs/quickstart-1
"""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from sws_dist import source_tree
from sws_dist.cli.common import make_parser, parse_args, print_result, whole_number
from sws_dist.config.paths import escape_path
from sws_dist.distributed.launch_env import free_port
from sws_dist.errors import RunError

DATA = Path("data/quickstart")
FREE_PORT = "FREE_PORT"
"""Stands for a port that is chosen when the command starts; DeepSpeed's own, 29500, may be in use."""
DEPTHS = (5, 8, 10, 12)  # the auxiliary model has 5 stages and 10 layers

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Command:
    """One command, and the file whose presence says that it is done."""

    title: str
    words: tuple[str, ...]
    done: Path | None
    """None: the command runs again each time."""
    log_file: Path | None = None
    """The file that takes the command's output; None for the terminal."""


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"), help="folder for all runs")
    parser.add_argument("--seed", type=whole_number(0, 2**32 - 1), default=0, help="of every run (default 0)")
    args = parse_args(parser, one_process=True)
    missing = [name for name in ("sklearn", "matplotlib", "nvidia") if find_spec(name) is None]
    if missing:
        raise ValueError(f"missing: {', '.join(missing)}; pip install 'sws-dist[dali,quickstart]' brings them")
    quiet = ("--quiet",) if args.quiet else ()
    out, begun = args.output, time.monotonic()
    teacher, auxiliary = out / "teacher", out / "auxiliary"
    taught = f"distill.teacher={escape_path(teacher)}/model.safetensors"
    num_gpus = count_gpus()
    ranks = min(2, num_gpus) or 2  # without a GPU two ranks share the CPU
    if not num_gpus:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or each process warns that it finds no other

    python = Path(sys.executable).name
    perform(Command("the data", (python, "-m", "sws_dist.data.digits", str(DATA)), DATA / "train"))
    perform(train_command("1. a teacher", "teacher", teacher, args.seed, *quiet, ranks=ranks))
    perform(
        train_command("2. the auxiliary model", "auxiliary", auxiliary, args.seed, *quiet, sets=[taught], ranks=ranks)
    )
    log.info("\n# 3. the learngene, expanded to four depths")
    for depth in DEPTHS:
        file = out / f"depth{depth}" / "expanded.safetensors"
        learngene = f"{escape_path(auxiliary)}/learngene.safetensors"
        options = ("--learngene", learngene, "--depth", str(depth), "--out", escape_path(file))
        perform(Command("", (*sws("expand"), *options, *quiet), file))
    log.info("\n# 4. descendants, each beside the same model from random weights; two runs at a time")
    with ThreadPoolExecutor(max_workers=2) as pool:
        list(pool.map(perform, descendant_commands(out, args.seed)))
    perform(Command("5. the report", (*sws("report"), "--runs", escape_path(out), *quiet), done=None))
    log.info(f"\nfinished in {time.monotonic() - begun:.0f} s")
    tensorboard = "tensorboard" if shutil.which("tensorboard") else f"{Path(sys.executable).parent}/tensorboard"
    folder = shlex.quote(str(out))
    print_result(f"the report   {out}/report.md, {out}/report.png\nevery curve  {tensorboard} --logdir {folder}")


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


def train_command(
    title: str,
    config: str,
    output: Path,
    seed: int,
    *options: str,
    sets: list[str] | tuple[str, ...] = (),
    ranks: int = 1,
    beside_others: bool = False,
) -> Command:
    """Return a training run through DeepSpeed's launcher.

    Args:
        config: the name of one of the quickstart's configs.
        sets: config overrides.
        beside_others: other runs take place at the same time; the output goes into a file.
    """
    if in_checkout():
        program = ["launcher/train.py", "--config", f"configs/runs/quickstart/{config}.yaml"]
        program += ["--deepspeed_config", "configs/deepspeed/zero2.json"]
    else:
        program = ["--module", "sws_dist.cli.train", "--config", f"quickstart/{config}", "--deepspeed_config", "zero2"]
    # As a module: the first line of the script deepspeed cannot name an interpreter whose path has a space.
    command = [Path(sys.executable).name, "-m", "deepspeed.launcher.runner", "--quiet"]
    command += ["--num_accelerators", str(ranks), "--master_port", FREE_PORT, *program]
    for override in (f"output={escape_path(output)}", f"train.seed={seed}", *sets):
        command += ["--set", override]
    command += ["--resume", "auto", *options]
    log_file = output.with_suffix(".log") if beside_others else None
    return Command(title, tuple(command), output / "metrics.json", log_file)


def descendant_commands(out: Path, seed: int) -> list[Command]:
    """Return three runs a depth: expanded and fine-tuned, from scratch with the same recipe or with the full budget."""
    commands = []
    for depth in sorted(DEPTHS, reverse=True):  # the long ones first, so that both workers end together
        folder, layers = out / f"depth{depth}", f"model.depth={depth}"
        expanded = f"model.initial_checkpoint={escape_path(folder)}/expanded.safetensors"
        commands += [
            train_command("", "scratch_full", folder / "scratch_full", seed, sets=[layers], beside_others=True),
            train_command("", "scratch", folder / "scratch", seed, sets=[layers], beside_others=True),
            train_command("", "descendant", folder / "tuned", seed, sets=[layers, expanded], beside_others=True),
        ]
    return commands


def perform(command: Command) -> None:
    """Log a command and run it, unless it is done.

    Raises:
        RunError: the command failed.
    """
    if command.title:
        log.info(f"\n# {command.title}")
    if command.done is not None and command.done.exists():
        log.info(f"# {command.done} is there")
        return
    words = [str(free_port()) if word == FREE_PORT else word for word in command.words]
    log.info(f"$ {shlex.join(words)}" + (f" > {command.log_file}" if command.log_file else ""))
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    if command.log_file is None:
        code = subprocess.run(words, env=environment).returncode
    else:
        environment.setdefault("OMP_NUM_THREADS", "1")  # runs side by side must not fight for the cores
        command.log_file.parent.mkdir(parents=True, exist_ok=True)
        with command.log_file.open("a") as file:
            code = subprocess.run(words, env=environment, stdout=file, stderr=subprocess.STDOUT).returncode
    if code:
        seen = f"; see {command.log_file}" if command.log_file else ""
        raise RunError(f"this command ended with exit code {code}{seen}:\n  {shlex.join(words)}")
