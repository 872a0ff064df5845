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

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus, is_zero_param
from safetensors import safe_open
from torch import Tensor, nn

from sws_dist import comm, learngene
from sws_dist import engine as ds_engine
from sws_dist.expansion import Design
from sws_dist.learngene import Header

Way = Literal["read", "broadcast"]
Fetch = Callable[[int, int], Tensor]
"""The flat range [start, stop) of one tensor."""


class Master(NamedTuple):
    """This rank's fp32 part of a parameter, which the optimizer updates: from ``start`` on, flat."""

    start: int
    values: Tensor


@dataclass
class Filled:
    """What filling a model took. ``gathered``: parameters whose layout had to be gathered, written and cut again."""

    num_bytes: int = 0
    """Read from the file by this rank, or broadcast."""
    gathered: list[str] = field(default_factory=list)


def own_masters(engine: Any) -> dict[str, Master]:
    """What this rank's optimizer updates, by the parameters' names."""
    flats = ds_engine.masters(engine)
    return {piece.name: Master(piece.start, piece.of(flats)) for piece in ds_engine.fragments(engine)}


def choose(path: str | Path, way: Literal["auto", "read", "broadcast"]) -> tuple[Header, Way]:
    """The learngene's header, on every rank, and how the ranks will get its tensors. A collective.

    ``auto``: every rank reads for itself if all of them see the same file, else rank 0 broadcasts.

    Raises:
        ValueError, RunError: no learngene on rank 0, or ``read`` where some rank sees another file or none.
    """
    header: Header | None = None
    with comm.together("read the learngene"):
        if way == "read" or dist.get_rank() == 0 or (way == "auto" and Path(path).is_file()):
            header = learngene.read_header(path)
    seen = comm.gather_to_main(header and header.fingerprint)
    others = comm.from_main(seen and [rank for rank, print_ in enumerate(seen) if print_ != seen[0]])
    if way == "read" and others:
        raise comm.RunError(
            f"model.expand: read, but rank(s) {', '.join(map(str, others))} see another file under {path} than rank 0; "
            "put it where all of them see it, or set model.expand to broadcast"
        )
    return comm.from_main(header), "broadcast" if way == "broadcast" or others else "read"


def allocate(model: nn.Module, ds: dict[str, Any], device: torch.device, dtype: torch.dtype) -> None:
    """Give a model on the meta device its memory, filled with zeros: shards under ZeRO-3, else whole tensors.

    Args:
        ds: what ``ds_config.resolve`` returned; it says where shards lie (offload).
        device, dtype: where and in what the model runs.
    """
    assert not list(model.buffers()), "a model with buffers cannot be built without its values"
    sharded = ds["zero_optimization"]["stage"] == 3
    if sharded:
        # The config alone: zero.Init's own dtype argument gives bf16 on CPUs for fp32.
        init = deepspeed.zero.Init(config_dict_or_path=ds)
        if init.mem_efficient_linear:
            init._enable_mem_efficient_linear()
    for module in model.modules():
        for name, on_meta in list(module._parameters.items()):
            if on_meta is None:
                continue
            # One whole tensor at a time, untouched zeros which cost a CPU no memory; zero.Init would broadcast it too.
            parameter: Any = nn.Parameter(torch.zeros(on_meta.shape, dtype=dtype, device=device), on_meta.requires_grad)
            module._parameters[name] = parameter
            if sharded:
                init._convert_to_deepspeed_param(parameter)
                parameter.partition()
                parameter.ds_tensor.data.zero_()  # the padding, which DeepSpeed leaves as it finds it


def broadcast_into(
    model: nn.Module,
    path: str | Path,
    header: Header,
    to: Design,
    fresh: Mapping[str, Tensor],
    masters: Mapping[str, Master],
    device: torch.device,
) -> Filled:
    """Fill ``model``; rank 0 reads ``path``, and each tensor goes over the wire once. A collective.

    Buckets are no larger than the largest tensor. The wire carries the model's dtype, or fp32 where there are fp32
    masters of a low-precision model to be filled; never more than the file holds.
    """
    parameters, filled = dict(model.named_parameters()), Filled()
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


def read_into(
    model: nn.Module,
    path: str | Path,
    header: Header,
    to: Design,
    fresh: Mapping[str, Tensor],
    masters: Mapping[str, Master],
) -> Filled:
    """Fill ``model`` from a file that every rank sees: each reads the rows of its own slices, nothing is moved."""
    parameters, filled = dict(model.named_parameters()), Filled()
    for name, targets in to.copies.items():
        if targets:
            _fill(targets, _reader(path, name, header.shapes[name], to, filled), parameters, masters, filled)
    _fill_fresh(fresh, parameters, masters, filled)
    return filled


def _fill_fresh(
    fresh: Mapping[str, Tensor], parameters: dict[str, Any], masters: Mapping[str, Master], filled: Filled
) -> None:
    for name, tensor in fresh.items():
        _fill((name,), _cutter(tensor.reshape(-1)), parameters, masters, filled)


@torch.no_grad()
def _fill(
    names: tuple[str, ...], fetch: Fetch, parameters: dict[str, Any], masters: Mapping[str, Master], filled: Filled
) -> None:
    """Write one tensor into this rank's part of every parameter that is a copy of it."""
    for name in names:
        parameter = parameters[name]
        if not is_zero_param(parameter):
            parameter.data.view(-1).copy_(fetch(0, parameter.numel()))
        elif _has_plain_shard(parameter):
            _write_shard(parameter, fetch)
        else:
            filled.gathered.append(name)
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                if dist.get_rank() == 0:
                    parameter.data.view(-1).copy_(fetch(0, parameter.ds_numel))
        if name in masters:
            master = masters[name]
            master.values.copy_(fetch(master.start, master.start + master.values.numel()))


def _has_plain_shard(parameter: Any) -> bool:
    """Whether the shard lies in memory as the model's own numbers: not on NVMe, not quantised."""
    shard = parameter.ds_tensor
    in_memory = shard.status == PartitionedParamStatus.AVAILABLE and shard.final_location != OffloadDeviceEnum.nvme
    return in_memory and not hasattr(shard, "ds_quant_scale")


def _write_shard(parameter: Any, fetch: Fetch) -> None:
    shard = parameter.ds_tensor
    start = min(parameter.ds_zero_partition_rank * shard.ds_numel, parameter.ds_numel)
    stop = min(start + shard.ds_numel, parameter.ds_numel)
    shard.data[: stop - start].copy_(fetch(start, stop))
    shard.data[stop - start :].zero_()
    parameter.ds_secondary_tensor = None  # hpZ's second copy would be stale; the next gather makes it anew
    if parameter.ds_status == ZeroParamStatus.AVAILABLE:  # DeepSpeed keeps small parameters whole on every rank
        parameter.data.view(-1).copy_(fetch(0, parameter.ds_numel))


def _cutter(flat: Tensor) -> Fetch:
    return lambda start, stop: flat[start:stop]


def _reader(path: str | Path, name: str, shape: tuple[int, ...], to: Design, filled: Filled) -> Fetch:
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


def _numel(parameter: Any) -> int:
    return parameter.ds_numel if is_zero_param(parameter) else parameter.numel()
