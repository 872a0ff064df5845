"""Times the kernels against eager PyTorch and torch.compile on one GPU; prints a table and writes JSON.

    python benchmarks/kernels.py [--only add_layer_norm] [--out results.json]

One registry, CASES: an operator, its inputs, its providers, the bytes it must move. Each provider is first
checked against the fp32 reference: a wrong one gets no time. GB/s count the bytes that the operator must
move, whatever a provider moves; the ceiling is a large copy on the device, measured in the same run.
"""

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch._functorch.config
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel

from sws_kernels import add_layer_norm, add_layer_norm_reference, packed_attention, packed_attention_reference

Function = Callable[..., tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """One operator at one shape. `inputs` makes (leaves, output gradients); `num_bytes` is per pass."""

    operator: str
    label: str
    inputs: Callable[[], tuple[list[torch.Tensor], list[torch.Tensor]]]
    providers: dict[str, Function]
    reference: Function
    num_bytes: dict[str, int]


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


# ViT-Ti, S and B at the batch of DESIGN's estimates.
CASES: list[Callable[[], Case]] = [
    *(lambda width=width: add_layer_norm_case(256, 196, width) for width in (192, 384, 768)),
    *(lambda heads=heads: packed_attention_case(256, 196, heads) for heads in (3, 6, 12)),
]


def measure(case: Case, provider: str, copy_gb_per_s: float) -> list[dict]:
    """A row a pass (forward, backward, both), or one row that says the provider is wrong."""
    function = case.providers[provider]
    leaves, gradients = case.inputs()

    def both(call: Function = function, leaves=leaves, gradients=gradients) -> tuple[torch.Tensor, ...]:
        outputs = call(*leaves)
        return *outputs, *torch.autograd.grad(outputs, leaves, gradients)

    row = {"operator": case.operator, "case": case.label, "provider": provider}
    exact_leaves = [x.detach().float().requires_grad_() for x in leaves]
    exact = both(case.reference, exact_leaves, [x.float() for x in gradients])
    # Loose, a guard against timing nonsense: the tests hold the tolerances.
    if any((got - want).norm() > 0.02 * want.norm() for got, want in zip(both(), exact, strict=True)):
        return [row | {"error": "differs from the fp32 reference by more than 2 %; not timed"}]
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
        gb_per_s = case.num_bytes[name] / ms / 1e6
        figures = {"ms": ms, "gb_per_s": gb_per_s, "of_copy": gb_per_s / copy_gb_per_s, "peak_bytes": peak}
        rows.append(row | {"pass": name} | figures)
    return rows


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
    parser.add_argument("--only", help="run only this operator's cases")
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/kernels.py: no CUDA device, nothing to measure, nothing written")
        sys.exit(0)
    torch._functorch.config.donated_buffer = False  # or a compiled backward runs only once
    ceiling = copy_ceiling()
    results = environment() | {"copy_gb_per_s": ceiling, "rows": []}
    for case in [make() for make in CASES]:
        if arguments.only not in (None, case.operator):
            continue
        for provider in case.providers:
            results["rows"] += measure(case, provider, ceiling)
    for row in results["rows"]:
        print("  ".join(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
