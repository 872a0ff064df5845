"""Draw the picture of a report: accuracy against depth, and what the family costs."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

LOOKS = {  # the start of a row's name -> colour, marker, line
    "untuned, auxiliary": ("#888888", "o", "--"),
    "untuned": ("#1b6ca8", "o", "-"),
    "fine-tuned": ("#7fb2d9", "^", ""),
    "random weights, full budget, with": ("#c2571a", "D", ""),
    "random weights, full": ("#e08e2b", "s", ""),
    "random weights, as": ("#d9b38c", "v", ""),
}


def draw(rows: dict[str, dict[int, list[float]]], bill: dict[str, float], path: Path) -> None:
    """Draw both panels.

    Args:
        rows: name -> depth -> top-1 in percent, one value a seed; single points for what was trained at one depth.
        bill: name -> PFLOP of the whole family.
        path: a ``.png`` file; its folder is made.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2), width_ratios=(3, 2), layout="constrained")
    for name, values in rows.items():
        colour, marker, line = next(look for start, look in LOOKS.items() if name.startswith(start))
        depths = list(values)
        faint = name.endswith(", 1 epoch")  # only the end of fine-tuning is drawn
        if faint:
            continue
        left.plot(
            depths, [mean(values[d]) for d in depths], linestyle=line or "none", marker=marker, color=colour, label=name
        )
        for depth in depths:
            left.plot([depth] * len(values[depth]), values[depth], ".", color=colour, alpha=0.5, markersize=4)
    left.set(xlabel="layers of the descendant", ylabel="validation top-1 (%)")
    left.set_xticks(sorted({depth for values in rows.values() for depth in values}))
    left.grid(alpha=0.3)
    left.legend(fontsize=7)

    names = list(bill)
    colours = ["#1b6ca8" if name.startswith("learngene") else "#e08e2b" for name in names]
    right.barh(names, list(bill.values()), color=colours)
    for position, cost in enumerate(bill.values()):
        right.text(cost, position, f" {cost:.3g}", va="center", fontsize=8)
    right.invert_yaxis()
    right.margins(x=0.15)
    right.set(xlabel="PFLOP for the family of all these depths")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
