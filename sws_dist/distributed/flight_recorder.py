"""Write down what each rank was doing when a run hangs or loses a rank, and name the collective that it hangs in.

    OUTPUT/crash/20261126-081702/        the start of the run that ended so
        rank-00003.txt                   the stacks of all of the rank's threads, and its latest collectives
        rank-00003.json                  the same collectives, to be compared with those of the other ranks

torch keeps the latest collectives of every process group, of NCCL and of gloo, with the place that called them
(``TORCH_FR_BUFFER_SIZE``, 2,000 by default). Nothing is written before something is wrong.
"""

from __future__ import annotations

import json
import pickle
import socket
import sys
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch._C import _distributed_c10d

from sws_dist.atomic import atomic_write_text
from sws_dist.distributed.init import World

_KEPT = 200
"""Number of collectives of each rank that are written."""
_CALLERS, _NAMED_CALLERS = 8, 2
"""Number of functions that called a collective: in the record, and in the message."""
_NO_CALLERS = ("/torch/", "/contextlib.py", "/typing_extensions.py", "/deepspeed/comm/", "/deepspeed/utils/")
"""Parts of the paths of functions through which every collective is called; these are left out."""
_MAX_RANKS = 8
"""Number of ranks that a message names."""
_UNEVEN = ("all_to_all", "alltoall", "scatter", "gather")
"""Collectives in which the ranks' tensors may differ in size."""


@dataclass(frozen=True)
class Collective:
    """One collective of one rank."""

    group: str
    """Number and name of the process group."""
    number: int
    """Counted from 1, in each group."""
    name: str
    tensors: str
    """The types and shapes of the inputs: ``Float[8, 3]``."""
    callers: list[str]
    """The functions that called it, the innermost first, without torch's own."""
    finished: bool

    @property
    def signature(self) -> str:
        """Return what has to be the same on all ranks."""
        return self.name if self.name.startswith(_UNEVEN) else f"{self.name} of {self.tensors}"

    def __str__(self) -> str:
        callers = ", called by ".join(self.callers[:_NAMED_CALLERS])
        return f"{self.name} number {self.number} of {self.tensors or 'nothing'} ({callers or 'caller unknown'})"


class FlightRecorder:
    """Write this rank's record, and compare the records of all ranks.

    Args:
        folder: where the ranks of this start of the run write; created with the first record.
    """

    def __init__(self, folder: Path, world: World) -> None:
        self.folder = folder
        self._world = world

    @property
    def is_record_wanted(self) -> bool:
        """True if another rank has written a record and this one has not: the records are to be compared."""
        return self.folder.is_dir() and not self._path(self._world.rank, "json").exists()

    def write(self, reason: str, error: BaseException | None = None) -> None:
        """Write this rank's record; an earlier one is replaced.

        Args:
            reason: for the first line.
            error: what the main thread has met, if anything.
        """
        host = f"rank {self._world.rank} of {self._world.size} on {socket.gethostname()}"
        text = [f"{host}, {time.strftime('%Y-%m-%d %H:%M:%S')}: {reason}\n"]
        if error is not None:
            text.append("\n" + "".join(traceback.format_exception(error)))
        text += _describe_threads()
        collectives = latest_collectives()
        text.append(f"\nThe latest {len(collectives)} collectives, the last one at the end\n")
        text += [_describe_collective(each) for each in collectives]
        atomic_write_text(self._path(self._world.rank, "txt"), "".join(text))
        atomic_write_text(self._path(self._world.rank, "json"), json.dumps([asdict(each) for each in collectives]))

    def find_hang(self) -> str | None:
        """Compare the records of all ranks. Returns a sentence on the collective that not all of them came to."""
        records = {rank: record for rank in range(self._world.size) if (record := self._read(rank)) is not None}
        return find_hang(records, self._world.size)

    def _read(self, rank: int) -> list[Collective] | None:
        try:
            return [Collective(**fields) for fields in json.loads(self._path(rank, "json").read_text())]
        except (OSError, ValueError):
            return None

    def _path(self, rank: int, suffix: str) -> Path:
        return self.folder / f"rank-{rank:05d}.{suffix}"


def latest_collectives() -> list[Collective]:
    """Return this rank's latest collectives in all process groups, in the order in which they began."""
    if not dist.is_initialized():
        return []
    dump = "_dump_nccl_trace" if dist.get_backend() == "nccl" else "_dump_fr_trace"
    recorded = pickle.loads(getattr(_distributed_c10d, dump)())
    return [_collective(entry) for entry in recorded.get("entries", [])[-_KEPT:] if not entry["is_p2p"]]


def find_hang(records: Mapping[int, list[Collective]], world_size: int) -> str | None:
    """Find the collective that the ranks hang in.

    Args:
        records: rank -> its latest collectives, in their order; ranks that have left none are missing.

    Returns:
        A sentence: where the ranks' collectives differ, or which one some ranks came to and others did not.
    """
    groups: dict[str, dict[int, list[Collective]]] = defaultdict(dict)
    for rank, record in records.items():
        for each in record:
            groups[each.group].setdefault(rank, []).append(each)
    for by_rank in groups.values():
        if (difference := _find_difference(by_rank)) is not None:
            return difference
    first_open = [next((each for each in record if not each.finished), None) for record in records.values()]
    # After a lost connection there may be none that is not finished.
    hung = list(filter(None, first_open)) or [record[-1] for record in records.values() if record]
    if not hung:
        return None
    missing = sorted(set(range(world_size)) - records.keys())
    found = [_Hang.at(each, groups[each.group], missing) for each in sorted(hung, key=lambda each: each.number)]
    if behind := [each for each in found if each.behind]:
        return str(behind[0])
    return str(found[0]) if missing or any(first_open) else None


@dataclass(frozen=True)
class _Hang:
    """A collective, and the ranks that came to it, that are behind, and of which nothing is known."""

    collective: Collective
    came: list[int]
    behind: list[int]
    missing: list[int]

    @classmethod
    def at(cls, collective: Collective, by_rank: Mapping[int, list[Collective]], missing: list[int]) -> _Hang:
        came = [rank for rank, record in by_rank.items() if record[-1].number >= collective.number]
        return cls(collective, came, sorted(by_rank.keys() - set(came)), missing)

    def __str__(self) -> str:
        parts = [f"{_name_ranks(self.came)} came to {self.collective}"]
        parts += [f"{_name_ranks(self.behind)} did not"] if self.behind else []
        parts += [f"{_name_ranks(self.missing)} left no record"] if self.missing else []
        return ", ".join(parts)


def _find_difference(by_rank: Mapping[int, list[Collective]]) -> str | None:
    """Describe the first collective of a group that is not the same on all ranks: one of them has left one out."""
    numbered: dict[int, dict[int, Collective]] = defaultdict(dict)
    for rank, record in by_rank.items():
        for each in record:
            numbered[each.number][rank] = each
    for _, found in sorted(numbered.items()):
        ranks_of: dict[str, list[int]] = defaultdict(list)
        for rank, each in found.items():
            ranks_of[each.signature].append(rank)
        if len(ranks_of) > 1:
            parts = [f"{_name_ranks(ranks)} in {found[ranks[0]]}" for ranks in ranks_of.values()]
            return f"the ranks are in different collectives: {', '.join(parts)}"
    return None


def _name_ranks(ranks: list[int]) -> str:
    """Name the first few of ``ranks``: ``ranks 0, 2``."""
    more = f" and {len(ranks) - _MAX_RANKS} more" if len(ranks) > _MAX_RANKS else ""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:_MAX_RANKS]))}{more}"


def _collective(entry: Mapping[str, Any]) -> Collective:
    """Read an entry of torch's record."""
    inputs = zip(entry["input_dtypes"], entry["input_sizes"], strict=True)
    return Collective(
        group=" ".join(entry["process_group"]),
        number=entry["collective_seq_id"],
        name=entry["profiling_name"].partition(":")[2],
        tensors=", ".join(f"{dtype}{list(sizes)}" for dtype, sizes in inputs),
        callers=list(_callers(entry.get("frames", [])))[:_CALLERS],
        finished=entry["retired"] or entry["state"] == "completed",
    )


def _callers(frames: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    for frame in frames:
        if not any(part in frame["filename"] for part in _NO_CALLERS):
            yield f"{frame['name']} at {'/'.join(Path(frame['filename']).parts[-2:])}:{frame['line']}"


def _describe_threads() -> Iterator[str]:
    """Yield the stack of every thread, as tracebacks are printed."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    for ident, frame in sys._current_frames().items():
        yield f"\nThread {names.get(ident, ident)} (most recent call last)\n"
        yield from traceback.format_stack(frame)


def _describe_collective(collective: Collective) -> str:
    state = "" if collective.finished else ", not finished"
    lines = [f"  {collective.group}: {collective}{state}", *collective.callers[_NAMED_CALLERS:]]
    return "\n      ".join(lines) + "\n"
