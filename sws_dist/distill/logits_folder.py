"""Keep a teacher's logits in a folder: ``logits.json`` says what they are of, and each epoch has one file.

An epoch's file is a safetensors file of three arrays, one row a position: ``values`` and ``classes`` (``topk.py``; no
``classes`` where all are kept), and ``images``, the place in the list of the image that was shown there. Its metadata
has the checksum of the arrays, and says which folder it belongs to.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sws_dist.atomic import atomic_write_json
from sws_dist.data.mapped_arrays import map_arrays, save_arrays
from sws_dist.distill.fingerprint import Fingerprint, differences
from sws_dist.distill.topk import TopK
from sws_dist.text import read_json

_DESCRIPTION = "logits.json"


class EpochLogits(NamedTuple):
    """The teacher's logits at the N positions of an epoch."""

    kept: TopK
    """The logits, N rows."""
    images: np.ndarray
    """[N] unsigned: the image that was shown at each position, as its place in the list of images."""

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays by their names in the file."""
        found = {"values": self.kept.values, "classes": self.kept.classes, "images": self.images}
        return {name: array for name, array in found.items() if array is not None}


@dataclass(frozen=True)
class LogitsFolder:
    """A folder of logits of one fingerprint."""

    path: Path
    fingerprint: Fingerprint
    num_classes: int
    top_k: int
    epoch_size: int

    @property
    def is_truncated(self) -> bool:
        return self.top_k < self.num_classes

    def create(self, about: Mapping[str, Any]) -> None:
        """Write ``logits.json``, or check that the one that is there says the same.

        Args:
            about: where the logits come from, for people.

        Raises:
            ValueError: the folder holds logits of another fingerprint, or another number of them.
        """
        if (self.path / _DESCRIPTION).is_file():
            there = LogitsFolder.open(self.path)
            ours, theirs = self.fingerprint | {"--top-k": self.top_k}, there.fingerprint | {"--top-k": there.top_k}
            if differ := differences(ours, theirs):
                raise ValueError(f"{self.path} holds other logits: {'; '.join(differ)}. Give another folder")
            return
        content = {key: value for key, value in asdict(self).items() if key != "path"}
        atomic_write_json(self.path / _DESCRIPTION, content | {"about": dict(about)})

    @classmethod
    def open(cls, path: Path) -> LogitsFolder:
        """Open a folder that ``create`` has made.

        Raises:
            ValueError: any other folder.
        """
        try:
            fields = read_json(path / _DESCRIPTION)
            return cls(path, **{key: fields[key] for key in ("fingerprint", "num_classes", "top_k", "epoch_size")})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not a folder of logits that sws teach wrote ({error})") from None

    def file(self, epoch: int) -> Path:
        """Return the path of an epoch's file."""
        return self.path / f"epoch-{epoch:05d}.safetensors"

    def write(self, epoch: int, logits: EpochLogits) -> Path:
        """Write the logits of one epoch; the file appears whole or not at all."""
        arrays = logits.arrays()
        texts = {"epoch": epoch, "folder": self._identity(), "sha256": _checksum(arrays)}
        return save_arrays(self.file(epoch), arrays, texts)

    def read(self, epoch: int, verify: bool = False) -> EpochLogits:
        """Map the logits of one epoch.

        Args:
            verify: read them all, and compare them with their checksum.

        Raises:
            ValueError: the file is missing, damaged, or of another folder.
        """
        path = self.file(epoch)
        try:
            arrays, texts, _ = map_arrays(path)
            if (texts["epoch"], texts["folder"]) != (epoch, self._identity()):
                raise ValueError("it is another epoch's, or belongs to other logits")
            if verify and _checksum(arrays) != texts["sha256"]:
                raise ValueError("its checksum is wrong")
            return EpochLogits(TopK(arrays["values"], arrays.get("classes")), arrays["images"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: cannot be used ({error}); sws teach with the same arguments writes it again"
            ) from None

    def _identity(self) -> str:
        """Return what the files of this folder have in common, and those of others have not."""
        about = json.dumps([self.fingerprint, self.num_classes, self.top_k, self.epoch_size], sort_keys=True)
        return hashlib.sha256(about.encode()).hexdigest()


def _checksum(arrays: Mapping[str, np.ndarray]) -> str:
    checksum = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        checksum.update(f"{name} {array.dtype} {array.shape} ".encode())
        checksum.update(np.ascontiguousarray(array).data)
    return checksum.hexdigest()
