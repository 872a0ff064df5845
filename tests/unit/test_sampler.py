"""Test that the order of the images is timm's, shows each once, and is the same from any step at any world size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from timm.data.distributed_sampler import RepeatAugSampler

from sws_dist.data.sampler import TrainOrder, eval_batches, micro_batch_positions


@pytest.mark.parametrize("world_size", [1, 3, 8])
@pytest.mark.parametrize(("num_images", "num_repeats"), [(1000, 3), (256, 3), (2049, 2), (777, 4)])
def test_repeated_augmentation_is_timms_index_for_index(num_images: int, num_repeats: int, world_size: int) -> None:
    order = TrainOrder(num_images, seed=0, num_repeats=num_repeats)
    for epoch in (0, 1, 7):
        ours = order.pass_images(epoch)
        for rank in range(world_size):
            theirs = RepeatAugSampler(range(num_images), world_size, rank, num_repeats=num_repeats)
            theirs.set_epoch(epoch)
            expected = list(theirs)
            # timm cuts each rank's share to a whole number; the stream goes on, so no position is lost.
            assert 0 <= len(ours[rank::world_size]) - len(expected) <= 1
            assert ours[rank::world_size][: len(expected)].tolist() == expected


@pytest.mark.parametrize("world_size", [1, 3, 8])
def test_a_rank_gets_timms_images_step_by_step(world_size: int) -> None:
    """Check a batch that divides the epoch: rank r's micro-batches are what timm's loader gives to rank r."""
    order = TrainOrder(1000, seed=0, num_repeats=3)
    batch = 96 // world_size
    for rank in range(world_size):
        sampler = RepeatAugSampler(range(1000), world_size, rank)
        theirs = list(sampler)
        for step in range(order.epoch_size // 96):
            images = order.images(micro_batch_positions(step, 96, rank, world_size))
            assert images.tolist() == theirs[step * batch : (step + 1) * batch]


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 1), (1, 6), (2, 3), (3, 1), (6, 1)])
@pytest.mark.parametrize("num_images", [5, 100, 257])
def test_every_image_once_an_epoch(num_images: int, world_size: int, accumulation: int) -> None:
    """Count the images by their place in the stream, since batches reach across the ends of epochs."""
    order = TrainOrder(num_images, seed=3)
    global_batch, num_micros = 12, world_size * accumulation
    steps = 4 * num_images // global_batch + 1
    stream = np.full(steps * global_batch, -1)
    for step in range(steps):
        for micro in range(num_micros):
            positions = micro_batch_positions(step, global_batch, micro, num_micros)
            assert (stream[positions] == -1).all()
            stream[positions] = order.images(positions)
    for epoch in range(4):
        images = stream[epoch * num_images : (epoch + 1) * num_images]
        if len(images) == num_images:
            assert sorted(images) == list(range(num_images))
    assert stream[:num_images].tolist() != stream[num_images : 2 * num_images].tolist()


def test_goes_on_at_another_world_size() -> None:
    """Take seven steps on one rank, eight on three, the rest on two: together they are a single rank's stream."""
    whole = TrainOrder(50, seed=9)
    stream: list[np.ndarray] = []
    for steps, world_size in [(range(7), 1), (range(7, 15), 3), (range(15, 20), 2)]:
        order = TrainOrder(50, seed=9)  # a new process knows only the step
        for step in steps:
            seen = np.empty(12, dtype=np.int64)
            for rank in range(world_size):
                positions = micro_batch_positions(step, 12, rank, world_size)
                seen[positions - step * 12] = order.images(positions)
            stream.append(seen)
    np.testing.assert_array_equal(np.concatenate(stream), whole.images(np.arange(240)))


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 1), (1, 3), (3, 1), (3, 2)])
@pytest.mark.parametrize("num_images", [5, 257])
def test_one_pass_shows_all_crops_of_every_image(num_images: int, world_size: int, accumulation: int) -> None:
    """Count over passes of four epochs, whose batches reach across the ends of epochs and of passes."""
    num_micros, pass_size = world_size * accumulation, 4 * num_images
    orders = [TrainOrder(num_images, seed=3, num_crops=4, share=(rank, world_size)) for rank in range(world_size)]
    assert orders[0].epoch_size == num_images
    stream = np.full(-(-2 * pass_size // 24) * 24, -1)
    for step in range(len(stream) // 24):
        for micro in range(num_micros):
            positions = micro_batch_positions(step, 24, micro, num_micros, num_crops=4)
            assert (np.diff(positions.reshape(-1, 4)) == 1).all(), "the crops of an image are side by side"
            stream[positions] = orders[micro % world_size].images(positions)
    for number in range(2):
        images = stream[number * pass_size : (number + 1) * pass_size]
        assert images.tolist() == np.repeat(orders[0].pass_images(number), 4).tolist()
        assert np.bincount(images).tolist() == [4] * num_images


def test_the_shuffle_is_torchs() -> None:
    generator = torch.Generator().manual_seed(42 + 5)
    expected = torch.randperm(300, generator=generator).tolist()
    assert TrainOrder(300, seed=42).pass_images(5).tolist() == expected


@pytest.mark.parametrize("num_repeats", [1, 3])
def test_shards_are_read_a_few_at_a_time(num_repeats: int) -> None:
    shards = np.repeat(np.arange(10), 30)
    order = TrainOrder(300, seed=4, num_repeats=num_repeats, shards=shards, window=3)
    epochs = []
    for epoch in range(3):
        images = order.pass_images(epoch)
        windows = [set(shards[images[start : start + 90 * num_repeats]]) for start in range(0, 300, 90 * num_repeats)]
        assert all(len(window) <= 3 for window in windows)
        assert not set.intersection(*windows) or len(windows) == 1
        assert len(set(images)) == (300 if num_repeats == 1 else -(-256 // 3))
        assert max(np.diff(images)) > 30, "shuffled inside a window"
        epochs.append(tuple(images))
    assert len(set(epochs)) == 3
    everything = TrainOrder(300, seed=4, shards=shards, window=10).pass_images(0)
    np.testing.assert_array_equal(everything, TrainOrder(300, seed=4).pass_images(0))


@pytest.mark.parametrize("num_images", [1, 2, 7, 100])
@pytest.mark.parametrize("world_size", [1, 3, 8])
@pytest.mark.parametrize("batch", [1, 8, 64])
def test_evaluation_counts_every_image_once(num_images: int, world_size: int, batch: int) -> None:
    ranks = [eval_batches(num_images, rank, world_size, batch) for rank in range(world_size)]
    counted = np.concatenate([images[valid] for batches in ranks for images, valid in batches])
    assert sorted(counted) == list(range(num_images))
    shapes = [[len(images) for images, _ in batches] for batches in ranks]
    assert all(shape == shapes[0] for shape in shapes), "ZeRO-3 needs as many equal batches on every rank"
    assert all(0 < n <= batch for n in shapes[0])


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("num_repeats", [1, 3])
def test_a_rank_keeps_its_own_part_of_an_epoch(world: int, num_repeats: int) -> None:
    whole = TrainOrder(301, seed=7, num_repeats=num_repeats)
    positions = np.arange(24 * 40)
    expected = whole.images(positions)
    for rank in range(world):
        own = TrainOrder(301, seed=7, num_repeats=num_repeats, share=(rank, world))
        for step in range(40):  # over several epochs, whose lengths no world size divides
            mine = micro_batch_positions(step, 24, rank, world)
            np.testing.assert_array_equal(own.images(mine), expected[mine])
        assert max(len(part.result()) for part in own._passes.values()) <= -(-whole.epoch_size // world)


@pytest.mark.parametrize("num_images", [1, 80, 100_003])
def test_the_order_is_that_of_64_bit_numbers(num_images: int) -> None:
    expected = torch.randperm(num_images, generator=torch.Generator().manual_seed(9))
    assert TrainOrder(num_images, seed=9).pass_images(0).tolist() == expected.tolist()
