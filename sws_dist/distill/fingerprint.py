"""Describe all that decides a teacher's logits at a position of a run: a run reads no logits of another fingerprint.

A fingerprint is a flat dictionary. Its keys are those of the run config where there is one, so that a message about a
difference says what to set. A key that is new in ``data`` or ``augment`` belongs to it, unless it is named here.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sws_dist.checkpoint.safetensors_stream import digest
from sws_dist.config.loader import marked_keys
from sws_dist.config.resume import flatten_config
from sws_dist.config.schema import MAY_CHANGE, AugmentConfig, DistillConfig, RunConfig
from sws_dist.data.manifest import Manifest
from sws_dist.distill.teacher import is_model_file, weights_file

FORMAT = 1
"""Version of the files. Another version of what an image at a position looks like is another version too."""
_SAMPLED_FILES = 16
_TEACHER_KEYS = ("weights of the teacher", "timm model of the teacher", "distill.teacher_ema")
_LEFT_OUT = {
    *("data.val_share", "data.val_seed", "data.image_extensions", "data.label_key"),  # the list of images shows them
    *("data.crop_pct", "data.crop_mode", "augment.smoothing"),  # evaluation; labels
}

Fingerprint = dict[str, Any]
"""Plain values by key, as JSON has them."""


def compute_fingerprint(
    config: RunConfig, images: Manifest, micro_batch: int, device: torch.device, *, is_truncated: bool
) -> Fingerprint:
    """Describe what decides the logits of a run.

    Where neither mixing nor noise depends on which images share a micro-batch, its size is left out, and so is the
    global batch: the logits then serve any of them.

    Args:
        config: the run's config.
        images: its training images.
        micro_batch: number of images of a micro-batch.
        device: where the noise of erased boxes is drawn.
        is_truncated: not all classes are kept. Then the temperature belongs to it.

    Raises:
        ValueError: the teacher has no file of weights.
    """
    may_change = set(marked_keys(MAY_CHANGE))
    fingerprint = {
        key: value
        for key, value in flatten_config(config).items()
        if key.startswith(("data.", "augment.")) and key not in may_change and key not in _LEFT_OUT
    }
    fingerprint |= {"format": FORMAT, "train.seed": config.train.seed} | _describe_images(images)
    if config.distill.teacher is not None:
        fingerprint |= _describe_teacher(config.distill)
    if _depends_on_micro_batch(config.augment):
        fingerprint |= {"train.global_batch": config.train.global_batch, "images in a micro-batch": micro_batch}
    if _draws_noise(config.augment):
        fingerprint["device that draws the noise of erased boxes"] = device.type
    if is_truncated:
        fingerprint["distill.tau"] = config.distill.tau
    return {key: value for key, value in json.loads(json.dumps(fingerprint)).items() if value is not None}


def require_same_fingerprint(ours: Fingerprint, stored: Fingerprint, folder: Path) -> None:
    """Raise ValueError, naming what differs, if stored logits are not those of this run.

    A run without a teacher of its own takes the logits of any.
    """
    if _TEACHER_KEYS[0] not in ours:
        stored = {key: value for key, value in stored.items() if key not in _TEACHER_KEYS}
    if differ := differences(ours, stored):
        raise ValueError(
            f"distill.logits {folder}: not the logits of this run: {'; '.join(differ)}. Set that as it is there, or "
            "let sws teach write this run's logits"
        )


def differences(ours: Fingerprint, stored: Fingerprint) -> list[str]:
    """Return one text for each key whose values differ."""
    return [
        f"{key} is {_short(ours.get(key))}, in the folder {_short(stored.get(key))}"
        for key in sorted(ours.keys() | stored.keys())
        if ours.get(key) != stored.get(key)
    ]


def _depends_on_micro_batch(config: AugmentConfig) -> bool:
    """Return True if an image's pixels depend on which images share its micro-batch."""
    return config.mixup > 0 or config.cutmix > 0 or _draws_noise(config)


def _draws_noise(config: AugmentConfig) -> bool:
    return config.re_prob > 0 and config.re_mode != "const"


def _describe_images(images: Manifest) -> Fingerprint:
    """Describe the list of images, and the bytes of a few of them: their labels do not matter to the teacher."""
    names = [images.paths.data, images.paths.ends.astype(np.uint64)]
    places = [] if images.spans is None else [np.asarray(images.spans)]
    sampled = np.unique(np.linspace(0, len(images) - 1, _SAMPLED_FILES).astype(np.int64))
    return {
        "number of images": len(images),
        "names of the images": _digest(*names),
        "sizes of the images": _digest(np.asarray(images.sizes, dtype=np.int32)),
        "places in tar shards": _digest(json.dumps(images.shards).encode(), *places),
        "contents of some images": _digest(*(_read(images, index) for index in sampled.tolist())),
        "names of the classes": _digest(json.dumps(images.classes).encode()),
    }


def _read(images: Manifest, index: int) -> bytes:
    try:
        return images.read(index)
    except OSError:  # a bad image has a substitute at its position, and the shard says which
        return b""


def _describe_teacher(config: DistillConfig) -> Fingerprint:
    file = weights_file(config)
    if not file.is_file():
        raise ValueError(
            f"distill.teacher: {file}: no such file. A run that reads stored logits needs no teacher: set "
            "distill.teacher to null, and the logits of any teacher are taken"
        )
    named = (None, None) if is_model_file(str(config.teacher)) else (config.teacher, config.teacher_ema)
    return dict(zip(_TEACHER_KEYS, (digest(file).sha256, *named), strict=True))


def _digest(*parts: np.ndarray | bytes) -> str:
    checksum = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else np.ascontiguousarray(part).data
        checksum.update(memoryview(data).nbytes.to_bytes(8, "little"))
        checksum.update(data)
    return checksum.hexdigest()


def _short(value: Any) -> str:
    is_digest = isinstance(value, str) and len(value) == 64
    return f"{value[:8]}..." if is_digest else json.dumps(value, ensure_ascii=False)
