"""Expand a learngene into a descendant of any depth, ready to be fine-tuned.

examples:
  # 12 layers, each stage's layer copied evenly
  sws expand --learngene runs/auxiliary_small/learngene.safetensors --depth 12 --out des12.safetensors

  # other labels and another image size: a fresh head, a resampled position embedding
  sws expand --learngene learngene.safetensors --depth 8 --num-classes 37 --image-size 288 --out pets8.safetensors

  # an explicit plan: which stage each layer is copied from
  sws expand --learngene learngene.safetensors --depth 6 --plan 0,0,1,2,3,4 --out des6.safetensors

  # the paper's auxiliary model, trained at its own depth alone: branches scaled for this depth
  sws expand --learngene learngene.safetensors --depth 12 --branch-scaling 1 --out des12.safetensors

  # a model whose layers share nothing: six of its layers, at even distances
  sws expand --learngene runs/des12/model.safetensors --depth 6 --plan spaced --out des6.safetensors

Fine-tune the result with
  sws train --set model.initial_checkpoint=des12.safetensors --set model.depth=12 ...
"""

from __future__ import annotations

import logging
from pathlib import Path

from sws_dist.cli.common import DEPTH, IMAGE_SIZE, SEED, make_parser, number, parse_args, whole_number

log = logging.getLogger(__name__)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--learngene", type=Path, required=True, help="learngene.safetensors of an auxiliary run")
    parser.add_argument("--depth", type=DEPTH, required=True, help="the descendant's layers")
    parser.add_argument(
        "--plan", default="even", help="even (default), proportional, spaced, or the stage of each layer: 0,0,1,2,..."
    )
    parser.add_argument(
        "--num-classes", type=whole_number(), help="another count than the learngene's gives a fresh head"
    )
    parser.add_argument("--image-size", type=IMAGE_SIZE, help="another size resamples the position embedding")
    parser.add_argument(
        "--branch-scaling",
        type=number(0, 2),
        help="exponent of the factors of repeated layers' branches (default: the auxiliary model's)",
    )
    parser.add_argument("--seed", type=SEED, default=0, help="of a fresh head (default 0)")
    parser.add_argument("--out", type=Path, required=True, help="the file to write")
    args = parse_args(parser, one_process=True)
    # torch takes seconds to import; --help and a wrong option should not wait for it.
    from sws_dist.checkpoint.model_file import save_model_file
    from sws_dist.learngene.expand import describe_layers, expand_learngene, plan_layers
    from sws_dist.learngene.file import load_learngene, read_learngene_info
    from sws_dist.learngene.plan import parse_plan

    about = read_learngene_info(args.learngene)
    layers = plan_layers(about, args.depth, parse_plan(args.plan))  # checked before any tensor is read
    learngene = load_learngene(args.learngene)
    info, weights = expand_learngene(
        *learngene,
        layers,
        num_classes=args.num_classes,
        image_size=args.image_size,
        seed=args.seed,
        branch_scaling=args.branch_scaling,
    )
    if info.provenance["fresh_head"]:
        log.info("the head is new: %d classes, the learngene knows %d", info.num_classes, learngene.info.num_classes)
    save_model_file(args.out, info, weights)
    num_parameters = sum(tensor.numel() for tensor in weights.values())
    log.info(
        f"{args.out}: {describe_layers(about, layers)}; "
        f"{num_parameters / 1e6:.2f} M parameters from a learngene of {learngene.num_parameters / 1e6:.2f} M"
    )
