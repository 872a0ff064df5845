"""Classify images with a model of one's own, prepared as in an evaluation: the likeliest labels.

examples:
  sws classify exported/pets photo.jpg photos/

  # a finished run, a file of weights, an ONNX file
  sws classify runs/finetune/pets photo.jpg
  sws classify exported/pets/model_int8.onnx photos/ --top 1 --json labels.json
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sws_dist.atomic import atomic_write_json
from sws_dist.cli.common import BATCH_SIZE, add_num_threads_option, make_parser, parse_args, print_result, whole_number

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("model", type=Path, help="a timm folder, a finished run, weights, or an ONNX file")
    parser.add_argument("images", type=Path, nargs="+", help="images, and folders of images")
    parser.add_argument("--top", type=whole_number(1, 1000), default=5, help="labels for each image (default 5)")
    parser.add_argument("--json", type=Path, help="write the labels with their probabilities here")
    parser.add_argument("--batch", type=BATCH_SIZE, default=32, help="images at a time (default 32)")
    add_num_threads_option(parser)
    args = parse_args(parser, one_process=True)
    # torch takes seconds to import; --help and a wrong option should not wait for it.
    from sws_dist.checkpoint.open_model import open_model
    from sws_dist.class_names import describe_labels

    files = list(find_images(args.images))
    model = open_model(args.model)
    names = describe_labels(model)
    found: dict[str, list[dict[str, Any]]] = {}
    for file, probabilities in classify(model, str(args.model), files, args.batch, args.num_threads):
        best = zip(*(column.tolist() for column in probabilities.topk(min(args.top, len(names)))), strict=True)
        found[file] = [{"number": number, "label": names[number], "probability": p} for p, number in best]
        print_result(
            f"{file}: " + "; ".join(f"{each['label']} {100 * each['probability']:.1f} %" for each in found[file])
        )
    if not found:
        raise ValueError(f"none of {len(files)} image(s) could be read")
    if args.json:
        atomic_write_json(args.json, found)


def find_images(places: Sequence[Path]) -> Iterator[str]:
    """Yield files as they are named, and the images in folders, sorted.

    Raises:
        ValueError: a place that is not there, or a folder without images.
        OSError: a folder cannot be read.
    """
    from sws_dist.data.class_folders import list_below

    for place in places:
        if not place.exists():
            raise ValueError(f"{place}: no such file or folder")
        if not place.is_dir():
            yield str(place)
            continue
        images = list_below(place, os.path.join(place, ""))
        if not images:
            raise ValueError(f"{place}: holds no images")
        yield from sorted(images)


def classify(
    model: Any, name: str, files: Sequence[str], batch_size: int, num_threads: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each file that can be read with its labels' probabilities [classes]; warn of the others."""
    import numpy as np
    import torch

    from sws_dist.data import manifest  # needs DALI
    from sws_dist.data.bad_images import BadImages, describe_bad_files
    from sws_dist.distributed.init import has_gpu
    from sws_dist.inference import input_config, read_images

    images = manifest.list_files(files, num_threads)
    config, bad = input_config(model, name, Path(), num_threads=num_threads), BadImages(images.bad)
    for line in describe_bad_files(images.bad):
        log.warning(line)
    device = torch.device("cuda" if has_gpu() else "cpu")
    model.to(device).eval()
    with torch.inference_mode():
        for rows, batch in read_images(images, np.arange(len(images)), config, device, batch_size, bad):
            for row, logits in zip(rows, model(batch).float().cpu(), strict=True):
                yield images.paths[row], logits.softmax(0)
    for line in bad.exchange(device, None, max(1, len(images)), 1.0):
        log.warning(line)
