"""Train a model: a teacher, an auxiliary model with shared weights, a descendant, or one from scratch.

examples:
  # two ranks of this machine
  deepspeed --num_accelerators 2 launcher/train.py --config configs/runs/quickstart/auxiliary.yaml \\
      --deepspeed_config configs/deepspeed/zero2.json

  # every host of a hostfile, in bf16, going on where an earlier run stopped
  deepspeed --hostfile hostfile launcher/train.py --config configs/runs/auxiliary_small.yaml \\
      --deepspeed_config configs/deepspeed/zero2_bf16.json --set data.root=/data/imagenet --resume auto

  # one process, another learning rate
  python launcher/train.py --config configs/runs/quickstart/teacher.yaml \\
      --deepspeed_config configs/deepspeed/zero0.json --set optim.lr=1e-3 --set output=runs/trial

The run's folder (config key `output`) receives config.yaml, deepspeed.json, log.jsonl, tensorboard/, checkpoints/,
and at the end metrics.json with learngene.safetensors (auxiliary models) or model.safetensors (all others).
Every config key stands, explained, in sws_dist/config.py.

SIGTERM, SIGUSR1 and Ctrl-C finish the step under way and save; every rank then leaves with exit code 75, which means:
start again with --resume auto. A second Ctrl-C stops at once.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from sws_dist.cli.common import make_parser, parse_args
from sws_dist.distributed.signals import install_handlers

log = logging.getLogger(__name__)


def main() -> None:
    install_handlers()  # before the imports that take seconds
    from sws_dist.config.loader import load_config

    parser = make_parser(__doc__)
    parser.add_argument("--config", type=Path, required=True, help="what to train (YAML, see configs/runs)")
    parser.add_argument(
        "--deepspeed_config", type=Path, required=True, help="how it is sharded (JSON, see configs/deepspeed)"
    )
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        dest="overrides",
        help="override a config key; repeatable",
    )
    parser.add_argument(
        "--resume",
        metavar="auto|PATH",
        help="auto: go on from the run's newest whole checkpoint, if any; or one's folder",
    )
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # DeepSpeed's launcher appends it
    args = parse_args(parser)
    run = load_config(args.config, args.overrides)
    if args.resume and (done := Path(run.output) / "metrics.json").is_file():
        log.info(f"{done} exists: this run is done")
        return
    # torch and DeepSpeed take seconds to import; a wrong key should not wait for them.
    from sws_dist.build import build_run
    from sws_dist.distributed.init import close_distributed
    from sws_dist.trainer import Trainer

    Trainer(build_run(run, args.deepspeed_config, args.resume)).run()
    close_distributed()
