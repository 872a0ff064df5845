"""Call the kernels of other packages, none of which is required: where one is missing, its row of the results says so.

    Liger             liger_kernel     LayerNorm in Triton
    QuACK             quack            LayerNorm, and products with GELU in their epilogue, in CuTe
    cuBLASLt          nvmath           products with GELU, GELU' and the bias gradient in their epilogue

Shapes and names are those of `add_layer_norm` and `linear_gelu`. The results are compared with the same references as
our own; cuBLASLt's GELU is the one by tanh, which is within the tolerance and would change a model's results.
tests/kernels/test_rivals.py checks the calls against the packages where they are installed.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.kernels.operator_case import Function
from sws_kernels.column_sum import column_sum

EPS = 1e-6


def liger_add_layer_norm(residual: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    new_residual = residual + branch
    return new_residual, LigerLayerNormFunction.apply(new_residual, weight, bias, EPS)


def quack_add_layer_norm(residual: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    new_residual = residual + branch
    return new_residual, _QuackLayerNorm.apply(new_residual, weight, bias)


class _QuackLayerNorm(torch.autograd.Function):
    """Make QuACK's LayerNorm differentiable. It takes rows, and fp32 weights."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        from quack.rmsnorm import layernorm_fwd

        rows, weight32 = x.flatten(0, -2), weight.float()
        normed, rstd, mean = layernorm_fwd(rows, weight32, bias.float(), EPS, return_rstd=True, return_mean=True)
        ctx.save_for_backward(rows, weight32, rstd, mean)
        ctx.dtype = weight.dtype
        return normed.view_as(x)

    @staticmethod
    def backward(ctx: Any, d_normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        from quack.rmsnorm import layernorm_bwd

        rows, weight32, rstd, mean = ctx.saved_tensors
        d_rows = d_normed.flatten(0, -2).contiguous()
        d_x, d_weight, d_bias = layernorm_bwd(rows, weight32, d_rows, rstd, mean, has_bias=True)
        return d_x.view_as(d_normed), d_weight.to(ctx.dtype), d_bias.to(ctx.dtype)


def quack_linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    from quack.gemm_interface import gemm_act

    z, h = gemm_act(x, weight.t(), bias=bias, activation="gelu_erf")
    return h, z


def quack_linear_gelu_backward(dy: Tensor, weight: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    from quack.gemm_interface import gemm_dact

    dz, h = gemm_dact(dy, weight, z, activation="gelu_erf")
    return dz, h, column_sum(dz)


def cublaslt_linear_gelu() -> Function:
    """Return linear_gelu's forward by cuBLASLt, computed as its transpose: GELU(W x^T + b), by columns."""
    product = _EpilogueProduct("GELU_AUX_BIAS")

    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        h, others = product(weight, x.t(), bias=bias)
        return h.t(), others["gelu_aux"].t()

    return forward


def cublaslt_linear_gelu_backward() -> Function:
    """Return linear_gelu's backward by cuBLASLt, likewise. Its epilogue leaves no GELU(z); PyTorch computes that."""
    product = _EpilogueProduct("DGELU_BGRAD")

    def backward(dy: Tensor, weight: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dz, others = product(weight.t(), dy.t(), gelu_aux=z.t())
        return dz.t(), F.gelu(z, approximate="tanh"), others["dgelu_bgrad"]

    return backward


class _EpilogueProduct:
    """Hold one of cuBLASLt's products with an epilogue. It is planned and tuned for the shapes of its first call."""

    def __init__(self, epilogue: str) -> None:
        self._epilogue = epilogue
        self._matmul: Any = None

    def __call__(self, a: Tensor, b: Tensor, **inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return a @ b with the epilogue, and the epilogue's other results by name; matrices are column by column."""
        from nvmath.linalg.advanced import Matmul, MatmulEpilog

        if self._matmul is None:
            self._matmul = Matmul(a, b)
            self._matmul.plan(epilog=MatmulEpilog[self._epilogue], epilog_inputs=inputs)
            self._matmul.autotune()
        else:
            self._matmul.reset_operands(a=a, b=b, epilog_inputs=inputs)
        return self._matmul.execute()
