"""Convert learngenes and checkpoints: from the paper's released code, and to plain timm.

examples:
  # the released code's auxiliary model; the file says neither its repeats nor its heads
  sws convert --released aux.pth --schedule 3,3,4,3,3 --heads 6 --out learngene.safetensors

  # a learngene as the plain, unrolled timm ViT that computes what the auxiliary model computed
  sws convert --learngene learngene.safetensors --out model.safetensors

  # a training checkpoint of any ZeRO stage and world size: a descendant's weights for timm, an auxiliary model's
  # learngene; one tensor is in memory at a time
  sws convert --checkpoint runs/des12/checkpoints/step-00000880 --out model.safetensors
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from sws_dist.cli.common import make_parser, parse_args, print_result, whole_number

if TYPE_CHECKING:  # the helpers import what they need: torch takes seconds, and --help should not wait for it
    from sws_dist.checkpoint.model_file import ModelInfo

log = logging.getLogger(__name__)


def main() -> None:
    parser = make_parser(__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--released", type=Path, help="a checkpoint of the paper's released code")
    source.add_argument("--learngene", type=Path, help="a learngene: unrolled into a plain timm ViT")
    source.add_argument("--checkpoint", type=Path, help="a training checkpoint's folder (.../checkpoints/step-N)")
    parser.add_argument("--schedule", help="with --released: repeats of each stage, for example 3,3,4,3,3")
    parser.add_argument("--heads", type=whole_number(1, 1024), help="with --released: attention heads")
    parser.add_argument("--ema", action="store_true", help="with --checkpoint: the moving average of the weights")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="with --checkpoint (default fp32)")
    parser.add_argument("--out", type=Path, required=True, help="the .safetensors file to write")
    args = parse_args(parser, one_process=True)
    for kind, options in {"released": ("schedule", "heads"), "checkpoint": ("ema", "dtype")}.items():
        for option in options:
            if getattr(args, option) and not getattr(args, kind):
                parser.error(f"--{option} goes with --{kind}")
    if args.released:
        convert_released_file(args)
    elif args.learngene:
        unroll_learngene(args)
    else:
        convert_checkpoint(args)


def convert_released_file(args: argparse.Namespace) -> None:
    """Write a learngene from a checkpoint of the paper's released code."""
    from sws_dist.checkpoint.model_file import save_model_file
    from sws_dist.checkpoint.weight_file import read_weight_file
    from sws_dist.checkpoint.weight_names import select_weights
    from sws_dist.learngene.released import convert_released

    if not args.schedule or not args.heads:
        raise ValueError("--released needs --schedule (for example 3,3,4,3,3) and --heads: the file does not say them")
    try:
        schedule = tuple(int(part) for part in args.schedule.split(","))
    except ValueError:
        raise ValueError(f"--schedule {args.schedule!r}: expected numbers such as 3,3,4,3,3") from None
    info, weights = convert_released(select_weights(read_weight_file(args.released)), schedule, args.heads)
    save_model_file(args.out, info, weights)
    log.info(f"{args.out}: a learngene of {len(schedule)} stages, schedule {args.schedule}, {args.heads} heads")


def unroll_learngene(args: argparse.Namespace) -> None:
    """Write a learngene's descendant of the auxiliary model's own depth."""
    from sws_dist.checkpoint.model_file import save_model_file
    from sws_dist.learngene.expand import expand_learngene, plan_layers
    from sws_dist.learngene.file import load_learngene

    learngene = load_learngene(args.learngene)
    layers = plan_layers(learngene.info, sum(learngene.schedule))
    info, weights = expand_learngene(*learngene, layers)
    save_model_file(args.out, info, weights)
    log_timm_call(args.out, info)


def convert_checkpoint(args: argparse.Namespace) -> None:
    """Write the weights of a training checkpoint."""
    import torch

    from sws_dist.checkpoint.checkpoint import export_weights, verify

    problem = verify(args.checkpoint)
    if problem is not None:
        raise ValueError(problem)
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    info = export_weights(args.checkpoint, args.out, average=args.ema, dtype=dtypes[args.dtype or "fp32"])
    if info.kind == "learngene":
        log.info(f"{args.out}: a learngene, schedule {info.kwargs['schedule']}; sws expand makes descendants of it")
    else:
        log_timm_call(args.out, info)


def log_timm_call(path: Path, info: ModelInfo) -> None:
    """Log the line that builds the plain timm model for the file."""
    from sws_dist.models.geometry import timm_call

    if info.name == "sws_vit":
        call = timm_call(info.kwargs, info.num_classes)
    else:
        arguments = "".join(
            f", {key}={value!r}" for key, value in (info.kwargs | {"num_classes": info.num_classes}).items()
        )
        call = f"timm.create_model({info.name!r}{arguments})"
    print_result(f"{path}: weights under timm's names; build the model with\n  {call}")
