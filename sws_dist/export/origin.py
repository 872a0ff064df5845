"""Find out where exported weights come from, and what their run has measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sws_dist.config.yaml_text import parse_yaml
from sws_dist.export.source import ExportSource
from sws_dist.learngene.plan import expansion_plan
from sws_dist.text import read_json, read_text

_PAPER = "[Stage-wise Weight Sharing](https://arxiv.org/abs/2404.16897)"


def describe_origin(source: ExportSource) -> dict[str, str]:
    """Return what the weights' file and their run's folder say: a title and a text for each fact that is known."""
    expanded = source.info.provenance
    trained = expanded.get("learngene") or {} if "plan" in expanded else expanded
    config, metrics = _read_run(source.file, trained)
    rows = {"method": _describe_method(expanded)}
    if trained.get("teacher"):
        rows["teacher"] = trained["teacher"]
    if config:
        rows["trained on"] = _name_data(config["data"])
    if "epochs" in trained:
        whose = ", of the auxiliary model" if "plan" in expanded else ""
        rows["training"] = f"{trained['epochs']} epochs, {trained.get('step')} steps, seed {trained.get('seed')}{whose}"
    rows["accuracy"] = _measured_accuracy(source, config, metrics) or "not measured for these weights"
    if trained.get("commit"):
        rows["commit"] = f"`{trained['commit']}` of SWS-Dist"
    if trained.get("versions"):
        rows["versions"] = ", ".join(f"{package} {version}" for package, version in trained["versions"].items())
    if trained.get("hardware"):
        rows["hardware"] = trained["hardware"]
    return rows


def _name_data(data: dict[str, Any]) -> str:
    """Return the name of the data's folder; that of ``root`` may be anybody's where the split is the folder."""
    split = Path(str(data.get("train_split", "train")))
    return Path(str(data["root"])).name if split.stem == "train" else split.name


def _describe_method(provenance: dict[str, Any]) -> str:
    if "plan" in provenance:
        return f"{_PAPER}: {_describe_expansion(provenance)}; not fine-tuned"
    if start := provenance.get("initial_learngene"):
        return f"{_PAPER}: expanded from a learngene ({start}), then fine-tuned"
    start = provenance.get("initial_checkpoint")
    if expansion := provenance.get("expansion"):
        return f"{_PAPER}: {_describe_expansion(expansion)}, then fine-tuned ({start})"
    if start:
        return f"fine-tuned from {start}"
    return "trained from random weights" if "run" in provenance else "not known"


def _describe_expansion(provenance: dict[str, Any]) -> str:
    plan = provenance.get("plan")
    if plan is None:  # by a training run, which its learngene's path is kept of
        return f"layers expanded from a learngene ({provenance['learngene']})"
    layers = "theta_A + i/L theta_B (TLEG)" if plan == "linear" else f"stages {', '.join(map(str, plan))}"
    return f"layers expanded from a learngene, {layers}"


def _read_run(file: Path, trained: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return config and metrics of the run that wrote ``file``; both empty where they are not beside it."""
    config, metrics = file.parent / "config.yaml", file.parent / "metrics.json"
    if not (config.is_file() and metrics.is_file()):
        return {}, {}
    found = read_json(metrics)
    if (found.get("steps"), found.get("commit")) != (trained.get("step"), trained.get("commit")):
        return {}, {}  # another run's file was put there
    return parse_yaml(read_text(config), str(config), is_file=True), found


def _measured_accuracy(source: ExportSource, config: dict[str, Any], metrics: dict[str, Any]) -> str | None:
    """Return the accuracy that the run measured for these weights at this depth and image size; None if it did not."""
    size, plan = source.image_shape[-1], source.info.provenance.get("plan")
    if not metrics or config["data"]["image_size"] != size:
        return None
    name = "val_ema" if source.file.stem.endswith("_ema") else "val"
    if plan is not None:
        if not source.schedule:  # another command has expanded it, with options of its own
            return None
        depth, kind = len(source.model.blocks), "even"
        if depth != metrics["depth"]:
            name += f"_depth{depth}"
            elastic = config["model"].get("elastic") or {}
            kind = config.get("train", {}).get("eval_plan") or elastic.get("plan", "even")
        if plan != "linear" and plan != list(expansion_plan(source.schedule, depth, kind)):
            return None
    last = metrics["history"][-1]
    if f"{name}/top1" not in last:
        return None
    top1, top5 = (100 * last[f"{name}/{key}"] for key in ("top1", "top5"))
    return f"top-1 {top1:.2f} %, top-5 {top5:.2f} % of {metrics['validation_images']} images, in the training run"
