"""Score a run's weights on its validation images: at the model's own depth and others, and their average too."""

from __future__ import annotations

import logging

from sws_dist.build import RunParts
from sws_dist.data.bad_images import BadImages
from sws_dist.distributed.collectives import average_buffers
from sws_dist.distributed.step_sync import StopAwareIterator
from sws_dist.scoring import Scores, score_batches

OWN, AVERAGED = "val", "val_ema"
"""Names of the scores of the weights, and of their moving average, at the model's own depth."""

log = logging.getLogger(__name__)


def score_run(parts: RunParts) -> dict[str, Scores] | None:
    """Score what the run has learned so far. A collective.

    Returns:
        Scores by name, each a group of TensorBoard curves: ``val``, ``val_ema`` where an average is kept, and both with
        ``_depth8`` and so on for each of ``train.eval_depths``. None if the run was told to stop meanwhile.
    """
    average_buffers(parts.engine.module)
    found = _score_depths(parts, OWN)
    if found is None or parts.ema is None:
        return found
    with parts.ema.applied():
        averaged = _score_depths(parts, AVERAGED)
    return None if averaged is None else found | averaged


def _score_depths(parts: RunParts, name: str) -> dict[str, Scores] | None:
    """Score what the model holds, at each depth. Returns None if the run was told to stop meanwhile."""
    found = {}
    for suffix, repeats in parts.models.eval_repeats.items():  # the own depth is the last, and stays
        if repeats is not None:
            parts.models.student.set_repeats(repeats)
        scores = _score(parts)
        if scores is None:
            return None
        found[name + suffix] = scores
    return found


def _score(parts: RunParts) -> Scores | None:
    parts.engine.eval()
    parts.data.bad_val.clear()
    batches = StopAwareIterator(parts.data.val_loader, parts.world.device, parts.heartbeat.tick)
    with parts.heartbeat.phase("evaluating"):
        scores = score_batches(parts.engine, batches, parts.dtype)
    log_bad_images(parts, parts.data.bad_val, 0, len(parts.data.val))
    parts.engine.train()
    return None if batches.stop_requested else scores


def log_bad_images(parts: RunParts, bad: BadImages, epoch: int, epoch_size: int) -> None:
    """Log what could not be read since the last call; RunError on all ranks if it is too much. A collective."""
    for line in bad.exchange(parts.world.device, epoch, epoch_size, parts.config.data.max_bad_share):
        log.warning(line)
