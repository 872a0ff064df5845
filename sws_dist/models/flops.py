"""Count the floating-point operations of a forward pass, by torch on the meta device: nothing is computed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

TRAIN_FACTOR = 3  # backward costs two forwards: one for the inputs' gradients, one for the weights'


def forward_flops(build: Callable[[], nn.Module], image_size: int) -> int:
    """Return the FLOPs of the model that ``build`` makes for one square image; a multiply-add is two.

    Args:
        image_size: height and width in pixels.
    """
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        # The counter's hooks fail on expanded parameters (a class token's) that want gradients; nothing here does.
        build().eval().requires_grad_(False)(torch.empty(1, 3, image_size, image_size))
    return counter.get_total_flops()
