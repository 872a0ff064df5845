"""Draw the chart of a results file: what share of the measured ceiling each provider reaches.

python -m benchmarks.kernels.chart results.json chart.png
"""

import json
import sys
from itertools import groupby
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.kernels.measure import Row

COLOURS = {"triton": "#1b6ca8", "compile": "#e08e2b", "cuBLAS": "#7a9e5f", "SDPA": "#9b6fb0"}
OTHER = "#9a9a9a"  # eager


def draw(results: Row, path: Path) -> None:
    """Draw a panel for each operator, with a bar for the last pass (both, or the step) of each case and provider."""
    panels = {name: list(rows) for name, rows in groupby(_bars(results["rows"]), key=lambda row: row["operator"])}
    heights = [len(rows) + 2 for rows in panels.values()]
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(11, 0.22 * sum(heights) + 1), height_ratios=heights, squeeze=False, sharex=True
    )
    for (operator, rows), axis in zip(panels.items(), axes[:, 0], strict=True):
        _panel(axis, operator, rows)
    axes[-1, 0].set_xlabel(
        f"% of what the GPU reaches on a large product ({results['ceilings']['matmul_tflop_per_s']:.0f} TFLOP/s) "
        f"or copy ({results['ceilings']['copy_gb_per_s']:.0f} GB/s)"
    )
    figure.suptitle(results["hardware"])
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _bars(rows: list[Row]) -> list[Row]:
    """Return a row for each case and provider: the last of its passes, or its error."""
    last = {(row["operator"], row["case"], row["provider"]): row for row in rows}
    return list(last.values())


def _panel(axis: Axes, operator: str, rows: list[Row]) -> None:
    shares = [100 * row.get("of_matmul", row.get("of_copy", 0)) for row in rows]
    names = [f"{row['case']}: {row['provider']}" for row in rows]
    colours = [next((c for start, c in COLOURS.items() if row["provider"].startswith(start)), OTHER) for row in rows]
    axis.barh(range(len(rows)), shares, color=colours)
    axis.set_yticks(range(len(rows)), names, fontsize=7)
    axis.invert_yaxis()
    axis.set_title(f"{operator}, {rows[0].get('pass', 'not measured')}", fontsize=9, loc="left")
    for position, (row, share) in enumerate(zip(rows, shares, strict=True)):
        text = f" {row['ms']:.3g} ms" if "ms" in row else f" {row['error'][:60]}"
        axis.text(share, position, text, va="center", fontsize=6)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
