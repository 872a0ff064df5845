"""Export a model: a folder that timm and the Hub read, with other formats beside it, each compared with the model."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import timm
from torch import nn

from sws_dist.api import evaluate
from sws_dist.atomic import atomic_write_text
from sws_dist.checkpoint.model_file import save_model_file
from sws_dist.checkpoint.onnx_file import OnnxClassifier
from sws_dist.errors import RunError, require_packages
from sws_dist.export.formats import FORMATS, TIMM, Format
from sws_dist.export.model_card import write_card
from sws_dist.export.parity import Parity, TestImages, compare, sample_images
from sws_dist.export.programs import (
    load_program,
    require_linear_weights,
    save_fp16,
    save_int8,
    save_onnx,
    save_program,
    trace,
)
from sws_dist.export.source import ExportSource
from sws_dist.scoring import Scores

log = logging.getLogger(__name__)


@dataclass
class Exported:
    """What an export has written and measured."""

    folder: Path
    test: TestImages
    parities: dict[str, Parity] = field(default_factory=dict)
    """By file name."""
    scores: dict[str, Scores] = field(default_factory=dict)
    """By file name: of the model (``model.safetensors``), and of ``model_int8.onnx``, on the user's images."""


def export(
    source: ExportSource,
    folder: Path,
    formats: Sequence[str] = (),
    *,
    data: Path | None = None,
    license_id: str | None = None,
    max_drop: float = 0.01,
) -> Exported:
    """Write a model's folder, whole or not at all.

    Args:
        source: what ``open_source`` returned.
        folder: is made; it must not exist, or be empty.
        formats: which of ``FORMATS`` to write beside what timm reads.
        data: validation images in class folders, to compare and to score on; None: noise, and no scores.
        license_id: the Hub's name of the license, for the model card.
        max_drop: the largest share of the images that int8 may lose.

    Raises:
        ValueError: a folder that is in use, packages that are missing, a model that cannot be traced.
        RunError: a file that does not compute what the model computes.
    """
    require_packages("export", *dict.fromkeys(name for key in formats for name in FORMATS[key].packages))
    if os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: exists and is not empty; name another folder, or remove it")
    if "onnx-int8" in formats:
        require_linear_weights(source)
    folder = Path(os.path.abspath(folder))
    exported = Exported(folder, sample_images(source, data))
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    draft.mkdir()
    try:
        _write_timm_folder(source, draft, exported)
        _write_programs(source, draft, exported, formats)
        if data is not None:
            exported.scores[TIMM.file] = evaluate(source.model, data)
            if "onnx-int8" in formats:
                _score_int8(draft, exported, data, max_drop)
        atomic_write_text(draft / "README.md", _card(source, exported, license_id, data))
        os.replace(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return exported


def _write_timm_folder(source: ExportSource, folder: Path, exported: Exported) -> None:
    """Write ``config.json`` and the weights, and load them as any user of timm does."""
    atomic_write_text(folder / "config.json", json.dumps(source.config, indent=2) + "\n")
    save_model_file(folder / TIMM.file, source.info, source.model.state_dict())
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    _check(TIMM, model, source, exported)
    found, expected = timm.data.resolve_model_data_config(model), source.config["pretrained_cfg"]
    for key in ("input_size", "mean", "std", "crop_pct", "interpolation", "crop_mode"):
        if json.dumps(found[key]) != json.dumps(expected[key]):
            raise RunError(f"config.json: timm reads {key} {found[key]} where {expected[key]} was written")


def _write_programs(source: ExportSource, folder: Path, exported: Exported, formats: Sequence[str]) -> None:
    if not formats:
        return
    log.info("tracing the model")
    program, files = trace(source), {key: folder / FORMATS[key].file for key in FORMATS}
    if "torch" in formats:
        save_program(program, source.config, files["torch"])
        _check(FORMATS["torch"], load_program(files["torch"])[0], source, exported)
    if not any(key.startswith("onnx") for key in formats):
        return
    save_onnx(program, source.config, files["onnx"])  # the others are made of it
    if "onnx" in formats:
        _check(FORMATS["onnx"], OnnxClassifier(files["onnx"]), source, exported)
    for key, save in (("onnx-fp16", save_fp16), ("onnx-int8", save_int8)):
        if key in formats:
            save(files["onnx"], source.config, files[key])
            _check(FORMATS[key], OnnxClassifier(files[key]), source, exported)
    if "onnx" not in formats:
        files["onnx"].unlink()


def _check(which: Format, model: nn.Module, source: ExportSource, exported: Exported) -> None:
    parity = compare(which.file, model, source.model, exported.test, which.tolerance)
    exported.parities[which.file] = parity
    log.info(f"{which.file}: {parity}, on {exported.test.kind}")


def _score_int8(folder: Path, exported: Exported, data: Path, max_drop: float) -> None:
    """Score the int8 file. Raises ``RunError`` if it loses more than ``max_drop``."""
    file = FORMATS["onnx-int8"].file
    scores, own = evaluate(OnnxClassifier(folder / file), data), exported.scores[TIMM.file]
    if (drop := own.top1 - scores.top1) > max_drop:
        raise RunError(
            f"{file}: top-1 {100 * scores.top1:.2f} % of {scores.images} images, the model has {100 * own.top1:.2f} %: "
            f"int8 loses {100 * drop:.2f} points, more than --max-drop {100 * max_drop:g}; nothing is written"
        )
    exported.scores[file] = scores


def _card(source: ExportSource, exported: Exported, license_id: str | None, data: Path | None) -> str:
    about = {which.file: which.about for which in (TIMM, *FORMATS.values())}
    # Not where the images lie: the card may become public.
    tested = exported.test.kind if data is None else f"{len(exported.test.images)} validation images"
    files = {"config.json": "the model's geometry, how its images are prepared, and its labels' names"}
    for file, parity in exported.parities.items():
        files[file] = f"{about[file]}; {parity}, on {tested}"
        if file == FORMATS["onnx-int8"].file and file not in exported.scores:
            files[file] += "; the accuracy lost is not measured"
    measured = {}
    for file, scores in exported.scores.items():
        assert data is not None
        measured[f"accuracy of `{file}`"] = f"{describe_scores(scores)} of {data.name}, measured by this export"
    return write_card(source, exported.folder.name, license_id, files, measured)


def describe_scores(scores: Scores) -> str:
    """Return scores as a part of a sentence."""
    return f"top-1 {100 * scores.top1:.2f} %, top-5 {100 * scores.top5:.2f} % of {scores.images} images"
