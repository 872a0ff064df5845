"""Predict the kernels' times and a training step's on an H100 and an H200, and compare them with what is known.

    python -m benchmarks.kernels.model        no GPU is needed; writes benchmarks/results/model.md

`kernel_work.py` has the model and its assumptions. Its predictions are compared with what was measured (kernels.json)
and with what others published (`public_figures.py`). No prediction is a measurement.
"""

import json
import math
from collections.abc import Iterator

from benchmarks.kernels import public_figures
from benchmarks.kernels.__main__ import SIZES
from benchmarks.kernels.kernel_work import BF16, PEAK_BANDWIDTH, RESULTS, Kernels, Work, total
from benchmarks.kernels.measure import Machine, Size
from benchmarks.kernels.operator_case import BACKWARD, BOTH, FORWARD, label

Key = tuple[str, str, str, str]  # operator, case, provider and pass, as in kernels.json


def predictions(size: Size) -> Iterator[tuple[Key, list[Work]]]:
    """Yield what is predicted of the benchmark's rows."""
    kernels, machine = Kernels(size), Machine()
    stream, rows, width, hidden = label(machine, *size.stream), kernels.rows, size.width, kernels.hidden
    mlp = kernels.mlp()
    attention = label(machine, size.batch, size.tokens, size.heads, size.head_dim)
    operators = {
        ("add_layer_norm", stream): {FORWARD: kernels.norm_forward(), BACKWARD: kernels.norm_backward(1)},
        ("packed_attention", attention): {
            FORWARD: kernels.attention_forward(), BACKWARD: kernels.attention_backward()
        },
        ("linear_gelu", label(machine, rows, width, hidden)): {FORWARD: kernels.gelu_forward()},
        ("linear_gelu_backward", label(machine, rows, width, hidden)): {FORWARD: kernels.gelu_backward()},
        ("mlp", stream): {FORWARD: mlp[FORWARD], BACKWARD: mlp[BACKWARD] + kernels.column_sum(width)},
        ("stage", f"{stream}, 1 repeat"): kernels.stage(1),
        ("stage", f"{stream}, 3 repeats"): kernels.stage(3),
    }  # fmt: skip
    for (operator, case), passes in operators.items():
        for name, works in passes.items():
            yield (operator, case, "triton", name), works
    for name, inner, out in (
        *(("qkv", width, 3 * width), ("proj", width, width)),
        *(("fc1", width, hidden), ("fc2", hidden, width)),
    ):
        key = ("linear", f"{name} {label(machine, rows, inner, out)}", "cuBLAS")
        gradients = kernels.linear(out, inner) + kernels.weight_gradient(inner, out, BF16) + kernels.column_sum(out)
        yield (*key, FORWARD), kernels.linear(inner, out)
        yield (*key, BACKWARD), gradients
    yield ("training_step", f"{size.name}, batch {size.batch}", "triton, step graphed", "step"), kernels.step()


def public_comparisons() -> Iterator[tuple[str, float, str, float, str]]:
    """Yield (what, predicted rate, who, published rate, source) of an H100: TFLOP/s, or GB/s for norms.

    Attention is predicted for our kernel, so it says what rank the model gives it; products and norms are predicted for
    whoever computes them.
    """
    for figure in public_figures.ATTENTION:
        batch, side = public_figures.ATTENTION_TOKENS // figure.tokens, math.isqrt(figure.tokens)
        kernels = Kernels(Size("", public_figures.ATTENTION_WIDTH, batch=batch, image=side, patch=1))
        passes = {FORWARD: kernels.attention_forward(), BACKWARD: kernels.attention_backward()}
        passes[BOTH] = passes[FORWARD] + passes[BACKWARD]
        flops = {FORWARD: 4, BACKWARD: 10, BOTH: 14}[figure.passes] * kernels.rows * figure.tokens * kernels.size.width
        rate = flops / total(passes[figure.passes], "H100") / 1e12
        what = f"attention {figure.passes}, {batch} x {figure.tokens} x 32 x 64"
        yield what, rate, figure.provider, figure.tflop_per_s, figure.source
    for product in public_figures.PRODUCTS:
        kernels = Kernels(Size("", product.inner, batch=product.rows, image=1, patch=1))
        flops = 2 * product.rows * product.inner * product.out
        rate = flops / total(kernels.linear(product.inner, product.out), "H100") / 1e12
        what = f"product {product.rows} x {product.inner} x {product.out}"
        yield what, rate, product.provider, product.tflop_per_s, product.source
    for norm in public_figures.NORMS:
        size = norm.rows * norm.width * BF16
        rate = 2 * size / Work(size, size).seconds("H100") / 1e9
        yield f"norm forward, {norm.rows} x {norm.width}", rate, norm.provider, norm.gb_per_s, norm.source


def page() -> str:
    """Return the comparison with kernels.json, and the steps that are predicted."""
    measured = json.loads((RESULTS / "kernels.json").read_text())
    gpu = next((name for name in PEAK_BANDWIDTH if name in measured["hardware"]), None)
    if gpu is None:
        raise ValueError(
            f"kernels.json was measured on {measured['hardware']}; the model knows {', '.join(PEAK_BANDWIDTH)}"
        )
    times = {
        tuple(row[k] for k in ("operator", "case", "provider", "pass")): row.get("ms")
        for row in measured["rows"]
        if "pass" in row
    }
    lines, errors = [], []
    for key, works in (pair for size in SIZES.values() for pair in predictions(size)):
        if times.get(key):
            predicted = 1e3 * total(works, gpu)
            errors.append(predicted / times[key] - 1)
            lines.append(f"| {' | '.join(key)} | {predicted:.3f} | {times[key]:.3f} | {errors[-1]:+.0%} |")
    mean = sum(map(abs, errors)) / len(errors)
    steps = []
    for size in SIZES.values():
        kernels = Kernels(size)
        for who, works in (("kernels", kernels.step()), ("compiled timm, at best", kernels.compiled_timm_step())):
            cells = (f"{1e3 * total(works, name):.1f}" for name in PEAK_BANDWIDTH)
            steps.append(f"| {size.name}, {who} | {' | '.join(cells)} |")
    public = [
        f"| {what} | {rate:.0f} | {who} | {published:.0f} | {rate / published - 1:+.0%} | {source} |"
        for what, rate, who, published, source in public_comparisons()
    ]
    return "\n".join(
        [
            "# The performance model against measurement", "",
            "Written by `python -m benchmarks.kernels.model`; the assumptions are the docstring and the constants of "
            "`benchmarks/kernels/kernel_work.py`.",
            f"Measured: kernels.json, {measured['hardware']}. Predicted times are no measurements.", "",
            f"The {len(errors)} predictions are off by {mean:.0%} on average, "
            f"from {min(errors):+.0%} to {max(errors):+.0%}.", "",
            "| operator | case | provider | pass | predicted ms | measured ms | off |", "|---" * 7 + "|", *lines, "",
            "A training step of 256 images as one CUDA graph, predicted, in ms:", "",
            f"| ViT | {' | '.join(PEAK_BANDWIDTH)} |", "|---" * (1 + len(PEAK_BANDWIDTH)) + "|", *steps, "",
            "# The performance model against what others published of an H100", "",
            "TFLOP/s; GB/s for norms. Neither column is a measurement of ours. Attention is predicted for our kernel, "
            "products and norms for whoever computes them.", "",
            "| what | predicted | by | published | off | source |", "|---" * 6 + "|", *public, "",
            *(f"- {name}: {place}" for name, place in public_figures.SOURCES.items()), "",
        ]
    )  # fmt: skip


def main() -> None:
    path = RESULTS / "model.md"
    path.write_text(page())
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
