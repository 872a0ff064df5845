"""The monitors of a DeepSpeed config: what is written where, and what happens when one is not there or fails."""

from __future__ import annotations

import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import ranks


def feed(folder: Path) -> list[str]:
    """Feed CSV files, one of which breaks, and ask for Weights & Biases in vain. Returns what is said."""
    from sws_dist.distributed.init import init_distributed
    from sws_dist.errors import ConfigError
    from sws_dist.zero.engine import connect_deepspeed
    from sws_dist.zero.monitor import open_monitors

    init_distributed(60)
    connect_deepspeed()
    warnings: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("sws_dist.zero.monitor").addHandler(handler)
    off: dict[str, Any] = {"wandb": {"enabled": False}, "csv_monitor": {}}
    assert open_monitors(off, 32, folder) is None
    default = open_monitors({"csv_monitor": {"enabled": True}}, 32, folder / "run")
    own = {"enabled": True, "output_path": str(folder), "job_name": "mine"}
    named = open_monitors({"csv_monitor": own}, 32, folder / "run")
    assert default is not None
    assert named is not None
    for step in (1, 2):
        default.write(step, {"train/loss": 1 / step, "val/top1": 0.5})
        named.write(step, {"train/loss": 1 / step})  # into a folder that is gone after the first
        shutil.rmtree(folder / "mine", ignore_errors=True)
    sys.modules["wandb"] = None  # type: ignore[assignment]
    with pytest.raises(ConfigError) as raised:
        open_monitors({"wandb": {"enabled": True}}, 32, folder)
    return [*warnings, str(raised.value)]


def test_curves_are_fed_and_a_failure_is_said_once(tmp_path: Path) -> None:
    ((warning, refusal),) = ranks.run(feed, tmp_path, world=1)
    assert (tmp_path / "run" / "csv" / "train_loss.csv").read_text().split() == ["step,loss", "32,1.0", "64,0.5"]
    assert (tmp_path / "run" / "csv" / "val_top1.csv").read_text().split() == ["step,top1", "32,0.5", "64,0.5"]
    assert warning.startswith("the monitors of the DeepSpeed config get no more values: [Errno 2]")
    assert refusal.startswith("wandb in the DeepSpeed config: ")
    assert refusal.endswith("; install the package, or set enabled to false")
