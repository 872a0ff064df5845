"""Estimate how long a step takes: its arithmetic at an assumed share of the device's rate, and its collectives.

    arithmetic = operations / (ranks x published rate x utilisation)
    network    = the sum over all collectives, one after another, at the links' published rates
    step       = between max(arithmetic, network), where all is overlapped, and their sum, where nothing is

Not in it: the input (``decoding_cores`` says what that needs), evaluation, saving, stragglers, and that small
micro-batches leave a device idle between kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sws_dist.plan.devices import DECODING_CPU_S
from sws_dist.plan.traffic import Collective, Network


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step."""

    arithmetic: float
    network: float

    @property
    def shortest(self) -> float:
        """The step's seconds if all traffic is overlapped with arithmetic."""
        return max(self.arithmetic, self.network)

    @property
    def longest(self) -> float:
        """The step's seconds if no traffic is."""
        return self.arithmetic + self.network


def step_time(step_flops: float, collectives: Sequence[Collective], network: Network, rate: float) -> StepTime:
    """Estimate one step.

    Args:
        step_flops: operations of the step, over all ranks.
        rate: operations a second that one device is assumed to reach.
    """
    return StepTime(step_flops / (network.ranks * rate), sum(network.seconds(each) for each in collectives))


def decoding_cores(images_per_s: float) -> float:
    """Return how many CPU cores decode and augment ``images_per_s``, if DALI runs on the CPU."""
    return images_per_s * DECODING_CPU_S
