"""TODO: say what this module does."""

from __future__ import annotations

from typing import Any

from sws_dist.checkpoint.checkpoint import describe_layout
from sws_dist.data.bad_images import named
from sws_dist.data.manifest import Manifest
from sws_dist.run_dir import write_configs


def log_run_header(trainer: Any) -> None:
    """The first lines of the log, and the resolved configs beside the run."""
    t = trainer
    if t.world.is_main:
        for note in t.notes:
            t.recorder.say(note)
        for name, text in write_configs(t.config, t.ds, t.output).items():
            t.recorder.text(name, text)
    teacher = f", taught by {t.config.distill.teacher}" if t.teacher is not None else ""
    start = f"from step {t.step}, " if t.step else ""
    layout = describe_layout(t.engine, t.world)
    t.recorder.say(
        f"{t.output}: {t.config.model.name}, {t.parameters / 1e6:.2f} M parameters{teacher}\n"
        + "".join(f"{line}\n" for line in describe_dataset(t.train_set, t.val_set))
        + f"{start}{t.total_steps} steps of {t.config.train.global_batch} images, "
        f"{t.world}, {t.world.device.type}, ZeRO-{layout['zero_stage']}, {layout['precision']}\n"
        f"{t.kernels}"
    )


def describe_dataset(train: Manifest, val: Manifest) -> list[str]:
    """What whoever starts a run should hear of its images: how many there are, and which are left out."""
    lines = [f"{len(train)} training and {len(val)} validation images in {len(train.classes)} classes"]
    for kind, images in (("training", train), ("validation", val)):
        lines += images.notes
        if images.bad:
            lines.append(f"{len(images.bad)} bad {kind} image(s) in {images.folder} are left out")
            lines += named(images.bad)
    return lines
