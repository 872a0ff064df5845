"""Compare a config with that of the run that it resumes: a run goes on only as it began. Imports no torch.

The keys that may change, since they do not decide what is learned, are marked ``MayChange`` in ``schema.py``.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sws_dist.config.loader import load_config, marked_keys, valid_keys
from sws_dist.config.lr_schedule import LRSchedule
from sws_dist.config.schema import IS_PATH, MAY_CHANGE, RunConfig
from sws_dist.errors import ConfigError
from sws_dist.text import read_json, read_text

CLIPPING = "gradient_clipping"
"""The one key of the DeepSpeed config that is part of the recipe; the others may change."""

LENGTH = {"train.epochs", "optim.decay_epochs"}
"""The keys that may change as long as the learning rate has not begun to decay."""

_NO_WEIGHTS = "FILE (sws convert writes one from a checkpoint)"

log = logging.getLogger(__name__)


def compare_with_own_config(
    folder: Path,
    config: RunConfig,
    ds: Mapping[str, Any] | None = None,
    weights: str | Path = _NO_WEIGHTS,
    reached: tuple[int, int] | None = None,
) -> RunConfig | None:
    """Compare ``config`` with that of the run in ``folder``, and log the keys that are allowed to differ and do.

    Args:
        folder: the run's output folder, as it stands now.
        ds: the resolved DeepSpeed config; None: it is not compared.
        weights: the file of the run's weights, for the message.
        reached: the step of the checkpoint that the run goes on from, and the images of its epochs.

    Returns:
        The run's own config; None, with a warning, if the folder holds none.

    Raises:
        ConfigError: another key differs.
    """
    file = folder / "config.yaml"
    if not file.is_file():
        log.warning("%s is not there: nothing says whether this config is the run's own", file)
        return None
    own = load_config(file)
    if own.model.elastic is not None and "branch_scaling" not in read_text(file):  # written before there was one
        unscaled = dataclasses.replace(own.model.elastic, branch_scaling=0.0)
        own = dataclasses.replace(own, model=dataclasses.replace(own.model, elastic=unscaled))
    harmless: list[str] = []
    refused: list[str] = []
    may_change = set(marked_keys(MAY_CHANGE))
    if "muon" in (own.optim.name, config.optim.name):
        may_change.remove("optim.name")  # it keeps another state than the Adams, which are one method
    if reached is not None and _is_before_decay(own, *reached) and _is_before_decay(config, *reached):
        may_change |= LENGTH
    for key, (before, now) in changed_keys(own, config).items():
        (harmless if key in may_change else refused).append(f"{key} {_text(now)} (it was {_text(before)})")
    if ds is not None and (folder / "deepspeed.json").is_file():
        before, now = read_json(folder / "deepspeed.json").get(CLIPPING), ds.get(CLIPPING)
        if before != now:
            refused.append(f"{CLIPPING} {_text(now)} in the DeepSpeed config (it was {_text(before)})")
    if refused:
        hint = "; its length may change from a checkpoint before its decay" if own.optim.schedule == "wsd" else ""
        raise ConfigError(
            f"{folder}: a run goes on only as it began{hint}, and this config has {', '.join(refused)}. Set that back, "
            f"or begin a new run from its weights: --set model.initial_checkpoint={weights} --set output=ANOTHER"
        )
    if harmless:
        log.info("going on with %s", ", ".join(harmless))
    return own


def changed_keys(own: RunConfig, now: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Return the keys whose values differ, with both values. Paths to one place are equal, however they are written."""
    before, after = flatten_config(own), flatten_config(now)
    paths = set(marked_keys(IS_PATH))
    return {
        key: (before[key], after[key])
        for key in before
        if key in after  # a group that is null on the other side; its keys are there
        and before[key] != after[key]
        and not (key in paths and before[key] and after[key] and _same_place(before[key], after[key]))
    }


def finished_metrics(config: RunConfig) -> dict[str, Any] | None:
    """Return what ``metrics.json`` holds if the run in ``config.output`` is done, else None.

    Raises:
        ConfigError: it is done, and ``config`` is that of another run.
    """
    finished = Path(config.output) / "metrics.json"
    if not finished.is_file():
        return None
    require_own(config)
    log.info("%s exists: this run is done", finished)
    return read_json(finished)


def require_own(config: RunConfig) -> None:
    """Raise ConfigError if the finished run in ``config.output`` is another one than that of ``config``."""
    output = Path(config.output)
    files = (output / f"{name}.safetensors" for name in ("learngene", "model"))
    weights = next((file for file in files if file.is_file()), _NO_WEIGHTS)
    try:
        compare_with_own_config(output, config, weights=weights)
    except ConfigError as error:
        raise ConfigError(f"{output / 'metrics.json'} exists: this run is done. {error}") from None


def flatten_config(config: RunConfig) -> dict[str, Any]:
    """Return the value of every key that is no group; None where its group is null."""
    flat = {}
    for dotted in valid_keys():
        value: Any = config
        for part in dotted.split("."):
            value = getattr(value, part, None)
        if not dataclasses.is_dataclass(value):
            flat[dotted] = value
    return flat


def _is_before_decay(config: RunConfig, step: int, epoch_size: int) -> bool:
    """Return True if the learning rates of the first ``step`` steps do not depend on the length of the run."""
    return config.optim.schedule == "wsd" and step <= LRSchedule.of_run(config, epoch_size).decay_start


def _same_place(one: str, other: str) -> bool:
    return os.path.abspath(one) == os.path.abspath(other)


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
