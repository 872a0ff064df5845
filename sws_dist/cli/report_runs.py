"""Read the runs of a family for its report: their metrics, and what follows from them for other depths."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sws_dist.config.loader import load_config
from sws_dist.text import read_json

Metrics = dict[str, Any]
OTHER_MODELS = {
    "untaught": ("auxiliary model without the teacher", "untuned, from an auxiliary model without the teacher"),
    "fixed": ("auxiliary model of one depth", "untuned, from an auxiliary model of one depth"),
    "tleg": ("TLEG's auxiliary model", "untuned, from TLEG's auxiliary model"),
    "unshared": ("model without sharing", "untuned, layers picked from a model without sharing"),
}
"""Kind of a model that is expanded beside the auxiliary model -> its name in the report, and its descendants'."""
KINDS = {
    "tuned": "fine-tuned",
    "scratch": "random weights, fine-tuned the same way",
    "scratch_full": "random weights",
    "scratch_taught": "random weights, with the teacher",
}
"""Kind of a run at a single depth -> its name in the report, which the number of epochs completes."""


@dataclass(frozen=True)
class FamilyMetrics:
    """The metrics of one family's runs, with one seed.

    Args:
        stages: the number of the auxiliary model's distinct layers.
        others: which of ``OTHER_MODELS`` there are.
        scaled: for some of these, depth -> top-1 (a share) of their descendants with scaled branches.
        depths: depth -> kind -> metrics, for the descendants that were trained and their rivals.
    """

    stages: int
    teacher: Metrics
    auxiliary: Metrics
    others: dict[str, Metrics]
    scaled: dict[str, dict[int, float]]
    depths: dict[int, dict[str, Metrics]]

    @property
    def runs(self) -> tuple[object, ...]:
        """Return which runs there are, to be compared with those of other seeds."""
        trained = {depth: sorted(runs) for depth, runs in self.depths.items()}
        return sorted(self.others), sorted(self.scaled), self.scored, trained

    @property
    def scored(self) -> list[int]:
        """Return the depths at which the auxiliary model was evaluated: those of untuned descendants."""
        last, own = self.auxiliary["history"][-1], self.auxiliary["depth"]
        others = (key.removeprefix("val_depth").removesuffix("/top1") for key in last if key.startswith("val_depth"))
        return sorted({own, *(int(depth) for depth in others if depth.isdecimal())})

    @property
    def kinds(self) -> list[str]:
        """Return which of ``KINDS`` were trained at some depth."""
        return [kind for kind in KINDS if any(kind in runs for runs in self.depths.values())]

    def forward_flops(self, depth: int) -> float:
        """Return the operations of one image at any depth: a line through the smallest and the largest known depth."""
        points = {run["depth"]: run["flops_forward"] for runs in self.depths.values() for run in runs.values()}
        points[self.auxiliary["depth"]] = self.auxiliary["flops_forward"]
        (d0, f0), (d1, f1) = min(points.items()), max(points.items())
        return f0 if d0 == d1 else f0 + (f1 - f0) * (depth - d0) / (d1 - d0)

    def stored(self) -> float | None:
        """Return the parameters of descendants of all scored depths together.

        A layer's parameters are found by comparing a descendant with the auxiliary model's distinct layers. None where
        no descendant has more layers than those.
        """
        depth, runs = max(self.depths.items(), default=(self.stages, {}))
        shared = self.auxiliary["parameters"]
        if depth == self.stages:
            return None
        layer = (next(iter(runs.values()))["parameters"] - shared) / (depth - self.stages)
        return sum(shared + layer * (depth - self.stages) for depth in self.scored)

    def flops(self, kind: str, depth: int) -> float:
        """Return the operations of a kind's whole training at any depth, with the images of a run at a known depth."""
        run = next(runs[kind] for runs in self.depths.values() if kind in runs)
        return run["images"] * (3 * self.forward_flops(depth) + run["flops_teacher"])


def read_family(folder: Path, first: Path) -> FamilyMetrics:
    """Read the metrics of one family's runs.

    Args:
        folder: the family's.
        first: the first family's, whose teacher may have taught this one too.

    Raises:
        ValueError: a run that has not finished, a folder without runs, or one without its teacher.
    """

    def metrics(run: Path) -> Metrics:
        path = run / "metrics.json"
        if not path.is_file():
            raise ValueError(f"{path}: not there; this run has not finished")
        found = read_json(path)
        if not isinstance(found, dict) or "history" not in found:
            raise ValueError(f"{path}: not what a finished run wrote")
        if found["flops"] is None:
            raise ValueError(f"{path}: torch could not count the operations of the teacher, and the report needs them")
        return found

    places = [place for place in folder.glob("depth*") if place.name.removeprefix("depth").isdecimal()]
    depths = {}
    for place in sorted(places, key=lambda place: int(place.name.removeprefix("depth"))):
        kinds = [kind for kind in KINDS if (place / kind).is_dir()]
        if kinds:
            depths[int(place.name.removeprefix("depth"))] = {kind: metrics(place / kind) for kind in kinds}
    others = {name: metrics(folder / name) for name in OTHER_MODELS if (folder / name).is_dir()}
    if not others and not depths:
        raise ValueError(
            f"{folder}: holds nothing to compare an auxiliary model with, such as fixed or depth*/scratch_full; run "
            "sws quickstart or sws study first"
        )
    files = {name: folder / name / "scaled.json" for name in others}
    scaled = {
        name: {int(depth): scores["top1"] for depth, scores in read_json(file)["depths"].items()}
        for name, file in files.items()
        if file.is_file()
    }
    config, firsts = (load_config(place / "auxiliary" / "config.yaml") for place in (folder, first))
    stages = config.model.schedule
    if stages is None:
        raise ValueError(f"{folder}/auxiliary/config.yaml: model.schedule is null, so this is no auxiliary model")
    is_firsts = not (folder / "teacher").is_dir() and config.distill.teacher == firsts.distill.teacher
    return FamilyMetrics(
        len(stages),
        metrics((first if is_firsts else folder) / "teacher"),
        metrics(folder / "auxiliary"),
        others,
        scaled,
        depths,
    )


def top1(run: Metrics, epoch: int | None = None) -> float:
    """Return validation top-1 in percent after that epoch, which was evaluated, or after the last."""
    history = run["history"]
    point = history[-1] if epoch is None else next(point for point in history if point["epoch"] == epoch)
    return 100 * point["val/top1"]


def untuned(run: Metrics, depth: int) -> float | None:
    """Return the top-1 of an auxiliary model at a depth, which is that of the expanded descendant."""
    key = "val/top1" if depth == run["depth"] else f"val_depth{depth}/top1"
    found = run["history"][-1].get(key)
    return None if found is None else 100 * found
