"""Times the kernels against eager PyTorch and torch.compile on one GPU; prints a table and writes JSON.

    python benchmarks/kernels.py [--only add_layer_norm] [--out results.json]

One registry, CASES: an operator, its inputs, its providers, the work it must do. Each provider is first
checked against the fp32 reference: a wrong one gets no time. GB/s and TFLOP/s count what the operator must move
or multiply, whatever a provider does; the ceilings, a large copy and a large matrix product on the device, are
measured in the same run.
"""

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import product
from pathlib import Path

import torch
import torch._functorch.config
import triton
from timm.models.vision_transformer import Block
from torch.nn.attention import SDPBackend, sdpa_kernel

from sws_kernels import (
    StageWeights,
    add_layer_norm,
    add_layer_norm_reference,
    mlp,
    mlp_reference,
    packed_attention,
    packed_attention_reference,
    stage,
)

Function = Callable[..., tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """One operator at one shape. `inputs` makes (leaves, output gradients); the work is per pass.

    num_bytes: for what memory limits; num_flops: for what arithmetic limits. The other is left empty.
    """

    operator: str
    label: str
    inputs: Callable[[], tuple[list[torch.Tensor], list[torch.Tensor]]]
    providers: dict[str, Function]
    reference: Function
    num_bytes: dict[str, int] = field(default_factory=dict)
    num_flops: dict[str, int] = field(default_factory=dict)
    tolerance: float = 0.02  # relative, of the whole tensor: against timing nonsense; the tests hold the real ones


def add_layer_norm_case(batch: int, tokens: int, width: int, dtype: torch.dtype = torch.bfloat16) -> Case:
    def inputs() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        streams = [torch.randn(batch, tokens, width, device="cuda", dtype=dtype) for _ in range(4)]
        gamma, beta = torch.randn(2, width, device="cuda", dtype=dtype).unbind()
        return [x.requires_grad_() for x in (*streams[:2], gamma.clone(), beta.clone())], streams[2:]

    compiled = torch.compile(add_layer_norm_reference, mode="max-autotune-no-cudagraphs", dynamic=False)
    stream = batch * tokens * width * dtype.itemsize
    return Case(
        operator="add_layer_norm",
        label=f"{batch} x {tokens} x {width} {str(dtype).removeprefix('torch.')}",
        inputs=inputs,
        providers={
            "triton": lambda *x: add_layer_norm(*x, backend="triton"),
            "eager": add_layer_norm_reference,
            "compile": compiled,
        },
        reference=add_layer_norm_reference,
        num_bytes={"forward": 4 * stream, "backward": 4 * stream, "both": 8 * stream},
    )


def packed_attention_case(batch: int, tokens: int, heads: int, dtype: torch.dtype = torch.bfloat16) -> Case:
    """Without a bias, as a linear layer leaves it: that is what SDPA can be compared with."""
    head_dim = 64

    def inputs() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        qkv = torch.randn(batch, tokens, 3, heads, head_dim, device="cuda", dtype=dtype)
        d_out = torch.randn(batch, tokens, heads * head_dim, device="cuda", dtype=dtype)
        return [qkv.requires_grad_()], [d_out]

    def sdpa(backend: SDPBackend) -> Function:
        def function(qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
            with sdpa_kernel(backend):  # an error where this GPU or torch has no such backend
                return (packed_attention_reference(qkv),)

        return function

    compiled = torch.compile(packed_attention_reference, mode="max-autotune-no-cudagraphs", dynamic=False)
    part = batch * tokens * heads * head_dim * dtype.itemsize  # one of q, k, v, out
    return Case(
        operator="packed_attention",
        label=f"{batch} x {tokens} x {heads} x {head_dim} {str(dtype).removeprefix('torch.')}",
        inputs=inputs,
        providers={
            "triton": lambda qkv: (packed_attention(qkv, backend="triton"),),
            "SDPA flash": sdpa(SDPBackend.FLASH_ATTENTION),
            "SDPA cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION),
            "SDPA math": sdpa(SDPBackend.MATH),
            "compile": lambda qkv: (compiled(qkv),),
        },
        reference=lambda qkv: (packed_attention_reference(qkv),),
        num_bytes={"forward": 4 * part, "backward": 7 * part, "both": 11 * part},
    )


def mlp_case(batch: int, tokens: int, width: int, dtype: torch.dtype = torch.bfloat16) -> Case:
    hidden = 4 * width

    def inputs() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        def normal(*size: int, deviation: float = 1.0) -> torch.Tensor:
            return torch.randn(size, device="cuda", dtype=dtype) * deviation

        x, dy = normal(batch, tokens, width), normal(batch, tokens, width)
        first = normal(hidden, width, deviation=width**-0.5), normal(hidden)
        second = normal(width, hidden, deviation=hidden**-0.5), normal(width)
        return [leaf.requires_grad_() for leaf in (x, *first, *second)], [dy]

    compiled = torch.compile(mlp_reference, mode="max-autotune-no-cudagraphs", dynamic=False)
    forward = 2 * 2 * batch * tokens * width * hidden
    return Case(
        operator="mlp",
        label=f"{batch} x {tokens} x {width} {str(dtype).removeprefix('torch.')}",
        inputs=inputs,
        providers={
            "triton": lambda *x: (mlp(*x, backend="triton"),),
            "eager": lambda *x: (mlp_reference(*x),),
            "compile": lambda *x: (compiled(*x),),
        },
        reference=lambda *x: (mlp_reference(*x),),
        num_flops={"forward": forward, "backward": 2 * forward, "both": 3 * forward},
    )


def stage_case(batch: int, tokens: int, width: int, repeats: int, dtype: torch.dtype = torch.bfloat16) -> Case:
    """A shared stage, or with one repeat a block, against timm's Block run as often on the same weights."""
    heads, hidden = width // 64, 4 * width
    timm_block = Block(width, heads, qkv_bias=True, norm_layer=partial(torch.nn.LayerNorm, eps=1e-6)).cuda()
    names = [name for name, _ in timm_block.named_parameters()]

    def inputs() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        streams = torch.randn(2, batch, tokens, width, device="cuda", dtype=dtype).unbind()
        fresh = Block(width, heads, qkv_bias=True).to("cuda", dtype)
        leaves = [streams[0].clone(), *(parameter.detach() for parameter in fresh.parameters())]
        return [leaf.requires_grad_() for leaf in leaves], [streams[1]]

    def ours(recompute: bool, backend: str = "triton") -> Function:
        def function(x: torch.Tensor, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return (stage(x, StageWeights(*weights), repeats, heads, recompute=recompute, backend=backend),)

        return function

    def timms() -> Function:
        def function(x: torch.Tensor, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
            parameters = dict(zip(names, weights, strict=True))
            for _ in range(repeats):
                x = torch.func.functional_call(timm_block, parameters, (x,))
            return (x,)

        return function

    def compiled(backend: SDPBackend) -> Function:
        function = torch.compile(timms(), mode="max-autotune-no-cudagraphs", dynamic=False)

        def with_backend(*leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
            with sdpa_kernel(backend):
                return function(*leaves)

        return with_backend

    rows = batch * tokens
    forward = repeats * (2 * rows * width * (4 * width + 2 * hidden) + 4 * rows * tokens * width)
    return Case(
        operator="stage" if repeats > 1 else "block",
        label=f"{batch} x {tokens} x {width}, {repeats} repeats {str(dtype).removeprefix('torch.')}",
        inputs=inputs,
        providers={
            "triton": ours(recompute=False),
            "triton, recomputed": ours(recompute=True),
            "eager timm": timms(),
            "compile timm, flash": compiled(SDPBackend.FLASH_ATTENTION),
            "compile timm, cudnn": compiled(SDPBackend.CUDNN_ATTENTION),
        },
        reference=ours(recompute=False, backend="reference"),
        num_flops={"forward": forward, "backward": 2 * forward, "both": 3 * forward},
        tolerance=0.05,  # a chain of bf16 products
    )


# ViT-Ti, S and B at the batch of DESIGN's estimates. Made one at a time: each may hold memory.
WIDTHS = (192, 384, 768)
CASES: dict[str, Callable[[int], Case]] = {
    "add_layer_norm": lambda width: add_layer_norm_case(256, 196, width),
    "packed_attention": lambda width: packed_attention_case(256, 196, width // 64),
    "mlp": lambda width: mlp_case(256, 196, width),
    "block": lambda width: stage_case(256, 196, width, repeats=1),
    "stage": lambda width: stage_case(256, 196, width, repeats=3),
}


@dataclass(frozen=True)
class Ceilings:
    """What this GPU reaches on a plain task, the measure of what the operators reach."""

    copy_gb_per_s: float
    matmul_tflop_per_s: float


def measure(case: Case, provider: str, ceilings: Ceilings) -> list[dict]:
    """A row a pass (forward, backward, both), or one row that says the provider is wrong."""
    function = case.providers[provider]
    leaves, gradients = case.inputs()

    def both(call: Function = function, leaves=leaves, gradients=gradients) -> tuple[torch.Tensor, ...]:
        outputs = call(*leaves)
        return *outputs, *torch.autograd.grad(outputs, leaves, gradients)

    row = {"operator": case.operator, "case": case.label, "provider": provider}
    exact_leaves = [x.detach().float().requires_grad_() for x in leaves]
    exact = both(case.reference, exact_leaves, [x.float() for x in gradients])
    if any((got - want).norm() > case.tolerance * want.norm() for got, want in zip(both(), exact, strict=True)):
        return [row | {"error": f"differs from the fp32 reference by more than {case.tolerance:.0%}; not timed"}]
    del exact, exact_leaves

    outputs = function(*leaves)
    passes = {
        "forward": lambda: function(*leaves),
        "backward": lambda: torch.autograd.grad(outputs, leaves, gradients, retain_graph=True),
        "both": both,
    }
    rows = []
    for name, run in passes.items():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        peak = torch.cuda.max_memory_allocated() - before
        ms = triton.testing.do_bench(run, return_mode="median")
        rows.append(row | {"pass": name, "ms": ms} | _rates(case, name, ms, ceilings) | {"peak_bytes": peak})
    return rows


def _rates(case: Case, name: str, ms: float, ceilings: Ceilings) -> dict[str, float]:
    rates = {}
    if case.num_bytes:
        gb_per_s = case.num_bytes[name] / ms / 1e6
        rates |= {"gb_per_s": gb_per_s, "of_copy": gb_per_s / ceilings.copy_gb_per_s}
    if case.num_flops:
        tflop_per_s = case.num_flops[name] / ms / 1e9
        rates |= {"tflop_per_s": tflop_per_s, "of_matmul": tflop_per_s / ceilings.matmul_tflop_per_s}
    return rates


def matmul_ceiling() -> float:
    """TFLOP/s of a square bf16 product of 8192."""
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    return 2 * 8192**3 / triton.testing.do_bench(lambda: a @ b, return_mode="median") / 1e9


def copy_ceiling() -> float:
    """GB/s, read plus write, of copying 2 GiB on the device."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    ms = triton.testing.do_bench(lambda: target.copy_(source), return_mode="median")
    return 2 * source.numel() / ms / 1e6


def environment() -> dict:
    git = ["git", "-C", str(Path(__file__).parent)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True).stdout.strip()
    return {
        "gpu": torch.cuda.get_device_name(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__}
        | {"triton": triton.__version__, "cuda": torch.version.cuda},
        "commit": commit or None,
        "uncommitted_changes": bool(changed),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=CASES, help="run only this operator's cases")
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/kernels.py: no CUDA device, nothing to measure, nothing written")
        sys.exit(0)
    torch._functorch.config.donated_buffer = False  # or a compiled backward runs only once
    ceilings = Ceilings(copy_ceiling(), matmul_ceiling())
    results = environment() | asdict(ceilings) | {"rows": []}
    for operator, width in product([arguments.only] if arguments.only else CASES, WIDTHS):
        case = CASES[operator](width)
        for provider in case.providers:
            results["rows"] += measure(case, provider, ceilings)
    for row in results["rows"]:
        print("  ".join(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
