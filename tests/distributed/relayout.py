"""Load checkpoints into other layouts and save them again at once: nothing may change on the way.

    deepspeed --num_accelerators 3 --module tests.distributed.relayout jobs.json

jobs.json as in ``tests.distributed.worker``; ``resume`` is the checkpoint to load, the copy goes to ``output``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from sws_dist import cli, comm, config
from sws_dist.trainer import Trainer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("jobs", type=Path)
    parser.add_argument("--local_rank", type=int, default=0)
    for job in json.loads(parser.parse_args().jobs.read_text()):
        trainer = Trainer(config.load(job["config"], job["overrides"]), job["deepspeed_config"], job["resume"])
        trainer._save(0, None)
        trainer.recorder.close()
    comm.close()


if __name__ == "__main__":
    cli.run(main)
