"""packed_attention's cases for compile_table: every launch that `tiles.packed_attention` can return."""

import importlib
from collections.abc import Iterator
from itertools import product

import torch

from sws_kernels import tiles
from tests.kernels.machine_code import compile_for

module = importlib.import_module("sws_kernels.packed_attention")  # the package's name is the function

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FP32 = {"lse_ptr", "delta_ptr", "partials_ptr", "scale"}


def cases() -> Iterator[dict]:
    """With a bias, the variant that holds more, and without where that changes the tiles.

    196 and 577 tokens in all dtypes, fewer in bf16 only. A token count whose tiles 577 has too is left out.
    """
    seen = set()
    for head_dim, tokens, dtype, arch, bias in product((32, 64, 128), (577, 196, 100, 50), DTYPES, (80, 90), (1, 0)):
        if tokens < 196 and dtype != "bf16":
            continue
        launches = _launches(head_dim, tokens, dtype, arch, bias)
        key = (dtype, arch, repr(launches))
        if key in seen or (not bias and launches == _launches(head_dim, tokens, dtype, arch, True)):
            continue
        seen.add(key)
        for kernel in launches:
            yield {
                "kernel": f"packed_attention_{kernel}", "tokens": tokens, "head_dim": head_dim, "bias": bias,
                "dtype": dtype, "arch": arch,
            }  # fmt: skip


def _launches(head_dim: int, tokens: int, dtype: str, arch: int, bias: bool) -> dict[str, dict]:
    return tiles.packed_attention(tokens, head_dim, DTYPES[dtype], hopper=arch == 90, bias=bool(bias))


def compile_case(case: dict) -> dict:
    name = case["kernel"].removeprefix("packed_attention_")
    launch = _launches(case["head_dim"], case["tokens"], case["dtype"], case["arch"], case["bias"])[name]
    kernel = getattr(module, f"_{name}_kernel")
    absent = [] if case["bias"] else ["bias_ptr", "partials_ptr"]
    absent += ["delta_ptr"] if launch.get("WHOLE") else []
    launch = launch | {argument: None for argument in absent if argument in kernel.arg_names}
    return {**case, **compile_for(case["arch"], kernel, case["dtype"], launch, FP32)}
