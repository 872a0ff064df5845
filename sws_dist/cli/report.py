"""Write a report and its curves from the quickstart's runs, as they came out.

examples:
  sws report --runs runs/quickstart                               # report.md and report.png in that folder
  sws report --runs runs/quickstart runs/quickstart-1 runs/quickstart-2 --out docs/results.md
"""

from __future__ import annotations

import logging
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from sws_dist.atomic import atomic_write_text
from sws_dist.cli.common import make_parser, parse_args, print_result
from sws_dist.text import read_json

Metrics = dict[str, Any]
KINDS = ("tuned", "scratch", "scratch_full")

log = logging.getLogger(__name__)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--runs", type=Path, nargs="+", required=True, help="quickstart folders, one a seed")
    parser.add_argument("--out", type=Path, help="the report (default: report.md in the first of --runs)")
    args = parse_args(parser, one_process=True)
    seeds = [read_metrics(folder) for folder in args.runs]
    out = args.out or args.runs[0] / "report.md"
    picture = out.with_suffix(".png")
    draw_curves(seeds, picture)
    text = write_report(seeds, picture.name)
    atomic_write_text(out, text)
    print_result(text)


def read_metrics(folder: Path) -> dict[str, Any]:
    """Return one seed's metrics: ``teacher``, ``auxiliary``, and ``depths``: depth -> kind -> metrics."""

    def metrics(run: Path) -> Metrics:
        path = run / "metrics.json"
        if not path.is_file():
            raise ValueError(f"{path}: not there; this run has not finished")
        found = read_json(path)
        if not isinstance(found, dict) or "history" not in found:
            raise ValueError(f"{path}: not what a finished run wrote")
        return found

    folders = [place for place in folder.glob("depth*") if place.name.removeprefix("depth").isdecimal()]
    found = sorted(folders, key=lambda place: int(place.name.removeprefix("depth")))
    if not found:
        raise ValueError(f"{folder}: holds no depth*/ folders; run sws quickstart first")
    depths = {int(p.name.removeprefix("depth")): {kind: metrics(p / kind) for kind in KINDS} for p in found}
    return {"teacher": metrics(folder / "teacher"), "auxiliary": metrics(folder / "auxiliary"), "depths": depths}


def top1(run: Metrics, epoch: int) -> float:
    """Return validation top-1 in percent after that epoch."""
    return next(100 * point["val/top1"] for point in run["history"] if point["epoch"] == epoch)


def spread(values: list[float], unit: str = "") -> str:
    """Return the mean, and the smallest and largest value where they differ."""
    text = f"{mean(values):.1f}{unit}"
    return text if max(values) - min(values) < 0.05 else f"{text} ({min(values):.1f}-{max(values):.1f})"


def write_report(seeds: list[dict[str, Any]], picture: str) -> str:
    """Return the report, in Markdown; ``picture`` is the file of its curves."""
    first = seeds[0]
    some = next(iter(first["depths"].values()))
    short, full = some["tuned"]["epochs"], some["scratch_full"]["epochs"]
    teacher, auxiliary = first["teacher"], first["auxiliary"]
    numbers = ", ".join(str(seed["auxiliary"]["seed"]) for seed in seeds)
    lines = [
        "# Quickstart: a family of vision transformers from one learngene",
        "",
        f"Written by `sws report` from seed{'s' if len(seeds) > 1 else ''} {numbers}"
        + ("; mean (smallest-largest)." if len(seeds) > 1 else ".")
        + f" Validation top-1 in percent over {auxiliary['validation_images']} images of handwritten digits: one image "
        f"is {100 / auxiliary['validation_images']:.1f} points.",
        "",
        f"- Teacher: {teacher['model']}, {spread([100 * s['teacher']['top1'] for s in seeds])} %.",
        f"- Auxiliary model: {auxiliary['depth']} layers of {auxiliary['parameters'] / 1e6:.2f} M shared parameters, "
        f"{auxiliary['epochs']} epochs, {spread([100 * s['auxiliary']['top1'] for s in seeds])} %.",
        "",
        f"| depth | parameters | expanded, untrained | after 1 epoch | after {short} epochs "
        f"| scratch, 1 epoch | scratch, {short} epochs | scratch, {full} epochs |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for depth in first["depths"]:
        runs = {kind: [s["depths"][depth][kind] for s in seeds] for kind in KINDS}
        cells = [
            str(depth),
            f"{runs['tuned'][0]['parameters'] / 1e6:.2f} M",
            *(spread([top1(r, epoch) for r in runs["tuned"]]) for epoch in (0, 1, short)),
            *(spread([top1(r, epoch) for r in runs["scratch"]]) for epoch in (1, short)),
            spread([top1(r, full) for r in runs["scratch_full"]]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", _comparison(seeds, short, full), "", f"![curves]({picture})", ""]
    lines += ["## What the family cost", "", *_costs(seeds), ""]
    lines += ["## Where it was measured", "", *_origin(auxiliary), ""]
    lines += [
        "Each run's folder, beside this report where the quickstart wrote it, holds its resolved configs, `log.jsonl`, "
        "weights and TensorBoard events; `tensorboard --logdir` on the folder of them all shows every curve.",
        "",
    ]
    return "\n".join(lines)


def _comparison(seeds: list[dict[str, Any]], short: int, full: int) -> str:
    """Compare the runs with the paper's two claims."""
    runs = [kinds for seed in seeds for kinds in seed["depths"].values()]
    tuned, scratch = (mean(top1(r[kind], 1) for r in runs) for kind in ("tuned", "scratch"))
    ends = [(top1(r["tuned"], short), top1(r["scratch_full"], full)) for r in runs]
    as_good = sum(ours >= theirs for ours, theirs in ends)
    ours, theirs = (mean(column) for column in zip(*ends, strict=True))
    return (
        f"After 1 epoch an expanded descendant has {tuned:.1f} % on average, the same model from scratch "
        f"{scratch:.1f} %. After {short} epochs it has {ours:.1f} %; from scratch, {full} epochs lead to "
        f"{theirs:.1f} %. {as_good} of {len(ends)} descendants are at least as good as their twin at its full budget."
    )


def _origin(run: Metrics) -> list[str]:
    """Say where a run took place, and with which versions."""
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items() if name != "sws-dist")
    source = f"Commit {run['commit']}" if run["commit"] else f"sws-dist {run['versions'].get('sws-dist', '(unknown)')}"
    return [f"{source}; {run['hardware']} a rank; {versions}."]


def _costs(seeds: list[dict[str, Any]]) -> list[str]:
    """Compare the whole family by learngene and from scratch: seconds, floating-point operations, parameters."""

    def spent(key: str, once: tuple[str, ...], each: str) -> list[float]:
        """Sum a metric, for each seed, over the runs that are made once and one run of that kind for each depth."""
        return [sum(s[run][key] for run in once) + sum(runs[each][key] for runs in s["depths"].values()) for s in seeds]

    class Row(NamedTuple):
        family: str
        seconds: float
        flops: float
        stored: float

    def row(family: str, once: tuple[str, ...], each: str) -> Row:
        stored = seeds[0]["auxiliary"]["parameters"] if once else spent("parameters", (), each)[0]
        # The quickest seed's seconds: what else the machine does only ever adds to them.
        return Row(family, min(spent("rank_seconds", once, each)), mean(spent("flops", once, each)), stored)

    scratch = row("from scratch, full budget", (), "scratch_full")
    rows = [
        row("by learngene", ("auxiliary",), "tuned"),
        row("by learngene, teacher included", ("teacher", "auxiliary"), "tuned"),
        scratch,
    ]
    return [
        "| family | rank-seconds | PFLOP | parameters stored | scratch costs x FLOPs | scratch stores x parameters |",
        "|---|--:|--:|--:|--:|--:|",
        *(
            f"| {r.family} | {r.seconds:.0f} | {r.flops / 1e15:.3f} | {r.stored / 1e6:.2f} M "
            f"| {scratch.flops / r.flops:.1f} | {scratch.stored / r.stored:.1f} |"
            for r in rows
        ),
        "",
        "Rank-seconds: a run's wall time, evaluation and saving included, times its ranks"
        + ("; of the quickest seed." if len(seeds) > 1 else "."),
    ]


def draw_curves(seeds: list[dict[str, Any]], path: Path) -> None:
    """Draw validation top-1 over epochs, expanded against scratch: a panel for each depth, a line for each seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    looks = {
        "tuned": ("tab:blue", "expanded from the learngene"),
        "scratch": ("tab:orange", "from scratch, same recipe"),
        "scratch_full": ("tab:gray", "from scratch, the auxiliary's budget"),
    }
    depths = list(seeds[0]["depths"])
    figure, panels = plt.subplots(1, len(depths), figsize=(3.4 * len(depths), 3.4), sharey=True, layout="constrained")
    for panel, depth in zip(panels, depths, strict=True):
        for kind, (colour, label) in looks.items():
            for number, seed in enumerate(seeds):
                history = seed["depths"][depth][kind]["history"]
                panel.plot(
                    [point["epoch"] for point in history],
                    [100 * point["val/top1"] for point in history],
                    color=colour,
                    marker="o",
                    markersize=3,
                    label=label if number == 0 else None,
                )
        panel.set(title=f"{depth} layers", xlabel="epochs of its own training")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("validation top-1 (%)")
    panels[0].legend(loc="lower right", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
