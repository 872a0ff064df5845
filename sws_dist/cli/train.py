"""Train a model: a teacher, an auxiliary model with shared weights, a descendant, or one from scratch.

examples:
  # one process
  sws train --config quickstart/teacher --deepspeed_config zero0 --set optim.lr=1e-3 --set output=runs/trial

  # two ranks of this machine, without the launcher's own messages
  deepspeed --quiet --num_accelerators 2 --module sws_dist.cli.train --config quickstart/auxiliary \\
      --deepspeed_config zero2

  # every host of a hostfile, in bf16, going on where an earlier run stopped
  deepspeed --hostfile hostfile --module sws_dist.cli.train --config auxiliary_small \\
      --deepspeed_config zero2_bf16 --set data.root=/data/imagenet --resume auto

In a checkout, `python launcher/train.py` and `deepspeed launcher/train.py` are the same, and configs may be given by
their paths: --config configs/runs/auxiliary_small.yaml. Every config key stands, explained, in docs/config.md.

`deepspeed --quiet` (before --module) hides what the launcher says of itself at every start; its errors are shown. On a
machine without a GPU, DS_ACCELERATOR=cpu in the environment hides its warning that it finds none.

The run's folder (config key `output`) receives config.yaml, deepspeed.json, log.jsonl, tensorboard/, checkpoints/,
and at the end metrics.json with learngene.safetensors (auxiliary models) or model.safetensors (all others).

SIGTERM, SIGUSR1 and Ctrl-C finish the step under way and save; every rank then leaves with exit code 75, which means:
start again with --resume auto. A second Ctrl-C stops at once.
"""

from __future__ import annotations

from sws_dist.cli.common import (
    add_config_options,
    add_deepspeed_option,
    add_local_rank_option,
    expanded,
    make_parser,
    parse_args,
)
from sws_dist.distributed.signals import install_handlers


def main() -> None:
    install_handlers()  # before the imports that take time
    from sws_dist.config.loader import load_config
    from sws_dist.config.resume import finished_metrics
    from sws_dist.zero.config import load_deepspeed_config

    parser = make_parser(__doc__)
    add_config_options(parser)
    add_deepspeed_option(parser)
    parser.add_argument(
        "--resume",
        type=expanded,
        metavar="auto|PATH",
        help="auto: go on from the run's newest valid checkpoint, if any; or the path of a checkpoint",
    )
    add_local_rank_option(parser)
    args = parse_args(parser)
    config = load_config(args.config, args.overrides)
    if args.resume and finished_metrics(config) is not None:
        return
    load_deepspeed_config(args.deepspeed_config)
    # torch and DeepSpeed take seconds to import; a wrong key should not wait for them.
    from sws_dist.api import train
    from sws_dist.distributed.init import close_distributed

    train(config, args.deepspeed_config, resume=args.resume)
    close_distributed()


if __name__ == "__main__":  # deepspeed --module sws_dist.cli.train
    import sys

    from sws_dist.cli.main import run

    run("train", sys.argv[1:])
