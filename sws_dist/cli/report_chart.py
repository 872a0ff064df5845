"""Draw the picture of a report: accuracy against depth, and what the family costs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import mean

LOOKS = {  # kind of a row -> colour, marker, line
    "untuned": ("#1b6ca8", "o", "-"),
    "untaught": ("#3fa7a0", "o", "-"),
    "fixed": ("#888888", "o", "--"),
    "fixed, scaled": ("#888888", "x", "-"),
    "tleg": ("#6a9f58", "o", ":"),
    "tleg, scaled": ("#6a9f58", "x", "-"),
    "unshared": ("#a87cb8", "o", ":"),
    "unshared, scaled": ("#a87cb8", "x", "-"),
    "tuned": ("#7fb2d9", "^", "none"),
    "scratch": ("#d9b38c", "v", "none"),
    "scratch_full": ("#e08e2b", "s", "none"),
    "scratch_taught": ("#c2571a", "D", "none"),
}


SPAN = 12.0
"""Points of accuracy that the picture shows below the best one, since small differences are what it is for."""


@dataclass(frozen=True)
class Row:
    """One row of the report's table.

    Args:
        kind: a key of ``LOOKS``; a row of any other kind is not drawn.
        values: depth -> top-1 in percent, one value a seed.
    """

    kind: str
    name: str
    values: dict[int, list[float]]


def draw(rows: list[Row], bill: dict[str, float], teacher: float, path: Path) -> None:
    """Draw both panels.

    Args:
        bill: name -> PFLOP of the whole family.
        teacher: its top-1 in percent.
        path: a ``.png`` file; its folder is made.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), width_ratios=(3, 2), layout="constrained")
    for row in rows:
        if row.kind not in LOOKS:
            continue
        colour, marker, line = LOOKS[row.kind]
        values = {depth: seeds for depth, seeds in row.values.items() if seeds}
        means = [mean(seeds) for seeds in values.values()]
        left.plot(list(values), means, linestyle=line, marker=marker, color=colour, label=row.name)
        for depth, seeds in values.items():
            left.plot([depth] * len(seeds), seeds, ".", color=colour, alpha=0.5, markersize=4)
    left.axhline(teacher, color="black", linewidth=0.8, linestyle=":", label="teacher")
    drawn = [value for row in rows if row.kind in LOOKS for seeds in row.values.values() for value in seeds]
    bottom = max(drawn) - SPAN
    cut = min(drawn) < bottom
    if cut:
        left.set_ylim(bottom=bottom)
    left.set(
        xlabel="layers of the descendant", ylabel=f"validation top-1 (%){', points below are cut off' if cut else ''}"
    )
    left.set_xticks(sorted({depth for row in rows for depth in row.values}))
    left.grid(alpha=0.3)
    figure.legend(fontsize=7, ncols=3, loc="outside lower left")

    colours = ["#1b6ca8" if name.startswith("learngene") else "#e08e2b" for name in bill]
    right.barh(list(bill), list(bill.values()), color=colours)
    for position, cost in enumerate(bill.values()):
        right.text(cost, position, f" {cost:.3g}", va="center", fontsize=8)
    right.invert_yaxis()
    right.margins(x=0.18)
    right.set(xlabel="PFLOP for the family of all these depths")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
