"""Store a teacher's logits for all images that a run will show, so that its students need no teacher."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import numpy as np
from torch import Tensor

from sws_dist.config.schema import RunConfig
from sws_dist.data import pipeline, sampler
from sws_dist.data.build import DataParts, build_data, list_images
from sws_dist.data.loader import Batch
from sws_dist.data.mixup import augment_batch
from sws_dist.distill.fingerprint import compute_fingerprint
from sws_dist.distill.logits_folder import EpochLogits, LogitsFolder
from sws_dist.distill.teacher import OnlineTeacher, count_teacher_flops, load_teacher
from sws_dist.distill.topk import TopK, index_dtype, keep_top_k
from sws_dist.distributed.collectives import broadcast_from_rank0, raise_on_all_ranks
from sws_dist.distributed.init import World, init_distributed
from sws_dist.errors import ConfigError
from sws_dist.logging.startup import describe_left_out
from sws_dist.progress import ProgressBar
from sws_dist.provenance import collect_provenance
from sws_dist.units import format_bytes

_TIMEOUT_S = 7 * 24 * 3600
"""Ranks wait for each other only after an epoch each, which may take long."""

log = logging.getLogger(__name__)


def store_logits(config: RunConfig, path: Path, top_k: int, micro_batch: int) -> LogitsFolder:
    """Store the teacher's logits for every position of every epoch of a run. A collective; the ranks share the epochs.

    The images are read, augmented and mixed as training does it. Epochs that are there and whole are kept. The teacher
    runs in fp32.

    Args:
        config: the run.
        path: the folder to write.
        top_k: number of logits of an image that are kept; at most all.
        micro_batch: number of images of a micro-batch in training, which mixing and the noise of erased boxes depend
            on.

    Raises:
        ValueError: no teacher, one that does not fit, no images, or a folder with other logits.
        RunError: the same where several ranks run.
    """
    world = init_distributed(_TIMEOUT_S)
    with raise_on_all_ranks("load the teacher and list the images"):
        if config.distill.teacher is None:
            raise ConfigError("distill.teacher is null: there is nobody whose logits could be stored")
        train, val = list_images(config.data)
        data = build_data(config, train, val, 0, 1, world.device)  # the order of all positions
        teacher = load_teacher(config.distill, train.classes, config.data)
        assert teacher is not None
        teacher.to(world.device)
        num_classes = len(train.classes)
        is_truncated = top_k < num_classes
        fingerprint = compute_fingerprint(config, train, micro_batch, world.device, is_truncated=is_truncated)
        folder = LogitsFolder(path, fingerprint, num_classes, min(top_k, num_classes), data.order.epoch_size)
        if world.is_rank_zero:
            flops = count_teacher_flops(config.distill, config.data.image_size)
            folder.create({"teacher": config.distill.teacher, "flops_forward": flops, **collect_provenance()})
    for line in describe_left_out("training", train):
        log.warning(line)
    epochs = broadcast_from_rank0(_missing_epochs(folder, config.train.epochs) if world.is_rank_zero else None)
    _log_plan(folder, len(train), config.train.epochs, len(epochs))
    _EpochWriter(config, data, teacher, folder, micro_batch, world, epochs).write()
    return folder


def _missing_epochs(folder: LogitsFolder, num_epochs: int) -> list[int]:
    """Return the epochs whose files are not there, or damaged."""
    missing = []
    for epoch in range(num_epochs):
        if not folder.file(epoch).is_file():
            missing.append(epoch)
            continue
        try:
            folder.read(epoch, verify=True)
        except ValueError as error:
            log.warning("%s", error)
            missing.append(epoch)
    return missing


def _log_plan(folder: LogitsFolder, num_images: int, num_epochs: int, num_missing: int) -> None:
    num_bytes = sum(array.nbytes for array in _allocate(folder, num_images, 1).arrays().values())
    what = f"{folder.top_k} of {folder.num_classes} classes, {num_bytes} bytes an image"
    whole = format_bytes(num_epochs * folder.epoch_size * num_bytes)
    log.info(f"logits   {folder.path}: {num_epochs} epochs of {folder.epoch_size} images, {what}, {whole} in all")
    if num_missing < num_epochs:
        log.info(f"{num_epochs - num_missing} of {num_epochs} epochs are there already")


def _allocate(folder: LogitsFolder, num_images: int, rows: int) -> EpochLogits:
    """Return ``rows`` rows of an epoch, for a list of ``num_images`` images, to be filled."""
    truncated, k = folder.is_truncated, folder.top_k
    values = np.empty((rows, k + truncated), np.float16)
    classes = np.empty((rows, k), index_dtype(folder.num_classes)) if truncated else None
    return EpochLogits(TopK(values, classes), np.empty(rows, index_dtype(num_images)))


class _EpochWriter:
    """Write the logits of ``epochs``, which the ranks share: in each round every rank writes one."""

    def __init__(
        self,
        config: RunConfig,
        data: DataParts,
        teacher: OnlineTeacher,
        folder: LogitsFolder,
        micro_batch: int,
        world: World,
        epochs: list[int],
    ) -> None:
        self.config, self.data, self.teacher, self.folder = config, data, teacher, folder
        self.micro_batch, self.world = micro_batch, world
        self._rounds = [epochs[first : first + world.size] for first in range(0, len(epochs), world.size)]
        positions = (places for epoch in epochs[world.rank :: world.size] for places in self._micro_batches(epoch))
        seed, device, bad = config.train.seed, world.device, data.bad_train
        self._loader = pipeline.train_loader(
            data.train, data.order, positions, data.recipe, seed, config.data, device, bad
        )

    def write(self) -> None:
        """Write the files. A collective."""
        batches, rank, size = iter(self._loader), self.world.rank, self.folder.epoch_size
        total = sum(map(len, self._rounds)) * size
        with ProgressBar("teaching", total, "images") as bar:
            for epochs in self._rounds:
                with raise_on_all_ranks("store the logits of an epoch"):
                    for epoch in epochs[rank : rank + 1]:
                        own = islice(batches, len(self._micro_batches(epoch)))
                        self.folder.write(epoch, self._ask_teacher(epoch, own, bar, len(epochs)))
                max_share = self.config.data.max_bad_share
                for line in self.data.bad_train.exchange(self.world.device, epochs[-1], size, max_share):
                    log.warning(line)

    def _micro_batches(self, epoch: int) -> list[np.ndarray]:
        """Return the positions of each micro-batch that shows an image of ``epoch``, among them some of its neighbours.

        Steps do not end where epochs do. The few images at the seams are classified twice, so that an epoch can be
        written on its own.
        """
        size, batch = self.folder.epoch_size, self.config.train.global_batch
        steps = range(epoch * size // batch, -(-(epoch + 1) * size // batch))
        num_micros, num_crops = batch // self.micro_batch, self.config.augment.num_crops
        return [
            sampler.micro_batch_positions(step, batch, micro, num_micros, num_crops)
            for step in steps
            for micro in range(num_micros)
        ]

    def _ask_teacher(self, epoch: int, batches: Iterable[Batch], bar: ProgressBar, num_ranks: int) -> EpochLogits:
        """Return what the teacher says of the images of one epoch.

        Args:
            batches: the micro-batches of ``epoch``.
            bar: counts the images of all ``num_ranks`` that write an epoch in this round.
        """
        size = self.folder.epoch_size
        logits = _allocate(self.folder, len(self.data.train), size)
        for batch in batches:
            assert batch.positions is not None
            kept = keep_top_k(self._logits(batch), self.folder.top_k, self.config.distill.tau)
            found = EpochLogits(kept, batch.indices).arrays()
            rows = batch.positions - epoch * size
            own = (rows >= 0) & (rows < size)
            for name, column in logits.arrays().items():
                column[rows[own]] = found[name][own]
            bar.update(num_ranks * int(own.sum()))
        return logits

    def _logits(self, batch: Batch) -> Tensor:
        """Return the teacher's logits of a micro-batch, [B, classes]."""
        images, _ = augment_batch(batch, self.data.mixing, self.config.augment, self.config.train.seed)
        logits = self.teacher.logits(images, batch)
        if self._loader.failure is not None:
            raise self._loader.failure
        finite = logits.isfinite().all(dim=1).tolist()
        if not all(finite):
            path = self.data.train.paths[int(batch.indices[finite.index(False)])]
            raise ValueError(f"distill.teacher {self.config.distill.teacher}: its logits of {path} are not finite")
        return logits
