"""Prepare a run's output folder: exclusive to one run, shared by all nodes, with its configs inside."""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from pathlib import Path
from typing import Any

from sws_dist.atomic import atomic_write_text
from sws_dist.checkpoint.folders import list_checkpoints
from sws_dist.config.loader import config_to_yaml
from sws_dist.config.schema import RunConfig
from sws_dist.distributed.collectives import broadcast_from_rank0, raise_on_all_ranks
from sws_dist.distributed.heartbeat import find_live_rank
from sws_dist.distributed.init import World
from sws_dist.errors import ConfigError

_VISIBLE_WITHIN_S = 75.0
"""Seconds in which a file of one node has to be seen by all others (NFS remembers for up to 60 that one was absent), if
``train.timeout_s`` lets the ranks wait for as long."""

CHECKPOINTS, HEARTBEATS = "checkpoints", "heartbeats"
"""Folders inside the run's."""


def run_folder(checkpoint: Path) -> Path:
    """Return the output folder of the run that wrote a checkpoint."""
    return Path(os.path.abspath(checkpoint)).parent.parent  # a checkpoint may be named from inside its folder


def prepare_output(config: RunConfig, resume: str | None, world: World) -> Path:
    """Create the run's folder, which all nodes have to see, refusing to mix two runs in one. A collective.

    Raises:
        RunError: another run is at work there, or has left checkpoints that this one does not go on from; no permission
            to write; or the nodes do not share it.
    """
    output = Path(config.output)
    checkpoints = output / CHECKPOINTS
    with raise_on_all_ranks("prepare the output folder"):
        if world.is_rank_zero:
            output.mkdir(parents=True, exist_ok=True)
            if not os.access(output, os.W_OK):
                raise PermissionError(f"output {output}: no permission to write there")
            own = resume == "auto" or (resume is not None and run_folder(Path(resume)).resolve() == output.resolve())
            if not own and list_checkpoints(checkpoints):
                raise ConfigError(
                    f"output {output}: already holds a run; go on with --resume auto, or --set output=ANOTHER"
                )
            if (live := find_live_rank(output / HEARTBEATS)) is not None:
                raise ConfigError(
                    f"output {output}: another run is at work there: rank {live['rank']} on {live['host']} (process "
                    f"{live['pid']}); stop it first, or --set output=ANOTHER"
                )
            checkpoints.mkdir(exist_ok=True)
    _require_shared(output, world, min(_VISIBLE_WITHIN_S, config.train.timeout_s))
    return output


def _require_shared(output: Path, world: World, within_s: float) -> None:
    """Stop all ranks if what rank 0 writes into the run's folder is not there for every one of them. A collective."""
    if world.nodes == 1:
        return
    token = output / CHECKPOINTS / broadcast_from_rank0(f".seen-by-all-{uuid.uuid4().hex}")
    try:
        with raise_on_all_ranks("write into the output folder"):
            if world.is_rank_zero:
                token.touch()
        with raise_on_all_ranks("find there what rank 0 wrote"):
            deadline = time.monotonic() + within_s
            while not token.exists():
                if time.monotonic() > deadline:
                    raise ConfigError(
                        f"output {output}: on {socket.gethostname()} it is another folder than on rank 0's node; "
                        "all nodes have to share its file system"
                    )
                time.sleep(0.1)
    finally:
        if world.is_rank_zero:
            token.unlink(missing_ok=True)


def write_configs(config: RunConfig, ds: dict[str, Any], provenance: dict[str, Any], output: Path) -> dict[str, str]:
    """Write ``config.yaml``, ``deepspeed.json`` and ``environment.json`` into the run's folder.

    Returns:
        Their texts by name.
    """
    texts = {
        "config.yaml": config_to_yaml(config),
        "deepspeed.json": json.dumps(ds, indent=2) + "\n",
        "environment.json": json.dumps(provenance, indent=2) + "\n",
    }
    for name, text in texts.items():
        atomic_write_text(output / name, text)
    return texts
