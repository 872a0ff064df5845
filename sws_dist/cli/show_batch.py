"""Write a picture of a training batch as the model will see it, with what was drawn for each image.

examples:
  sws show-batch --config auxiliary_small --set data.root=/data/imagenet
  sws show-batch --config quickstart/auxiliary --out batch.png --images 64 --step 100

Under each image: its target (the classes with the largest shares), the window that was cropped from the file (width x
height at left, top), the operations with their strengths, and the erased box. Mixup and cutmix put the batch over its
own reverse; operations are those of the image that the tile belongs to.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from sws_dist.cli.common import (
    add_config_options,
    add_micro_batch_option,
    make_parser,
    micro_batch_of,
    parse_args,
    whole_number,
)
from sws_dist.config.loader import load_config
from sws_dist.config.schema import RunConfig

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)


def main() -> None:
    parser = make_parser(__doc__)
    add_config_options(parser)
    parser.add_argument("--out", type=Path, default=Path("batch.png"), help="the picture to write (default batch.png)")
    parser.add_argument(
        "--images", type=whole_number(1, 1024), default=32, help="how many of the batch to show (default 32)"
    )
    parser.add_argument("--step", type=whole_number(0), default=0, help="which optimizer step (default: the first)")
    add_micro_batch_option(parser)
    args = parse_args(parser, one_process=True)
    write_picture(load_config(args.config, args.overrides), args)


def write_picture(config: RunConfig, args: argparse.Namespace) -> None:
    """Read, augment and mix the images of one micro-batch as a training step does, and write them with captions."""
    augment, seed, global_batch = config.augment, config.train.seed, config.train.global_batch
    micro = micro_batch_of(args, config)
    # torch and DALI take seconds to import; a wrong key should not wait for them.
    import torch
    from PIL import Image

    from sws_dist.atomic import atomic_write
    from sws_dist.data import pipeline, sampler
    from sws_dist.data.build import build_order, list_images
    from sws_dist.data.draws import Recipe, describe_draws
    from sws_dist.data.mixup import Mixing, augment_batch, denormalise
    from sws_dist.distributed.init import has_gpu
    from sws_dist.logging.images import labelled_grid

    images, _ = list_images(config.data)
    order = build_order(config, images)
    positions = sampler.micro_batch_positions(args.step, global_batch, 0, global_batch // micro, augment.num_crops)
    recipe, mixing = Recipe(augment, config.data.image_size), Mixing(augment, len(images.classes), seed)
    device = torch.device("cuda", 0) if has_gpu() else torch.device("cpu")
    (batch,) = pipeline.train_loader(images, order, [positions], recipe, seed, config.data, device)
    draws = recipe.draw(seed, positions, images.sizes_of(batch.indices))
    pixels, targets = augment_batch(batch, mixing, augment, seed)

    count = min(args.images, len(pixels))
    names = [target_in_words(target, images.classes, augment.smoothing) for target in targets[:count]]
    captions = ["\n".join([name, *describe_draws(draws, row)]) for row, name in enumerate(names)]
    grid = labelled_grid(denormalise(pixels[:count], config.data.mean, config.data.std), captions, tile=200)
    atomic_write(args.out, lambda path: Image.fromarray(grid).save(path, format="PNG"))
    use_cutmix, share, _ = mixing.draw(batch.position) if mixing.changes_images else (False, 1.0, None)
    mixed = f"{'cutmix' if use_cutmix else 'mixup'}, drawn share {share:.2f}" if mixing.changes_images else "not mixed"
    log.info(f"wrote {args.out}: {count} of {len(pixels)} images of step {args.step}, {mixed}")


def target_in_words(target: Tensor, classes: tuple[str, ...], smoothing: float) -> str:
    """Return ``cat``, or ``0.62 cat + 0.28 dog`` for a soft target, without what smoothing gives to every class."""
    if target.ndim == 0:
        return classes[int(target)]
    shares, labels = target.topk(min(2, len(classes)))
    named = zip(shares.tolist(), labels.tolist(), strict=True)
    return " + ".join(f"{x:.2f} {classes[label]}" for x, label in named if x > smoothing / len(classes) + 1e-6)
