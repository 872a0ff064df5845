"""Training runs in the fast ranks of ``tests.ranks``: the real ``launcher/train.py``, without DeepSpeed's launcher."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil

from sws_dist.build import build_run
from sws_dist.config.loader import load_config
from sws_dist.logging.console import setup_console
from sws_dist.trainer import Trainer
from tests import ranks as pool
from tests.launching import Job, Underway, train_arguments


def train(job: Job, ranks: int, timeout_s: float = pool.LIMIT_S) -> subprocess.CompletedProcess[str]:
    """Run ``launcher/train.py`` to its end in every rank; with one, as plain ``python`` does."""
    return pool.script(*train_arguments(job), world=ranks, timeout_s=timeout_s)


@dataclass
class Running(Underway):
    """A run under way."""

    job: Job
    group: pool.Group

    def said(self) -> str:
        return self.group.printed()

    def ranks(self) -> list[psutil.Process]:
        return self.group.processes

    def ended(self) -> bool:
        return None not in self.group.exitcodes()

    def wait(self) -> list[int]:
        """Wait for the exit codes of all ranks."""
        return self.group.wait()


@contextmanager
def running(job: Job, ranks: int) -> Iterator[Running]:
    """Start what ``train`` runs to its end; whatever is left of it at the end of the block is killed."""
    with pool.start_script(*train_arguments(job), world=ranks) as group:
        yield Running(job, group)


def train_all(jobs: list[Job], ranks: int) -> None:
    """Run several jobs one after another in one group of ranks."""
    for job in jobs:
        job.ds_file()
    pool.run(_train_each, jobs, world=ranks)


def trainer(job: Job) -> Trainer:
    """Build a job's trainer, in a rank."""
    setup_console()
    return Trainer(build_run(load_config(job.config, job.overrides()), job.ds_path, job.resume))


def _train_each(jobs: list[Job]) -> None:
    for job in jobs:
        trainer(job).run()
