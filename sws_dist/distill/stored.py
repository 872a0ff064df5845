"""Read a teacher's stored logits in training, in the place of the teacher."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sws_dist.config.schema import RunConfig
from sws_dist.data.loader import Batch
from sws_dist.data.manifest import Manifest
from sws_dist.distill.fingerprint import compute_fingerprint, require_same_fingerprint
from sws_dist.distill.logits_folder import LogitsFolder
from sws_dist.distill.topk import TopK, build_logits
from sws_dist.distributed.init import World


class StoredTeacher:
    """Read the logits of each micro-batch from a folder: a ``Teacher``.

    The position of an image in the stream says where its logits are, so any number of ranks may read them. Each rank
    maps the files, and reads of them what it needs.

    Args:
        folder: the logits.
        images: the run's training images, for their names.
        device: where the logits are moved to.
    """

    def __init__(self, folder: LogitsFolder, images: Manifest, device: torch.device) -> None:
        self.failure: Exception | None = None
        self._folder, self._images, self._device = folder, images, device
        self._read_epoch = lru_cache(maxsize=2)(folder.read)

    def logits(self, images: Tensor, batch: Batch) -> Tensor:
        """Return the logits of a micro-batch, [B, classes] float32; see ``Teacher.logits``."""
        try:
            return build_logits(self._read(batch), self._folder.num_classes, self._device)
        except ValueError as error:  # the other ranks have to hear of it before this one ends
            self.failure = error
            return torch.full((len(images), self._folder.num_classes), torch.nan, device=self._device)

    def _read(self, batch: Batch) -> TopK:
        assert batch.positions is not None
        epochs, rows = np.divmod(batch.positions, self._folder.epoch_size)
        parts = []
        for epoch in np.unique(epochs).tolist():  # rising, as the positions are
            logits, here = self._read_epoch(epoch), epochs == epoch
            self._require_same_images(batch.positions[here], batch.indices[here], logits.images[rows[here]])
            classes = logits.kept.classes
            parts.append(TopK(logits.kept.values[rows[here]], None if classes is None else classes[rows[here]]))
        values, classes = zip(*parts, strict=True)
        return TopK(np.concatenate(values), None if classes[0] is None else np.concatenate(classes))

    def _require_same_images(self, positions: np.ndarray, shown: np.ndarray, stored: np.ndarray) -> None:
        for place in np.flatnonzero(shown != stored)[:1].tolist():
            now, then = (self._images.paths[int(images[place])] for images in (shown, stored))
            raise ValueError(
                f"position {positions[place]} of the run shows {now}, but its logits in {self._folder.path} are of "
                f"{then}: one of the two cannot be read, or could not then, and another image took its place. Mend the "
                "file, or let sws teach write the logits anew"
            )


def open_stored_teacher(
    config: RunConfig, images: Manifest, epoch_size: int, left: range, micro_batch: int, world: World
) -> StoredTeacher:
    """Open the run's stored logits; the ranks share the work of verifying the files.

    Args:
        config: the run's config.
        images: its training images.
        epoch_size: number of positions of an epoch.
        left: the positions of the run that are left.
        micro_batch: number of images of a micro-batch.

    Raises:
        ValueError: logits of another fingerprint, a missing epoch, or a damaged file.
    """
    assert config.distill.logits is not None
    folder = LogitsFolder.open(Path(config.distill.logits))
    fingerprint = compute_fingerprint(config, images, micro_batch, world.device, is_truncated=folder.is_truncated)
    require_same_fingerprint(fingerprint, folder.fingerprint, folder.path)
    epochs = range(left.start // epoch_size, -(-left.stop // epoch_size))
    missing = [folder.file(epoch).name for epoch in epochs if not folder.file(epoch).is_file()]
    if missing:
        raise ValueError(
            f"distill.logits {folder.path}: {len(missing)} of the run's epochs are not there, the first is "
            f"{missing[0]}; sws teach writes those that are missing"
        )
    for epoch in epochs[world.rank :: world.size]:
        folder.read(epoch, verify=True)
    return StoredTeacher(folder, images, world.device)
