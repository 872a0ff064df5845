"""Feed DeepSpeed's own monitors (``wandb``, ``csv_monitor``, ``comet`` in its JSON) with the run's curves.

Left to itself, DeepSpeed's engine writes the learning rate alone, after every step, and counts from 0 again when a run
goes on. So the engine is not told of the monitors (``engine.build_engine``); they get what TensorBoard gets. Like
DeepSpeed they count in images, which Comet's ``samples_log_interval`` is given in.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepspeed.monitor.config import get_monitor_config
from deepspeed.monitor.monitor import MonitorMaster

from sws_dist.errors import ConfigError, RunError
from sws_dist.zero.config import MONITORS

log = logging.getLogger(__name__)


class Monitors:
    """Write curves to the monitors of a DeepSpeed config.

    Args:
        master: DeepSpeed's, which knows them all.
        global_batch: images of a step.
    """

    def __init__(self, master: Any, global_batch: int) -> None:
        self._master, self._global_batch = master, global_batch
        self._works = True

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write the values of ``step``. A monitor that fails is given up with a warning: training goes on without."""
        if not self._works:
            return
        try:
            self._master.write_events([(name, value, step * self._global_batch) for name, value in values.items()])
        except Exception as error:  # whatever a service's client raises
            self._works = False
            log.warning("the monitors of the DeepSpeed config get no more values: %s", error)


def open_monitors(ds: Mapping[str, Any], global_batch: int, output: Path) -> Monitors | None:
    """Start the monitors that a DeepSpeed config enables, on rank 0. Returns None if there are none.

    Args:
        output: the run's folder. CSV files without an ``output_path`` go there: DeepSpeed would append the rows of all
            runs to the same files in the current folder.

    Raises:
        ConfigError: a monitor's package is not installed.
        RunError: a monitor cannot be started.
    """
    enabled = [name for name in MONITORS if ds.get(name, {}).get("enabled")]
    if not enabled:
        return None
    groups = {name: dict(ds[name]) for name in enabled}
    if "csv_monitor" in groups:
        groups["csv_monitor"] = {"output_path": str(output), "job_name": "csv"} | groups["csv_monitor"]
    try:
        master = MonitorMaster(get_monitor_config(groups))
    except ImportError as error:
        raise ConfigError(
            f"{', '.join(enabled)} in the DeepSpeed config: {error}; install the package, or set enabled to false"
        ) from None
    except Exception as error:  # whatever a service's client raises
        raise RunError(f"{', '.join(enabled)} in the DeepSpeed config cannot be started: {error}") from None
    return Monitors(master, global_batch)
