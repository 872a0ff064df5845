"""Write a picture of a training batch as the model will see it: labels, drawn operations, mixing and all.

examples:
  python launcher/show_batch.py --config configs/runs/auxiliary_small.yaml --set data.root=/data/imagenet
  python launcher/show_batch.py --config configs/runs/quickstart/auxiliary.yaml --out batch.png --images 64 --step 100

Under each image: its target (the classes with the largest shares), the window that was cropped from the file (width x
height at left, top), the operations with their strengths, and the erased box. Mixup and cutmix put the batch over its
own reverse; operations are those of the image that the tile belongs to.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sws_dist.cli.common import make_parser, parse_args
from sws_dist.config.loader import load_config
from sws_dist.config.schema import RunConfig


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--config", type=Path, required=True, help="a run's config (YAML, see configs/runs)")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], dest="overrides", help="override")
    parser.add_argument("--out", type=Path, default=Path("batch.png"), help="the picture to write (default batch.png)")
    parser.add_argument("--images", type=int, default=32, help="how many of the batch to show (default 32)")
    parser.add_argument("--step", type=int, default=0, help="which optimizer step (default: the first)")
    parser.add_argument("--batch", type=int, help="images in a micro-batch (default: the global batch)")
    args = parse_args(parser)
    show(load_config(args.config, args.overrides), args)


def show(run: RunConfig, args: argparse.Namespace) -> None:
    import torch
    from PIL import Image

    from sws_dist.atomic import atomic_write
    from sws_dist.build import list_images, train_order
    from sws_dist.data import pipeline, sampler
    from sws_dist.data.draws import Recipe, describe_draws
    from sws_dist.data.mixup import Mixing, denormalise, erase
    from sws_dist.logging.images import labelled_grid
    from sws_dist.seed import seed_everything

    images, _ = list_images(run.data)
    order = train_order(run, images)
    micro = args.batch or run.train.global_batch
    positions = sampler.micro_batch_positions(args.step, run.train.global_batch, 0, run.train.global_batch // micro)
    recipe, mixing = Recipe(run.augment, run.data.image_size), Mixing(run.augment, len(images.classes), run.train.seed)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    loader = pipeline.train_loader(images, order, [positions], recipe, run.train.seed, run.data, device)
    (batch,) = loader
    draws = recipe.draw(run.train.seed, positions, images.sizes[batch.indices])
    seed_everything(run.train.seed, batch.position)
    pixels = batch.images if batch.erase is None else erase(batch.images, batch.erase, run.augment.re_mode)
    pixels, targets = mixing(pixels, batch.labels, batch.position)

    count = min(args.images, len(pixels))
    names = [target_in_words(target, images.classes, run.augment.smoothing) for target in targets[:count]]
    captions = ["\n".join([name, *describe_draws(draws, row)]) for row, name in enumerate(names)]
    grid = labelled_grid(denormalise(pixels[:count], run.data.mean, run.data.std), captions, tile=200)
    atomic_write(args.out, lambda path: Image.fromarray(grid).save(path, format="PNG"))
    use_cutmix, share, _ = mixing.draw(batch.position) if mixing.changes_images else (False, 1.0, None)
    mixed = f"{'cutmix' if use_cutmix else 'mixup'}, drawn share {share:.2f}" if mixing.changes_images else "not mixed"
    print(f"wrote {args.out}: {count} of {len(pixels)} images of step {args.step}, {mixed}")


def target_in_words(target: Any, classes: tuple[str, ...], smoothing: float) -> str:
    """``cat``, or ``0.62 cat + 0.28 dog`` where the target is soft; what smoothing gives to every class is left out."""
    if target.ndim == 0:
        return classes[int(target)]
    shares, labels = target.topk(min(2, len(classes)))
    named = zip(shares.tolist(), labels.tolist(), strict=True)
    return " + ".join(f"{x:.2f} {classes[label]}" for x, label in named if x > smoothing / len(classes) + 1e-6)
