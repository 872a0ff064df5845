"""Say what a run has come to: the contents of ``metrics.json``, and the last lines of the log."""

from __future__ import annotations

import logging
import shlex
from pathlib import Path
from typing import Any

from sws_dist.build import RunParts
from sws_dist.build_models import num_layers, training_flops
from sws_dist.checkpoint.checkpoint import describe_layout
from sws_dist.units import format_duration, format_flop

log = logging.getLogger(__name__)


def collect_results(
    parts: RunParts, history: list[dict[str, float]], best_top1: float | None, seconds: float, rank_seconds: float
) -> dict[str, Any]:
    """Return what ``metrics.json`` holds.

    Args:
        history: the evaluations, the last one at the run's end.
        seconds, rank_seconds: of the run, over all its resumes, and of its ranks together.
    """
    train, models, last = parts.config.train, parts.models, history[-1]
    return {
        "model": parts.config.model.name,
        "depth": num_layers(models.student),
        "parameters": models.num_parameters,
        "top1": last["val/top1"],
        "top5": last["val/top5"],
        "top1_ema": last.get("val_ema/top1"),
        "best_top1": best_top1,
        "history": history,
        "seed": train.seed,
        "epochs": train.epochs,
        "steps": parts.total_steps,
        "images": parts.total_steps * train.global_batch,
        "validation_images": len(parts.data.val),
        "seconds": seconds,
        "rank_seconds": rank_seconds,
        "flops_forward": models.flops.student,
        "flops_teacher": models.flops.teacher,
        "flops": training_flops(models.flops, models.elastic, parts.total_steps, train.global_batch),
        **describe_layout(parts.engine, parts.world),
        **parts.provenance,
    }


def log_summary(result: dict[str, Any], output: Path, weights: Path, device: str) -> None:
    """Log accuracy, time and cost of a finished run, and where things are, a line each.

    Args:
        result: what ``metrics.json`` holds.
        weights: the file to use.
        device: ``cuda`` or ``cpu``.
    """
    averaged = "" if result["top1_ema"] is None else f", averaged weights {100 * result['top1_ema']:.2f} %"
    flops = "" if result["flops"] is None else f", {format_flop(result['flops'])}"
    unit = "GPU" if device == "cuda" else "CPU rank"
    lines = [
        ("done", f"{result['steps']} steps, {result['images']:,} images"),
        (
            "accuracy",
            f"top-1 {100 * result['top1']:.2f} %, top-5 {100 * result['top5']:.2f} %, "
            f"best top-1 {100 * result['best_top1']:.2f} %{averaged}",
        ),
        ("time", f"{format_duration(result['seconds'])}, {result['images'] / result['seconds']:.0f} images/s in all"),
        ("cost", f"{result['rank_seconds'] / 3600:.2f} {unit} hours{flops}"),
        ("weights", str(weights)),
        ("figures", f"{output / 'metrics.json'}, {output / 'confusion.csv'}"),
        ("curves", f"tensorboard --logdir {shlex.quote(str(output))}"),
    ]
    for label, text in lines:
        log.info(f"{label:8} {text}")
