"""From planned batches to tensors: DALI works ahead; a batch with an unreadable image is read again without it.

A decode error costs DALI the whole batch, but no other. The loader reads that batch a second time in halves, and
halves of halves, until the bad images stand alone. What takes their place is a function of the position (training)
or nothing at all (evaluation: the image does not count), so it is the same at any world size and after a resume.
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
from sws_dist.data.manifest import Manifest
from sws_dist.data.prefetch import read_ahead
from sws_dist.data.validate import BadImageError, check_whole

_READERS = 8  # images of a shard that are read at once
_TRIES = 32  # substitutes for one position; that many bad ones in a row mean that there is no data any more

Feeds = tuple[Any, ...]
Build = Callable[..., Any]  # (source, prefetch) -> a DALI pipeline


@dataclass(frozen=True)
class Batch:
    """images [B, 3, S, S] float32, normalised, and labels [B] int64, both on the rank's device.

    ``indices`` [B]: the images' places in the manifest. ``valid`` [B]: whether each counts (evaluation fills up
    its last batch). ``erase`` [B, 4]: boxes to erase, or None. ``position``: the batch's first place in the stream.
    """

    images: Tensor
    labels: Tensor
    indices: np.ndarray
    valid: np.ndarray
    erase: np.ndarray | None = None
    position: int = 0


@dataclass(frozen=True)
class Plan:
    """The host's side of a batch: which images, and what DALI is told about each. All arrays [B, ...]."""

    indices: np.ndarray
    valid: np.ndarray
    feeds: Feeds
    positions: np.ndarray | None = None
    erase: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def part(self, rows: slice) -> Plan:
        def cut(array: np.ndarray | None) -> Any:
            return None if array is None else array[rows]

        feeds = tuple(feed[rows] for feed in self.feeds)
        return Plan(self.indices[rows], self.valid[rows], feeds, cut(self.positions), cut(self.erase))


class Loader:
    """Iterates ``Batch``es in the order of ``plans``; DALI works ahead. One to evaluate with is iterated many times:
    DALI never frees the threads of a pipeline that calls Python.

    Args:
        plans: starts a pass over all batches.
        build: makes a DALI pipeline from a source of (encoded images, *feeds); its images are ``image_size`` squared.
        substitute: (the plan of one position, attempt) -> a plan with another image; None: bad images do not count.
        bad: where unreadable images are reported.
        epoch_size: positions of an epoch, to report each in its own.

    ``failure`` is set when even substitutes cannot be read. The batch is then NaN: whoever compares losses over the
    ranks stops all of them, where a rank that raised alone would leave the others waiting.
    """

    def __init__(
        self,
        build: Build,
        plans: Callable[[], Iterable[Plan]],
        manifest: Manifest,
        image_size: int,
        device: torch.device,
        bad: BadImages,
        substitute: Callable[[Plan, int], Plan] | None = None,
        epoch_size: int = 1,
    ) -> None:
        self.manifest, self.device, self.bad = manifest, device, bad
        self.failure: Exception | None = None
        self._substitute, self._epoch_size, self._image_size = substitute, epoch_size, image_size
        self._build, self._all_plans = build, plans
        self._plans: Iterator[tuple[Plan, Feeds]] = iter(())
        self._readers = ThreadPoolExecutor(_READERS)
        self._ahead: deque[Plan] = deque()
        self._graph: Any = None
        self._again: deque[Plan] = deque()
        self._second_graph: Any = None

    def __iter__(self) -> Iterator[Batch]:
        self._start()
        while True:
            try:
                images = self._run(self._graph)
                plan = self._ahead.popleft()
            except StopIteration:
                self._graph.reset()
                return
            except RuntimeError as error:
                if not self._ahead:
                    raise
                images, plan = self._read_again(self._ahead.popleft(), error)
            labels = torch.from_numpy(self.manifest.labels[plan.indices])
            yield Batch(
                images.to(self.device, non_blocking=True),
                labels.to(self.device, non_blocking=True),
                plan.indices,
                plan.valid,
                plan.erase,
                0 if plan.positions is None else int(plan.positions[0]),
            )

    def _start(self) -> None:
        if self._graph is None or self._ahead:  # a pass that was left in the middle has batches under way
            self._ahead.clear()
            self._graph = self._build(source=self._feed)
        # Drawing and, from shards, reading go on while the model trains, not in its thread.
        self._plans = read_ahead(((plan, self._feeds(plan)) for plan in self._all_plans()), depth=2)

    def _run(self, graph: Any) -> Tensor:
        (output,) = graph.run()
        # Without a copy: DALI keeps the buffer for as long as the tensor lives (exec_dynamic).
        return torch.from_dlpack(output.as_tensor())

    def _feed(self) -> Feeds:
        plan, feeds = next(self._plans)
        self._ahead.append(plan)
        return feeds

    def _feeds(self, plan: Plan) -> Feeds:
        return (self.manifest.encoded(plan.indices, self._readers.map), *plan.feeds)

    # ---- bad images ----------------------------------------------------------------------------------------------

    def _read_again(self, plan: Plan, error: Exception) -> tuple[Tensor, Plan]:
        """A batch that failed, whole again."""
        parts = self._salvage(plan, error)
        images, plans = [part for part, _ in parts], [part for _, part in parts]
        whole = torch.cat([part.to(self.device) for part in images])
        if self.failure is not None:
            whole.fill_(torch.nan)
        return whole, _joined(plans)

    def _salvage(self, plan: Plan, error: Exception) -> list[tuple[Tensor, Plan]]:
        """The parts of a batch that failed with ``error``, each decoded, with substitutes for what is bad."""
        if len(plan) == 1:
            return [self._replace(plan, error)]
        parts = []
        for half in (plan.part(slice(0, len(plan) // 2)), plan.part(slice(len(plan) // 2, None))):
            try:
                parts.append((self._decode(half), half))
            except RuntimeError as reason:
                parts += self._salvage(half, reason)
        return parts

    def _replace(self, plan: Plan, error: Exception) -> tuple[Tensor, Plan]:
        """The image of one position failed: another one, by rule."""
        nothing = torch.zeros(1, 3, self._image_size, self._image_size)
        for attempt in range(_TRIES):
            self._report(plan, error, first=attempt == 0)
            if self._substitute is None:
                return nothing, dataclasses.replace(plan, valid=np.zeros(1, dtype=bool))
            plan = self._substitute(plan, attempt)
            try:
                return self._decode(plan), plan
            except RuntimeError as reason:
                error = reason
        self.failure = ValueError(
            f"{self.manifest.folder}: {_TRIES + 1} images in a row cannot be read, the last one "
            f"{self.manifest.paths[plan.indices[0]]}; is the data still there?"
        )
        return nothing, plan

    def _decode(self, plan: Plan) -> Tensor:
        """Through a second pipeline of its own, which does not disturb what is under way in the first."""
        if self._second_graph is None:
            self._second_graph = self._build(source=self._feed_again, prefetch=1)
        self._again.append(plan)
        return self._run(self._second_graph)

    def _feed_again(self) -> Feeds:
        return self._feeds(self._again.popleft())

    def _report(self, plan: Plan, error: Exception, first: bool) -> None:
        index = int(plan.indices[0])
        try:
            check_whole(self.manifest.read(index))
            reason = "cannot be decoded by DALI: " + str(error).strip().splitlines()[0]
        except BadImageError as found:
            reason = str(found)
        except OSError as found:
            reason = "missing" if isinstance(found, FileNotFoundError) else f"unreadable: {found.strerror}"
        epoch = 0 if plan.positions is None else int(plan.positions[0]) // self._epoch_size
        self.bad.add(self.manifest.paths[index], reason, epoch, missed=first and bool(plan.valid[0]))


def _joined(plans: list[Plan]) -> Plan:
    """The opposite of ``Plan.part``; the feeds have been used and are left out."""

    def join(name: str) -> Any:
        arrays = [getattr(plan, name) for plan in plans]
        return None if arrays[0] is None else np.concatenate(arrays)

    return Plan(join("indices"), join("valid"), (), join("positions"), join("erase"))
