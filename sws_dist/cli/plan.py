"""Plan a run before it is queued: memory, traffic, time, and what its family costs.

examples:
  # two nodes of eight H100, ImageNet-1K; nothing of the data is read
  sws plan --config auxiliary_small --deepspeed_config zero2_bf16 --nodes 2 --gpus-per-node 8 --device h100 \\
      --images 1281167 --classes 1000 --set train.global_batch=4096

  # the same with the bill of ten descendants, as JSON
  sws plan --config auxiliary_small --deepspeed_config zero2_bf16 --gpus-per-node 8 --images 1281167 --classes 1000 \\
      --depths 6-15 --tune-epochs 10 --json

Without --images and --classes the run's training images are listed, as sws train does it. No GPU is needed: the model's
tensors have shapes and no data. Times are estimates; every figure that they rest on is printed with its source
(docs/scaling.md).
"""

from __future__ import annotations

import argparse
import json

from sws_dist.cli.common import (
    add_config_options,
    add_deepspeed_option,
    make_parser,
    number,
    parse_args,
    parse_depths,
    print_result,
    whole_number,
)
from sws_dist.config.loader import load_config
from sws_dist.errors import ConfigError
from sws_dist.plan.devices import DEFAULT_DEVICE, DEVICES, GBIT, HEADROOM, find_device
from sws_dist.zero.config import config_source, resolve_deepspeed_config


def main() -> None:
    args = parse_args(build_parser(), one_process=True)
    config = load_config(args.config, args.overrides)
    ds = resolve_deepspeed_config(args.deepspeed_config, config, args.nodes * args.gpus_per_node)
    if (args.images is None) != (args.classes is None):
        raise ConfigError("--images and --classes: give both, or none to list the run's own images")
    # torch takes seconds to import; a wrong key should not wait for it.
    import torch

    from sws_dist.plan.run import Request, plan_run
    from sws_dist.plan.table import plan_table
    from sws_dist.zero.schema import check_against_deepspeed

    check_against_deepspeed(ds, config_source(args.deepspeed_config), torch.device("cuda"))
    images, classes = args.images, args.classes
    if images is None:
        from sws_dist.data.build import list_images  # needs DALI

        train, _ = list_images(config.data)
        images, classes = len(train), len(train.classes)
    request = Request(
        config=config,
        ds=ds,
        num_images=images,
        num_classes=classes,
        nodes=args.nodes,
        ranks_a_node=args.gpus_per_node,
        device=find_device(args.device),
        utilisation=args.utilisation,
        network_bytes=None if args.network is None else args.network * GBIT,
        headroom=args.headroom,
        depths=args.depths,
        tuned_epochs=args.tune_epochs,
        scratch_epochs=args.scratch_epochs,
        teacher_epochs=args.teacher_epochs,
    )
    plan = plan_run(request)
    print_result(json.dumps(plan.as_json(), indent=2) if args.json else plan_table(plan, request.device))


def build_parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = make_parser(__doc__)
    add_config_options(parser)
    add_deepspeed_option(parser)
    parser.add_argument("--nodes", type=whole_number(), default=1, help="(default 1)")
    parser.add_argument("--gpus-per-node", type=whole_number(), default=1, help="(default 1)")
    parser.add_argument(
        "--device", default=DEFAULT_DEVICE, choices=sorted(DEVICES), help="the GPU (default %(default)s)"
    )
    parser.add_argument(
        "--utilisation", type=number(0.001, 1), help="share of the GPU's published rate (default: as measured)"
    )
    parser.add_argument(
        "--network", type=number(0.001, 1e6), help="Gbit/s between nodes for each GPU (default: the GPU's server)"
    )
    parser.add_argument(
        "--headroom",
        type=number(0, 0.9),
        default=HEADROOM,
        help="share of the memory that stays free (default %(default)s)",
    )
    parser.add_argument("--images", type=whole_number(1, 10**12), help="training images; the data is not read then")
    parser.add_argument("--classes", type=whole_number(), help="labels; with --images")
    parser.add_argument("--depths", type=parse_depths, default=(), help="bill of descendants: 6,9,12 or 6-15")
    parser.add_argument("--tune-epochs", type=whole_number(0), default=10, help="bill: of a descendant (default 10)")
    parser.add_argument("--scratch-epochs", type=whole_number(), help="bill: of its rival (default: the config's)")
    parser.add_argument(
        "--teacher-epochs", type=whole_number(0), default=0, help="bill: of the teacher (default 0: it is there)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser
