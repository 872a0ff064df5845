"""Load checkpoints into other layouts and save them again at once: nothing may change on the way.

    deepspeed --num_accelerators 3 --module tests.distributed.relayout jobs.json

jobs.json as in ``tests.distributed.worker``; ``resume`` is the checkpoint to load, the copy goes to ``output``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from sws_dist.cli.common import run_command
from sws_dist.config.loader import load_config
from sws_dist.distributed.init import close_distributed
from sws_dist.trainer import Trainer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("jobs", type=Path)
    parser.add_argument("--local_rank", type=int, default=0)
    for job in json.loads(parser.parse_args().jobs.read_text()):
        trainer = Trainer(load_config(job["config"], job["overrides"]), job["deepspeed_config"], job["resume"])
        trainer._save(0, None)
        trainer.recorder.close()
    close_distributed()


if __name__ == "__main__":
    run_command(main)
