"""Arrange a run's curves for TensorBoard: a few groups, and a page of charts on which the runs of a family compare.

``log.jsonl`` and ``metrics.json`` name a score after the evaluation that it is of (``val_ema_depth7/top1``). On a page
that would be a group for each depth; there it is ``depth/val_top1_ema/7``.
"""

from __future__ import annotations

import re

_SCORE = re.compile(r"(train|val)(_ema)?(?:_depth(\d+))?/(\w+)")

# Group -> chart -> the tags of its curves, as regular expressions; TensorBoard draws those of every run.
LAYOUT = {
    "The family": {
        "top-1": ["Multiline", [r"^val/top1$", r"^val/top1_ema$"]],
        "validation loss": ["Multiline", [r"^val/loss$", r"^val/loss_ema$"]],
        "training loss": ["Multiline", [r"^train/loss$"]],
        "top-1 by depth": ["Multiline", [r"^depth/val_top1/"]],
        "validation loss by depth": ["Multiline", [r"^depth/val_loss/"]],
        "training loss by depth": ["Multiline", [r"^depth/train_loss/"]],
    },
    "Speed": {
        "images a second": ["Multiline", [r"^perf/images_per_s$"]],
        "share of the peak FLOP/s": ["Multiline", [r"^perf/mfu$"]],
        "milliseconds a step": ["Multiline", [r"^time/"]],
    },
    "Health": {
        "gradient norms": ["Multiline", [r"^norms/gradient/"]],
        "weight norms": ["Multiline", [r"^norms/weights/"]],
        "learning rate": ["Multiline", [r"^train/lr$"]],
    },
}


def tag_of(name: str) -> str:
    """Return the TensorBoard tag of a value of the log."""
    found = _SCORE.fullmatch(name)
    if found is None:
        return name
    split, ema, depth, score = found.groups()
    score += ema or ""
    return f"{split}/{score}" if depth is None else f"depth/{split}_{score}/{depth}"
