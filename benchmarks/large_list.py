"""Measure what a list of 14 million images (ImageNet-21k) takes: memory of a node's ranks, and time to the first batch.

    python benchmarks/large_list.py [--images 14000000] [--ranks 8] [--out results.json]

The list is synthetic, with names as ImageNet-21k has them, and is kept as `sws scan` keeps it. Then so many processes
do what a rank does (`data.trust_manifest`): rank 0 writes the run's own list, all map it, find the images of their
first micro-batch, and draw its crops. Memory is the sum over the processes of what each holds more than before (PSS,
which counts shared pages once): private memory, and pages of the list, which the system may drop at any time. It is
taken after the first batch, with the next epoch's order shuffled, and after all of the arrays has been read. The peak
is of all processes' private memory at one time: a shuffle holds the whole order for a moment.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import queue
import re
import tempfile
import time
from contextlib import suppress
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np

from sws_dist.config.schema import AugmentConfig
from sws_dist.data.draws import Recipe
from sws_dist.data.manifest import Manifest, list_path, load_scanned
from sws_dist.data.packed_names import PackedNames
from sws_dist.data.sampler import TrainOrder, micro_batch_positions
from sws_dist.provenance import collect_provenance

CLASSES = 21_841
BATCH = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=14_000_000)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        write_list(Path(folder), args.images)
        print(f"wrote the list in {time.perf_counter() - begun:.0f} s")
        result = measure(Path(folder), args.images, args.ranks)
    result = collect_provenance() | {"images": args.images, "ranks": args.ranks} | result
    print(json.dumps(result, indent=2))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


def write_list(root: Path, num_images: int) -> None:
    """Write the list of a training split as ``sws scan`` does."""
    labels = np.sort(np.random.default_rng(0).integers(CLASSES, size=num_images))
    synsets = [f"n{label:08}" for label in range(CLASSES)]
    names = PackedNames.pack(f"{synsets[label]}/{synsets[label]}_{i}.JPEG" for i, label in enumerate(labels.tolist()))
    sizes = np.random.default_rng(1).integers(200, 1000, size=(num_images, 2))
    (root / "train").mkdir()
    images = Manifest(folder=root / "train", classes=tuple(synsets), paths=names, labels=labels, sizes=sizes)
    images.save(list_path(root, "train"))


def measure(root: Path, num_images: int, num_ranks: int) -> dict[str, Any]:
    """Run the ranks. Returns seconds and MB."""
    context = multiprocessing.get_context("spawn")
    barrier, done, results = context.Barrier(num_ranks), context.Barrier(num_ranks + 1), context.Queue()
    ranks = [
        context.Process(target=run_rank, args=(r, num_ranks, root, barrier, done, results)) for r in range(num_ranks)
    ]
    for rank in ranks:
        rank.start()
    found, highest = [], 0.0
    while len(found) < num_ranks:
        highest = max(highest, sum(memory_mb(rank.pid)["private"] for rank in ranks if rank.pid))
        with suppress(queue.Empty):
            found.append(results.get(timeout=0.02))
    done.wait()
    for rank in ranks:
        rank.join()
    mb = {
        when: {kind: sum(f["mb"][when][kind] for f in found) for kind in ("private", "shared")}
        for when in found[0]["mb"]
    }
    return {
        "list_mb": round(list_path(root, "train").stat().st_size / 1e6),
        "seconds_to_the_first_batch": round(max(f["first_s"] for f in found), 1),
        "longest_wait_for_a_later_epoch_ms": round(1e3 * max(f["next_epoch_s"] for f in found), 1),
        "peak_of_private_mb_of_all_ranks": round(highest - sum(f["before_mb"] for f in found)),
        "mb_of_all_ranks": {when: {kind: round(value) for kind, value in kinds.items()} for when, kinds in mb.items()},
    }


def run_rank(rank: int, num_ranks: int, root: Path, barrier: Barrier, done: Barrier, results: Any) -> None:
    recipe = Recipe(AugmentConfig(), 224)
    recipe.draw(0, np.arange(8), np.full((8, 2), 500))  # what only the first call imports
    TrainOrder(8, seed=0).images(np.arange(8))
    before = memory_mb()
    barrier.wait()
    begun = time.perf_counter()
    file = root / "images-train.safetensors"
    if rank == 0:
        load_scanned(root, "train").save(file)
    barrier.wait()
    images = Manifest.load(file)
    order = TrainOrder(len(images), seed=0, share=(rank, num_ranks))

    def plan(step: int) -> None:
        positions = micro_batch_positions(step, BATCH, rank, num_ranks)
        indices = order.images(positions)
        images.encoded(indices)
        recipe.draw(0, positions, images.sizes_of(indices))

    plan(0)
    first_s = time.perf_counter() - begun
    order._passes[1].result()
    barrier.wait()
    mb = {"first_batch": since(before)}
    begun = time.perf_counter()
    plan(len(images) // BATCH)  # the step in which the second epoch begins
    next_epoch_s = time.perf_counter() - begun
    for array in (images.paths.ends, images.labels, images.sizes):  # names are read from the file
        array.view(np.uint8).ravel()[::1024].sum()
    order._passes[2].result()
    barrier.wait()
    mb["all_read"] = since(before)
    results.put({"before_mb": before["private"], "first_s": first_s, "next_epoch_s": next_epoch_s, "mb": mb})
    done.wait()  # shared pages are divided by the processes that live


def memory_mb(pid: int | str = "self") -> dict[str, float]:
    """Return a process's memory: private, and its part of what it shares."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    kb = {name: int(value) for name, value in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}
    private = kb["Pss_Anon"]
    return {"private": private / 1e3 * 1.024, "shared": (kb["Pss"] - private) / 1e3 * 1.024}


def since(before: dict[str, float]) -> dict[str, float]:
    now = memory_mb()
    return {kind: now[kind] - before[kind] for kind in now}


if __name__ == "__main__":
    main()
