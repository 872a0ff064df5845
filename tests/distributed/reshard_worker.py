"""Load checkpoints into other layouts and save them again at once: nothing may change on the way."""

from __future__ import annotations

from tests import ranks, runs
from tests.launching import Job


def reshard(jobs: list[Job], world: int) -> None:
    """Load the checkpoint that each job resumes from, and save it to the job's output."""
    for job in jobs:
        job.ds_file()
    ranks.run(_reshard_each, jobs, world=world)


def _reshard_each(jobs: list[Job]) -> None:
    for job in jobs:
        trainer = runs.trainer(job)
        trainer._save(None, wait=True)
        trainer.parts.recorder.close()
