"""Turn planned batches into tensors, and decode a batch that holds an unreadable image again without it.

DALI works ahead of the training step. A decoding error costs DALI the whole batch, but no other batch. The loader
decodes that batch a second time in halves, and in halves of halves, until the bad images stand alone. In training
another image takes the place of each and of all its crops, chosen as a function of the position; in evaluation a bad
image does not count. So the result is the same at any world size and after a resume.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sws_dist.data.bad_images import BadImages
from sws_dist.data.decoder import describe_error
from sws_dist.data.manifest import Manifest
from sws_dist.data.prefetch import prefetch_items
from sws_dist.data.validate import BadImageError, check_image

_NUM_READERS = 8
"""Number of images of a shard that are read at once."""
_MAX_SUBSTITUTES = 32
"""Number of substitutes that are tried for one position. If all of them are bad, the data is gone."""

Feeds = tuple[Any, ...]
BuildPipeline = Callable[..., Any]
"""A function of (source, prefetch) that returns a DALI pipeline."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch of B images of S x S pixels. The tensors are on the rank's device."""

    images: Tensor
    """[B, 3, S, S] float32, normalised."""
    labels: Tensor
    """[B] int64."""
    indices: np.ndarray
    """[B] int64: the images' places in the manifest."""
    valid: np.ndarray
    """[B] bool: False for an image that does not count, in evaluation (the filling of the last batch, a bad image)."""
    erase: np.ndarray | None = None
    """[B, 4] int32: the box to erase in each image (``Draws.erase``), or None."""
    positions: np.ndarray | None = None
    """[B] int64: the images' positions in the stream (``sampler.py``), rising; None in evaluation."""

    @property
    def position(self) -> int:
        """The first image's position in the stream; 0 in evaluation."""
        return 0 if self.positions is None else int(self.positions[0])


@dataclass(frozen=True)
class BatchPlan:
    """The n files of a batch, and what DALI is told about them. All arrays are [n, ...].

    DALI makes C crops of each file, so the batch has n * C images.
    """

    indices: np.ndarray
    """Places in the manifest."""
    valid: np.ndarray
    """See ``Batch.valid``."""
    feeds: Feeds
    """Arrays for the pipeline's source, after the encoded images."""
    positions: np.ndarray | None = None
    """[n, C]: positions in the stream; None in evaluation, where C is 1."""
    erase: np.ndarray | None = None
    """[n, C, 4]: see ``Batch.erase``."""

    def __len__(self) -> int:
        """Return the number of files."""
        return len(self.indices)

    @property
    def num_crops(self) -> int:
        """Number of images that are made of each file."""
        return 1 if self.positions is None else self.positions.shape[1]

    def select_rows(self, rows: slice) -> BatchPlan:
        """Return the plan of a part of the batch."""

        def select(array: np.ndarray | None) -> Any:
            return None if array is None else array[rows]

        feeds = tuple(feed[rows] for feed in self.feeds)
        return BatchPlan(self.indices[rows], self.valid[rows], feeds, select(self.positions), select(self.erase))


class Loader:
    """Yield one ``Batch`` for each plan, while DALI works ahead.

    An evaluation loader is iterated many times, since DALI never frees the threads of a pipeline that calls Python.

    ``before_transfer`` is called when a batch is decoded and about to be moved to the device.

    ``failure`` is set when even substitutes cannot be read. The batch then holds NaN. A rank that raised alone would
    leave the others waiting; a loss that is NaN, compared over the ranks, stops all of them.

    Args:
        build_pipeline: builds a DALI pipeline from a source of (encoded images, *feeds).
        plans: starts a pass over all batches, and returns their plans.
        manifest: the images.
        image_size: height and width in pixels of the pipeline's images.
        device: where the batches are moved to.
        bad: collects the unreadable images.
        substitute: returns, for the plan of one file and the number of the attempt, a plan with another file.
            None: bad images do not count.
        epoch_size: positions of an epoch; a bad image is counted in its own epoch.
    """

    def __init__(
        self,
        build_pipeline: BuildPipeline,
        plans: Callable[[], Iterable[BatchPlan]],
        manifest: Manifest,
        image_size: int,
        device: torch.device,
        bad: BadImages,
        substitute: Callable[[BatchPlan, int], BatchPlan] | None = None,
        epoch_size: int = 1,
    ) -> None:
        self.manifest, self.device, self.bad = manifest, device, bad
        self.failure: Exception | None = None
        self.before_transfer: Callable[[], None] = lambda: None
        self._substitute, self._epoch_size, self._image_size = substitute, epoch_size, image_size
        self._build_pipeline, self._start_plans = build_pipeline, plans
        self._plans: Iterator[tuple[BatchPlan, Feeds]] = iter(())
        self._readers = ThreadPoolExecutor(_NUM_READERS)
        self._in_flight: deque[BatchPlan] = deque()  # what DALI works on, oldest first
        self._pipeline: Any = None
        self._retries: deque[BatchPlan] = deque()
        self._retry_pipeline: Any = None

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of one pass."""
        self._start_pass()
        while True:
            try:
                images = self._run(self._pipeline)
                plan = self._in_flight.popleft()
            except StopIteration:
                self._pipeline.reset()
                return
            except RuntimeError as error:
                if not self._in_flight:
                    raise
                images, plan = self._recover_batch(self._in_flight.popleft(), error)
            indices, valid = plan.indices.repeat(plan.num_crops), plan.valid.repeat(plan.num_crops)
            labels = torch.from_numpy(self.manifest.labels[indices].astype(np.int64))
            self.before_transfer()
            yield Batch(
                images.to(self.device, non_blocking=True),
                labels.to(self.device, non_blocking=True),
                indices,
                valid,
                None if plan.erase is None else plan.erase.reshape(-1, 4),
                None if plan.positions is None else plan.positions.ravel(),
            )

    def _start_pass(self) -> None:
        if self._pipeline is None or self._in_flight:  # a pass that was left in the middle has batches in flight
            self._in_flight.clear()
            self._pipeline = self._build_pipeline(source=self._next_feeds)
        # A thread draws and, from shards, reads while the model trains.
        self._plans = prefetch_items(((plan, self._read_feeds(plan)) for plan in self._start_plans()), depth=2)

    def _run(self, pipeline: Any) -> Tensor:
        """Run a pipeline once. Returns its images, [B, 3, S, S]."""
        (output,) = pipeline.run()
        # There is no copy: DALI keeps the buffer for as long as the tensor lives (exec_dynamic).
        return torch.from_dlpack(output.as_tensor()).flatten(0, -4)  # several crops of a file: [n, C, 3, S, S]

    def _next_feeds(self) -> Feeds:
        plan, feeds = next(self._plans)
        self._in_flight.append(plan)
        return feeds

    def _read_feeds(self, plan: BatchPlan) -> Feeds:
        return (self.manifest.encoded(plan.indices, self._readers.map), *plan.feeds)

    # ---- bad images ----------------------------------------------------------------------------------------------

    def _recover_batch(self, plan: BatchPlan, error: Exception) -> tuple[Tensor, BatchPlan]:
        """Decode a batch that failed with ``error`` again. Returns its images and the plan that they followed."""
        parts = self._decode_in_halves(plan, error)
        images, plans = [part for part, _ in parts], [part for _, part in parts]
        whole = torch.cat([part.to(self.device) for part in images])
        if self.failure is not None:
            whole.fill_(torch.nan)
        return whole, _join_plans(plans)

    def _decode_in_halves(self, plan: BatchPlan, error: Exception) -> list[tuple[Tensor, BatchPlan]]:
        """Split a batch that failed with ``error`` until its bad images stand alone; decode the rest, replace these."""
        if len(plan) == 1:
            return [self._replace_image(plan, error)]
        parts = []
        for half in (plan.select_rows(slice(0, len(plan) // 2)), plan.select_rows(slice(len(plan) // 2, None))):
            try:
                parts.append((self._decode(half), half))
            except RuntimeError as reason:
                parts += self._decode_in_halves(half, reason)
        return parts

    def _replace_image(self, plan: BatchPlan, error: Exception) -> tuple[Tensor, BatchPlan]:
        """Decode a substitute for the one file of ``plan``, which failed with ``error``."""
        nothing = torch.zeros(plan.num_crops, 3, self._image_size, self._image_size)
        for attempt in range(_MAX_SUBSTITUTES):
            self._report_bad_image(plan, error, is_first=attempt == 0)
            if self._substitute is None:
                return nothing, dataclasses.replace(plan, valid=np.zeros(1, dtype=bool))
            plan = self._substitute(plan, attempt)
            try:
                return self._decode(plan), plan
            except RuntimeError as reason:
                error = reason
        self.failure = ValueError(
            f"{self.manifest.folder}: {_MAX_SUBSTITUTES + 1} images in a row cannot be read, the last one "
            f"{self.manifest.paths[plan.indices[0]]}; is the data still there?"
        )
        return nothing, plan

    def _decode(self, plan: BatchPlan) -> Tensor:
        """Decode a part of a batch in a second pipeline, which leaves the batches in flight in the first alone."""
        if self._retry_pipeline is None:
            self._retry_pipeline = self._build_pipeline(source=self._next_retry_feeds, prefetch=1)
        self._retries.append(plan)
        return self._run(self._retry_pipeline)

    def _next_retry_feeds(self) -> Feeds:
        return self._read_feeds(self._retries.popleft())

    def _report_bad_image(self, plan: BatchPlan, error: Exception, is_first: bool) -> None:
        """Find out why the one file of ``plan`` is bad, and report it.

        Args:
            is_first: True for the file that belongs to these positions, False for a substitute.
        """
        index = int(plan.indices[0])
        try:
            check_image(self.manifest.read(index))
            reason = f"cannot be decoded by DALI: {describe_error(error)}"
        except BadImageError as found:
            reason = str(found)
        except OSError as found:
            reason = "missing" if isinstance(found, FileNotFoundError) else f"unreadable: {found.strerror}"
        epoch = 0 if plan.positions is None else int(plan.positions[0, 0]) // self._epoch_size
        num_missed = plan.num_crops if is_first and plan.valid[0] else 0
        self.bad.add(self.manifest.paths[index], reason, epoch, num_missed)


def _join_plans(plans: list[BatchPlan]) -> BatchPlan:
    """Join the parts of a batch. Their feeds have been used, and are left out."""

    def join(name: str) -> Any:
        arrays = [getattr(plan, name) for plan in plans]
        return None if arrays[0] is None else np.concatenate(arrays)

    return BatchPlan(join("indices"), join("valid"), (), join("positions"), join("erase"))
