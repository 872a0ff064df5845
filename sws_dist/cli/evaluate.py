"""Score a model on a folder of images (<class>/<image>, each image counted once).

examples:
  # a file that this trainer wrote knows its model and its pixels
  python launcher/evaluate.py --checkpoint runs/quickstart/auxiliary/learngene.safetensors --data data/quickstart/val

  # any timm model with local weights
  python launcher/evaluate.py --model resnet50 --checkpoint resnet50.safetensors --data /data/imagenet/val

  # on the GPUs of this machine, with every image's logits kept
  deepspeed launcher/evaluate.py --checkpoint model.safetensors --data /data/imagenet/val --predictions p.npz
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
from pathlib import Path
from typing import Any

from sws_dist.cli.common import make_parser, parse_args
from sws_dist.config.schema import DataConfig

log = logging.getLogger(__name__)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", help="a timm model name, ours included (default: what the checkpoint says it is)")
    parser.add_argument("--checkpoint", type=Path, required=True, help="weights: .safetensors or a PyTorch file")
    parser.add_argument("--data", type=Path, required=True, help="folder of class folders")
    parser.add_argument("--image-size", type=int, help="pixels (default: the checkpoint's, or the model's own)")
    parser.add_argument("--crop-pct", type=float, help="share of the resized image that is cropped")
    parser.add_argument("--batch", type=int, default=128, help="images at a time on one rank (default 128)")
    parser.add_argument("--num-threads", type=int, default=4, help="DALI threads of one rank (default 4)")
    parser.add_argument("--json", type=Path, help="write the scores here")
    parser.add_argument("--predictions", type=Path, help="write path, label and logits of every image here (.npz)")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    args = parse_args(parser)
    evaluate(args)


def evaluate(args: argparse.Namespace) -> None:
    import torch

    from sws_dist.atomic import atomic_write_json
    from sws_dist.data import manifest, pipeline, sampler
    from sws_dist.data.bad_images import BadImages, describe_bad_files
    from sws_dist.distributed.collectives import gather_on_rank0, raise_on_all_ranks
    from sws_dist.distributed.init import close_distributed, init_distributed
    from sws_dist.evaluate import Predictions
    from sws_dist.evaluate import evaluate as score

    world = init_distributed(timeout_s=1800)
    with raise_on_all_ranks("load the model and list the images"):
        model, data, classes = load_model(args)
        images = manifest.scan(args.data.parent, args.data.name, classes or None)
        if len(images.classes) != model.num_classes:
            raise ValueError(
                f"{args.data} has {len(images.classes)} class folders, {args.checkpoint} knows {model.num_classes} "
                "labels and not their names; which label is which folder cannot be told"
            )
    model.to(world.device).eval()
    batches = sampler.eval_batches(len(images), world.rank, world.size, args.batch)
    bad = BadImages(images.bad)
    loader = pipeline.eval_loader(images, batches, data, world.device, bad)
    predictions: list[Predictions] | None = [] if args.predictions else None
    for line in (*images.notes, *describe_bad_files(images.bad)):
        log.info(line)
    scores = score(model, loader, torch.float32, predictions)
    for line in bad.exchange(world.device, 0, len(images), data.max_bad_share):
        log.info(line)
    log.info(
        f"top-1 {100 * scores.top1:.2f} %  top-5 {100 * scores.top5:.2f} %  "
        f"loss {scores.loss:.4f}  over {scores.images} images"
    )
    gathered = gather_on_rank0(predictions) if predictions is not None else None
    with raise_on_all_ranks("write the results"):
        if world.is_rank_zero and args.json:
            atomic_write_json(args.json, {"checkpoint": str(args.checkpoint), **dataclasses.asdict(scores)})
        if gathered is not None:
            write_predictions(args.predictions, [p for rank in gathered for p in rank], images)
    close_distributed()


def load_model(args: argparse.Namespace) -> tuple[Any, DataConfig, list[str]]:
    """The model with its weights, how it wants its pixels, and its classes' names if it knows them."""
    from sws_dist.checkpoint.model_file import (
        apply_timm_filter,
        infer_num_labels,
        is_described,
        load_model_file,
        load_state_dict_file,
        load_weights_strict,
    )
    from sws_dist.models import create_model

    described = args.checkpoint.suffix == ".safetensors" and is_described(args.checkpoint)
    classes: list[str] = []
    if described:
        info, weights = load_model_file(args.checkpoint)
        pixels, classes = dict(info.preprocessing), info.classes
        name = args.model or info.name
        ours = name == info.name or name.startswith("sws_")  # whose arguments the file's are
        model = create_model(name, num_classes=info.num_classes, **(info.kwargs if ours else {}))
    elif args.model is None:
        raise ValueError(f"{args.checkpoint} does not say which model it is of; give --model NAME")
    else:
        weights = load_state_dict_file(args.checkpoint)
        default = create_model(args.model).num_classes
        model = create_model(args.model, num_classes=infer_num_labels(args.model, weights, default))
        weights = apply_timm_filter(model, weights)
        cfg = model.pretrained_cfg
        pixels = {key: cfg[key] for key in ("mean", "std", "crop_pct", "interpolation")}
        pixels["image_size"] = cfg["input_size"][-1]
    load_weights_strict(model, weights, args.checkpoint)
    if args.image_size:
        pixels["image_size"] = args.image_size
    if args.crop_pct:
        pixels["crop_pct"] = args.crop_pct
    missing = {"mean", "std", "image_size"} - set(pixels)
    if missing:
        raise ValueError(f"{args.checkpoint}: does not say its {', '.join(sorted(missing))}; convert it again")
    pixels |= {key: tuple(pixels[key]) for key in ("mean", "std")}
    data = DataConfig(root=str(args.data.parent), num_threads=args.num_threads, **pixels)
    return model, data, classes


def write_predictions(path: Path, predictions: list[Any], images: Any) -> None:
    """Arrays ``path``, ``label``, ``logits``: one row an image, in the manifest's order."""
    import numpy as np

    from sws_dist.atomic import atomic_write

    indices = np.concatenate([p.indices for p in predictions])
    logits = np.concatenate([p.logits for p in predictions])
    order = np.argsort(indices)
    rows = indices[order]
    arrays = {"path": np.array([images.paths[i] for i in rows]), "label": images.labels[rows], "logits": logits[order]}

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez(file, **arrays)

    atomic_write(path, write)
