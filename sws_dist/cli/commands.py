"""Start ordinary commands one after another or side by side, as a user would, and skip those that are done.

The quickstart and the study are made of such commands. Each is printed before it runs.
"""

from __future__ import annotations

import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sws_dist import source_tree
from sws_dist.config.loader import load_config
from sws_dist.config.paths import escape_path
from sws_dist.config.resume import require_own
from sws_dist.distributed.launch_env import free_port
from sws_dist.errors import RunError

FREE_PORT = "FREE_PORT"
"""Stands for a port that is chosen when the command starts; DeepSpeed's own, 29500, may be in use."""

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
    check_done: Callable[[], object] | None = None
    """Raises ConfigError if what is done is something else than this command would do."""


def prepare_devices() -> int:
    """Let all commands run on the CPU where there is no GPU.

    Returns:
        The number of ranks of a run that has the machine to itself: one for each GPU, two at most; on the CPU two.
    """
    import torch  # takes seconds: not before the command line is known to be right

    from sws_dist.distributed.init import has_gpu

    num_gpus = torch.cuda.device_count() if has_gpu() else 0
    if not num_gpus:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or each process warns that it finds no other
    return min(2, num_gpus) or 2


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
    """Return the command of a training run: with DeepSpeed's launcher, which one rank starts sooner without.

    Args:
        config: the name of a run config, such as ``quickstart/teacher``.
        sets: config overrides.
        beside_others: True if other runs go on at the same time; the output then goes into a file.
    """
    if ranks == 1:
        command = list(sws("train"))
    else:
        # As a module: the first line of the script deepspeed cannot name an interpreter whose path has a space.
        command = [Path(sys.executable).name, "-m", "deepspeed.launcher.runner", "--quiet"]
        command += ["--num_accelerators", str(ranks), "--master_port", FREE_PORT]
        command += ["launcher/train.py"] if in_checkout() else ["--module", "sws_dist.cli.train"]
    if in_checkout():
        config_file, deepspeed_config = f"configs/runs/{config}.yaml", "configs/deepspeed/zero2.json"
    else:
        config_file, deepspeed_config = config, "zero2"
    command += ["--config", config_file, "--deepspeed_config", deepspeed_config]
    overrides = [f"output={escape_path(output)}", f"train.seed={seed}", *sets]
    for override in overrides:
        command += ["--set", override]
    command += ["--resume", "auto", *options]
    log_file = output.with_suffix(".log") if beside_others else None
    return Command(
        title, tuple(command), output / "metrics.json", log_file, lambda: require_own(load_config(config, overrides))
    )


def perform(command: Command) -> None:
    """Log a command and run it, unless it is done.

    Raises:
        RunError: the command failed.
        ConfigError: what is there was made by another one.
    """
    if command.title:
        log.info(f"\n# {command.title}")
    if command.done is not None and command.done.exists():
        if command.check_done is not None:
            command.check_done()
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
