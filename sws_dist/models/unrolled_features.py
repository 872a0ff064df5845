"""Give features by layer: number i is what the i-th layer that runs has computed, as in the unrolled model.

timm counts blocks. A block of ours runs several times, and what it has computed after each time is as much a layer's
output as in a model without sharing: an auxiliary model's feature i is that of the descendant with as many layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.models._features import feature_take_indices
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.utils.checkpoint import checkpoint


class UnrolledFeatures(VisionTransformer):
    """Number the features of a model whose ``blocks`` are stages by the layers that run.

    A stage has ``drop_rates``, one for each repeat, and ``run_layer``. Under ZeRO-3 gather the parameters first:
    single layers run past the hooks of their stage.
    """

    schedule: tuple[int, ...]
    feature_info: list[dict[str, Any]]

    def describe_features(self) -> None:
        """Write ``feature_info``, timm's list of the features that there are, for the present number of repeats."""
        about = self.feature_info[0]
        self.feature_info = [dict(about, module=f"blocks.{stage}") for stage, _ in self._positions()]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        """Compute what timm's ``forward_intermediates`` does for the unrolled model, with the same arguments.

        Args:
            x: images [batch, channels, height, width].
            indices: the layers, from 0, whose outputs are returned; a number n: the last n; None: all.
            return_prefix_tokens: return pairs of a feature and its class token [batch, 1, width].
            norm: apply the final norm to each feature.
            stop_early: run no layer behind the last of ``indices``.
            output_fmt: ``NCHW``: features are [batch, width, rows, columns]; ``NLC``: [batch, tokens, width].
            intermediates_only: return the list of features alone.
            output_dict: return a dictionary with ``image_features`` and ``image_intermediates``.

        Returns:
            The final tokens [batch, tokens, width], and the list of features.
        """
        assert output_fmt in ("NCHW", "NLC"), "Output format must be one of NCHW or NLC."
        positions = self._positions()
        taken, last = feature_take_indices(len(positions), indices)
        grid, num_prefix = self.patch_embed.dynamic_feat_size(x.shape[-2:]), self.num_prefix_tokens
        x = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))
        outputs = []
        for number, (stage, layer) in enumerate(positions[: last + 1] if stop_early else positions):
            run, arguments = self.blocks[stage].run_layer, (layer, x, attn_mask, is_causal)
            x = checkpoint(run, *arguments, use_reentrant=False) if self.grad_checkpointing else run(*arguments)
            if number in taken:
                outputs.append(self.norm(x) if norm else x)
        prefix, features = [y[:, :num_prefix] for y in outputs], [y[:, num_prefix:] for y in outputs]
        if output_fmt == "NCHW":
            features = [y.unflatten(1, grid).permute(0, 3, 1, 2).contiguous() for y in features]
        if output_dict:
            found: dict[str, Any] = {"image_intermediates": features}
            if return_prefix_tokens and num_prefix:
                found["image_intermediates_prefix"] = prefix
            return found if intermediates_only else found | {"image_features": self.norm(x)}
        pairs: Any = list(zip(features, prefix, strict=True)) if return_prefix_tokens and num_prefix else features
        return pairs if intermediates_only else (self.norm(x), pairs)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages behind the last of the layers ``indices``, and the parts that features do not need.

        Returns:
            The layers, counted from the first.
        """
        positions = self._positions()
        taken, last = feature_take_indices(len(positions), indices)
        super().prune_intermediate_layers([positions[last][0]], prune_norm, prune_head)
        self.schedule = self.schedule[: len(self.blocks)]
        return taken

    def _positions(self) -> list[tuple[int, int]]:
        """Return the stage of each layer that runs, and the number of the repeat in it."""
        return [(number, layer) for number, stage in enumerate(self.blocks) for layer in range(len(stage.drop_rates))]
