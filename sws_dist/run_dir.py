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
from sws_dist.checkpoint.checkpoint import list_checkpoints
from sws_dist.config.loader import config_to_yaml
from sws_dist.config.schema import RunConfig
from sws_dist.distributed.collectives import broadcast_from_rank0, raise_on_all_ranks
from sws_dist.distributed.init import World
from sws_dist.errors import ConfigError

_VISIBLE_WITHIN_S = 15.0
"""Seconds in which a file of one node has to be seen by all others (NFS caches folders for some seconds)."""


def prepare_output(config: RunConfig, resume: str | None, world: World) -> Path:
    """Create the run's folder, which all nodes have to see, refusing to mix two runs in one. A collective."""
    output = Path(config.output)
    with raise_on_all_ranks("prepare the output folder"):
        if world.is_rank_zero:
            output.mkdir(parents=True, exist_ok=True)
            if not os.access(output, os.W_OK):
                raise PermissionError(f"output {output}: no permission to write there")
            if resume is None and list_checkpoints(output / "checkpoints"):
                raise ConfigError(
                    f"output {output}: already holds a run; go on with --resume auto, or --set output=ANOTHER"
                )
    _require_shared(output, world)
    return output


def _require_shared(output: Path, world: World) -> None:
    """Stop all ranks if what rank 0 writes into the run's folder is not there for every one of them. A collective."""
    if world.nodes == 1:
        return
    token = output / broadcast_from_rank0(f".seen-by-all-{uuid.uuid4().hex}")
    try:
        with raise_on_all_ranks("write into the output folder"):
            if world.is_rank_zero:
                token.touch()
        with raise_on_all_ranks("find there what rank 0 wrote"):
            deadline = time.monotonic() + _VISIBLE_WITHIN_S
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
