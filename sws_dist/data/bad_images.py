"""Count the images that cannot be read, name each of them once, and stop a run that has too many.

``loader.py`` puts other images in their place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from sws_dist.data.manifest import BadFile, check_bad_share
from sws_dist.distributed.collectives import gather_on_rank0, raise_on_all_ranks, sum_over_ranks

_MAX_NAMED = 100
"""Number of files that are named at once; the others are counted."""


class BadImages:
    """Collect the unreadable images of one rank. The loader calls ``add``; all ranks call ``exchange`` together.

    Args:
        left_out: the files that the manifest leaves out; they are counted too.
    """

    def __init__(self, left_out: tuple[BadFile, ...] = ()) -> None:
        self.known = {file.path: file.reason for file in left_out}
        """Path -> reason. Rank 0 knows the files of all ranks."""
        self._found = set(self.known)
        self._not_exchanged: list[BadFile] = []
        self._num_missed: Counter[int] = Counter()  # of each epoch
        self._first_unchecked_epoch = 0  # earlier epochs are over and have been checked

    def __len__(self) -> int:
        """Return the number of known bad files."""
        return len(self.known)

    def add(self, path: str, reason: str, epoch: int = 0, num_missed: int = 1) -> None:
        """Report an image that could not be read.

        Args:
            num_missed: how often the epoch should have shown this image here; 0 if it was to replace another one.
        """
        self._num_missed[epoch] += num_missed
        if path not in self._found:
            self._found.add(path)
            self._not_exchanged.append(BadFile(path, reason))

    def exchange(self, device: torch.device, epoch: int | None, epoch_size: int, max_share: float) -> list[str]:
        """Tell rank 0 which files are new, and check that they are not too many. A collective.

        Args:
            device: the device of the process group.
            epoch: the current epoch; all epochs since the last call are checked. None: a pass of an evaluation.
            epoch_size: number of images of an epoch.
            max_share: largest share of an epoch that may be unreadable.

        Returns:
            Log messages on rank 0, an empty list elsewhere.

        Raises:
            ValueError, RunError: on all ranks, if more than ``max_share`` of an epoch was unreadable.
        """
        epochs = range(self._first_unchecked_epoch, (epoch or 0) + 1)
        self._first_unchecked_epoch = epochs[-1]
        counts = torch.tensor([len(self._not_exchanged), *(self._num_missed[e] for e in epochs)], device=device)
        num_new, *missed = sum_over_ranks(counts).tolist()
        first_seen: list[BadFile] = []
        if num_new:
            for file in (file for rank in gather_on_rank0(self._not_exchanged) or [] for file in rank):
                if file.path not in self.known:
                    self.known[file.path] = file.reason
                    first_seen.append(file)
            self._not_exchanged = []
        most, worst = max(zip(missed, epochs, strict=True))
        if most:
            with raise_on_all_ranks("read the images"):
                bad = [BadFile(*item) for item in self.known.items()]
                check_bad_share(most, epoch_size, max_share, "" if epoch is None else f"epoch {worst + 1}: ", bad)
        return describe_bad_files(first_seen)

    def clear(self) -> None:
        """Forget how many images were missed, before a new pass over the same images begins."""
        self._num_missed.clear()
        self._first_unchecked_epoch = 0


def describe_bad_files(files: Sequence[BadFile]) -> list[str]:
    """Return one log message for each bad file, and one that counts those beyond the first hundred."""
    lines = [f"bad image: {file.path}: {file.reason}" for file in files[:_MAX_NAMED]]
    num_more = len(files) - _MAX_NAMED
    return lines + ([f"... and {num_more} more bad images"] if num_more > 0 else [])
