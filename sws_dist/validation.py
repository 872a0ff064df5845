"""Score a run's weights on its validation images: at the model's own depth and others, and their average too."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from sws_dist.atomic import atomic_write_text
from sws_dist.build import RunParts
from sws_dist.data.bad_images import BadImages
from sws_dist.data.loader import Batch
from sws_dist.distributed.collectives import average_buffers, raise_on_all_ranks
from sws_dist.distributed.step_sync import StopAwareIterator
from sws_dist.logging.confusion import MAX_CLASSES, confusion_table, draw_confusion
from sws_dist.logging.images import labelled_grid
from sws_dist.progress import track
from sws_dist.review import Review
from sws_dist.scoring import Scores, score_batches

OWN, AVERAGED = "val", "val_ema"
"""Names of the scores of the weights, and of their moving average, at the model's own depth."""

log = logging.getLogger(__name__)


def score_run(parts: RunParts, step: int) -> dict[str, Scores] | None:
    """Score what the run has learned by ``step``, and show its worst guesses. A collective.

    Returns:
        Scores by name: ``val``, ``val_ema`` where an average is kept, and both with ``_depth8`` and so on for each of
        ``train.eval_depths``. None if the run was told to stop meanwhile.
    """
    average_buffers(parts.engine.module)
    review = Review(parts.config.data.mean, parts.config.data.std)
    found = _score_depths(parts, OWN, review)
    if found is None:
        return None
    _show(parts, review, step)
    if parts.ema is None:
        return found
    with parts.ema.applied():
        averaged = _score_depths(parts, AVERAGED)
    return None if averaged is None else found | averaged


def _score_depths(parts: RunParts, name: str, review: Review | None = None) -> dict[str, Scores] | None:
    """Score what the model holds, at each depth, and review its own. Returns None if the run was told to stop."""
    found = {}
    for suffix, repeats in parts.models.eval_repeats.items():  # the own depth is the last, and stays
        if repeats is not None:
            parts.models.student.set_repeats(repeats)
        scores = _score(parts, review.add if review is not None and not suffix else None)
        if scores is None:
            return None
        found[name + suffix] = scores
    return found


def _score(parts: RunParts, observe: Callable[[Batch, Tensor], None] | None) -> Scores | None:
    parts.engine.eval()
    parts.data.bad_val.clear()
    loader = track(parts.data.val_loader, "evaluating", parts.data.num_val_batches, "batches")
    batches = StopAwareIterator(loader, parts.world.device, parts.heartbeat.tick)
    with parts.heartbeat.phase("evaluating"):
        scores = score_batches(parts.engine, batches, parts.dtype, observe)
    log_bad_images(parts, parts.data.bad_val, None, len(parts.data.val))
    parts.engine.train()
    return None if batches.stop_requested else scores


def _show(parts: RunParts, review: Review, step: int) -> None:
    """Write the images with the largest losses and, at the run's end, the confusion matrix. A collective."""
    images, recorder, classes = parts.data.val, parts.recorder, parts.data.val.classes
    worst = review.gather_worst()
    if worst is not None:
        rows = zip(*(column.tolist() for column in worst[:4]), strict=True)
        captions = [
            f"{classes[label]} / {classes[guess]}\nloss {loss:.2f}\n{Path(images.paths[index]).name}"
            for loss, label, guess, index in rows
        ]
        recorder.image("val/worst (label / guess)", labelled_grid(worst.images, captions), step)
    if step < parts.total_steps:
        return
    if len(classes) > MAX_CLASSES:
        log.info("the confusion matrix of %d classes is left out; it is made of up to %d", len(classes), MAX_CLASSES)
        return
    counts = review.gather_confusion(len(classes))
    with raise_on_all_ranks("write the confusion matrix"):
        if counts is not None:
            atomic_write_text(parts.output / "confusion.csv", confusion_table(counts, classes))
            recorder.image("val/confusion", draw_confusion(counts, classes), step)


def log_bad_images(parts: RunParts, bad: BadImages, epoch: int | None, epoch_size: int) -> None:
    """Log what could not be read since the last call; RunError on all ranks if it is too much. A collective."""
    for line in bad.exchange(parts.world.device, epoch, epoch_size, parts.config.data.max_bad_share):
        log.warning(line)
