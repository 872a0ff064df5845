"""Score a model on a folder of images (<class>/<image>), each image counted once.

examples:
  # a file that this trainer wrote knows its model and how its images are normalised
  sws evaluate --checkpoint runs/quickstart/auxiliary/learngene.safetensors --data data/quickstart/val

  # the descendants of a learngene, as they leave it: which depth will do?
  sws evaluate --checkpoint runs/quickstart/auxiliary/learngene.safetensors --data data/quickstart/val --depths 5-8

  # any timm model with local weights; an ImageNet model on a few of its classes (folders n01440764, ...) too
  sws evaluate --model resnet50 --checkpoint resnet50.safetensors --data /data/imagenet/val

  # on the GPUs of this machine, with every image's logits kept
  deepspeed --quiet --module sws_dist.cli.evaluate --checkpoint model.safetensors --data /data/imagenet/val \\
      --predictions p.npz
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sws_dist.atomic import atomic_write_json
from sws_dist.cli.common import (
    BATCH_SIZE,
    IMAGE_SIZE,
    add_local_rank_option,
    add_num_threads_option,
    add_shard_options,
    make_parser,
    number,
    parse_args,
    parse_depths,
    print_result,
    shard_keys_of,
)
from sws_dist.learngene.plan import NAMED_PLANS

if TYPE_CHECKING:
    from sws_dist.scoring import Scores


def main() -> None:
    args = parse()
    # torch takes seconds to import; --help and a wrong option should not wait for it.
    from sws_dist.api import evaluate, evaluate_depths
    from sws_dist.distributed.collectives import raise_on_all_ranks
    from sws_dist.distributed.init import close_distributed
    from sws_dist.distributed.launch_env import rank

    options: dict[str, Any] = {
        "classes": args.classes,
        "numeric_classes": args.numeric_classes,
        "image_size": args.image_size,
        "crop_pct": args.crop_pct,
        "batch_size": args.batch,
        "num_threads": args.num_threads,
        "shard_keys": shard_keys_of(args),
    }
    found: dict[str, Any] = {"checkpoint": str(args.checkpoint)}
    if args.depths:
        expansion = {"plan": args.plan, "branch_scaling": args.branch_scaling}
        by_depth = evaluate_depths(args.checkpoint, args.data, args.depths, **expansion, **options)
        print_result("\n".join(f"{depth:3d} layers: {format_scores(scores)}" for depth, scores in by_depth.items()))
        found |= expansion | {"depths": {depth: dataclasses.asdict(scores) for depth, scores in by_depth.items()}}
    else:
        scores = evaluate(
            args.checkpoint,
            args.data,
            model_name=args.model,
            use_ema=not args.no_ema,
            predictions=args.predictions,
            **options,
        )
        print_result(format_scores(scores))
        found |= dataclasses.asdict(scores)
    with raise_on_all_ranks("write the scores"):
        if args.json and rank() == 0:
            atomic_write_json(args.json, found)
    close_distributed()


def parse() -> argparse.Namespace:
    """Parse the command line, and refuse options that do not go together."""
    parser = make_parser(__doc__)
    parser.add_argument("--model", help="a timm model name, ours included (default: what the checkpoint says it is)")
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="weights, a run's folder, a timm folder, or an ONNX file"
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of class folders")
    order = parser.add_mutually_exclusive_group()
    order.add_argument(
        "--classes", type=Path, help="what the model's labels are called, one a line in their order (default: it knows)"
    )
    order.add_argument(
        "--numeric-classes", action="store_true", help="the folders are called by their labels' numbers: 0, 1, 2, ..."
    )
    parser.add_argument(
        "--no-ema", action="store_true", help="not the averaged weights, where the file has them beside others"
    )
    parser.add_argument("--image-size", type=IMAGE_SIZE, help="pixels (default: the checkpoint's, or the model's own)")
    parser.add_argument("--crop-pct", type=number(0.1, 1), help="share of the resized image that is cropped")
    parser.add_argument("--batch", type=BATCH_SIZE, default=128, help="images at a time on one rank (default 128)")
    add_num_threads_option(parser)
    add_shard_options(parser)
    depths = parser.add_argument_group("the descendants of a learngene")
    depths.add_argument(
        "--depths", type=parse_depths, help="layers of the descendants to score, untuned: 6,9,12 or 6-15"
    )
    depths.add_argument("--plan", choices=NAMED_PLANS, default="even", help="how they are expanded (default even)")
    depths.add_argument(
        "--branch-scaling", type=number(0, 2), help="exponent of the branches' factors, as sws expand takes it"
    )
    parser.add_argument("--json", type=Path, help="write the scores here")
    parser.add_argument("--predictions", type=Path, help="write path, label and logits of every image here (.npz)")
    add_local_rank_option(parser)
    args = parse_args(parser)
    if args.depths and (args.model or args.predictions or args.no_ema):
        parser.error("--depths is for a learngene: --model, --no-ema and --predictions do not go with it")
    if not args.depths and (args.plan != "even" or args.branch_scaling is not None):
        parser.error("--plan and --branch-scaling say how --depths are expanded, and there are none")
    return args


def format_scores(scores: Scores) -> str:
    return (
        f"top-1 {100 * scores.top1:.2f} %  top-5 {100 * scores.top5:.2f} %  "
        f"loss {scores.loss:.4f}  over {scores.images} images"
    )


if __name__ == "__main__":  # deepspeed --module sws_dist.cli.evaluate
    from sws_dist.cli.main import run

    run("evaluate")
