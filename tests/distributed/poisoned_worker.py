"""``worker.py`` with a fault: rank 1 sees images full of NaN in the steps that a job lists under ``poison``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from sws_dist.cli.common import run_command
from sws_dist.config.loader import load_config
from sws_dist.distributed.init import close_distributed
from sws_dist.trainer import Trainer


def poison(trainer: Trainer, steps: list[int]) -> None:
    """Steps are counted from 1."""
    clean = trainer.mixing

    def mixing(images: Any, *arguments: Any) -> Any:
        bad = trainer.world.rank == 1 and trainer.step + 1 in steps
        return clean(images * float("nan") if bad else images, *arguments)

    trainer.mixing = mixing  # type: ignore[assignment]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("jobs", type=Path)
    parser.add_argument("--local_rank", type=int, default=0)
    for job in json.loads(parser.parse_args().jobs.read_text()):
        trainer = Trainer(load_config(job["config"], job["overrides"]), job["deepspeed_config"], job["resume"])
        poison(trainer, job["poison"])
        trainer.run()
    close_distributed()


if __name__ == "__main__":
    run_command(main)
