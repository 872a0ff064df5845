"""Train for three steps in real ranks, and measure the third: the bytes that its tensors take, and its traffic."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

from sws_dist.cli.train import check_and_plan
from sws_dist.config.loader import load_config
from sws_dist.distributed.traffic import count_traffic
from tests import runs
from tests.launching import Job

STEPS = 3
MARK = "the measured step"


def dry_run(job: Job, overrides: list[str]) -> str:
    """Return what ``sws train --dry-run`` prints."""
    return check_and_plan(load_config(job.config, [*job.overrides(), *overrides]), job.ds_path, None)


def measure_jobs(jobs: list[Job]) -> list[dict[str, Any]]:
    """Train each job in this rank; see ``measure``."""
    return [measure(job) for job in jobs]


def measure(job: Job) -> dict[str, Any]:
    """Return the bytes of this rank's tensors before the third step and at its peak, and its collectives.

    The profiler sees every allocation of PyTorch's CPU allocator from before the run is built.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer = runs.trainer(job)
        batches = iter(trainer._loader)
        for trainer.step in range(STEPS - 1):
            trainer._train_step(batches)
        gc.collect()  # what earlier steps left is not this step's
        with record_function(MARK), count_traffic() as traffic:
            trainer._train_step(batches)
    return {"traffic": dict(traffic.bytes), **allocated(profiler)}


def allocated(profiler: profile) -> dict[str, int]:
    """Read the allocated bytes at the beginning of the marked block, and the most inside it."""
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = list(walk(profiler.profiler.kineto_results.experimental_event_tree()))
    mark = next(event for event in events if event.name == MARK)
    allocations = sorted((e for e in events if e.name == "[memory]"), key=lambda e: e.start_time_ns)
    sizes: dict[int, int] = {}  # what is freed and was allocated before belongs to an earlier run
    now, before, peak = 0, 0, 0
    for event in allocations:
        address, change = event.extra_fields.ptr, event.extra_fields.alloc_size
        if change > 0:
            sizes[address] = change
        now += change if change > 0 else -sizes.pop(address, 0)
        if event.start_time_ns < mark.start_time_ns:
            before = now
        elif event.start_time_ns < mark.end_time_ns:
            peak = max(peak, now)
    return {"before": before, "peak": peak}


def walk(events: Iterable[Any]) -> Iterator[Any]:
    for event in events:
        yield event
        yield from walk(event.children)
