"""Export a model to a folder that timm and the Hub read, and to ONNX, torch.export and int8, each checked.

examples:
  # a finished run: config.json, model.safetensors and a model card, for timm.create_model("local-dir:exported/pets")
  sws export --from runs/finetune/pets --out exported/pets

  # with ONNX in three precisions, compared and scored on validation images
  sws export --from runs/finetune/pets --out exported/pets --formats onnx onnx-fp16 onnx-int8 --data pets/val

  # a learngene's descendant of 9 layers
  sws export --from runs/auxiliary_small/learngene.safetensors --depth 9 --out exported/des9 --formats onnx torch

  # weights of another program
  sws export --from deit_small.pth --model deit_small_patch16_224 --out exported/deit

The images that --data holds are read as in sws evaluate. Without it files are compared on noise, and what int8 loses is
not measured. sws push puts the folder on the Hub, sws classify tries it on images.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from sws_dist.cli.common import DEPTH, IMAGE_SIZE, make_parser, number, parse_args, print_result
from sws_dist.export.formats import FORMATS

if TYPE_CHECKING:
    from sws_dist.export.exporter import Exported


def main() -> None:
    args = parse_args(build_parser(), one_process=True)
    # torch takes seconds to import; --help and a wrong option should not wait for it.
    from sws_dist.export.exporter import export
    from sws_dist.export.source import open_source
    from sws_dist.learngene.plan import parse_plan

    source = open_source(
        args.source,
        model_name=args.model,
        depth=args.depth,
        plan=parse_plan(args.plan),
        ema=args.ema,
        image_size=args.image_size,
        classes=args.classes,
    )
    exported = export(
        source, args.out, args.formats, data=args.data, license_id=args.license, max_drop=args.max_drop / 100
    )
    print_result(describe(exported))


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--from", dest="source", type=Path, required=True, help="a finished run's folder, weights, or a timm folder"
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder to make")
    parser.add_argument(
        "--formats",
        nargs="+",
        choices=tuple(FORMATS),
        default=[],
        help="what to write beside timm's files (default: nothing)",
    )
    parser.add_argument("--data", type=Path, help="folder of class folders with validation images")
    parser.add_argument("--depth", type=DEPTH, help="layers that a learngene is expanded to")
    parser.add_argument("--plan", default="even", help="with --depth, as in sws expand (default even)")
    parser.add_argument("--model", help="the timm model that the weights are of (default: what the file says)")
    parser.add_argument("--ema", action="store_true", help="the moving average of a run's weights")
    parser.add_argument("--image-size", type=IMAGE_SIZE, help="pixels (default: the model's own)")
    parser.add_argument("--classes", type=Path, help="the labels' names, one a line (default: the model knows)")
    parser.add_argument("--license", help="the Hub's name of the license, such as apache-2.0 (default: left open)")
    parser.add_argument(
        "--max-drop", type=number(0, 100), default=1.0, help="points of top-1 that int8 may lose on --data (default 1)"
    )
    return parser


def describe(exported: Exported) -> str:
    """Return what was written, and how it was checked."""
    from sws_dist.export.exporter import describe_scores

    lines = [f"{exported.folder}: compared with the model on {exported.test.kind}"]
    width = max(map(len, exported.parities))
    for file, parity in exported.parities.items():
        scores = exported.scores.get(file)
        size = (exported.folder / file).stat().st_size / 1e6
        lines.append(f"  {file:{width}}  {size:8.1f} MB  {parity}" + (f"; {describe_scores(scores)}" if scores else ""))
        if file == "model_int8.onnx" and scores is None:
            lines[-1] += "; accuracy not measured (--data)"
    lines.append(f'use it: timm.create_model("local-dir:{exported.folder}", pretrained=True), or sws classify')
    return "\n".join(lines)
