"""Start training as a user does, through DeepSpeed's launcher, with a hard time limit.

That takes 15 seconds and more on two cores. What does not depend on the launcher is started with ``tests.runs``.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.ranks import free_port

REPOSITORY = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Job:
    """One training run: ``sets`` are config overrides, ``ds`` a DeepSpeed config."""

    config: Path
    output: Path
    ds: dict[str, Any]
    sets: dict[str, Any] = field(default_factory=dict)
    resume: str | None = None

    def overrides(self) -> list[str]:
        values = {"output": str(self.output), **self.sets}
        return [f"{key}={json.dumps(value, default=str)}" for key, value in values.items()]

    @property
    def ds_path(self) -> Path:
        """Return the file that ``ds_file`` writes: another for another DeepSpeed config of the same run."""
        return self.output.with_suffix(f".{zlib.crc32(json.dumps(self.ds).encode()):08x}.json")

    def ds_file(self) -> Path:
        """Write the DeepSpeed config."""
        self.ds_path.parent.mkdir(parents=True, exist_ok=True)
        self.ds_path.write_text(json.dumps(self.ds))
        return self.ds_path


def deepspeed(*arguments: str, ranks: int, timeout_s: float = 600) -> subprocess.CompletedProcess[str]:
    """Run ``deepspeed --num_accelerators <ranks> <arguments>``; past the limit all its processes are killed."""
    process = _launch(arguments, ranks, subprocess.PIPE)
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"still running after {timeout_s} s: {process.args}\n{output[-6000:]}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, output)


def _launch(arguments: Sequence[str], ranks: int, stdout: Any) -> subprocess.Popen[str]:
    """Start the launcher in a process group of its own, as a shell does."""
    command = [str(BIN / "deepspeed"), "--num_accelerators", str(ranks), "--master_port", str(free_port()), *arguments]
    environment = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    # One environment, one cache of compiled operators: the common one is compiled anew for each other's sources.
    environment["TORCH_EXTENSIONS_DIR"] = str(BIN.parent / "torch_extensions")
    return subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=environment,
        text=True,
        stdout=stdout,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


class Underway(ABC):
    """A run under way, for tests that disturb it."""

    job: Job

    @abstractmethod
    def said(self) -> str:
        """Return everything that it has printed so far."""

    @abstractmethod
    def ranks(self) -> list[psutil.Process]:
        """Return its ranks, in their order."""

    @abstractmethod
    def ended(self) -> bool:
        """Return whether nothing of it runs any more."""

    def wait_for(self, what: Callable[[], object], timeout_s: float = 600) -> None:
        """Wait until ``what()`` is true; fail if the run ends before that."""
        deadline = time.monotonic() + timeout_s
        while not what():
            ended = self.ended()
            if what():
                return
            assert not ended, f"ended before it came to that: {self.said()[-6000:]}"
            assert time.monotonic() < deadline, f"not within {timeout_s} s: {self.said()[-6000:]}"
            time.sleep(0.01)

    def wait_for_step(self, step: int) -> None:
        self.wait_for(lambda: any(entry["step"] >= step for entry in log(self.job.output)))

    def errors(self) -> list[str]:
        return [line for line in self.said().splitlines() if line.startswith("error: ")]


@dataclass
class Running(Underway):
    """A run of DeepSpeed's launcher: its process, and the file that it prints to."""

    job: Job
    process: subprocess.Popen[str]
    printed: Path

    def said(self) -> str:
        return self.printed.read_text()

    def processes(self) -> list[psutil.Process]:
        """Return the launchers' and the ranks' processes."""
        main = psutil.Process(self.process.pid)
        return [main, *main.children(recursive=True)]

    def ranks(self) -> list[psutil.Process]:
        found = [p for p in self.processes() if any(a.startswith("--local_rank=") for a in p.cmdline())]
        return sorted((p for p in found if "deepspeed.launcher.launch" not in p.cmdline()), key=psutil.Process.cmdline)

    def ended(self) -> bool:
        return self.process.poll() is not None


@contextmanager
def running(job: Job, ranks: int) -> Iterator[Running]:
    """Start what ``train`` runs to its end; whatever is left of it at the end of the block is killed."""
    printed = job.config.with_name(f"{job.output.name}.printed.txt")
    printed.parent.mkdir(parents=True, exist_ok=True)
    with printed.open("w") as file:
        process = _launch(train_arguments(job), ranks, file)
    try:
        yield Running(job, process, printed)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def train(job: Job, ranks: int, timeout_s: float = 600) -> subprocess.CompletedProcess[str]:
    """Run ``deepspeed launcher/train.py ...`` to its end, as a user does."""
    return deepspeed(*train_arguments(job), ranks=ranks, timeout_s=timeout_s)


def train_alone(job: Job, timeout_s: float = 600) -> subprocess.CompletedProcess[str]:
    """Run ``python launcher/train.py ...`` to its end: for what is decided while torch and others are imported."""
    return subprocess.run(
        [sys.executable, *train_arguments(job)],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
    )


def train_arguments(job: Job) -> list[str]:
    """Return the script and its arguments; writes the DeepSpeed config."""
    arguments = ["launcher/train.py", "--config", str(job.config), "--deepspeed_config", str(job.ds_file())]
    arguments += [part for override in job.overrides() for part in ("--set", override)]
    return arguments + (["--resume", job.resume] if job.resume else [])


def log(output: Path) -> list[dict[str, float]]:
    """Read a run's ``log.jsonl`` as far as its lines are whole; empty before there is one."""
    file = output / "log.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def losses(output: Path) -> list[float]:
    """Return the training loss of every logged step, in order."""
    return [entry["train/loss"] for entry in log(output) if "train/loss" in entry]
