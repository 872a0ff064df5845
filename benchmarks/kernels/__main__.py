"""Times the kernels, and training with them, against eager PyTorch, cuBLASLt, SDPA and torch.compile on one GPU.

    python -m benchmarks.kernels [--only training_step] [--size Ti] [--out results.json] [--chart chart.png]

One registry, CASES: an operator, its inputs, its providers, the work it must do. Each provider is first checked against
PyTorch in fp32: a wrong one gets no time, and neither does one that fails; both have a row that says why. The ceilings,
a large copy and a large product, are measured in the same run. The JSON is written anew after every case.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path

import torch

from benchmarks.kernels import cases, chart
from benchmarks.kernels.measure import Case, Machine, Results, Row, Size, measure_ceilings, rows_of
from benchmarks.kernels.steps import step_cases
from sws_dist import provenance

SIZES = {name: Size(name, width) for name, width in {"Ti": 192, "S": 384, "B": 768}.items()}
# Made one at a time: each may hold memory. The training step, which has the last word, comes first.
CASES: dict[str, Callable[[Machine, Size], Iterable[Case]]] = {
    "training_step": step_cases,
    "stage": cases.stage_cases,
    "block": cases.block_cases,
    "mlp": cases.mlp_cases,
    "linear_gelu": cases.linear_gelu_cases,
    "linear_gelu_backward": cases.linear_gelu_backward_cases,
    "linear": cases.linear_cases,
    "packed_attention": cases.packed_attention_cases,
    "add_layer_norm": cases.add_layer_norm_cases,
    "distillation_loss": cases.distillation_loss_cases,
}


def run(
    machine: Machine, operators: Iterable[str], sizes: Iterable[Size], out: Path | None, **plain_task: int
) -> Results:
    """Every case of these operators at these sizes; printed, and written to ``out``, as they come.

    plain_task: how large the copy and the product of the ceilings are, where not as on a GPU.
    """
    results = Results(provenance.collect(), measure_ceilings(machine, **plain_task))
    for operator, size in product(operators, sizes):
        for case in CASES[operator](machine, size):
            rows = rows_of(case, machine, results.ceilings)
            results.rows += rows
            for row in rows:
                print(_line(row), flush=True)
            if out:
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_text(json.dumps(results.to_dict(), indent=2) + "\n")
    return results


def _line(row: Row) -> str:
    return "  ".join(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values())


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=CASES, help="run only this operator's cases")
    parser.add_argument("--size", choices=SIZES, help="run only this size")
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    parser.add_argument("--chart", type=Path, help="draw the results here")
    arguments = parser.parse_args()
    operators = [arguments.only] if arguments.only else list(CASES)
    sizes = [SIZES[arguments.size]] if arguments.size else list(SIZES.values())
    if not torch.cuda.is_available():
        what = f"{', '.join(operators)} of {', '.join(size.name for size in sizes)}"
        print(f"benchmarks.kernels: no CUDA device, so these cannot be measured: {what}. Nothing was written")
        sys.exit(0)
    results = run(Machine(), operators, sizes, arguments.out)
    if arguments.chart:
        chart.draw(results.to_dict(), arguments.chart)
    failed = [row for row in results.rows if "error" in row and row["provider"].startswith("triton")]
    if failed:
        sys.exit(f"{len(failed)} of our own providers failed or were wrong: see the rows above")


if __name__ == "__main__":
    main()
