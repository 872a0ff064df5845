"""Write tensors into a model whose weights lie sharded over the ranks, without the whole model anywhere.

Under ZeRO-3 a parameter's shard ``ds_tensor`` is the flat slice [rank x n, (rank + 1) x n) of it, n = ceil(numel /
world), the last one padded. At the stages below, each rank has whole parameters, and slices of the masters only.
"""

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

from sws_dist.zero.partition import fragments, master_weights
from sws_dist.zero.protocol import ZeroEngine

Fetch = Callable[[int, int], Tensor]
"""Returns the flat range [start, stop) of one tensor."""


class MasterSlice(NamedTuple):
    """This rank's fp32 part of a parameter, which the optimizer updates: flat, from element ``start`` on."""

    start: int
    values: Tensor


def master_slices(engine: ZeroEngine) -> dict[str, MasterSlice]:
    """Return what this rank's optimizer updates, by the parameters' names."""
    flats = master_weights(engine)
    return {piece.name: MasterSlice(piece.start, piece.of(flats)) for piece in fragments(engine)}


def allocate_shards(model: nn.Module, ds: dict[str, Any], device: torch.device, dtype: torch.dtype) -> None:
    """Give a model on the meta device its memory, filled with zeros: shards under ZeRO-3, else whole tensors.

    Args:
        ds: the resolved DeepSpeed config; it says where shards lie (offload).
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


class ShardWriter:
    """Write tensors into this rank's part of a model's parameters and of its masters.

    The fp32 masters are written as well, so that a low-precision run trains the given numbers, not rounded ones.

    Args:
        model: the model inside the engine; before there is one, its shards can be written without masters.
        masters: what ``master_slices`` returned, or empty.

    ``gathered`` collects the parameters whose layout (NVMe, quantised) had to be gathered, written and cut again.
    """

    def __init__(self, model: nn.Module, masters: Mapping[str, MasterSlice]) -> None:
        self._parameters: dict[str, Any] = dict(model.named_parameters())
        self._masters = masters
        self.gathered: list[str] = []

    @property
    def has_masters(self) -> bool:
        """True if this rank holds a part of the masters."""
        return bool(self._masters)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the model's parameters."""
        return next(iter(self._parameters.values())).dtype

    def numel(self, name: str) -> int:
        """Return the number of elements of the whole parameter."""
        parameter = self._parameters[name]
        return parameter.ds_numel if is_zero_param(parameter) else parameter.numel()

    @torch.no_grad()
    def write(self, name: str, fetch: Fetch) -> None:
        """Write one tensor into the parameter ``name``; ``fetch`` is asked for the ranges that this rank needs.

        A collective where the parameter has to be gathered.
        """
        parameter = self._parameters[name]
        if not is_zero_param(parameter):
            parameter.data.view(-1).copy_(fetch(0, parameter.numel()))
        elif _has_plain_shard(parameter):
            _write_shard(parameter, fetch)
        else:
            self.gathered.append(name)
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                if dist.get_rank() == 0:
                    parameter.data.view(-1).copy_(fetch(0, parameter.ds_numel))
        if (master := self._masters.get(name)) is not None:
            master.values.copy_(fetch(master.start, master.start + master.values.numel()))


def _has_plain_shard(parameter: Any) -> bool:
    """Return True if the shard lies in memory as the model's own numbers: not on NVMe, not quantised."""
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
