"""Keep account of images that cannot be read: each is named once, all are counted, too many stop the run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from sws_dist.data.manifest import BadFile, refuse_too_many
from sws_dist.distributed.collectives import gather_on_rank0, raise_on_all_ranks, sum_over_ranks

_NAMED = 100  # so many are named at once, the rest is counted


class BadImages:
    """One rank's account: ``add`` is the loader's, ``exchange`` a collective of all ranks.

    Args:
        left_out: the files that the manifest leaves out; they are counted too.
    """

    def __init__(self, left_out: tuple[BadFile, ...] = ()) -> None:
        self.known = {file.path: file.reason for file in left_out}  # on rank 0: those of all ranks
        self._found = set(self.known)
        self._new: list[BadFile] = []
        self._missed: Counter[int] = Counter()
        self._first_open = 0  # the first epoch that may still miss more

    def __len__(self) -> int:
        return len(self.known)

    def add(self, path: str, reason: str, epoch: int = 0, missed: bool = True) -> None:
        """An image could not be read. ``missed``: it was to be seen in this epoch itself, not as a substitute."""
        self._missed[epoch] += missed
        if path not in self._found:
            self._found.add(path)
            self._new.append(BadFile(path, reason))

    def exchange(self, device: torch.device, epoch: int, epoch_size: int, max_share: float) -> list[str]:
        """Tell rank 0 what is new; the lines to log, there. A collective.

        Args:
            epoch: the latest one; all since the last call are checked.

        Raises:
            ValueError, RunError: on all ranks, if more than ``max_share`` of an epoch was unreadable.
        """
        epochs = range(self._first_open, epoch + 1)
        self._first_open = epoch
        counts = torch.tensor([len(self._new), *(self._missed[e] for e in epochs)], device=device)
        new, *missed = sum_over_ranks(counts).tolist()
        first_seen: list[BadFile] = []
        if new:
            for file in (file for rank in gather_on_rank0(self._new) or [] for file in rank):
                if file.path not in self.known:
                    self.known[file.path] = file.reason
                    first_seen.append(file)
            self._new = []
        if max(missed, default=0):
            with raise_on_all_ranks("read the images"):
                bad = [BadFile(*item) for item in self.known.items()]
                refuse_too_many(max(missed), epoch_size, max_share, f"epoch {epoch + 1}: ", bad)
        return describe_bad_files(first_seen)

    def clear(self) -> None:
        """A new pass over the same images begins: what was missed before does not count against it."""
        self._missed.clear()
        self._first_open = 0


def describe_bad_files(files: Sequence[BadFile]) -> list[str]:
    """A line for each bad file, the first hundred."""
    lines = [f"bad image: {file.path}: {file.reason}" for file in files[:_NAMED]]
    return lines + ([f"... and {len(files) - _NAMED} more bad images"] if len(files) > _NAMED else [])
