"""Time the kernels, and training with them, against eager PyTorch, cuBLASLt, SDPA and torch.compile on one GPU.

    python -m benchmarks.kernels [--only training_step] [--size Ti] [--out results.json] [--chart chart.png]

The cases of an operator are in the module of its name. Each provider is first checked against the reference in fp32.
A provider that is wrong or fails gets no time, but a row that says why. The ceilings, a large copy and a large product,
are measured in the same run. The JSON is written anew after every case.
"""

import argparse
import importlib
import json
import sys
from collections.abc import Iterable
from itertools import product
from pathlib import Path

import torch

from benchmarks.kernels.measure import Case, Machine, Results, Row, Size, measure_ceilings, rows_of

SIZES = {name: Size(name, width) for name, width in {"Ti": 192, "S": 384, "B": 768}.items()}
# The training step, which matters most, comes first.
OPERATORS = (
    *("training_step", "stage", "mlp", "linear_gelu", "linear"),
    *("packed_attention", "add_layer_norm", "distillation_loss"),
)


def cases_of(operator: str, machine: Machine, size: Size) -> Iterable[Case]:
    """Make an operator's cases one at a time, because each may hold memory.

    The module is imported here: some need timm or sws_dist's dependencies, which the others must not ask for.
    """
    return importlib.import_module(f"benchmarks.kernels.{operator}").cases(machine, size)


def run(
    machine: Machine, operators: Iterable[str], sizes: Iterable[Size], out: Path | None, **plain_task: int
) -> Results:
    """Measure every case of these operators at these sizes. Print the rows, and write them to ``out``, as they come.

    plain_task: the sizes of the ceilings' copy and product, if they are not those for a GPU.
    """
    from sws_dist.provenance import collect_provenance

    results = Results(collect_provenance(), machine.compile_mode, measure_ceilings(machine, **plain_task))
    for operator, size in product(operators, sizes):
        for case in cases_of(operator, machine, size):
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
    parser.add_argument("--only", choices=OPERATORS, help="run only this operator's cases")
    parser.add_argument("--size", choices=SIZES, help="run only this size")
    parser.add_argument(
        "--compile-mode", choices=("max-autotune", "reduce-overhead"), default="max-autotune", help="of torch.compile"
    )
    parser.add_argument("--warm-up", action="store_true", help="compile the training steps, and measure nothing")
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    parser.add_argument("--chart", type=Path, help="draw the results here")
    arguments = parser.parse_args()
    operators = [arguments.only] if arguments.only else list(OPERATORS)
    sizes = [SIZES[arguments.size]] if arguments.size else list(SIZES.values())
    if not torch.cuda.is_available():
        what = f"{', '.join(operators)} of {', '.join(size.name for size in sizes)}"
        print(f"benchmarks.kernels: no CUDA device, so these cannot be measured: {what}. Nothing was written")
        sys.exit(0)
    if arguments.warm_up:
        from benchmarks.kernels.training_step import warm_up

        for size in sizes:
            warm_up(Machine(compile_mode=arguments.compile_mode), size)
        return
    results = run(Machine(compile_mode=arguments.compile_mode), operators, sizes, arguments.out)
    if arguments.chart:
        from benchmarks.kernels import chart

        chart.draw(results.to_dict(), arguments.chart)
    failed = [row for row in results.rows if "error" in row and row["provider"].startswith("triton")]
    if failed:
        sys.exit(f"{len(failed)} of our own providers failed or were wrong: see the rows above")


if __name__ == "__main__":
    main()
