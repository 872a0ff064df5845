"""Hold what others have published of an H100 SXM (80 GB), for `model.py` to be compared with. None is a measurement of
ours, and each is for the shape and dtype that its source gives.
"""

from typing import NamedTuple

SOURCES = {
    "FA3, figure 5": "arXiv 2407.08608; read from github.com/Dao-AILab/flash-attention, assets/flash3_fp16_fwd.png (a)",
    "FA3, figure 6": "arXiv 2407.08608; read from two transcriptions of the figure that agree",
    "FA2": "arXiv 2307.08691; read from the same repository, assets/flash2_h100_fwd_bwd_benchmark.png (a)",
    "triton#2339": "github.com/triton-lang/triton/issues/2339",
    "QuACK's README": "github.com/Dao-AILab/quack, media/bf16_kernel_benchmarks_single_row.svg, from its points",
    "quack#7": "github.com/Dao-AILab/quack/pull/7",
}


class AttentionFigure(NamedTuple):
    """TFLOP/s of attention without a mask, fp16, 32 heads of 64, 16384 tokens in all (both papers' setting)."""

    tokens: int  # of a sequence
    passes: str
    provider: str
    tflop_per_s: float  # of 4 T^2 operations an element of the width forward, and 2.5 times as many backward
    source: str


class ProductFigure(NamedTuple):
    """TFLOP/s of a product [rows, inner] x [inner, out] in fp16."""

    rows: int
    inner: int
    out: int
    provider: str
    tflop_per_s: float
    source: str


class NormFigure(NamedTuple):
    """GB/s of a norm's forward in bf16: one tensor of [rows, width] read and one written."""

    rows: int
    width: int
    provider: str
    gb_per_s: float
    source: str


ATTENTION_TOKENS, ATTENTION_WIDTH = 16384, 2048
_FORWARD = {  # tokens: rates
    "FlashAttention-2": {1024: 306, 4096: 321, 16384: 324},
    "Triton": {1024: 382, 4096: 400, 16384: 403},
    "cuDNN": {1024: 373, 4096: 408, 16384: 413},
    "FlashAttention-3": {1024: 392, 4096: 476, 16384: 497},
}
_BACKWARD = {
    "FlashAttention-2": {1024: 238, 4096: 279, 16384: 291},
    "cuDNN": {1024: 348, 4096: 417, 16384: 433},
    "FlashAttention-3": {1024: 363, 4096: 453, 16384: 474},
}
_BOTH = {"FlashAttention-2": {1024: 254, 4096: 288, 16384: 296}}
ATTENTION = [
    AttentionFigure(tokens, passes, provider, rate, source)
    for passes, figures, source in (
        *(("forward", _FORWARD, "FA3, figure 5"), ("backward", _BACKWARD, "FA3, figure 6")),
        ("both", _BOTH, "FA2"),
    )
    for provider, rates in figures.items()
    for tokens, rate in rates.items()
]
PRODUCTS = [
    ProductFigure(2048, side, side, "cuBLAS", rate, "triton#2339")
    for side, rate in {512: 102.6, 1024: 243.1, 2048: 515.2, 4096: 613.7, 8192: 721.6}.items()
]
NORMS = [
    *(
        NormFigure(32768, width, "QuACK RMSNorm", rate, "QuACK's README")
        for width, rate in {256: 1913, 512: 2298, 1024: 2581, 2048: 2761, 4096: 2900}.items()
    ),
    NormFigure(32768, 32768, "QuACK LayerNorm", 2988, "quack#7"),
]
