"""Train in real ranks, and measure steps: the bytes that their tensors take, and their traffic."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from sws_dist.cli.train import check_and_plan
from sws_dist.config.loader import load_config
from sws_dist.distributed.traffic import count_traffic
from tests import runs
from tests.launching import Job

FIRST, LAST = 3, 8
"""The steps that are measured; DeepSpeed has all its buffers after two."""
MARK = "step "


def dry_run(job: Job, overrides: list[str]) -> str:
    """Return what ``sws train --dry-run`` prints."""
    return check_and_plan(load_config(job.config, [*job.overrides(), *overrides]), job.ds_path, None)


def measure_jobs(jobs: list[Job]) -> list[dict[str, Any]]:
    """Train each job in this rank; see ``measure``."""
    return [measure(job) for job in jobs]


def measure(job: Job) -> dict[str, Any]:
    """Return the bytes of this rank's tensors before a step and at its peak, and the step's collectives."""
    gc.collect()
    others = {tensor.untyped_storage()._cdata for tensor in live_tensors()}
    trainer = runs.trainer(job)
    batches, timer = iter(trainer._loader), trainer._watch.timer
    for trainer.step in range(FIRST - 1):
        trainer._train_step(batches, timer)
    gc.collect()  # what earlier steps left is not these steps'
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in live_tensors()}
    before = sum(num_bytes for key, num_bytes in storages.items() if key not in others)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for trainer.step in range(FIRST - 1, LAST):
            with record_function(f"{MARK}{trainer.step}"), count_traffic() as traffic:
                trainer._train_step(batches, timer)
    return {"traffic": dict(traffic.bytes), "before": before, "peak": before + allocated(profiler)}


def live_tensors() -> Iterator[torch.Tensor]:
    """Yield all tensors of this process that have memory of their own."""
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.device.type == "cpu":
            yield thing


def allocated(profiler: profile) -> int:
    """Return the most bytes that a step has allocated at a time, beyond those that were there when it began.

    What a thread of gloo frees is not seen, since it was the last to hold it; which is chance. So the step counts that
    has the least.
    """
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = list(walk(profiler.profiler.kineto_results.experimental_event_tree()))
    changes = [(e.start_time_ns, e.extra_fields.alloc_size) for e in events if e.name == "[memory]"]
    marks = [event for event in events if event.name.startswith(MARK)]
    assert len(marks) == LAST - FIRST + 1
    return min(
        max(accumulate(size for at, size in sorted(changes) if mark.start_time_ns <= at < mark.end_time_ns))
        for mark in marks
    )


def walk(events: Iterable[Any]) -> Iterator[Any]:
    for event in events:
        yield event
        yield from walk(event.children)
