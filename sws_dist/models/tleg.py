"""Define TLEG's auxiliary model: a ViT whose layers lie on a line between two sets of weights.

With L layers, layer i (from 0) has the weights ``theta_A + i / L theta_B``: those of the attention, of the MLP and of
both LayerNorms, biases too. ``blocks.0.base`` holds theta_A, ``blocks.0.slope`` theta_B. A descendant of another depth
has its own L in the same formula, and is an ordinary ViT from then on.

Method: Xia et al., "Transformer as Linear Expansion of Learngene", AAAI 2024 (arXiv 2312.05614). The count of layers
from 0, the tensors that take part, and their initial values are those of the released code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from timm.models import generate_default_cfgs, register_model, register_notrace_module
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from sws_dist.models.vit import Layer, SWSVisionTransformer, build_variant, default_cfg


def linear_expansion(base: Tensor, slope: Tensor, layer: int, depth: int) -> Tensor:
    """Return a tensor of layer number ``layer`` (from 0) of ``depth``, from those of theta_A and theta_B.

    Product and sum are rounded one by one, so that any slice of the tensors gives the same numbers on every device.
    """
    return base + slope * (layer / depth)


@register_notrace_module
class LinearStage(nn.Module):
    """Run all layers of a TLEG model, as many as there are ``drop_rates``: one drop-path rate for each.

    The loop is inside one module so that ZeRO-3 gathers both sets of weights once a pass (as a leaf module).
    """

    kernels = "reference"
    recomputes_itself = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.base = Layer(*args, **kwargs)
        """theta_A."""
        self.slope = Layer(*args, **kwargs)
        """theta_B. It never runs by itself."""
        for norm in (self.slope.norm1, self.slope.norm2):
            nn.init.zeros_(norm.weight)  # else the norms of the last layers would scale by 2 from the start
        self.drop_rates: tuple[float, ...] = (0.0,)
        self.branch_scale = 1.0
        """What every branch is multiplied by at the present number of layers."""
        self.recompute = False
        """True if backward recomputes the activations of each layer."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Run the layers: x [batch, tokens, width] -> the same shape."""
        for layer in range(len(self.drop_rates)):
            arguments = layer, x, attn_mask, is_causal
            recompute = self.recompute and torch.is_grad_enabled()
            x = checkpoint(self.run_layer, *arguments, use_reentrant=False) if recompute else self.run_layer(*arguments)
        return x

    def run_layer(self, layer: int, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Run one layer, counted from 0.

        Raises:
            ValueError: torch.fx traces the stage, which would record theta_A as the weights of every layer.
        """
        if isinstance(x, torch.fx.Proxy):
            raise ValueError("torch.fx cannot trace TLEG's layers: its tracer has to take LinearStage as a leaf")
        slope, depth = dict(self.slope.named_parameters()), len(self.drop_rates)
        weights = {
            name: linear_expansion(base, slope[name], layer, depth) for name, base in self.base.named_parameters()
        }
        return functional_call(self.base, weights, (x, attn_mask, is_causal, self.drop_rates[layer], self.branch_scale))


class TLEGVisionTransformer(SWSVisionTransformer):
    """Build the layers of a ViT from theta_A and theta_B.

    Seen from outside it is a model of one stage that runs ``depth`` times: ``schedule`` is ``(depth,)``.

    Args:
        depth: number of layers. Default: 12.
        schedule: the same as one number in a list, as weight files have it.
        kwargs: other arguments of ``SWSVisionTransformer``.

    Raises:
        ValueError: a schedule of several stages, or one that contradicts ``depth``.
    """

    stage_class: ClassVar[type[nn.Module]] = LinearStage
    timm_name: ClassVar[str] = "tleg_vit"
    kernel_obstacle: ClassVar[str | None] = "the weights of a TLEG model's layers are sums, which they do not compute"

    def __init__(self, depth: int | None = None, schedule: Sequence[int] | None = None, **kwargs: Any) -> None:
        layers = (12 if depth is None else depth,) if schedule is None else tuple(schedule)
        if len(layers) != 1 or depth not in (None, *layers):
            raise ValueError(
                f"schedule {list(layers)}: a TLEG model has no stages; give depth alone, its number of layers"
            )
        super().__init__(schedule=layers, **kwargs)

    @property
    def is_shared(self) -> bool:
        """True: all layers are made of the same two sets of weights."""
        return True


default_cfgs = generate_default_cfgs({"tleg_vit": default_cfg()})


@register_model
def tleg_vit(pretrained: bool = False, **kwargs: Any) -> SWSVisionTransformer:
    """Build a model of any geometry from the arguments of ``TLEGVisionTransformer``."""
    return build_variant("tleg_vit", pretrained, TLEGVisionTransformer, **kwargs)
