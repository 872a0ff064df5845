"""Tell checkpoints from whatever else lies in their folder, and delete them."""

from __future__ import annotations

import json
import logging
import re
from enum import Enum, auto
from pathlib import Path

log = logging.getLogger(__name__)

_GLOB = "step-" + 8 * "[0-9]"
_NAME = re.compile(r"(\.|\.abandoned-)?step-\d{8}")
_SHARD = re.compile(r"shard-\d+-of-\d+\.safetensors")
_OURS = re.compile(rf"{_SHARD.pattern}|state\.json|\.state\.json\.\d+\.tmp")


class FolderKind(Enum):
    """What a folder among the checkpoints is; ``kind_of`` says how it is told."""

    CHECKPOINT = auto()
    DAMAGED = auto()
    LEFTOVER = auto()
    OTHER = auto()


def kind_of(folder: Path) -> FolderKind:
    """Say what a folder is, from its name and its files' names.

    A save gives a checkpoint its name last, and a deletion takes it away first. So there are these cases:

    - ``CHECKPOINT``: ``step-N`` with shards and a ``state.json`` of step N. A shard may be damaged (``verify``).
    - ``DAMAGED``: ``step-N`` with shards, whose ``state.json`` is lost, or says no step. It is never deleted, for its
      weights.
    - ``LEFTOVER``: ``.step-N`` with nothing in it but files of ours: a kill has cut a save or a deletion short.
    - ``OTHER``: everything else, such as a copy under another step's number, or a folder of the user's own.
    """
    if not folder.is_dir() or not _NAME.fullmatch(folder.name):
        return FolderKind.OTHER
    names = [file.name for file in folder.iterdir()]
    if folder.name.startswith("."):
        return FolderKind.LEFTOVER if all(map(_OURS.fullmatch, names)) else FolderKind.OTHER
    if not any(map(_SHARD.fullmatch, names)):
        return FolderKind.OTHER
    try:
        step = json.loads((folder / "state.json").read_bytes())["step"]
    except (OSError, ValueError, KeyError, TypeError):
        return FolderKind.DAMAGED
    if not isinstance(step, int):
        return FolderKind.DAMAGED
    return FolderKind.CHECKPOINT if folder.name == f"step-{step:08d}" else FolderKind.OTHER


def list_checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints under ``folder``, damaged or not, oldest first; whatever else is there is not ours."""
    return [
        found for found in sorted(folder.glob(_GLOB)) if kind_of(found) in (FolderKind.CHECKPOINT, FolderKind.DAMAGED)
    ]


def delete_leftovers(folder: Path) -> None:
    """Delete what kills in the middle of saves and deletions have left under ``folder``."""
    for hidden in sorted(folder.glob(".*")):
        if kind_of(hidden) is FolderKind.LEFTOVER:
            log.info("%s: deleted; a kill had left it unfinished", hidden)
            delete_checkpoint(hidden)


def delete_checkpoint(checkpoint: Path) -> None:
    """Delete a checkpoint, whole or not, and nothing else that a user may have put into its folder.

    Its name goes first: what a kill leaves then is no damaged checkpoint, but none. A folder with files of the user's
    keeps its name, and its description until the end: the next ``prune_checkpoints`` goes on with it.
    """
    if not checkpoint.is_dir() or checkpoint.is_symlink():
        return
    has_others = not all(_OURS.fullmatch(file.name) for file in checkpoint.iterdir())
    if not has_others and not checkpoint.name.startswith("."):
        checkpoint = checkpoint.rename(checkpoint.with_name(f".{checkpoint.name}"))
    ours = [file for file in checkpoint.iterdir() if _OURS.fullmatch(file.name)]
    for file in sorted(ours, key=lambda file: file.name == "state.json"):
        file.unlink()
    if not has_others:
        checkpoint.rmdir()
