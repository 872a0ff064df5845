"""Store a teacher's logits for every image that a run will show, so that its students need no teacher.

What an image looks like at a position of a run depends on the data, the augmentation and the seed alone. So the teacher
has to see it once, and all students whose runs have these in common read what it said.

examples:
  sws teach --config quickstart/auxiliary --out runs/logits
  sws train --config quickstart/auxiliary --deepspeed_config zero0 --set distill.logits=runs/logits

  # the GPUs of this machine share the epochs; each of the 8 ranks will train on 64 images of 512
  deepspeed --quiet --module sws_dist.cli.teach --config auxiliary_small --set data.root=/data/imagenet \\
      --out /data/logits --top-k 20 --batch 64

With mixup, cutmix or the noise of erased boxes an image depends on its micro-batch, and --batch has to be that of
training. Otherwise any will do. Started again, the command goes on with the epochs that are missing. More epochs may be
added later (--set train.epochs=N), and a shorter run reads the first ones of a longer one.
"""

from __future__ import annotations

from pathlib import Path

from sws_dist.cli.common import (
    add_config_options,
    add_local_rank_option,
    add_micro_batch_option,
    make_parser,
    micro_batch_of,
    parse_args,
    whole_number,
)
from sws_dist.config.loader import load_config


def main() -> None:
    parser = make_parser(__doc__)
    add_config_options(parser)
    parser.add_argument("--out", type=Path, required=True, help="the folder to write, seen by all nodes")
    parser.add_argument(
        "--top-k",
        type=whole_number(),
        default=10,
        help="classes of an image whose logits are kept, the most likely ones (default 10, at most all)",
    )
    add_micro_batch_option(parser)
    add_local_rank_option(parser)
    args = parse_args(parser)
    config = load_config(args.config, args.overrides)
    micro_batch = micro_batch_of(args, config)
    # torch and DALI take seconds to import; a wrong key should not wait for them.
    from sws_dist.distill.teach import store_logits
    from sws_dist.distributed.init import close_distributed

    store_logits(config, args.out, args.top_k, micro_batch)
    close_distributed()


if __name__ == "__main__":  # deepspeed --module sws_dist.cli.teach
    from sws_dist.cli.main import run

    run("teach")
