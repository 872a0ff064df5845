"""Test that images which go bad during a run are replaced, by the same images at every world size."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sws_dist.config.schema import AugmentConfig, DataConfig
from sws_dist.data import manifest, sampler
from sws_dist.data.bad_images import BadImages
from sws_dist.data.draws import Recipe
from sws_dist.data.loader import Loader
from sws_dist.data.manifest import Manifest
from sws_dist.data.pipeline import eval_loader, train_loader
from tests.unit import bad_files

CPU = torch.device("cpu")
CONFIG = DataConfig(root="unused", image_size=32, num_threads=1)
RECIPE = Recipe(AugmentConfig(auto_augment="rand-m9-n1-mstd0.5-inc1", scale=(1.0, 1.0), re_prob=0.5), 32)


@pytest.fixture
def listed(few_digits: Path, tmp_path: Path) -> Manifest:
    """Return 80 digits that were good when they were listed."""
    shutil.copytree(few_digits, tmp_path / "data")
    return manifest.scan(tmp_path / "data", "train")


def spoil(listed: Manifest, count: int = 9) -> dict[str, str]:
    """Damage ``count`` of the images. Returns file name -> a word of the reason."""
    return bad_files.spoil([listed.file(i) for i in np.linspace(3, 77, count).astype(int)])


def training(listed: Manifest, positions: list[np.ndarray], bad: BadImages | None = None, num_crops: int = 1) -> Loader:
    order = sampler.TrainOrder(len(listed), 1, num_crops=num_crops)
    recipe = Recipe(replace(RECIPE.config, num_crops=num_crops), RECIPE.image_size)
    return train_loader(listed, order, positions, recipe, 5, CONFIG, CPU, bad)


def seen(
    listed: Manifest, positions: list[np.ndarray], bad: BadImages | None = None, num_crops: int = 1
) -> dict[int, tuple[int, bytes]]:
    """Train on ``positions``. Returns position -> (image, its pixels)."""
    pairs: dict[int, tuple[int, bytes]] = {}
    for places, batch in zip(positions, training(listed, positions, bad, num_crops), strict=True):
        assert batch.position == places[0]
        assert batch.labels.tolist() == listed.labels[batch.indices].tolist()
        assert batch.erase is not None
        for row, place in enumerate(places):
            pairs[int(place)] = int(batch.indices[row]), batch.images[row].numpy().tobytes()
    return pairs


def test_substitutes_take_the_places_of_bad_images(listed: Manifest) -> None:
    epochs = [np.arange(start, start + 16) for start in range(0, 160, 16)]
    before = seen(listed, epochs)
    reasons = spoil(listed)
    bad = BadImages()
    after = seen(listed, epochs, bad)

    names = {Path(listed.paths[i]).name: i for i in range(len(listed))}
    lost = {names[name] for name in reasons}
    assert not lost & {image for image, _ in after.values()}
    for place, (image, pixels) in before.items():
        if image not in lost:
            assert after[place] == (image, pixels), "a good image beside a bad one is unchanged"
    messages = bad.exchange(CPU, 1, 80, max_share=0.2)
    assert len(messages) == len(bad) == 9, "each file is named once, though it is read in two epochs"
    for name, reason in reasons.items():
        assert any(name in line and reason in line for line in messages), (name, reason, messages)


def test_substitutes_are_functions_of_the_position(listed: Manifest) -> None:
    """Check that one rank, three ranks and a start in the middle get the same images and pixels."""
    spoil(listed, 20)  # of 80, so that substitutes are bad as well
    whole = seen(listed, [np.arange(s, s + 12) for s in range(0, 48, 12)])
    ranks = [sampler.micro_batch_positions(step, 12, rank, 3) for step in range(4) for rank in range(3)]
    assert seen(listed, ranks) == whole
    assert seen(listed, [np.arange(17, 22), np.arange(22, 48)]) == {place: whole[place] for place in range(17, 48)}
    assert seen(listed, [np.array([place]) for place in (11, 30)]) == {place: whole[place] for place in (11, 30)}


def test_one_substitute_takes_the_places_of_all_crops(listed: Manifest) -> None:
    steps = [np.arange(start, start + 16) for start in range(0, 320, 16)]  # a pass: four epochs of 80
    before = seen(listed, steps, num_crops=4)
    names = {Path(listed.paths[i]).name: i for i in range(len(listed))}
    lost = {names[name] for name in spoil(listed)}
    bad = BadImages()
    after = seen(listed, steps, bad, num_crops=4)
    for first in range(0, 320, 4):
        (image,) = {after[place][0] for place in range(first, first + 4)}
        assert image not in lost
        if before[first][0] not in lost:
            assert all(after[place] == before[place] for place in range(first, first + 4))
    alone = [np.arange(first, first + 4) for first in range(0, 320, 4) if before[first][0] in lost]
    assert seen(listed, alone, num_crops=4) == {place: after[place] for places in alone for place in places.tolist()}
    shown = Counter(place // 80 for place, (image, _) in before.items() if image in lost)
    worst, epoch = max((count, epoch) for epoch, count in shown.items())
    assert sum(shown.values()) == 4 * len(lost)
    with pytest.raises(ValueError, match=f"epoch {epoch + 1}: {worst} of 80 images are bad"):
        bad.exchange(CPU, 3, 80, max_share=(worst - 1) / 80)


def test_too_many_bad_images_stop_the_run(listed: Manifest) -> None:
    spoil(listed)
    bad = BadImages()
    seen(listed, [np.arange(80)], bad)
    assert len(bad.exchange(CPU, 0, 80, max_share=9 / 80)) == 9
    seen(listed, [np.arange(80, 160)], bad)
    with pytest.raises(ValueError, match=r"epoch 2: 9 of 80 images are bad, more than data.max_bad_share 0.1 allows"):
        bad.exchange(CPU, 1, 80, max_share=0.1)
    bad.clear()
    bad.add("a.jpg", "empty")
    with pytest.raises(ValueError, match=r"^1 of 5 images are bad"):  # of an evaluation, which has no epoch
        bad.exchange(CPU, None, 5, max_share=0.1)


def test_missing_data_is_a_failure_and_no_hang(listed: Manifest) -> None:
    shutil.rmtree(listed.folder)
    loader = training(listed, [np.arange(4), np.arange(4, 8)])
    for batch in loader:
        assert batch.images.isnan().all(), "every loss is NaN, so all ranks of a run stop"
    assert "is the data still there?" in str(loader.failure)


def test_evaluation_counts_only_what_can_be_read(listed: Manifest) -> None:
    batches = sampler.eval_batches(len(listed), 0, 1, 16)
    before = torch.cat([batch.images for batch in eval_loader(listed, batches, CONFIG, CPU)])
    reasons = spoil(listed)
    bad = BadImages()
    loader = eval_loader(listed, batches, CONFIG, CPU, bad)
    after = list(loader)
    again = list(loader)  # one loader serves every evaluation of a run
    assert torch.equal(torch.cat([b.images for b in again]), torch.cat([b.images for b in after]))
    valid = np.concatenate([batch.valid for batch in after])
    unread = {Path(listed.paths[i]).name for i in np.flatnonzero(~valid)}
    assert unread == set(reasons)
    assert torch.equal(torch.cat([batch.images for batch in after])[valid], before[valid])
    assert len(bad.exchange(CPU, 0, 80, max_share=0.3)) == 9


def test_a_pass_may_be_left_in_the_middle(listed: Manifest) -> None:
    loader = eval_loader(listed, sampler.eval_batches(len(listed), 0, 1, 16), CONFIG, CPU)
    next(iter(loader))
    assert np.concatenate([batch.indices for batch in loader]).tolist() == list(range(80))


CUT_WHILE_READ = """
import os, sys, threading
import numpy as np
from nvidia.dali import fn, pipeline_def
from sws_dist.data.pipeline import _read_files

path = sys.argv[1]

def is_open():
    targets = (os.path.join("/proc/self/fd", number) for number in os.listdir("/proc/self/fd"))
    with open("/proc/self/maps") as maps:
        return path in maps.read() or any(os.path.lexists(each) and os.readlink(each) == path for each in targets)

def cut():
    while not is_open():
        pass
    os.truncate(path, 0)

@pipeline_def(batch_size=1, num_threads=1, device_id=None, exec_dynamic=True, prefetch_queue_depth=1)
def graph():
    return _read_files(fn.external_source(name="path"))

read = graph()
read.build()
read.feed_input("path", [np.frombuffer(os.fsencode(path), dtype=np.uint8)])
threading.Thread(target=cut, daemon=True).start()
try:
    read.run()
except RuntimeError:
    pass  # as of any bad file: the loader replaces it
os._exit(0)
"""


def test_a_file_that_is_cut_while_it_is_read_does_not_end_the_process(tmp_path: Path) -> None:
    file = tmp_path / "large"
    with file.open("wb") as opened:
        opened.truncate(1 << 28)  # reading it takes long enough to be cut meanwhile
    command = [sys.executable, "-c", CUT_WHILE_READ, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
