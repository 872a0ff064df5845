"""Write a report of families of runs and their picture: accuracy against depth, and the bill.

examples:
  sws report --runs runs/quickstart                               # report.md and report.png in that folder
  sws report --runs runs/study/seed0 runs/study/seed1 runs/study/seed2 --out runs/study/report.md
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from sws_dist.atomic import atomic_write_text
from sws_dist.cli.common import make_parser, parse_args, print_result
from sws_dist.cli.report_chart import Row, draw
from sws_dist.cli.report_runs import KINDS, OTHER_MODELS, FamilyMetrics, Metrics, read_family, top1, untuned

FULL_BUDGET = ("scratch_full", "scratch_taught")
"""The kinds of random weights that are trained as long as the auxiliary model."""


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--runs", type=Path, nargs="+", required=True, help="folders of families, one a seed")
    parser.add_argument("--out", type=Path, help="the report (default: report.md in the first of --runs)")
    parser.add_argument("--title", default="A family of vision transformers from one learngene")
    args = parse_args(parser, one_process=True)
    families = [read_family(folder, args.runs[0]) for folder in args.runs]
    for folder, family in zip(args.runs, families, strict=True):
        if family.runs != families[0].runs:
            raise ValueError(f"--runs {folder}: has not the same runs as {args.runs[0]}, so no mean can be taken")
    out = args.out or args.runs[0] / "report.md"
    picture = out.with_suffix(".png")
    teacher = mean(top1(family.teacher) for family in families)
    draw(rows_of(families), {bill.name: bill.total for bill in bills(families)}, teacher, picture)
    text = write_report(args.title, families, picture.name)
    atomic_write_text(out, text)
    print_result(text)


def rows_of(families: list[FamilyMetrics]) -> list[Row]:
    """Return the rows of the report's table."""
    first = families[0]
    rows = []
    expanded = {"untuned": ("untuned", [f.auxiliary for f in families])}
    expanded |= {kind: (OTHER_MODELS[kind][1], [f.others[kind] for f in families]) for kind in first.others}
    for kind, (name, runs) in expanded.items():
        scores = {depth: [untuned(run, depth) for run in runs] for depth in first.scored}
        rows.append(Row(kind, name, {d: [v for v in values if v is not None] for d, values in scores.items()}))
        if kind in first.scaled:
            rows.append(Row(f"{kind}, scaled", f"{name}, branches scaled", _scaled(kind, families)))
    for kind in KINDS:
        found = {d: [f.depths[d][kind] for f in families] for d, runs in first.depths.items() if kind in runs}
        epochs = _epochs(kind, next(iter(found.values()))[0]) if found else []
        for epoch in epochs:
            values = {depth: [top1(run, epoch) for run in runs] for depth, runs in found.items()}
            rows.append(Row(kind if epoch == epochs[-1] else f"{kind}, early", _name(kind, epoch), values))
    return [row for row in rows if any(row.values.values())]


def _scaled(kind: str, families: list[FamilyMetrics]) -> dict[int, list[float]]:
    """Return top-1 by depth with scaled branches; at the model's own depth nothing is scaled."""
    own = families[0].others[kind]["depth"]
    found = {depth: [100 * family.scaled[kind][depth] for family in families] for depth in families[0].scaled[kind]}
    found[own] = [top1(family.others[kind]) for family in families]
    return dict(sorted(found.items()))


def _epochs(kind: str, run: Metrics) -> list[int]:
    """Return the epochs to report: the last, and of fine-tuning the first too, if it was scored."""
    first = {1} & {point["epoch"] for point in run["history"]} if kind == "tuned" else set()
    return sorted({*first, run["epochs"]})


def _epochs_of(kind: str, family: FamilyMetrics) -> int:
    return next(runs[kind]["epochs"] for runs in family.depths.values() if kind in runs)


def _name(kind: str, epochs: int) -> str:
    return f"{KINDS[kind]}, {epochs} epoch" + ("s" if epochs != 1 else "")


def spread(values: list[float]) -> str:
    """Return the mean, and the smallest and largest value where they differ."""
    text = f"{mean(values):.1f}"
    return text if max(values) - min(values) < 0.05 else f"{text} ({min(values):.1f}-{max(values):.1f})"


@dataclass(frozen=True)
class Bill:
    """What one way to get the family of all scored depths costs, in PFLOP: the mean over the seeds.

    Args:
        kind: ``untuned``, ``untaught``, or one of ``KINDS``.
        training: of the family's own runs.
        teacher: of the teacher that taught them; 0 without one.
    """

    kind: str
    name: str
    training: float
    teacher: float

    @property
    def total(self) -> float:
        return self.training + self.teacher


def bills(families: list[FamilyMetrics]) -> list[Bill]:
    """Return what each way to get the family costs, the learngene's first."""
    first = families[0]
    teacher = mean(family.teacher["flops"] for family in families)
    learngene = mean(family.auxiliary["flops"] for family in families)
    found = [("untuned", "learngene, untuned", learngene, teacher)]
    if "untaught" in first.others:
        cost = mean(family.others["untaught"]["flops"] for family in families)
        found.append(("untaught", "learngene without the teacher, untuned", cost, 0.0))
    for kind in first.kinds:
        cost = mean(sum(family.flops(kind, depth) for depth in family.scored) for family in families)
        if kind == "tuned":
            found.append((kind, "learngene, each fine-tuned", learngene + cost, teacher))
        elif kind in FULL_BUDGET:
            taught = teacher if kind == "scratch_taught" else 0.0
            found.append((kind, _name(kind, _epochs_of(kind, first)), cost, taught))
    return [Bill(kind, name, training / 1e15, taught / 1e15) for kind, name, training, taught in found]


def write_report(title: str, families: list[FamilyMetrics], picture: str) -> str:
    """Return the report, in Markdown; ``picture`` is the name of its picture's file."""
    first = families[0]
    auxiliary, images = first.auxiliary, first.auxiliary["validation_images"]
    seeds = ", ".join(str(family.auxiliary["seed"]) for family in families)
    several = len(families) > 1
    lines = [
        f"# {title}",
        "",
        f"Written by `sws report` from seed{'s' if several else ''} {seeds}"
        + ("; mean (smallest-largest)." if several else ".")
        + f" Validation top-1 in percent over {images:,} images: one image is {100 / images:.2f} points.",
        "",
        f"- Teacher: {first.teacher['model']}, {spread([top1(f.teacher) for f in families])} %.",
        f"- Auxiliary model: {auxiliary['parameters'] / 1e6:.2f} M parameters, {auxiliary['depth']} layers of its own, "
        f"{auxiliary['epochs']} epochs. It becomes every descendant below.",
        "",
        f"![accuracy against depth, and the family's cost]({picture})",
        "",
        "| top-1 at depth | " + " | ".join(map(str, first.scored)) + " |",
        "|---|" + "--:|" * len(first.scored),
    ]
    for row in rows_of(families):
        cells = (spread(row.values[depth]) if row.values.get(depth) else "" for depth in first.scored)
        lines.append(f"| {row.name} | {' | '.join(cells)} |")
    lines += ["", *_comparison(families), "## What the family costs", "", *_costs(families), ""]
    lines += ["## Where it was measured", "", *_origin(families), ""]
    lines += [
        "Each run's folder holds its resolved configs, `log.jsonl`, weights and TensorBoard events; "
        "`tensorboard --logdir` on the folder of them all shows every curve.",
        "",
    ]
    return "\n".join(lines)


def _comparison(families: list[FamilyMetrics]) -> list[str]:
    """Compare untuned descendants with models of random weights that had the full budget, where both are known."""
    parts = []
    for kind in (kind for kind in FULL_BUDGET if kind in families[0].kinds):
        pairs = [
            (value, top1(runs[kind]))
            for family in families
            for depth, runs in family.depths.items()
            if kind in runs and (value := untuned(family.auxiliary, depth)) is not None
        ]
        if pairs:
            ours, theirs = (mean(column) for column in zip(*pairs, strict=True))
            name = _name(kind, _epochs_of(kind, families[0]))
            parts.append(f"{name}: {ours:.1f} % against {theirs:.1f} % ({ours - theirs:+.1f} points)")
    if not parts:
        return []
    return ["Untuned descendants, at the depths where both are known, against " + "; against ".join(parts) + ".", ""]


def _costs(families: list[FamilyMetrics]) -> list[str]:
    """Return the table of the bill, and that of the single runs."""
    lines = [
        *_bills_table(families[0].scored, bills(families)),
        *_storage(families[0]),
        "| run | epochs | images | PFLOP | rank-seconds |",
        "|---|--:|--:|--:|--:|",
    ]
    for name, found in _named_runs(families).items():
        flops, seconds = mean(r["flops"] for r in found), min(r["rank_seconds"] for r in found)
        run = found[0]
        lines.append(f"| {name} | {run['epochs']} | {run['images']:,} | {flops / 1e15:.3g} | {seconds:.0f} |")
    return [
        *lines,
        "",
        "Rank-seconds: a run's wall time, evaluation and saving included, times its ranks; of the quickest seed, since "
        "what else a machine does only ever adds to them.",
    ]


def _bills_table(depths: list[int], found: list[Bill]) -> list[str]:
    """Return the table of what the family costs each way, beside random weights; nothing where there are none."""
    rivals = [bill for bill in found if bill.kind in FULL_BUDGET]
    if not rivals:
        return []
    scratch, learngene = rivals[0].total, found[0].training
    parts = (f"{bill.name} {bill.training / learngene:.1f} x as much" for bill in rivals)
    return [
        f"All {len(depths)} depths. Each layer adds the same number of operations, so depths that were not trained are "
        "counted from those that were.",
        "",
        "| family | PFLOP | random weights take |",
        "|---|--:|--:|",
        *(f"| {bill.name} | {bill.total:.3g} | {scratch / bill.total:.1f} x as much |" for bill in found),
        "",
        f"Where the teacher is there already, the untuned learngene costs {learngene:.3g} PFLOP; {', '.join(parts)}.",
        "",
    ]


def _named_runs(families: list[FamilyMetrics]) -> dict[str, list[Metrics]]:
    """Return the runs of all families by their names in the report, one a family."""
    first = families[0]
    runs = {"teacher": [f.teacher for f in families], "auxiliary model": [f.auxiliary for f in families]}
    runs |= {OTHER_MODELS[kind][0]: [f.others[kind] for f in families] for kind in first.others}
    for depth, kinds in first.depths.items():
        for kind, run in kinds.items():
            runs[f"depth {depth}: {_name(kind, run['epochs'])}"] = [f.depths[depth][kind] for f in families]
    return runs


def _storage(family: FamilyMetrics) -> list[str]:
    """Compare what is stored: the learngene, or a file for each descendant."""
    shared, all_depths = family.auxiliary["parameters"], family.stored()
    if all_depths is None:
        return []
    return [
        f"The learngene has {shared / 1e6:.2f} M parameters, descendants of these depths {all_depths / 1e6:.2f} M: "
        f"{all_depths / shared:.1f} times as many.",
        "",
    ]


def _origin(families: list[FamilyMetrics]) -> list[str]:
    """Say where the runs took place, and with which versions: a line for each that differs."""
    places: dict[str, dict[str, list[str]]] = {}
    for name, found in _named_runs(families).items():
        for run in found:
            versions = dict(run["versions"])
            ours = f"sws-dist {versions.pop('sws-dist', '(unknown)')}"
            source = f"commit {run['commit']}" if run["commit"] else ours
            with_versions = ", ".join(f"{package} {version}" for package, version in versions.items())
            place = f"{source}; {run['hardware']} a rank; {with_versions}."
            places.setdefault(place, {}).setdefault(name, []).append(str(run["seed"]))
    if len(places) == 1:
        return [f"All runs: {place}" for place in places]
    most = max(places, key=lambda place: len(places[place]))
    lines = []
    for place, names in places.items():
        if place != most:
            told = (f"{name} (seed {', '.join(dict.fromkeys(seeds))})" for name, seeds in names.items())
            lines.append(f"- {'; '.join(told)}: {place}")
    return [*lines, f"- All others: {most}"]
