"""Log what a run is about to do: the first lines of its log."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from sws_dist.data.bad_images import describe_bad_files
from sws_dist.data.manifest import Manifest

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunHeader:
    """Contents of the first lines of a run's log."""

    output: Path
    model: str
    num_parameters: int
    teacher: str | None
    first_step: int
    total_steps: int
    global_batch: int
    world: str
    """Nodes and ranks: ``2 nodes x 8 ranks``."""
    device: str
    zero_stage: int
    precision: str
    kernels: str
    """Log message about the code that runs the stages."""
    peak: str
    """Log message about the device's peak."""


def log_run_header(header: RunHeader, train: Manifest, val: Manifest) -> None:
    """Log length, model, data and layout of a run, a line each."""
    start = f"from step {header.first_step}, " if header.first_step else ""
    lines = [
        ("run", f"{header.output}: {start}{header.total_steps} steps of {header.global_batch} images"),
        ("model", f"{header.model}, {header.num_parameters / 1e6:.2f} M parameters"),
        *([("teacher", header.teacher)] if header.teacher else []),
        ("data", f"{len(train)} training and {len(val)} validation images in {len(train.classes)} classes"),
        ("ranks", f"{header.world}, {header.device}, ZeRO-{header.zero_stage}, {header.precision}"),
        ("kernels", header.kernels.removeprefix("kernels: ")),
        ("peak", header.peak),
    ]
    for label, text in lines:
        log.info(f"{label:8} {text}")
    for line in (*describe_left_out("training", train), *describe_left_out("validation", val)):
        log.warning(line)


def describe_left_out(kind: str, images: Manifest) -> list[str]:
    """Return log messages about what the list of images has noticed, and about each file that it leaves out."""
    lines = list(images.notes)
    if images.bad:
        lines.append(f"{len(images.bad)} bad {kind} image(s) in {images.folder} are left out")
    return lines + describe_bad_files(images.bad)
