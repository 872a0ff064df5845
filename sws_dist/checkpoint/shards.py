"""Write and read a run's state as named pieces of parameters, for any world size and any ZeRO stage.

Each rank that holds something writes one ``.safetensors`` file. Its tensors are ``KIND/PARAMETER``, flat pieces in fp32
of the weights (``weight``), of the optimizer's moments (``exp_avg`` and ``exp_avg_sq``, or Muon's ``momentum_buffer``)
and of the moving average (``average``); its metadata says at which element of the flattened parameter each piece
starts. Rank 0 adds the model's buffers, whole. A reader takes the elements it needs from whichever files have them, and
executes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from sws_dist.checkpoint.safetensors_stream import FileDigest, TensorEntry, tensor_entry, write_safetensors
from sws_dist.errors import RunError
from sws_dist.units import format_bytes
from sws_dist.zero.ema import ShardedEMA
from sws_dist.zero.partition import Fragment, fragments, init_optimizer_state, master_weights, optimizer_moments
from sws_dist.zero.protocol import ZeroEngine

WEIGHT, AVERAGE, BUFFER = "weight", "average", "buffer"


def shard_name(rank: int, world_size: int) -> str:
    return f"shard-{rank:05d}-of-{world_size:05d}.safetensors"


@dataclass(frozen=True)
class Shard:
    """What one rank holds of a run's state: the engine's own tensors, or copies of them."""

    flats: dict[str, dict[int, Tensor]]
    """For each kind, and for the number of the master that it is laid out like, a tensor."""
    pieces: list[Fragment]
    """Which part of which parameter lies where in them."""
    buffers: dict[str, Tensor]

    @property
    def tensors(self) -> list[Tensor]:
        """All of them, always in the same order."""
        return [*chain.from_iterable(flats.values() for flats in self.flats.values()), *self.buffers.values()]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)

    def write(self, path: Path) -> FileDigest:
        """Write the shard, and return the file's size and checksum."""
        pieces = self.pieces
        entries = [
            tensor_entry(f"{kind}/{p.name}", p.of(flats))
            for kind, flats in self.flats.items()
            for p in pieces
            if p.flat in flats
        ]
        entries += [tensor_entry(f"{BUFFER}/{name}", buffer) for name, buffer in self.buffers.items()]
        starts = json.dumps({p.name: p.start for p in pieces})
        return write_safetensors(path, entries, {"format": "pt", "starts": starts})


def collect_shard(engine: ZeroEngine, ema: ShardedEMA | None) -> Shard | None:
    """Collect what this rank holds. Returns None where rank 0 holds all of it (stage 0, ranks above 0)."""
    main = engine.global_rank == 0
    if engine.zero_optimization_stage() == 0 and not main:
        return None
    return Shard(_kinds(engine, ema), fragments(engine), _buffers(engine.module) if main else {})


class HostCopy:
    """Copy this rank's shard to host memory, so that it can be written while training changes the original.

    The memory of the first copy is kept for the later ones, and page-locked for tensors of a GPU: to ask for new memory
    takes longer than to copy.
    """

    def __init__(self) -> None:
        self._kept: Shard | None = None

    @torch.no_grad()
    def of(self, shard: Shard) -> Shard:
        """Return a copy, which holds until the next call.

        Raises:
            RunError: there is not enough memory.
        """
        if self._kept is None or _layout(self._kept) != _layout(shard):
            self._kept = None
            self._kept = _allocate(shard)
        for kept, tensor in zip(self._kept.tensors, shard.tensors, strict=True):
            kept.copy_(tensor, non_blocking=True)
        if any(tensor.is_cuda for tensor in shard.tensors):
            torch.cuda.current_stream().synchronize()
        return self._kept


def _layout(shard: Shard) -> list[tuple[torch.Size, torch.dtype]]:
    return [(tensor.shape, tensor.dtype) for tensor in shard.tensors]


def _allocate(shard: Shard) -> Shard:
    """Return a shard like this one in host memory, not yet filled."""

    def like(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)

    try:
        return replace(
            shard,
            flats={kind: {i: like(flat) for i, flat in flats.items()} for kind, flats in shard.flats.items()},
            buffers={name: like(buffer) for name, buffer in shard.buffers.items()},
        )
    except RuntimeError as error:
        raise RunError(
            f"there is no host memory for a copy of a checkpoint, {format_bytes(shard.num_bytes)} on this rank "
            f"({str(error).splitlines()[0]}); checkpoint.background: false saves without one, while training waits"
        ) from None


@torch.no_grad()
def read_shards(paths: Iterable[Path], engine: ZeroEngine, ema: ShardedEMA | None, steps: int) -> None:
    """Fill this rank's masters, moments and average; ``sync_model_from_masters`` has to follow.

    Args:
        steps: number of steps that the optimizer has taken; without any it has no moments yet.
    """
    if steps:
        init_optimizer_state(engine, steps)
    pieces = fragments(engine)
    with ShardReader(paths) as reader:
        for kind, flats in _kinds(engine, ema).items():
            for piece in pieces:
                if piece.flat in flats:
                    found = reader.read(kind, piece.name, piece.start, piece.start + piece.numel)
                    piece.of(flats).copy_(found)
        for n, buffer in _buffers(engine.module).items():
            buffer.copy_(reader.read_buffer(n))


def _kinds(engine: ZeroEngine, ema: ShardedEMA | None) -> dict[str, dict[int, Tensor]]:
    """Return what this rank holds, by kind and by the number of the master that it is laid out like."""
    average = {} if ema is None else {AVERAGE: dict(enumerate(ema.average))}
    return {WEIGHT: dict(enumerate(master_weights(engine)))} | optimizer_moments(engine) | average


class ShardReader:
    """Read any elements of any parameter from the shards of all ranks. A context manager."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._files = ExitStack()
        self._pieces: dict[str, list[tuple[int, int, Any]]] = {}
        for path in paths:
            file = self._files.enter_context(safe_open(path, framework="pt"))
            starts = json.loads(file.metadata()["starts"])
            for key in file.keys():  # noqa: SIM118
                start = starts.get(key.partition("/")[2], 0)
                self._pieces.setdefault(key, []).append((start, start + _numel(file, key), file))

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._files.close()

    def has(self, kind: str) -> bool:
        return any(key.startswith(f"{kind}/") for key in self._pieces)

    def read(self, kind: str, parameter: str, start: int, stop: int) -> Tensor:
        """Read elements ``start`` to ``stop`` of the flattened parameter: [stop - start], fp32.

        Raises:
            ValueError: no shard holds some of them.
        """
        key, out, at = f"{kind}/{parameter}", torch.empty(stop - start), start
        for first, last, file in sorted(self._pieces.get(key, []), key=lambda piece: piece[:2]):
            if first <= at < last and at < stop:
                end = min(last, stop)
                out[at - start : end - start] = file.get_slice(key)[at - first : end - first]
                at = end
        if at < stop:
            raise ValueError(f"the shards hold no {kind} of {parameter} from element {at} on")
        return out

    def read_buffer(self, buffer: str) -> Tensor:
        """Read a buffer, in its own shape and dtype."""
        key = f"{BUFFER}/{buffer}"
        if key not in self._pieces:
            raise ValueError(f"the shards hold no buffer {buffer}")
        return self._pieces[key][0][2].get_tensor(key)

    def entries(self, shapes: Mapping[str, Sequence[int]], kind: str, dtype: torch.dtype) -> list[TensorEntry]:
        """List the whole model for ``write_safetensors``: parameters in ``dtype``, buffers as they are."""

        def reading(parameter: str, shape: tuple[int, ...]) -> Callable[[], Tensor]:
            return lambda: self.read(kind, parameter, 0, torch.Size(shape).numel()).reshape(shape)

        whole = [
            TensorEntry(parameter, tuple(shape), dtype, reading(parameter, tuple(shape)))
            for parameter, shape in shapes.items()
        ]
        buffers = [key.partition("/")[2] for key in self._pieces if key.startswith(f"{BUFFER}/")]
        return whole + [tensor_entry(buffer, self.read_buffer(buffer)) for buffer in buffers]


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that a state dict holds."""
    kept = model.state_dict().keys()
    return {n: buffer for n, buffer in model.named_buffers() if n in kept}


def _numel(file: Any, key: str) -> int:
    return torch.Size(file.get_slice(key).get_shape()).numel()
