"""Start real training processes through DeepSpeed's launcher, with a hard time limit."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

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
        return [f"{key}={json.dumps(value)}" for key, value in values.items()]

    def ds_file(self) -> Path:
        file = self.output.with_suffix(".deepspeed.json")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(self.ds))
        return file


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def deepspeed(*arguments: str, ranks: int, timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
    """``deepspeed --num_accelerators <ranks> <arguments>``; past the limit all its processes are killed."""
    process = _launch(arguments, ranks, subprocess.PIPE)
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"still running after {timeout_s} s: {process.args}\n{output[-6000:]}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, output)


def _launch(arguments: Sequence[str], ranks: int, stdout: Any) -> subprocess.Popen[str]:
    """In a process group of its own, as a shell starts it."""
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


@dataclass
class Running:
    """A run under way: the launcher's process, and the file that it prints to."""

    job: Job
    process: subprocess.Popen[str]
    printed: Path

    def said(self) -> str:
        return self.printed.read_text()

    def processes(self) -> list[psutil.Process]:
        """The launchers' and the ranks'."""
        main = psutil.Process(self.process.pid)
        return [main, *main.children(recursive=True)]

    def ranks(self) -> list[psutil.Process]:
        """In the order of their ranks."""
        found = [p for p in self.processes() if any(a.startswith("--local_rank=") for a in p.cmdline())]
        return sorted((p for p in found if "deepspeed.launcher.launch" not in p.cmdline()), key=psutil.Process.cmdline)

    def wait_for(self, what: Callable[[], object], timeout_s: float = 240) -> None:
        deadline = time.monotonic() + timeout_s
        while not what():
            assert self.process.poll() is None, f"ended before it came to that: {self.said()[-6000:]}"
            assert time.monotonic() < deadline, f"not within {timeout_s} s: {self.said()[-6000:]}"
            time.sleep(0.01)

    def wait_for_step(self, step: int) -> None:
        self.wait_for(lambda: any(entry["step"] >= step for entry in log(self.job.output)))


@contextmanager
def running(job: Job, ranks: int) -> Iterator[Running]:
    """``train``, to be disturbed: whatever is left of it at the end of the block is killed."""
    printed = job.config.with_name(f"{job.output.name}.printed.txt")
    printed.parent.mkdir(parents=True, exist_ok=True)
    with printed.open("w") as file:
        process = _launch(_train_arguments(job), ranks, file)
    try:
        yield Running(job, process, printed)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def train(job: Job, ranks: int, timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
    """One run as a user starts it: ``deepspeed launcher/train.py ...``."""
    return deepspeed(*_train_arguments(job), ranks=ranks, timeout_s=timeout_s)


def _train_arguments(job: Job) -> list[str]:
    arguments = ["launcher/train.py", "--config", str(job.config), "--deepspeed_config", str(job.ds_file())]
    arguments += [part for override in job.overrides() for part in ("--set", override)]
    return arguments + (["--resume", job.resume] if job.resume else [])


def train_all(
    jobs: list[Job], ranks: int, folder: Path, timeout_s: float = 400, module: str = "tests.distributed.worker"
) -> None:
    """Several runs one after another in one group of ranks."""
    listed = [
        {
            "config": str(job.config),
            "overrides": job.overrides(),
            "deepspeed_config": str(job.ds_file()),
            "resume": job.resume,
        }
        for job in jobs
    ]
    file = folder / f"jobs-{ranks}.json"
    file.write_text(json.dumps(listed))
    done = deepspeed("--module", module, str(file), ranks=ranks, timeout_s=timeout_s)
    assert done.returncode == 0, done.stdout[-6000:]


def log(output: Path) -> list[dict[str, float]]:
    """A run's ``log.jsonl``, as far as its lines are whole; empty before there is one."""
    file = output / "log.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def losses(output: Path) -> list[float]:
    """The training loss of every logged step, in order."""
    return [entry["train/loss"] for entry in log(output) if "train/loss" in entry]
