"""Run the training loop: one optimizer step after another, evaluated and saved at the ends of epochs.

What a step does is a function of its number (see ``data/sampler.py``, ``optim.LRSchedule``, ``data/mixup.py``),
so a run that is stopped and resumed takes the steps that it would have taken.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from sws_dist.atomic import atomic_write_json
from sws_dist.build import RunParts, describe_stream
from sws_dist.build_models import num_layers, training_flops
from sws_dist.checkpoint.checkpoint import describe_layout, export_weights, prune_checkpoints, save_checkpoint
from sws_dist.config.schema import DistillConfig
from sws_dist.data import pipeline, sampler
from sws_dist.data.loader import Batch, Loader
from sws_dist.data.mixup import augment_batch
from sws_dist.distributed.collectives import average_buffers, broadcast_from_rank0, raise_on_all_ranks
from sws_dist.distributed.signals import deferred_signals
from sws_dist.distributed.step_sync import StepStatus, StepSync
from sws_dist.distributed.step_timer import DATA, LOG
from sws_dist.errors import RunError, Stopped
from sws_dist.logging.images import log_first_batch
from sws_dist.logging.startup import RunHeader, log_run_header
from sws_dist.logging.throughput import LogWindow, Progress, SlowStepDetector, log_progress
from sws_dist.models.losses import LossParts
from sws_dist.run_dir import write_configs
from sws_dist.validation import OWN, log_bad_images, score_run
from sws_dist.zero.engine import StepResult, all_weights_finite, take_step

log = logging.getLogger(__name__)


class Trainer:
    """Train the run that ``build_run`` has built, on this rank."""

    def __init__(self, parts: RunParts) -> None:
        self.parts = parts
        self.step = 0
        self.best_top1: float | None = None
        self.history: list[dict[str, float]] = []
        self._seconds_before, self._start = 0.0, time.perf_counter()
        self._checkpoint: Path | None = None
        self._result = StepResult(applied=False, grad_norm=None)
        if parts.resumed is not None:
            state = parts.resumed.state
            self.step, self.best_top1, self.history = state.step, state.best_top1, list(state.history)
            self._seconds_before, self._checkpoint = state.seconds, parts.resumed.checkpoint
        config = parts.config.train
        self._last_step = min(parts.total_steps, config.max_steps or parts.total_steps)
        self._loader = self._build_loader()
        self._window = LogWindow(config.global_batch, parts.world.size)

    # ---- the run -------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any] | None:
        """Train to the end (or ``train.max_steps``), then write the run's results.

        Returns:
            What ``metrics.json`` holds, on every rank; None if ``train.max_steps`` came before the end.

        Raises:
            Stopped: on all ranks, once the run is saved: one of them was told to stop (see ``distributed/signals.py``).
        """
        with deferred_signals(), self.parts.heartbeat.monitoring():
            try:
                self._log_start()
                self._prune()  # a kill after saving leaves one checkpoint too many
                self._train()
                return self._finish() if self.step == self.parts.total_steps else None
            finally:
                self.parts.recorder.close()

    def _train(self) -> None:
        heartbeat, batches = self.parts.heartbeat, iter(self._loader)
        sync = StepSync([self._require_no_failure, self.parts.nonfinite.check, SlowStepDetector().check])
        self._run_pending_evaluation()
        heartbeat.finish_step()
        self._window.reset()
        while self.step < self._last_step:
            losses = self._train_step(batches)
            stop = sync.collect()  # of the step before
            self.step += 1
            heartbeat.step = self.step
            times = heartbeat.finish_step()
            failed = self._failure() is not None
            sync.post(self.step, losses.total, times, applied=self._result.applied, failed=failed)
            self._window.add(losses, times.data)
            self.parts.recorder.advance()
            if self.step % self.parts.config.train.log_every == 0 or self.step == self._last_step:
                self._log_step()
            if stop or self._ends_epoch() or self.step == self._last_step:
                stop = sync.collect() or stop
                self._evaluate_and_save(stop)
                self._window.reset()
                heartbeat.finish_step()
        if self.step < self.parts.total_steps:
            log.info(
                f"stopped at step {self.step} of {self.parts.total_steps} (train.max_steps); --resume auto goes on"
            )

    def _train_step(self, batches: Iterator[Batch]) -> LossParts:
        """Take one optimizer step. Returns the losses' means over this rank's micro-batches."""
        parts, engine = self.parts, self.parts.engine
        losses: list[LossParts] = []
        seen = []
        parts.nonfinite.before_step(engine.module)
        if parts.models.elastic is not None:
            elastic = parts.models.elastic
            parts.models.student.set_repeats(elastic.repeats(elastic.draw(self.step)))
        for group in engine.optimizer.param_groups:
            group["lr"] = parts.lr_schedule(self.step)
        for _ in range(engine.gradient_accumulation_steps()):
            with parts.heartbeat.phase(DATA):
                batch = next(batches)
            seen.append(batch.indices)
            losses.append(self._compute_losses(batch, is_first=self.step == 0 and not losses))
            engine.backward(losses[-1].total)
            result = take_step(engine)
            if result is not None:  # the last micro-batch of the step
                self._result = result
        if parts.ema is not None and self._result.applied:
            parts.ema.update()
        parts.nonfinite.after_step(self.step + 1, seen, self._result.applied)
        columns = zip(*losses, strict=True)  # totals, labels' terms, teacher's terms
        return LossParts(*(torch.stack([loss.detach().float() for loss in column]).mean() for column in columns))

    def _compute_losses(self, batch: Batch, is_first: bool) -> LossParts:
        """Augment one micro-batch on the device, and compute its losses."""
        parts, config = self.parts, self.parts.config
        images, targets = augment_batch(batch, parts.data.mixing, config.augment, config.train.seed)
        images = images.to(parts.dtype)
        teacher_logits = None if parts.teacher is None else parts.teacher.logits(images, batch)
        if is_first:
            log_first_batch(parts.recorder, images, batch, teacher_logits, parts.data.train.classes, config.data)
        return parts.loss(parts.engine(images), targets, teacher_logits)

    # ---- evaluating and saving -----------------------------------------------------------------------------------

    def _run_pending_evaluation(self) -> None:
        """Run the evaluation before the first step, or one that a stop has put off."""
        evaluated = bool(self.history) and self.history[-1]["step"] == self.step
        if self.step == 0 and self.parts.config.train.eval_at_start:
            if self._evaluate() is None:
                raise Stopped("told to stop before the first step: there is nothing to save")
        elif self._evaluation_due() and not evaluated:
            self._evaluate_and_save(None)

    def _evaluate_and_save(self, stop: str | None) -> None:
        """Evaluate and save where that is due. A run that is told to stop only saves, and evaluates after the resume.

        Args:
            stop: why the run is to stop, or None.

        Raises:
            Stopped: on all ranks.
        """
        top1 = None
        if stop is None and self._evaluation_due():
            top1 = self._evaluate()
            stop = "during the evaluation" if top1 is None else None
        epoch, config = self._num_epochs(self.step), self.parts.config
        is_last = self.step in (self.parts.total_steps, config.train.max_steps)
        if stop or is_last or self._ends_epoch(config.checkpoint.every):
            self._save(epoch, top1)
        if stop:
            raise Stopped(f"told to stop ({stop}): saved at step {self.step} of {self.parts.total_steps}")

    def _evaluate(self) -> float | None:
        """Score the weights, and log the scores.

        Returns:
            The weights' top-1 at the model's own depth, or None if the run was told to stop meanwhile.
        """
        scores = score_run(self.parts)
        if scores is None:
            return None
        values = {
            f"{group}/{name}": getattr(s, name) for group, s in scores.items() for name in ("top1", "top5", "loss")
        }
        epoch, val = self._num_epochs(self.step), scores[OWN]
        self.parts.recorder.scalars(self.step, values)
        self.history.append({"epoch": epoch, "step": self.step, "seconds": self._elapsed_s(), **values})
        self.best_top1 = max(val.top1, self.best_top1 or 0.0)
        others = "".join(f"  {group} {100 * s.top1:.2f} %" for group, s in scores.items() if group != OWN)
        log.info(
            f"epoch {epoch}/{self.parts.config.train.epochs}  step {self.step}/{self.parts.total_steps}  "
            f"val top-1 {100 * val.top1:.2f} %  loss {val.loss:.4f}  ({val.images} images){others}"
        )
        return val.top1

    def _save(self, epoch: int, top1: float | None) -> None:
        parts = self.parts
        state = {
            "step": self.step,
            "epoch": epoch,
            "seconds": self._elapsed_s(),
            "top1": top1,
            "best_top1": self.best_top1,
            "history": self.history,
        } | describe_stream(parts.config, parts.data.order, parts.total_steps)
        if not all_weights_finite(parts.engine):
            raise RunError(
                f"the weights are not finite after step {self.step}, which is therefore not saved; the last checkpoint "
                "is untouched. A lower optim.lr, more warm-up or gradient_clipping usually helps"
            )
        average_buffers(parts.engine.module)
        last_top1 = self.history[-1]["val/top1"] if self.history else None
        provenance = parts.models.info.provenance | {"step": self.step, "top1": last_top1}
        info = dataclasses.replace(parts.models.info, provenance=provenance)
        folder = parts.output / "checkpoints"
        with parts.heartbeat.phase("saving"):
            self._checkpoint = save_checkpoint(folder, parts.engine, parts.ema, info, parts.world, state)
        self._prune()

    def _prune(self) -> None:
        """Delete checkpoints that are no longer to be kept."""
        keep = self.parts.config.checkpoint
        if self.parts.world.is_rank_zero:
            try:
                prune_checkpoints(self.parts.output / "checkpoints", keep.keep_last, keep.keep_best)
            except OSError as error:  # the newest checkpoint is whole: what is left of old ones costs room, no more
                log.warning("an old checkpoint could not be deleted: %s", error)

    def _finish(self) -> dict[str, Any]:
        """Write the run's results: weights to use, and ``metrics.json``, whose presence says that the run is done.

        Returns:
            What ``metrics.json`` holds, on every rank.
        """
        parts = self.parts
        name = "learngene" if parts.models.info.kind == "learngene" else "model"
        with raise_on_all_ranks("write the final weights"):
            if parts.world.is_rank_zero:
                assert self._checkpoint is not None
                export_weights(self._checkpoint, parts.output / f"{name}.safetensors")
                if parts.ema is not None:
                    export_weights(self._checkpoint, parts.output / f"{name}_ema.safetensors", average=True)
        result = None
        with raise_on_all_ranks("write the results"):
            if parts.world.is_rank_zero:
                result, train = self._results(), parts.config.train
                atomic_write_json(parts.output / "metrics.json", result)
                settings = {"model": parts.config.model.name, "seed": train.seed, "lr": parts.lr_schedule.peak}
                settings |= {"epochs": train.epochs, "batch": train.global_batch}
                parts.recorder.hparams(settings, {"final/top1": result["top1"]})
                if parts.recorder.failure is not None:
                    raise parts.recorder.failure
                log.info(f"done: top-1 {100 * result['top1']:.2f} %, {parts.output / name}.safetensors")
        return broadcast_from_rank0(result)

    def _results(self) -> dict[str, Any]:
        """Return what ``metrics.json`` holds."""
        parts, train, models = self.parts, self.parts.config.train, self.parts.models
        num_images, last = parts.total_steps * train.global_batch, self.history[-1]
        return {
            "model": parts.config.model.name,
            "depth": num_layers(parts.models.student),
            "parameters": parts.models.num_parameters,
            "top1": last["val/top1"],
            "top5": last["val/top5"],
            "top1_ema": last.get("val_ema/top1"),
            "best_top1": self.best_top1,
            "history": self.history,
            "seed": train.seed,
            "epochs": train.epochs,
            "steps": parts.total_steps,
            "images": num_images,
            "validation_images": len(parts.data.val),
            "seconds": self._elapsed_s(),
            "rank_seconds": round(self._elapsed_s() * parts.world.size, 3),
            "flops_forward": models.flops.student,
            "flops_teacher": models.flops.teacher,
            "flops": training_flops(models, parts.total_steps, train.global_batch),
            **describe_layout(parts.engine, parts.world),
            **parts.provenance,
        }

    # ---- logging -------------------------------------------------------------------------------------------------

    def _log_start(self) -> None:
        """Write the first lines of the log, and the resolved configs into the run's folder."""
        parts = self.parts
        if parts.world.is_rank_zero:
            for name, text in write_configs(parts.config, parts.ds, parts.provenance, parts.output).items():
                parts.recorder.text(name, text)
        layout = describe_layout(parts.engine, parts.world)
        header = RunHeader(
            output=parts.output,
            model=parts.config.model.name,
            num_parameters=parts.models.num_parameters,
            teacher=_describe_teacher(parts.config.distill),
            first_step=self.step,
            total_steps=parts.total_steps,
            global_batch=parts.config.train.global_batch,
            world=str(parts.world),
            device=parts.world.device.type,
            zero_stage=layout["zero_stage"],
            precision=layout["precision"],
            kernels=parts.models.kernels,
        )
        log_run_header(header, parts.data.train, parts.data.val)

    def _log_step(self) -> None:
        """Write a line of the log about the steps since the last one. A collective."""
        parts = self.parts
        with parts.heartbeat.phase(LOG):
            means = self._window.means()
            epoch = (self.step * parts.config.train.global_batch - 1) // parts.data.order.epoch_size
            log_bad_images(parts, parts.data.bad_train, epoch, parts.data.order.epoch_size)
            if means is None:
                return
            grad_norm = self._result.grad_norm
            now = Progress(
                step=self.step,
                total_steps=parts.total_steps,
                images_left=(parts.total_steps - self.step) * parts.config.train.global_batch,
                lr=parts.lr_schedule(self.step - 1),
                grad_norm=math.nan if grad_norm is None else float(grad_norm),
                num_bad_images=len(parts.data.bad_train),
                is_distilled=parts.teacher is not None,
            )
            log_progress(parts.recorder, means, now, parts.world.device)
            self._window.reset()

    # ---- state ---------------------------------------------------------------------------------------------------

    def _build_loader(self) -> Loader:
        """Build the loader of the steps that are left."""
        parts, config = self.parts, self.parts.config
        accumulation = parts.engine.gradient_accumulation_steps()
        num_micros = accumulation * parts.world.size
        micros = range(parts.world.rank, num_micros, parts.world.size)
        positions = (
            sampler.micro_batch_positions(step, config.train.global_batch, micro, num_micros, config.augment.num_crops)
            for step in range(self.step, self._last_step)
            for micro in micros
        )
        data, seed = parts.data, config.train.seed
        return pipeline.train_loader(
            data.train, data.order, positions, data.recipe, seed, config.data, parts.world.device, data.bad_train
        )

    def _ends_epoch(self, every: int = 1) -> bool:
        """Return True if the step that was just taken completed a number of epochs that ``every`` divides.

        A step may complete more than one epoch, where the batch is larger.
        """
        return self.step > 0 and self._num_epochs(self.step) // every > self._num_epochs(self.step - 1) // every

    def _evaluation_due(self) -> bool:
        return self.step == self.parts.total_steps or self._ends_epoch(self.parts.config.train.eval_every)

    def _num_epochs(self, step: int) -> int:
        """Return how many epochs are complete after ``step``."""
        if step == self.parts.total_steps:  # what is left of the last epoch is less than a batch
            return self.parts.config.train.epochs
        return step * self.parts.config.train.global_batch // self.parts.data.order.epoch_size

    def _elapsed_s(self) -> float:
        """Return the seconds of this run, over all its resumes."""
        return round(self._seconds_before + time.perf_counter() - self._start, 3)

    def _failure(self) -> Exception | None:
        """Return why this rank cannot go on, or None."""
        teacher = self.parts.teacher
        return self._loader.failure or (teacher and teacher.failure) or self.parts.recorder.failure

    def _require_no_failure(self, status: StepStatus) -> None:
        if status.failed:
            with raise_on_all_ranks(f"take step {status.step}"):
                if (failure := self._failure()) is not None:
                    raise failure


def _describe_teacher(config: DistillConfig) -> str | None:
    """Return what the log says of the teacher; None without one."""
    if config.logits is None:
        return config.teacher
    return f"logits in {config.logits}" + (f", of {config.teacher}" if config.teacher else "")
