"""Run several training runs in one group of ranks: importing torch and DeepSpeed once saves most of the time.

    deepspeed --num_accelerators 2 --module tests.distributed.worker jobs.json

jobs.json: [{"config": FILE, "overrides": [...], "deepspeed_config": FILE, "resume": null | "auto"}, ...]
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
        run = load_config(job["config"], job["overrides"])
        Trainer(run, job["deepspeed_config"], job["resume"]).run()
    close_distributed()


if __name__ == "__main__":
    run_command(main)
