"""A shard's copy keeps what the shard held, and says so when there is no memory for it."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sws_dist.checkpoint.safetensors_stream import digest
from sws_dist.checkpoint.shards import HostCopy, Shard
from sws_dist.errors import RunError
from sws_dist.zero.partition import Fragment


def make_shard(numel: int = 10) -> Shard:
    """Two flat tensors with two parameters in the first and one in the second, and a counter as a buffer.

    The second has no moment, as with Muon.
    """
    flats = {0: torch.arange(numel, dtype=torch.float32), 1: torch.arange(4.0)}
    pieces = [Fragment("a", 0, 6, 0, 0), Fragment("b", 3, 4, 0, 6), Fragment("c", 0, 4, 1, 0)]
    return Shard({"weight": flats, "exp_avg": {0: -flats[0]}}, pieces, {"steps": torch.tensor(7)})


def test_what_is_written_is_what_was_copied(tmp_path: Path) -> None:
    shard = make_shard()
    copy = HostCopy().of(shard)
    for tensor in shard.tensors:
        tensor.fill_(-1)
    file = tmp_path / "shard.safetensors"
    assert copy.write(file) == digest(file)
    found = load_file(file)
    assert {name: tensor.tolist() for name, tensor in found.items()} == {
        "weight/a": [0, 1, 2, 3, 4, 5],
        "weight/b": [6, 7, 8, 9],
        "weight/c": [0, 1, 2, 3],
        "exp_avg/a": [0, -1, -2, -3, -4, -5],
        "exp_avg/b": [-6, -7, -8, -9],
        "buffer/steps": 7,
    }


def test_later_copies_use_the_memory_of_the_first_unless_the_layout_changed() -> None:
    host, shard = HostCopy(), make_shard()
    addresses = [tensor.data_ptr() for tensor in host.of(shard).tensors]
    shard.flats["weight"][1].fill_(5)
    again = host.of(shard)
    assert [tensor.data_ptr() for tensor in again.tensors] == addresses
    assert again.flats["weight"][1].tolist() == [5, 5, 5, 5]
    larger = host.of(make_shard(12))
    assert larger.flats["weight"][0].tolist() == list(range(12))


def test_a_copy_that_finds_no_memory_names_the_way_out() -> None:
    limits = resource.getrlimit(resource.RLIMIT_AS)
    shard = make_shard(1 << 24)
    used = int(Path(f"/proc/{os.getpid()}/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (32 << 20), limits[1]))
    try:
        with pytest.raises(RunError, match=r"no host memory .* 134.22 MB on this rank .*checkpoint.background"):
            HostCopy().of(shard)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
