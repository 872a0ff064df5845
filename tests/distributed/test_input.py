"""The input over real processes: killed and resumed at other world sizes, and memory over many epochs."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import psutil
import torch

from sws_dist.config.loader import load_config
from sws_dist.config.schema import AugmentConfig, DataConfig
from sws_dist.config.shipped import find_run_config
from sws_dist.data import manifest, pipeline, sampler
from sws_dist.data.draws import Recipe
from sws_dist.data.mixup import Mixing, erase
from sws_dist.distributed.init import init_distributed
from sws_dist.logging.console import setup_console
from sws_dist.prepare import load_image_lists
from tests import ranks
from tests.distributed import input_worker

STEPS = 30  # of 12 images: five epochs of 80 images, and a bit
Line = tuple[int, str, str]  # step, image, digest


def read(file: Path) -> dict[int, Line]:
    """Return what was seen at every position."""
    rows = [line.split() for line in file.read_text().splitlines()] if file.is_file() else []
    return {int(position): (int(step), image, digest) for step, position, image, digest in rows}


def run(data: Path, folder: Path, world: int, from_step: int, kill_at: int | None) -> dict[int, Line]:
    """Run all ranks from a step on, to the end or until they are killed; return what they saw."""
    files = [folder / f"{world}-{rank}.txt" for rank in range(world)]
    arguments = (data, str(folder / f"{world}-{{rank}}.txt"), world, from_step, STEPS, kill_at)
    with ranks.start(input_worker.record, *arguments, world=world) as group:
        if kill_at is not None:
            for rank, file in enumerate(files):
                deadline = time.monotonic() + ranks.LIMIT_S
                while max((step for step, *_ in read(file).values()), default=-1) < kill_at + rank - 1:
                    assert group.exitcodes() == [None] * world, group.printed()
                    assert time.monotonic() < deadline, "the ranks do not get on"
                    time.sleep(0.01)
            for process in group.processes:
                process.send_signal(signal.SIGKILL)
        assert set(group.wait()) == {0 if kill_at is None else -signal.SIGKILL}, group.printed()
    seen: dict[int, Line] = {}
    for file in files:
        assert not set(seen) & set(read(file)), "two ranks saw the same position"
        seen |= read(file)
    return seen


def test_killed_and_resumed_on_one_two_and_three_ranks(few_digits: Path, tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    whole = run(few_digits, tmp_path / "whole", 1, 0, None)
    assert sorted(whole) == list(range(12 * STEPS))
    assert len({digest for _, _, digest in whole.values()}) > 0.9 * len(whole), "repeats are drawn anew"

    parts: dict[int, Line] = {}
    step = 0
    for world, kill_at in ((1, 5), (2, 15), (3, None)):  # 5 and 15 steps of 12 are in the middle of 80 images
        seen = run(few_digits, tmp_path, world, step, kill_at)
        # A rank may have been ahead of the step that a checkpoint would hold: its lines come again, the same.
        for position in set(seen) & set(parts):
            assert seen[position] == parts[position]
        parts |= seen
        step = kill_at or STEPS
    assert parts == whole


def memory_of_fifty_epochs(root: Path) -> list[int]:
    """Return this process's resident memory in KiB after every epoch, with its evaluation."""
    augment = AugmentConfig(auto_augment="rand-m9-mstd0.5-inc1", re_prob=0.25, mixup=0.8, cutmix=1.0)
    listed = manifest.scan(root, "train")
    data, cpu = DataConfig(root="unused", image_size=64, num_threads=2), torch.device("cpu")
    positions = (np.arange(start, start + 16) for start in range(0, 50 * len(listed), 16))
    order, mixing = sampler.TrainOrder(len(listed), 0), Mixing(augment, 10, 0)
    loader = pipeline.train_loader(listed, order, positions, Recipe(augment, 64), 0, data, cpu)
    val_loader = pipeline.eval_loader(listed, sampler.eval_batches(len(listed), 0, 1, 32), data, cpu)
    kib = []
    for batch in loader:
        mixing(erase(batch.images, batch.erase), batch.labels, batch.position)
        if (batch.position + 16) % len(listed) == 0:
            assert sum(len(batch.images) for batch in val_loader) == len(listed)
            kib.append(psutil.Process().memory_info().rss // 2**10)
    return kib


def test_memory_is_flat_over_fifty_epochs(few_digits: Path) -> None:
    (kib,) = ranks.run(memory_of_fifty_epochs, few_digits, world=1)
    assert len(kib) == 50
    print(f"resident MiB: {[round(x / 1024) for x in kib[::7]]}")  # shown by pytest -s
    growth = max(kib[40:]) - max(kib[10:20])
    # An epoch's images are 80 x 64 x 64 x 3 floats, 4 MiB: keeping them, or a pipeline an epoch, would show at once.
    assert growth < 15 * 1024, kib


def list_images_on_two_ranks(root: Path, classes: Path) -> list[int]:
    setup_console()
    sets = [f"data.root={root}", f"data.classes={classes}", f"output={root}", "train.timeout_s=20"]
    config = load_config(find_run_config("quickstart/teacher"), sets)
    world = init_distributed(config.train.timeout_s)
    return [len(images) for images in load_image_lists(config, root, None, None, world)]


def test_a_long_listing_is_said_before_the_other_ranks_give_up(few_digits: Path, tmp_path: Path) -> None:
    root, classes = tmp_path / "data", tmp_path / "classes"
    shutil.copytree(few_digits, root)
    os.mkfifo(classes)  # holds rank 0 up until somebody writes
    with ranks.start(list_images_on_two_ranks, root, classes) as group:
        deadline = time.monotonic() + ranks.LIMIT_S
        while "rank 0 has been listing the images for 2 s" not in group.printed():
            assert group.exitcodes() == [None] * 2, group.printed()
            assert time.monotonic() < deadline, group.printed()
            time.sleep(0.01)
        classes.write_text("".join(f"{digit}\n" for digit in range(10)))
        assert group.wait() == [0, 0], group.printed()
        printed = group.printed()
    assert printed.count("rank 0 has been listing") == 1, "the other rank waits in silence"
    assert "the other ranks wait 20 s at most (train.timeout_s)" in printed
    assert "data.trust_manifest" in printed
