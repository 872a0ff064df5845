"""TODO: say what this module does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus, is_zero_param
from torch import Tensor, nn

from sws_dist.learngene.sharded_init import InitReport
from sws_dist.zero.partition import fragments, master_weights

Fetch = Callable[[int, int], Tensor]
"""The flat range [start, stop) of one tensor."""


class MasterSlice(NamedTuple):
    """This rank's fp32 part of a parameter, which the optimizer updates: from ``start`` on, flat."""

    start: int
    values: Tensor


def master_slices(engine: Any) -> dict[str, MasterSlice]:
    """What this rank's optimizer updates, by the parameters' names."""
    flats = master_weights(engine)
    return {piece.name: MasterSlice(piece.start, piece.of(flats)) for piece in fragments(engine)}


def allocate_shards(model: nn.Module, ds: dict[str, Any], device: torch.device, dtype: torch.dtype) -> None:
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


@torch.no_grad()
def _fill(
    names: tuple[str, ...],
    fetch: Fetch,
    parameters: dict[str, Any],
    masters: Mapping[str, MasterSlice],
    filled: InitReport,
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


def _numel(parameter: Any) -> int:
    return parameter.ds_numel if is_zero_param(parameter) else parameter.numel()
