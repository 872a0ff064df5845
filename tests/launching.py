"""Start real training processes through DeepSpeed's launcher, with a hard time limit."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
    command = [str(BIN / "deepspeed"), "--num_accelerators", str(ranks), "--master_port", str(free_port()), *arguments]
    environment = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    # One environment, one cache of compiled operators: the common one is compiled anew for each other's sources.
    environment["TORCH_EXTENSIONS_DIR"] = str(BIN.parent / "torch_extensions")
    process = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"still running after {timeout_s} s: {command}\n{output[-6000:]}") from None
    return subprocess.CompletedProcess(command, process.returncode, output)


def train(job: Job, ranks: int, timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
    """One run as a user starts it: ``deepspeed launcher/train.py ...``."""
    arguments = ["launcher/train.py", "--config", str(job.config), "--deepspeed_config", str(job.ds_file())]
    arguments += [part for override in job.overrides() for part in ("--set", override)]
    arguments += ["--resume", job.resume] if job.resume else []
    return deepspeed(*arguments, ranks=ranks, timeout_s=timeout_s)


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
    """A run's ``log.jsonl``."""
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def losses(output: Path) -> list[float]:
    """The training loss of every logged step, in order."""
    return [entry["train/loss"] for entry in log(output) if "train/loss" in entry]
