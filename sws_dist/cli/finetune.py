"""Fine-tune a learngene, a descendant or any timm checkpoint on a folder of one's own labelled images.

examples:
  # class folders (photos/cats, photos/dogs, ...): a tenth of each class is held out for validation
  sws finetune --from runs/auxiliary_small/learngene.safetensors --data photos --depth 9

  # a file of another program, and a folder with train/ and val/
  sws finetune --from deit_small.pth --model deit_small_patch16_224 --data /data/pets --epochs 20

  # a timm model's folder, as the Hub and `sws export` have it
  sws finetune --from exported/pets --data /data/birds

  # on all GPUs of this machine
  deepspeed --quiet --module sws_dist.cli.finetune --from model.safetensors --data photos

This is `sws train --config finetune` with model, data, batch and epochs set by the file and the number of images;
--debug prints that command. Without --epochs a run takes about 1,000 steps, in 10 to 100 epochs.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
from pathlib import Path
from typing import Any

from sws_dist.cli.common import (
    DEPTH,
    IMAGE_SIZE,
    SEED,
    add_deepspeed_option,
    add_local_rank_option,
    add_set_option,
    expanded,
    make_parser,
    number,
    parse_args,
    print_result,
    whole_number,
)
from sws_dist.cli.scan import holds_split
from sws_dist.config.loader import load_config, marked_keys
from sws_dist.config.paths import escape_path
from sws_dist.config.schema import IS_PATH, DataConfig
from sws_dist.distributed.launch_env import complete_environment
from sws_dist.distributed.signals import install_handlers
from sws_dist.errors import ConfigError

VAL_FOLDERS = ("val", "valid", "validation")
OTHER_SPLITS = ("test", "testing", "training")
BATCH = 64
"""Images in a step; fewer where that would leave an epoch fewer than ``STEPS_PER_EPOCH`` steps."""
STEPS_PER_EPOCH = 8
STEPS = 1000
EPOCHS = (10, 100)

log = logging.getLogger(__name__)


def main() -> None:
    install_handlers()  # before the imports that take time
    args = parse_args(build_parser())
    load_config("finetune", args.overrides)  # a wrong key is reported before torch is imported, which takes seconds
    from sws_dist.api import train
    from sws_dist.distributed.init import close_distributed

    try:
        sets = as_overrides(choose_settings(args)) + args.overrides
    except (ValueError, OSError) as error:  # all ranks find the same, and one of them is enough to say it
        raise ConfigError(str(error)) from error
    ds = str(args.deepspeed_config or choose_deepspeed_config())
    resume = ["--resume", args.resume] if args.resume else []
    words = ["sws", "train", "--config", "finetune", "--deepspeed_config", ds]
    log.debug("$ " + shlex.join([*words, *(word for each in sets for word in ("--set", each)), *resume]))
    config = load_config("finetune", sets)
    metrics = train(config, ds, resume=args.resume)
    close_distributed()
    if metrics is not None:
        print_result(
            f"the model     {config.output}/model.safetensors\n"
            f"its accuracy  {100 * metrics['top1']:.2f} % of {metrics['validation_images']} validation images\n"
            f"to use it     sws classify {shlex.quote(config.output)} IMAGES...\n"
            f"elsewhere     sws export --from {shlex.quote(config.output)} --out FOLDER --formats onnx"
        )


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--from",
        dest="weights",
        type=Path,
        required=True,
        help="weights to start from: .safetensors, a PyTorch file, or the folder of a timm model or of a finished run",
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of class folders, or of train/ and val/")
    parser.add_argument("--model", help="the timm model that the weights are of (default: what the file says)")
    parser.add_argument(
        "--depth",
        type=DEPTH,
        help="layers that a learngene is expanded to (default: as it was trained)",
    )
    parser.add_argument(
        "--val-share",
        type=number(0.001, 0.999),
        default=0.1,
        help="share of each class that is held out without val/ (default 0.1)",
    )
    parser.add_argument(
        "--output", type=Path, help="the run's folder (default: runs/finetune/NAME, called as the data)"
    )
    parser.add_argument("--epochs", type=whole_number(1, 1_000_000), help="passes over the training images")
    parser.add_argument("--lr", type=number(1e-12, 1000), help="highest learning rate (default 2e-4)")
    parser.add_argument(
        "--batch", type=whole_number(), help=f"images in a step, over all ranks (default: {BATCH}, or fewer)"
    )
    parser.add_argument("--image-size", type=IMAGE_SIZE, help="pixels (default: the weights')")
    parser.add_argument("--seed", type=SEED, default=0, help="of the run (default 0)")
    parser.add_argument("--no-ema", action="store_true", help="not the averaged weights, where the file has others too")
    parser.add_argument(
        "--resume", type=expanded, metavar="auto|PATH", help="go on with a run that was interrupted, as in sws train"
    )
    add_set_option(parser)
    add_deepspeed_option(parser, required=False)
    add_local_rank_option(parser)
    return parser


def choose_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the config keys that the command line, the weights and the number of images decide.

    Raises:
        ValueError: weights that say of no model, or a folder that cannot be trained on.
    """
    data = Path(os.path.abspath(args.data))
    sets = {"output": args.output or f"runs/finetune/{data.name}", "train.seed": args.seed}
    sets |= model_settings(args) | split_settings(data, args.val_share)
    num_images = count_images(load_config("finetune", [*as_overrides(sets), *args.overrides]).data)
    complete_environment(os.environ)
    world, local_size = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_SIZE"])
    batch = choose_batch(num_images, world) if args.batch is None else args.batch
    epochs = choose_epochs(num_images, batch) if args.epochs is None else args.epochs
    sets |= {"train.global_batch": batch, "train.epochs": epochs}
    sets |= {"train.eval_every": max(1, epochs // 20), "checkpoint.every": max(1, epochs // 5)}
    sets["data.num_threads"] = min(8, max(1, len(os.sched_getaffinity(0)) // local_size))
    return sets | ({} if args.lr is None else {"optim.lr": args.lr})


def as_overrides(sets: dict[str, Any]) -> list[str]:
    """Write config keys as ``--set`` takes them."""
    paths = marked_keys(IS_PATH)
    return [f"{key}={escape_path(value) if key in paths else json.dumps(value)}" for key, value in sets.items()]


def model_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the keys of the model, and how it wants its images."""
    from sws_dist.checkpoint.foreign_model import describe_file, is_same_model, timm_preprocessing
    from sws_dist.checkpoint.open_model import find_weights
    from sws_dist.models.vit import timm_config

    path = str(find_weights(args.weights))
    info = describe_file(path, args.model)
    is_learngene = info is not None and info.kind == "learngene"
    if args.depth is not None and not is_learngene:
        raise ValueError(f"--depth {args.depth}: only a learngene can be expanded, and {path} is none")
    if info is None:
        if args.model is None:
            raise ValueError(f"{path} does not say which model it is of; name it with --model")
        sets, about = {"model.name": args.model}, timm_preprocessing(timm_config(args.model))
    else:
        if args.model is not None and not is_same_model(args.model, info.name):
            raise ValueError(f"--model {args.model}: {path} says that it is of {info.name}")
        others = ("schedule", "branch_scaling", "img_size")  # a descendant's own: its layers do not repeat
        kwargs = {key: value for key, value in info.kwargs.items() if key not in others}
        name = "sws_vit" if is_learngene else info.name  # TLEG's descendants too are ordinary models
        sets, about = {"model.name": name, "model.kwargs": kwargs}, info.preprocessing
        if name == "sws_vit":
            schedule = info.kwargs["schedule"]
            sets["model.depth"] = len(schedule) if not is_learngene else sum(schedule)
            if args.depth is not None:
                sets["model.depth"] = args.depth
    sets |= {"model.initial_learngene": path} if is_learngene else {"model.initial_checkpoint": path}
    if args.no_ema:
        sets["model.initial_ema"] = False
    if about.get("interpolation") not in (None, "bicubic", "bilinear"):  # some of timm's models draw it, or have others
        about = about | {"interpolation": "bicubic"}
    sets |= {f"data.{key}": value for key, value in about.items()}
    return sets | ({} if args.image_size is None else {"data.image_size": args.image_size})


def split_settings(data: Path, val_share: float) -> dict[str, Any]:
    """Return where training and validation images are.

    ``data`` holds ``train`` and a validation folder, or ``train`` alone, or is itself a folder of class folders (or of
    shards, or a list). Without validation images a share of the training images is held out.
    """
    if not data.exists():
        raise ValueError(f"--data {data}: there is no such folder")
    if not 0 < val_share < 1:
        raise ValueError(f"--val-share {val_share}: expected a share between 0 and 1, such as 0.1")
    inside = {entry.name for entry in data.iterdir() if entry.is_dir()} if data.is_dir() else set()
    splits = inside & {"train", *VAL_FOLDERS, *OTHER_SPLITS}
    if splits < inside:  # a class may be called train, beside bus and car: its folder holds images
        splits = {name for name in splits if holds_split(data / name)}
    if "train" not in splits:
        if splits:
            raise ValueError(
                f"--data {data}: holds {', '.join(sorted(splits))}, but no train; name the training images' folder "
                "train, or give the folder of the class folders itself"
            )
        return {"data.root": str(data.parent), "data.train_split": data.name, "data.val_share": val_share}
    val = next((name for name in VAL_FOLDERS if name in splits), None)
    if unused := sorted(inside - {"train", val}):
        log.info(f"{data}: not used: {', '.join(unused)}")
    return {"data.root": str(data)} | ({"data.val_split": val} if val else {"data.val_share": val_share})


def count_images(config: DataConfig) -> int:
    """Return the number of training images.

    Raises:
        ValueError: fewer than two classes.
    """
    from sws_dist.data.sources import find_source
    from sws_dist.data.tar_shards import SampleKeys

    keys = SampleKeys(config.image_extensions, config.label_key)
    lists = Path(config.lists) if config.lists else None
    source, _ = find_source(config.root, config.train_split, keys=keys, lists=lists)
    if len(source.classes) < 2:
        raise ValueError(f"{source.folder}: holds one class ({source.classes[0]}); at least two are needed")
    return max(1, int(len(source) * (1 - (config.val_share or 0))))


def choose_batch(num_images: int, world: int) -> int:
    """Return a power of two, as far as the ranks allow it, that leaves an epoch some steps."""
    batch = BATCH
    while batch > 1 and batch * STEPS_PER_EPOCH > num_images:
        batch //= 2
    return max(1, batch // world) * world


def choose_epochs(num_images: int, batch: int) -> int:
    """Return the epochs that make about ``STEPS`` steps, within ``EPOCHS``."""
    return min(max(STEPS * batch // num_images, EPOCHS[0]), EPOCHS[1])


def choose_deepspeed_config() -> str:
    """Return the shipped DeepSpeed config for this machine: bf16 where its GPU has it."""
    import torch

    from sws_dist.distributed.init import has_gpu

    if not has_gpu():
        return "zero0"
    return "zero2_bf16" if torch.cuda.is_bf16_supported() else "zero2"


if __name__ == "__main__":  # deepspeed --module sws_dist.cli.finetune
    from sws_dist.cli.main import run

    run("finetune")
