"""Seed the random generators of this process."""

from __future__ import annotations

import random

import numpy as np
import torch


def seed_everything(*numbers: int) -> None:
    """Seed torch, Python and numpy as a pure function of ``numbers``.

    Called before each micro-batch with its place in the run, it makes drop-path and mixing independent of what ran
    before: a resumed run draws what the uninterrupted one drew, and no generator state needs saving.
    """
    seed = 0
    for number in numbers:  # splitmix64's finaliser: mix the bits so that consecutive inputs give uncorrelated seeds
        seed = (seed + number + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        seed = ((seed ^ (seed >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        seed = ((seed ^ (seed >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        seed ^= seed >> 31
    torch.manual_seed(seed >> 1)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)  # numpy's legacy generator takes 32 bits
