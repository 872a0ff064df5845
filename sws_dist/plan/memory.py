"""Add up a rank's memory at the two moments of a step that may be its peak.

What lies where at each ZeRO stage is what DeepSpeed 0.19.8 was seen to allocate (tests/distributed/test_plan.py holds
it against real runs). With N parameters of p bytes each on W ranks (Muon keeps one moment of its matrices, not two):

| stage | weights | optimizer (masters, two moments, average) | gradients kept between micro-batches |
|---|---|---|---|
| 0 | pN | 8N in fp32, else 12N; average 4N | pN |
| 1 | pN | 12N/W; average 4N/W | pN |
| 2 | pN | as stage 1 | pN/W |
| 3 | pN/W | as stage 1 | pN/W, always there |
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from sws_dist.config.schema import RunConfig
from sws_dist.plan.sharding import ModelSize, Sharding
from sws_dist.plan.step_memory import PassMemory

MASTER = 4
"""Bytes of a master weight, of a moment, and of a number of the average: fp32."""
LIVE_STAGES = 3
"""Stages that ZeRO-3 has whole at a time, with the trainer's settings (``set_zero3_memory_defaults``)."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank's device at one moment."""

    weights: int
    teacher: int
    gradients: int
    optimizer: int
    """Masters, moments and moving average."""
    activations: int
    """The batch, and what the backward pass needs of the forward pass."""
    workspace: int
    """Buffers of collectives, weights that are gathered for a while, and operators' results that are soon freed."""

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class RankMemory:
    """One rank's memory."""

    backward: Memory
    """When the backward pass begins: all activations are there."""
    update: Memory
    """When the weights are updated: all gradients are there."""
    host: int
    """Bytes that are offloaded to the host's memory."""
    checkpoint: int
    """Bytes of host memory for the copy that a checkpoint is written from while training goes on."""

    @property
    def peak(self) -> int:
        return max(self.backward.total, self.update.total)


def rank_memory(
    size: ModelSize, sharding: Sharding, one_pass: PassMemory, config: RunConfig, teacher: int
) -> RankMemory:
    """Add up the memory of one rank.

    Args:
        one_pass: of one micro-batch.
        config: says whether there is a moving average, which moments the optimizer has, and how checkpoints are saved.
        teacher: number of the teacher's parameters; 0 where none runs.
    """
    own, matrices = (n if sharding.zero_stage == 0 else sharding.shard(n) for n in (size.parameters, size.matrices))
    weights = sharding.element * (sharding.shard(size.parameters) if sharding.zero_stage == 3 else size.parameters)
    moments = 2 * own - (matrices if config.optim.name == "muon" else 0)
    kept = MASTER * (moments + own * (config.optim.ema_decay is not None))
    has_masters = sharding.zero_stage > 0 or sharding.element != MASTER  # else the parameters themselves
    optimizer = kept + MASTER * own * has_masters
    checkpoint = kept + MASTER * own if config.checkpoint.background else 0
    host = 0
    if sharding.offloads_optimizer:  # with the gradient in fp32, and the new weights on their way back
        host, optimizer = optimizer + own * (MASTER + sharding.element), 0
    if sharding.offloads_weights:
        host, weights = host + weights, 0

    def memory(gradients: int, activations: int, workspace: int) -> Memory:
        return Memory(weights, sharding.element * teacher, gradients, optimizer, activations, workspace)

    gradients = _kept_gradients(size, sharding)
    in_use = _buckets(sharding) + _gathered(size, sharding)
    backward = memory(gradients, one_pass.activations, one_pass.workspace + in_use)
    updates = [memory(gradients, 0, workspace) for gradients, workspace in _update_moments(size, sharding, own)]
    return RankMemory(backward, max(updates, key=lambda moment: moment.total), host, checkpoint)


def _kept_gradients(size: ModelSize, sharding: Sharding) -> int:
    """Return the bytes of gradients that are there when the backward pass of the last micro-batch begins."""
    if sharding.zero_stage == 3:
        return 0 if sharding.offloads_optimizer else sharding.element * sharding.shard(size.parameters)
    if sharding.accumulation == 1:
        return 0
    kept = size.parameters if sharding.zero_stage < 2 else sharding.shard(size.parameters)
    return 0 if sharding.zero_stage == 2 and sharding.offloads_optimizer else sharding.element * kept


def _buckets(sharding: Sharding) -> int:
    """Return the bytes of the buffers in which gradients are reduced. Their size does not depend on the model."""
    return sharding.num_buckets * sharding.bucket * sharding.reduced_element if sharding.zero_stage else 0


def _gathered(size: ModelSize, sharding: Sharding) -> int:
    """Return the bytes of whole weights that ZeRO-3 has at a time, the next stage's among them."""
    if sharding.zero_stage < 3:
        return 0
    rest = size.parameters - size.stages * size.stage
    live = min(size.parameters, LIVE_STAGES * size.stage + rest) + size.stage
    return sharding.element * (size.parameters if sharding.keeps_all else live)


def _update_moments(size: ModelSize, sharding: Sharding, own: int) -> list[tuple[int, int]]:
    """Return (gradients, workspace) when the last gradients are reduced, and when the optimizer takes its step.

    Args:
        own: number of the masters.
    """
    stage, whole, shard = sharding.zero_stage, sharding.element * size.parameters, sharding.element * own
    in_fp32 = own * MASTER * (sharding.element != MASTER)  # the optimizer's own gradient
    if stage == 0:
        return [(whole, whole), (whole, in_fp32)]  # the all-reduce takes a flat copy
    copy = min(sharding.bucket, size.parameters) * sharding.reduced_element  # of what is being reduced
    reducing = _buckets(sharding) + copy
    if stage == 3:
        kept = _kept_gradients(size, sharding)
        reducing += _gathered(size, sharding) + sharding.element * size.stage  # a stage's gradients come together
        stepping = _buckets(sharding) + shard + in_fp32
    else:
        kept = whole if stage == 1 else shard * min(2, sharding.accumulation)
        stepping = shard + in_fp32
    if sharding.offloads_optimizer:
        return [(whole if stage == 1 else 0, reducing)]
    return [(kept, reducing), (kept if stage == 3 else shard, stepping)]
