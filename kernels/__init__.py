"""Provide the Triton operators of SWS-Dist. They need torch and triton only.

Each public function takes ``backend="reference" | "triton"``. The reference is plain PyTorch and runs anywhere. Asking
for Triton where it cannot run is an error; no function falls back.

An operator named ``x`` is defined in ``x.py``: shape legend, launchers (``x_forward``, ``x_backward``), autograd, the
public function and its reference. Its Triton kernels are in ``x_kernels.py``.
"""

from sws_kernels.add_layer_norm import add_layer_norm, add_layer_norm_reference
from sws_kernels.graphed import GraphedStage, GraphPool
from sws_kernels.mlp import mlp, mlp_reference
from sws_kernels.packed_attention import packed_attention, packed_attention_reference
from sws_kernels.providers import Providers, auto_providers, provider_obstacle
from sws_kernels.stage import StageWeights, stage, stage_reference

__all__ = [
    "GraphPool",  # memory and stream that the graphs of one model's stages share
    "GraphedStage",  # `stage` captured as CUDA graphs at its first training call, and replayed
    "Providers",  # who computes each operator of a stage
    "StageWeights",
    "add_layer_norm",  # residual add (with drop-path's per-sample scale) + LayerNorm; returns both streams
    "add_layer_norm_reference",  # the formula in plain PyTorch: the tests compare with it
    "auto_providers",  # the fastest provider of each operator
    "mlp",  # linear, GELU, linear: bias and GELU inside the first product, GELU' inside its gradient's
    "mlp_reference",
    "packed_attention",  # non-causal attention on packed QKV, with its bias and scale; writes packed dQKV
    "packed_attention_reference",
    "provider_obstacle",  # why a provider cannot run somewhere
    "stage",  # repeats of a whole block through one set of weights, as one node of the autograd graph
    "stage_reference",
]
