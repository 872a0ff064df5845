"""Define auxiliary models and descendants as one class: timm's ViT whose blocks run a given number of times.

``blocks[i]`` is the layer of stage i and runs ``schedule[i]`` times in a row. An auxiliary model has few blocks, some
of which run more than once. A descendant has one block for each layer, and a schedule of ones. State-dict keys, the
handling of the head, the resampling of the position embedding and ``create_model`` are timm's, so a descendant's
weights are those of a plain timm ViT.

Method: Xia et al., "Exploring Learngene via Stage-wise Weight Sharing for Initializing Variable-sized Models",
IJCAI 2024 (arXiv 2404.16897), section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import timm
from timm.layers import LayerNorm, calculate_drop_path_rates, drop_path
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import Block, checkpoint_filter_fn
from torch import Tensor, nn
from torch.nn import functional as F

from sws_dist.config.schema import DEFAULT_CROP_PCT, IMAGENET_MEAN, IMAGENET_STD, MAX_LAYERS
from sws_dist.models.kernel_backend import fused_stage_forward
from sws_dist.models.unrolled_features import UnrolledFeatures

PAPER_SCHEDULE = (3, 3, 4, 3, 3)
"""The paper's auxiliary model: 16 layers in 5 stages."""
GEOMETRY_ARGUMENTS = {
    *("img_size", "patch_size", "in_chans", "num_classes", "global_pool", "embed_dim", "num_heads", "mlp_ratio"),
    "qkv_bias",
}
"""Arguments of timm's VisionTransformer that change what the model computes; ``geometry`` records them."""
TRAINING_ARGUMENTS = {
    *("weight_init", "drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate"),
}
"""Arguments of timm's VisionTransformer that matter in training alone."""


class Layer(Block):
    """Run one transformer block whose drop-path rate is an argument of each pass, and not timm's ``drop_path``."""

    def __init__(self, *args: Any, drop_path: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, drop_path=0.0, **kwargs)

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        drop_rate: float = 0.0,
        branch_scale: float = 1.0,
    ) -> Tensor:
        """Run the layer, with both branches multiplied by ``branch_scale``: x [batch, tokens, width] -> the same."""
        branch = self.ls1(self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal))
        x = x + drop_path(_scaled(branch, branch_scale), drop_rate, self.training)
        branch = self.ls2(self.mlp(self.norm2(x)))
        return x + drop_path(_scaled(branch, branch_scale), drop_rate, self.training)


def _scaled(branch: Tensor, scale: float) -> Tensor:
    return branch if scale == 1 else branch * scale


class Stage(Layer):
    """Run one transformer block several times in a row, with one set of weights, or not at all.

    ``drop_rates`` holds the drop-path rate of each *position*: its length is the number of repeats, which share the
    weights but have their own rates. The loop is inside one module so that ZeRO-3 gathers the weights once for each
    stage (as a leaf module), whatever the number of repeats.
    """

    def __init__(self, *args: Any, drop_path: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.drop_rates: tuple[float, ...] = (drop_path,)
        self.branch_scale = 1.0
        """What every branch is multiplied by at the present number of repeats."""
        self.scales_branches = drop_path > 0
        """True if branches are scaled at some depth, or dropped at some position, of the model: a CUDA graph then
        always has factors."""
        self.kernels: Literal["reference", "triton"] = "reference"
        self.providers: Any = None
        """The ``sws_kernels.Providers`` of the operators that the kernels run; None: all are Triton's."""
        self.recompute = False
        """True if the kernels recompute activations in backward (their own activation checkpointing)."""
        self.graphed: Any = None
        """A ``sws_kernels.GraphedStage`` if training launches the kernels as CUDA graphs."""

    @property
    def recomputes_itself(self) -> bool:
        """True if the stage has its own activation checkpointing (``recompute``), which then replaces timm's."""
        return self.kernels == "triton"

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:  # type: ignore[override]
        """Run the stage: x [batch, tokens, width] -> the same shape.

        Raises:
            ValueError: a mask, with the Triton kernels.
        """
        return self._run(x, self.drop_rates, attn_mask, is_causal)

    def run_layer(self, layer: int, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Run one of the stage's repeats, counted from 0."""
        return self._run(x, self.drop_rates[layer : layer + 1], attn_mask, is_causal)

    def _run(self, x: Tensor, drop_rates: tuple[float, ...], attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        if self.kernels == "triton" and drop_rates:
            if attn_mask is not None or is_causal:
                raise ValueError(
                    "model.kernels: the Triton kernels attend to all tokens; set it to reference for a mask"
                )
            return fused_stage_forward(self, x, drop_rates)
        for rate in drop_rates:
            x = super().forward(x, attn_mask, is_causal, rate, self.branch_scale)
        return x


class PatchProjection(nn.Conv2d):
    """Compute the convolution of a patch embedding, whose stride is its kernel, as one product of flattened patches.

    cuDNN's convolution and its gradient took 2.5 ms of a ViT-S step on an H200; the product takes 0.3 ms.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Compute [B, C, H, W] -> [B, D, H / patch, W / patch], a view of [B, H / patch, W / patch, D]."""
        height, width = self.kernel_size
        patches = input.unflatten(3, (-1, width)).unflatten(2, (-1, height)).permute(0, 2, 4, 1, 3, 5).flatten(3)
        return F.linear(patches, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class SWSVisionTransformer(UnrolledFeatures):
    """Add a stage schedule to timm's VisionTransformer.

    Images [batch, channels, height, width] become logits [batch, classes].

    Args:
        schedule: repeats of each distinct block. Default: ``depth`` blocks that run once each.
        depth: number of distinct blocks. Default: the length of ``schedule``, or 12.
        drop_path_rate: stochastic depth at the last of the ``sum(schedule)`` positions, growing linearly from 0 at the
            first.
        branch_scaling: exponent p. A stage that runs k times instead of the schedule's r multiplies its branches by
            (r / k)**p. With 1 its layers together change the tokens about as much at every depth; 0 scales nothing.
        norm_eps: epsilon of every LayerNorm.
        class_token: True for ViT's own class token and token pooling. Otherwise the tokens are normed, then averaged.
        kwargs: ``GEOMETRY_ARGUMENTS`` and ``TRAINING_ARGUMENTS`` of timm's VisionTransformer. Any other argument would
            make a model that its own weight files do not describe.

    Raises:
        ValueError: a schedule that is empty, has a number below 1, or contradicts ``depth``; an argument that is not
            listed; images that are no whole number of patches.
    """

    stage_class: ClassVar[type[nn.Module]] = Stage
    timm_name: ClassVar[str] = "sws_vit"
    """The name under which timm builds a model of any geometry; weight files say it."""
    kernel_obstacle: ClassVar[str | None] = None
    """Why the Triton kernels cannot run models of this class, or None."""

    def __init__(
        self,
        schedule: Sequence[int] | None = None,
        depth: int | None = None,
        drop_path_rate: float = 0.0,
        branch_scaling: float = 0.0,
        norm_eps: float = 1e-6,
        class_token: bool = False,
        **kwargs: Any,
    ) -> None:
        if depth is not None and not 1 <= depth <= MAX_LAYERS:
            raise ValueError(f"depth {depth}: expected from 1 to {MAX_LAYERS} layers")
        schedule = tuple(schedule) if schedule is not None else (1,) * (12 if depth is None else depth)
        if not schedule or min(schedule) < 1:
            raise ValueError(f"schedule {list(schedule)}: expected one number of 1 or more for each stage")
        if depth is not None and depth != len(schedule):
            raise ValueError(
                f"depth {depth} contradicts schedule {list(schedule)}: its {len(schedule)} stages are the distinct "
                "layers; leave depth out, or give a schedule of that many numbers"
            )
        unknown = sorted(set(kwargs) - GEOMETRY_ARGUMENTS - TRAINING_ARGUMENTS)
        if unknown:
            raise ValueError(
                f"argument(s) {', '.join(unknown)} are not for our models; known: schedule, depth, branch_scaling, "
                f"class_token, norm_eps, {', '.join(sorted(GEOMETRY_ARGUMENTS | TRAINING_ARGUMENTS))}"
            )
        kwargs = {"global_pool": "token" if class_token else "avg", "fc_norm": False} | kwargs
        norm_layer = partial(LayerNorm, eps=norm_eps)
        blocks: dict[str, Any] = {"depth": len(schedule), "block_fn": self.stage_class}
        super().__init__(class_token=class_token, norm_layer=norm_layer, **blocks, **kwargs)
        size, patch = self.patch_embed.img_size, self.patch_embed.patch_size
        if any(side % length for side, length in zip(size, patch, strict=True)):
            raise ValueError(
                f"images of {size[0]} x {size[1]} pixels are no whole number of patches of {patch[0]} x {patch[1]}: "
                "the last rows and columns would be left out without a word; choose another image size or patch_size"
            )
        self.schedule = schedule
        self.norm_eps = norm_eps
        self.branch_scaling = branch_scaling
        self.drop_path_rate = drop_path_rate
        self.set_repeats(schedule)

    def set_repeats(self, repeats: Sequence[int]) -> None:
        """Let stage i run ``repeats[i]`` times from now on, 0 to leave it out; ``schedule`` remains the model's own.

        Drop-path grows along the positions of this depth.

        Raises:
            ValueError: not one number of 0 or more for each stage, or no layer at all.
        """
        if len(repeats) != len(self.blocks) or min(repeats) < 0 or not any(repeats):
            raise ValueError(
                f"repeats {list(repeats)}: expected {len(self.blocks)} numbers, one a stage; 0 leaves a stage out, but "
                "one has to run"
            )
        rates = iter(calculate_drop_path_rates(self.drop_path_rate, sum(repeats)))
        for stage, own, count in zip(self.blocks, self.schedule, repeats, strict=True):
            stage.drop_rates = tuple(next(rates) for _ in range(count))
            stage.branch_scale = branch_scale(self.branch_scaling, own, count)
            stage.scales_branches = self.drop_path_rate > 0 or self.branch_scaling != 0
        self.describe_features()

    @property
    def is_shared(self) -> bool:
        """True if some stage runs more than once, as in an auxiliary model."""
        return max(self.schedule) > 1

    def use_kernels(self, kernels: Literal["reference", "triton"], providers: Any = None) -> None:
        """Choose the code that runs the stages and the patch embedding. Call it before ``set_grad_checkpointing``.

        ``kernel_backend.select_kernels`` checks first that the kernels can run.

        Args:
            providers: with ``triton``, the ``sws_kernels.Providers`` of the operators; None: all are Triton's.
        """
        for stage in self.blocks:
            stage.kernels, stage.providers = kernels, providers
        # The module keeps its parameters, its hooks and its name; only its forward changes.
        self.patch_embed.proj.__class__ = PatchProjection if kernels == "triton" else nn.Conv2d

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in backward: of each stage as timm does, or as the stages do it themselves."""
        own = self.blocks[0].recomputes_itself
        for stage in self.blocks:
            stage.recompute = enable and own
        super().set_grad_checkpointing(enable and not own)


def branch_scale(exponent: float, own: int, repeats: int) -> float:
    """Return what the branches of a stage are multiplied by that runs ``repeats`` times, 0 or more, instead of ``own``.

    With an exponent of 1 the repeats are steps of Euler's method, which become shorter where they become more: Chen et
    al. 2018, "Neural Ordinary Differential Equations", arXiv 1806.07366.
    """
    return (own / repeats) ** exponent if repeats else 1.0


def create_model(name: str, **kwargs: Any) -> Any:
    """Build a model as ``timm.create_model`` does, with random weights: nothing is fetched from a hub.

    Args:
        name: any timm model, or one of ours: ``sws_aux_{tiny,small,base}_patch16_224`` (stages that share weights),
            ``sws_des_{tiny,small,base}_patch16_224`` (descendants), ``sws_vit`` (any geometry).
        kwargs: arguments of its constructor, such as ``num_classes``, ``schedule``, ``depth``, ``drop_path_rate``.

    Returns:
        A float32 model on the CPU; ours map images [batch, 3, height, width] to logits [batch, num_classes].

    Raises:
        ValueError: naming the model or the argument that timm does not know.

    Examples:
        >>> import sws_dist, torch
        >>> model = sws_dist.create_model("sws_aux_tiny_patch16_224", schedule=(1, 2, 1), num_classes=10)
        >>> len(model.blocks), model(torch.zeros(2, 3, 224, 224)).shape
        (3, torch.Size([2, 10]))
    """
    timm_config(name)  # an unknown name is an error
    try:
        return timm.create_model(name, pretrained=False, **kwargs)
    except Exception as error:  # constructors raise a dozen types at an argument that they cannot use
        raise ValueError(f"model {name}: {str(error) or type(error).__name__} ({kwargs})") from None


def timm_config(name: str) -> Any:
    """Return what timm knows of a model (its ``PretrainedCfg``): input size, normalisation, names of its classifiers.

    Raises:
        ValueError: naming the model that timm does not know, and near ones.
    """
    if not timm.is_model(name):
        near = timm.list_models(f"*{name[:8]}*")[:5]
        raise ValueError(f"timm has no model {name!r}" + (f"; near: {', '.join(near)}" if near else ""))
    try:
        return timm.get_pretrained_cfg(name)
    except RuntimeError as error:  # an unknown tag after the name's dot
        raise ValueError(f"model {name}: {error}") from None


def build_variant(
    variant: str, pretrained: bool, model_class: type[SWSVisionTransformer] = SWSVisionTransformer, **kwargs: Any
) -> SWSVisionTransformer:
    """Build a model that is registered with timm under the name ``variant``."""
    return build_model_with_cfg(
        model_class,
        variant,
        pretrained,
        pretrained_filter_fn=partial(checkpoint_filter_fn, interpolation="bicubic", antialias=True),
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **kwargs,
    )


def default_cfg(**kwargs: Any) -> dict[str, Any]:
    """Return what timm has to know of a model (its ``default_cfg``)."""
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": DEFAULT_CROP_PCT,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    } | kwargs


# Name -> geometry. Heads are 64 wide.
SIZES = {
    "tiny": {"embed_dim": 192, "num_heads": 3},
    "small": {"embed_dim": 384, "num_heads": 6},
    "base": {"embed_dim": 768, "num_heads": 12},
}

default_cfgs = generate_default_cfgs(
    {"sws_vit": default_cfg()}
    | {f"sws_{kind}_{size}_patch16_224.untrained": default_cfg() for kind in ("aux", "des") for size in SIZES}
)


@register_model
def sws_vit(pretrained: bool = False, **kwargs: Any) -> SWSVisionTransformer:
    """Build a model of any geometry from the arguments of ``SWSVisionTransformer``."""
    return build_variant("sws_vit", pretrained, **kwargs)


def _register(name: str, **defaults: Any) -> None:
    """Register one name of a family with timm, as ``@register_model`` does for a function."""

    def entrypoint(pretrained: bool = False, **kwargs: Any) -> SWSVisionTransformer:
        return build_variant(name, pretrained, **(defaults | kwargs))

    entrypoint.__name__ = entrypoint.__qualname__ = name
    globals()[name] = register_model(entrypoint)


for _size, _geometry in SIZES.items():
    _register(f"sws_aux_{_size}_patch16_224", schedule=PAPER_SCHEDULE, **_geometry)
    _register(f"sws_des_{_size}_patch16_224", **_geometry)
