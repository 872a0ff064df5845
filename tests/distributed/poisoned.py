"""Training with a fault: rank 1 sees images full of NaN in some steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sws_dist.trainer import Trainer
from tests import ranks, runs
from tests.launching import Job


def train(jobs: list[tuple[Job, list[int]]]) -> tuple[list[ranks.Outcome], str]:
    """Run jobs one after another on two ranks, each with the numbers of its poisoned steps, counted from 1."""
    for job, _ in jobs:
        job.ds_file()
    return ranks.outcomes(_train_each, jobs)


def _train_each(jobs: list[tuple[Job, list[int]]]) -> None:
    for job, steps in jobs:
        trainer = runs.trainer(job)
        poison(trainer, steps)
        trainer.run()


def poison(trainer: Trainer, steps: list[int]) -> None:
    clean = trainer.parts.data.mixing

    def mixing(images: Any, *arguments: Any) -> Any:
        bad = trainer.parts.world.rank == 1 and trainer.step + 1 in steps
        return clean(images * float("nan") if bad else images, *arguments)

    data = replace(trainer.parts.data, mixing=mixing)
    trainer.parts = replace(trainer.parts, data=data)
