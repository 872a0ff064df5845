"""Describe what decides a rank's memory and traffic: the model's size, and how DeepSpeed shards it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sws_dist.optim import hidden_matrices
from sws_dist.zero.config import ZERO3_PREFIX, precision_of

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
BUCKET = 500_000_000
"""DeepSpeed's own ``reduce_bucket_size``, in elements."""
REUSE = 1_000_000_000
"""DeepSpeed's own ``max_reuse_distance``: a weight stays if it is used again within this number of elements."""
UNMODELLED = ("zero_hpz_partition_size", "zero_quantized_weights", "zero_quantized_gradients")


@dataclass(frozen=True)
class ModelSize:
    """Number of parameters of a model, of the matrices inside blocks, and of its stages."""

    parameters: int
    matrices: int
    """What Muon updates, which keeps one moment of it instead of two."""
    stages: int
    """Distinct layers, each of which ZeRO-3 gathers as one module; 0 for models that are not ours."""
    stage: int
    """Parameters of one stage."""

    @classmethod
    def of(cls, model: Any) -> ModelSize:
        """Count the parameters of a model of any kind, on any device."""
        sizes = {name: p.numel() for name, p in model.named_parameters()}
        matrices = sum(sizes[name] for name in hidden_matrices(model))
        stages: list[Any] = list(model.blocks) if hasattr(model, "set_repeats") else []
        stage = sum(p.numel() for p in stages[0].parameters()) if stages else 0
        return cls(sum(sizes.values()), matrices, len(stages), stage)


@dataclass(frozen=True)
class Sharding:
    """What a resolved DeepSpeed config says of one rank."""

    zero_stage: int
    ranks: int
    micro_batch: int
    accumulation: int
    precision: str
    element: int
    """Bytes of one of the model's numbers."""
    reduced_element: int
    """Bytes of a number of a gradient on its way between ranks."""
    bucket: int
    """Elements of a buffer in which gradients are reduced."""
    num_buckets: int
    """Buffers that there are: two where reducing overlaps with computing."""
    offloads_optimizer: bool
    offloads_weights: bool
    keeps_all: bool
    """True if ZeRO-3 does not free a weight between its uses in a step, as with DeepSpeed's own settings."""
    unmodelled: tuple[str, ...]
    """Keys of the config that a plan does not know the effect of."""

    @classmethod
    def of(cls, ds: dict[str, Any], ranks: int, is_ours: bool) -> Sharding:
        """Read a resolved DeepSpeed config.

        Args:
            ds: what ``resolve_deepspeed_config`` returned for ``ranks``.
            is_ours: True for a model with stages, for which the trainer completes ZeRO-3's settings
                (``set_zero3_memory_defaults``).
        """
        zero, precision = ds["zero_optimization"], precision_of(ds)
        offloads = [zero.get(key, {}).get("device", "none") != "none" for key in ("offload_optimizer", "offload_param")]
        overlaps = bool(zero.get("overlap_comm", zero["stage"] == 3))
        reuse = zero.get(f"{ZERO3_PREFIX}max_reuse_distance", zero.get("max_reuse_distance", 0 if is_ours else REUSE))
        return cls(
            zero_stage=zero["stage"],
            ranks=ranks,
            micro_batch=ds["train_micro_batch_size_per_gpu"],
            accumulation=ds["gradient_accumulation_steps"],
            precision=precision,
            element=BYTES[precision],
            reduced_element=BYTES[ds.get("communication_data_type", precision)],
            bucket=int(zero.get("reduce_bucket_size", BUCKET)),
            num_buckets=2 if overlaps and zero["stage"] in (1, 2) else 1,
            offloads_optimizer=offloads[0],
            offloads_weights=offloads[1],
            keeps_all=reuse >= REUSE,
            unmodelled=tuple(key for key in UNMODELLED if zero.get(key) not in (None, False, 1)),
        )

    def shard(self, count: int) -> int:
        """Return the part of ``count`` that one of the ranks has."""
        return -(-count // self.ranks)
