"""A learngene into a descendant whose weights lie spread over many ranks, without the whole of it anywhere.

    header, way = choose(path, "auto")                    # the file's description on every rank; read or broadcast
    to = expansion.design(header.info, header.shapes, model, layers)   # the model is on the meta device
    allocate(model, ds, device, dtype)                    # each rank its shards, one tensor after another
    engine = ...                                          # deepspeed.initialize
    read_into(model, path, to, fresh, masters(engine))    # or broadcast_into

``read_into`` moves nothing between ranks: each reads the rows that it needs from the file, which all of them see.
``broadcast_into`` sends each tensor of the learngene over the wire once, however many layers are copies of it, and
each rank cuts its own slices from it. Both hold no more than the largest tensor beside the shards, and both write the
fp32 masters as well: what a low-precision run trains is the file's numbers, not rounded ones.

Under ZeRO-3 a parameter's shard ``ds_tensor`` is the flat slice [rank x n, (rank + 1) x n) of it, n = ceil(numel /
world), the last one padded. At the stages below, each rank has whole parameters, and slices of the masters only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn

from sws_dist.distributed.collectives import broadcast_from_rank0, gather_on_rank0, raise_on_all_ranks
from sws_dist.errors import RunError
from sws_dist.learngene.expand import WeightMapping
from sws_dist.learngene.file import LearngeneHeader, read_learngene_header
from sws_dist.zero.shard_writer import Fetch, MasterSlice, _fill, _numel

TransferMode = Literal["read", "broadcast"]


@dataclass
class InitReport:
    """What filling a model took. ``gathered``: parameters whose layout had to be gathered, written and cut again."""

    num_bytes: int = 0
    """Read from the file by this rank, or broadcast."""
    gathered: list[str] = field(default_factory=list)


def choose_transfer(
    path: str | Path, way: Literal["auto", "read", "broadcast"]
) -> tuple[LearngeneHeader, TransferMode]:
    """The learngene's header, on every rank, and how the ranks will get its tensors. A collective.

    ``auto``: every rank reads for itself if all of them see the same file, else rank 0 broadcasts.

    Raises:
        ValueError, RunError: no learngene on rank 0, or ``read`` where some rank sees another file or none.
    """
    header: LearngeneHeader | None = None
    with raise_on_all_ranks("read the learngene"):
        if way == "read" or dist.get_rank() == 0 or (way == "auto" and Path(path).is_file()):
            header = read_learngene_header(path)
    seen = gather_on_rank0(header and header.fingerprint)
    others = broadcast_from_rank0(seen and [rank for rank, print_ in enumerate(seen) if print_ != seen[0]])
    if way == "read" and others:
        raise RunError(
            f"model.expand: read, but rank(s) {', '.join(map(str, others))} see another file under {path} than rank 0; "
            "put it where all of them see it, or set model.expand to broadcast"
        )
    return broadcast_from_rank0(header), "broadcast" if way == "broadcast" or others else "read"


def init_by_broadcast(
    model: nn.Module,
    path: str | Path,
    header: LearngeneHeader,
    to: WeightMapping,
    fresh: Mapping[str, Tensor],
    masters: Mapping[str, MasterSlice],
    device: torch.device,
) -> InitReport:
    """Fill ``model``; rank 0 reads ``path``, and each tensor goes over the wire once. A collective.

    Buckets are no larger than the largest tensor. The wire carries the model's dtype, or fp32 where there are fp32
    masters of a low-precision model to be filled; never more than the file holds.
    """
    parameters, filled = dict(model.named_parameters()), InitReport()
    sizes = {name: _numel(parameters[targets[0]]) for name, targets in to.copies.items() if targets}
    is_main = dist.get_rank() == 0
    needed = torch.float32 if masters else next(model.parameters()).dtype
    wire = min(header.dtype, needed, key=lambda dtype: dtype.itemsize)
    for names in _buckets(sizes):
        bucket = torch.empty(sum(sizes[name] for name in names), dtype=wire, device=device)
        parts = dict(zip(names, bucket.split([sizes[name] for name in names]), strict=True))
        if is_main:
            # Opened anew for each bucket: the pages of an open file stay in memory.
            with safe_open(path, framework="pt") as file:
                for name, part in parts.items():
                    part.copy_(to.adapt(name, file.get_tensor(name)).reshape(-1))
        dist.broadcast(bucket, src=0)
        filled.num_bytes += bucket.numel() * bucket.element_size()
        for name, part in parts.items():
            _fill(to.copies[name], _cutter(part), parameters, masters, filled)
    _fill_fresh(fresh, parameters, masters, filled)
    return filled


def init_by_reading(
    model: nn.Module,
    path: str | Path,
    header: LearngeneHeader,
    to: WeightMapping,
    fresh: Mapping[str, Tensor],
    masters: Mapping[str, MasterSlice],
) -> InitReport:
    """Fill ``model`` from a file that every rank sees: each reads the rows of its own slices, nothing is moved."""
    parameters, filled = dict(model.named_parameters()), InitReport()
    for name, targets in to.copies.items():
        if targets:
            _fill(targets, _reader(path, name, header.shapes[name], to, filled), parameters, masters, filled)
    _fill_fresh(fresh, parameters, masters, filled)
    return filled


def _fill_fresh(
    fresh: Mapping[str, Tensor], parameters: dict[str, Any], masters: Mapping[str, MasterSlice], filled: InitReport
) -> None:
    for name, tensor in fresh.items():
        _fill((name,), _cutter(tensor.reshape(-1)), parameters, masters, filled)


def _cutter(flat: Tensor) -> Fetch:
    return lambda start, stop: flat[start:stop]


def _reader(path: str | Path, name: str, shape: tuple[int, ...], to: WeightMapping, filled: InitReport) -> Fetch:
    """Reads only the rows in question; copies of a tensor ask for the same range, which is read once."""
    if name == "pos_embed" and to.grid is not None:
        with safe_open(path, framework="pt") as file:
            whole = to.adapt(name, file.get_tensor(name)).reshape(-1)
        filled.num_bytes += whole.numel() * whole.element_size()
        return _cutter(whole)
    row = torch.Size(shape[1:]).numel()

    @lru_cache(maxsize=2)
    def fetch(start: int, stop: int) -> Tensor:
        if start == stop:  # a rank whose shard is all padding
            return torch.empty(0)
        first, last = start // row, -(-stop // row)
        with safe_open(path, framework="pt") as file:
            rows = file.get_slice(name)[first:last].reshape(-1)
        filled.num_bytes += rows.numel() * rows.element_size()
        return rows[start - first * row : stop - first * row]

    return fetch


def _buckets(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Neighbours, as many as fit into the size of the largest tensor."""
    capacity = max(sizes.values())
    bucket: list[str] = []
    for name, size in sizes.items():
        if bucket and sum(sizes[n] for n in bucket) + size > capacity:
            yield bucket
            bucket = []
        bucket.append(name)
    yield bucket
