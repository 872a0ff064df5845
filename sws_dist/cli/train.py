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

--dry-run checks configs, ranks, data, weights and the checkpoint to resume, prints memory, traffic and time (as
`sws plan` does), and trains nothing.

The run's folder (config key `output`) receives config.yaml, deepspeed.json, log.jsonl, tensorboard/, checkpoints/,
and at the end metrics.json with learngene.safetensors (auxiliary models) or model.safetensors (all others).

SIGTERM, SIGUSR1 and Ctrl-C finish the step under way and save; every rank then leaves with exit code 75, which means:
start again with --resume auto. A second Ctrl-C stops at once.
"""

from __future__ import annotations

from pathlib import Path

from sws_dist.cli.common import (
    add_config_options,
    add_deepspeed_option,
    add_local_rank_option,
    expanded,
    make_parser,
    parse_args,
    print_result,
)
from sws_dist.config.schema import RunConfig
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
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything that can be checked without training, print the plan (sws plan), and leave nothing",
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

    if args.dry_run:
        print_result(check_and_plan(config, args.deepspeed_config, args.resume))
    else:
        train(config, args.deepspeed_config, resume=args.resume)
    close_distributed()


def check_and_plan(config: RunConfig, deepspeed_config: Path, resume: str | None) -> str:
    """Check a run on the ranks that are there, and return its plan. A collective."""
    import torch

    from sws_dist.plan.devices import DEFAULT_DEVICE, DEVICES, find_device
    from sws_dist.plan.run import Request, plan_run
    from sws_dist.plan.table import plan_table
    from sws_dist.prepare import check_run

    run = check_run(config, deepspeed_config, resume)
    world, train = run.world, run.data.train
    name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else world.device.type
    known = name in [each.cuda_name for each in DEVICES.values()]
    device = find_device(name if known else DEFAULT_DEVICE)
    nodes = world.nodes if world.size % world.nodes == 0 else world.size  # uneven: as if each rank had a node
    place = (nodes, world.size // nodes, device)
    plan = plan_run(Request(config, run.ds, len(train), len(train.classes), *place))
    start = f"from {run.checkpoint}" if run.checkpoint else "from its first step"
    note = "" if known else f"; memory and time below are for {device.name}, since of {name} no figures are known"
    return f"checked    {config.output} would train {start}{note}\n{plan_table(plan, device)}"


if __name__ == "__main__":  # deepspeed --module sws_dist.cli.train
    from sws_dist.cli.main import run

    run("train")
