"""Initialise a descendant whose weights lie sharded over many ranks from a learngene, without the whole of it anywhere.

    expansion = prepare_expansion(config.model, model)       # the model is on the meta device; nothing is read yet
    allocate_shards(model, ds, device, dtype)                # each rank its shards, one tensor after another
    engine = build_engine(model, ds, optim)
    init_from_learngene(model, master_slices(engine), expansion, seed, device)

In mode ``read`` nothing moves between ranks: each reads the rows that it needs from the file, which all of them see.
In mode ``broadcast`` each tensor of the learngene goes over the wire once, however many layers are made of it, and
each rank cuts its own slices from it. Both hold no more than the largest tensor beside the shards (for TLEG's
learngene, the largest of theta_A and of theta_B).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from sws_dist.config.schema import ModelConfig
from sws_dist.distributed.collectives import broadcast_from_rank0, gather_on_rank0, raise_on_all_ranks
from sws_dist.errors import RunError
from sws_dist.learngene.expand import (
    WeightMapping,
    describe_layers,
    fresh_head,
    log_depth,
    map_weights,
    plan_layers,
)
from sws_dist.learngene.file import LearngeneHeader, read_learngene_header
from sws_dist.models import SWSVisionTransformer
from sws_dist.units import format_bytes
from sws_dist.zero.shard_writer import Fetch, MasterSlice, ShardWriter

TransferMode = Literal["read", "broadcast"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Expansion:
    """A learngene that a run starts from, and how it becomes the descendant."""

    path: str
    header: LearngeneHeader
    mode: TransferMode
    mapping: WeightMapping


@dataclass
class InitReport:
    """Cost of an initialisation: bytes read by this rank or broadcast, and parameters that had to be gathered."""

    num_bytes: int
    gathered: list[str]


def prepare_expansion(config: ModelConfig, model: Any, classes: Sequence[str] | None = None) -> Expansion | None:
    """Plan what ``model.initial_learngene`` asks for, and check it against ``model``. A collective.

    Args:
        classes: names of the model's labels; others than the learngene's, or in another order, give a fresh head.

    Returns:
        None where the run starts from no learngene.

    Raises:
        RunError: a file that is no learngene or of another geometry, or a plan that does not fit.
    """
    path = config.initial_learngene
    if path is None:
        return None
    header, mode = choose_transfer(path, config.expand)
    with raise_on_all_ranks("plan the expansion"):
        if not isinstance(model, SWSVisionTransformer):
            raise ValueError(f"model.initial_learngene: {config.name} is not one of our models (sws_...)")
        info = header.info
        if "branch_scaling" in config.kwargs:  # as in sws expand --branch-scaling
            info = replace(info, kwargs=info.kwargs | {"branch_scaling": config.kwargs["branch_scaling"]})
        try:
            layers = plan_layers(info, len(model.blocks), config.plan)
            mapping = map_weights(info, header.shapes, model, layers, classes)
        except ValueError as error:
            raise ValueError(f"model.initial_learngene {path}: {error}") from None
    return Expansion(path, header, mode, mapping)


def choose_transfer(
    path: str | Path, wanted: Literal["auto", "read", "broadcast"]
) -> tuple[LearngeneHeader, TransferMode]:
    """Return the learngene's header on every rank, and how the ranks get its tensors. A collective.

    ``auto``: every rank reads for itself if all of them see the same file, else rank 0 broadcasts.

    Raises:
        ValueError, RunError: no learngene on rank 0, or ``read`` where some rank sees another file or none.
    """
    header: LearngeneHeader | None = None
    with raise_on_all_ranks("read the learngene"):
        if wanted == "read" or dist.get_rank() == 0 or (wanted == "auto" and Path(path).is_file()):
            header = read_learngene_header(path)
    fingerprints = gather_on_rank0(None if header is None else header.fingerprint) or []
    others = broadcast_from_rank0([rank for rank, found in enumerate(fingerprints) if found != fingerprints[0]])
    if wanted == "read" and others:
        raise RunError(
            f"model.expand: read, but rank(s) {', '.join(map(str, others))} see another file under {path} than rank 0; "
            "put it where all of them see it, or set model.expand to broadcast"
        )
    return broadcast_from_rank0(header), "broadcast" if wanted == "broadcast" or others else "read"


def init_from_learngene(
    model: SWSVisionTransformer,
    masters: Mapping[str, MasterSlice],
    expansion: Expansion,
    seed: int,
    device: torch.device,
) -> InitReport:
    """Write a learngene's tensors into this rank's shards and fp32 masters. A collective.

    Args:
        masters: what ``master_slices`` returned; empty before there is an engine.
        seed: of a fresh head, where the descendant has other labels than the learngene.
    """
    writer = ShardWriter(model, masters)
    is_read = expansion.mode == "read"
    num_bytes = _read_slices(writer, expansion) if is_read else _broadcast(writer, expansion, device)
    if expansion.mapping.fresh:
        for name, tensor in fresh_head(model, seed).items():
            writer.write(name, _slices_of(tensor.reshape(-1)))
    return InitReport(num_bytes, writer.gathered)


def log_expansion(expansion: Expansion, report: InitReport, num_classes: int) -> None:
    """Log where the descendant's layers come from, and what it took to get them."""
    mapping, known = expansion.mapping, expansion.header.info.num_classes
    log.info("%s of %s", describe_layers(expansion.header.info, mapping.layers), expansion.path)
    log_depth(expansion.header.info, mapping.layers, mapping.dropped)
    if mapping.fresh:
        other = "" if num_classes != known else " of other names, or in another order"
        log.info("the head is new: %d classes, the learngene knows %d%s", num_classes, known, other)
    how = "read by this rank" if expansion.mode == "read" else "broadcast by rank 0"
    log.info("%s of the learngene %s", format_bytes(report.num_bytes), how)
    if report.gathered:
        log.info("%d parameters, on NVMe or quantised, were gathered, written and cut again", len(report.gathered))


def _read_slices(writer: ShardWriter, expansion: Expansion) -> int:
    """Read the rows of this rank's slices from a file that every rank sees. Returns the bytes read."""
    num_bytes = 0
    for name, targets in expansion.mapping.copies.items():
        if targets:
            readers = [_SliceReader(expansion, source) for source in expansion.mapping.sources(name)]
            _write_targets(writer, expansion.mapping, name, [reader.fetch for reader in readers])
            num_bytes += sum(reader.num_bytes for reader in readers)
    return num_bytes


def _write_targets(writer: ShardWriter, mapping: WeightMapping, name: str, sources: Sequence[Fetch]) -> None:
    """Write all that is made of the learngene's tensor ``name``; ``sources`` fetch ``mapping.sources(name)``."""
    for target in mapping.copies[name]:

        def fetch(start: int, stop: int, target: str = target) -> Tensor:
            return mapping.compute(target, *(source(start, stop) for source in sources))

        writer.write(target, fetch)


def _broadcast(writer: ShardWriter, expansion: Expansion, device: torch.device) -> int:
    """Let rank 0 read the file and broadcast each tensor once. Returns the bytes broadcast. A collective.

    Buckets are no larger than the largest tensor (with TLEG, and its slope). The wire carries the model's dtype, or
    fp32 where there are fp32 masters of a low-precision model to be filled; never more than the file holds, unless a
    position embedding is resampled, which rank 0 does in fp32.
    """
    mapping, num_bytes = expansion.mapping, 0
    sizes = {name: writer.numel(targets[0]) for name, targets in mapping.copies.items() if targets}
    totals = {name: size * len(mapping.sources(name)) for name, size in sizes.items()}
    needed = torch.float32 if writer.has_masters else writer.dtype
    wire = needed if mapping.grid else min(expansion.header.dtype, needed, key=lambda dtype: dtype.itemsize)
    for names in _buckets(totals):
        bucket = torch.empty(sum(totals[name] for name in names), dtype=wire, device=device)
        sources = {source: sizes[name] for name in names for source in mapping.sources(name)}
        parts = dict(zip(sources, bucket.split(list(sources.values())), strict=True))
        if dist.get_rank() == 0:
            # Opened anew for each bucket: the pages of an open file stay in memory.
            with safe_open(expansion.path, framework="pt") as file:
                for name, part in parts.items():
                    part.copy_(mapping.adapt(name, file.get_tensor(name)).reshape(-1))
        dist.broadcast(bucket, src=0)
        num_bytes += bucket.numel() * bucket.element_size()
        for name in names:
            _write_targets(writer, mapping, name, [_slices_of(parts[source]) for source in mapping.sources(name)])
    return num_bytes


def _slices_of(flat: Tensor) -> Fetch:
    return lambda start, stop: flat[start:stop]


class _SliceReader:
    """Read flat ranges of one tensor: only the rows in question.

    Copies of a tensor ask for the same range, which is read once.
    """

    def __init__(self, expansion: Expansion, name: str) -> None:
        self.num_bytes = 0
        self._path, self._name, self._mapping = expansion.path, name, expansion.mapping
        self._row = torch.Size(expansion.header.shapes[name][1:]).numel()
        self._read = lru_cache(maxsize=2)(self._read_rows)

    def fetch(self, start: int, stop: int) -> Tensor:
        if start == stop:  # a rank whose shard is all padding
            return torch.empty(0)
        if self._name == "pos_embed" and self._mapping.grid is not None:  # resampled from all of it
            return self._read(0, None)[start:stop]
        first = start // self._row
        rows = self._read(first, -(-stop // self._row))
        return rows[start - first * self._row : stop - first * self._row]

    def _read_rows(self, first: int, last: int | None) -> Tensor:
        with safe_open(self._path, framework="pt") as file:
            rows = file.get_slice(self._name)[first:last]
        if last is None:
            rows = self._mapping.adapt(self._name, rows)
        self.num_bytes += rows.numel() * rows.element_size()
        return rows.reshape(-1)


def _buckets(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Group neighbours, as many as fit into the size of the largest tensor."""
    capacity = max(sizes.values())
    bucket: list[str] = []
    for name, size in sizes.items():
        if bucket and sum(sizes[n] for n in bucket) + size > capacity:
            yield bucket
            bucket = []
        bucket.append(name)
    yield bucket
