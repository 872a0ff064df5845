"""Count the bytes that a training step moves between ranks, by arithmetic, and how long a network takes for them.

A collective's bytes are those of the whole tensor that it spreads or combines, once, as ``distributed/traffic.py``
counts them. What a rank sends over the wire follows from the ring that NCCL runs: an all-gather or a reduce-scatter
passes on all parts but one, an all-reduce does both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from sws_dist.plan.devices import Device
from sws_dist.plan.sharding import ModelSize, Sharding

PASSES = {"all_gather": 1, "reduce_scatter": 1, "all_reduce": 2}
"""How often each part of a tensor goes once around the ring."""

# Seconds of a hop over NVLink and between nodes, and of a call, from NCCL's own model of its time: hwLat and baseLat of
# the protocol Simple in src/graph/tuning.cc of NCCL 2.2x.
RING_HOP_S, TREE_HOP_S, CALL_S = (3.4e-6, 14e-6), (4.0e-6, 14e-6), 8.4e-6


@dataclass(frozen=True)
class Collective:
    """All collectives of one kind and purpose in one optimizer step."""

    kind: str
    purpose: str
    num_bytes: int
    """Of the whole tensors."""
    calls: int

    def wire_bytes(self, ranks: int) -> int:
        """Return the bytes that one rank sends."""
        return round(PASSES[self.kind] * self.num_bytes * (ranks - 1) / ranks)


def step_collectives(size: ModelSize, sharding: Sharding) -> list[Collective]:
    """List what one optimizer step exchanges; a step's status and norms, some hundred bytes, are left out."""
    if sharding.ranks == 1:
        return []
    stage, micros = sharding.zero_stage, sharding.accumulation
    reductions = micros if stage >= 2 else 1  # from stage 2 on no rank keeps a whole gradient between micro-batches
    buckets = math.ceil(size.parameters / sharding.bucket)
    found = [
        Collective(
            "reduce_scatter" if stage == 3 else "all_reduce",  # what DeepSpeed 0.19 runs at stages 1 and 2 too
            "gradients",
            reductions * size.parameters * sharding.reduced_element,
            reductions * buckets,
        )
    ]
    if stage in (1, 2):
        found.append(Collective("all_gather", "updated weights", size.parameters * sharding.element, 2))
    elif stage == 3 and sharding.keeps_all:
        found.append(Collective("all_gather", "weights", size.parameters * sharding.element, buckets))
    elif stage == 3:
        # All once for the forward pass, and for the backward pass all stages but the two that are kept.
        again = max(0, size.stages - 2)
        gathered = micros * (size.parameters + again * size.stage) * sharding.element
        found.append(Collective("all_gather", "weights", gathered, micros * (size.stages + 2 + again)))
    return found


@dataclass(frozen=True)
class Network:
    """Ranks on nodes, and the links between them: the figures of ``Device``, or the user's."""

    nodes: int
    ranks_a_node: int
    link_bytes: float
    network_bytes: float

    @classmethod
    def of(cls, device: Device, nodes: int, ranks_a_node: int) -> Network:
        return cls(nodes, ranks_a_node, device.link_bytes, device.network_bytes)

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_a_node

    def seconds(self, collective: Collective) -> float:
        """Return how long a collective takes alone, at the links' published rates.

        NCCL's rings leave a node through all its adapters, so the nodes are as fast as these together, if NVLink is.
        """
        if self.ranks == 1:
            return 0.0
        rates = [self.link_bytes] if self.ranks_a_node > 1 else []
        if self.nodes > 1:
            rates.append(self.network_bytes * self.ranks_a_node)
        return collective.wire_bytes(self.ranks) / min(rates) + collective.calls * self._latency(collective.kind)

    def _latency(self, kind: str) -> float:
        """Return what a call takes without any data: the hops of a ring, or of a tree where that has fewer."""
        link, network = RING_HOP_S
        ring = PASSES[kind] * ((self.ranks - self.nodes) * link + (self.nodes - 1) * network)
        if kind != "all_reduce":
            return CALL_S + ring
        link, network = TREE_HOP_S
        tree = 2 * ((self.ranks_a_node - 1) * link + math.ceil(math.log2(self.nodes)) * network)
        return CALL_S + min(ring, tree)
