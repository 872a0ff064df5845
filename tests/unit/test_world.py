"""Seeds: each rank draws its own numbers, the same ones in each run."""

from __future__ import annotations

import torch

from sws_dist.seed import seed_everything


def test_seeds_are_a_function_of_the_numbers() -> None:
    def draw(*numbers: int) -> float:
        seed_everything(*numbers)
        return torch.rand(1).item()

    assert draw(3, 14) == draw(3, 14)
    assert len({draw(a, b) for a in range(20) for b in range(20)}) == 400
