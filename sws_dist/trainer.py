"""Run the training loop: one optimizer step after another, evaluated and saved at the ends of epochs.

What a step does is a function of its number (see ``data/sampler.py``, ``config/lr_schedule.py``, ``data/mixup.py``),
so a run that is stopped and resumed takes the steps that it would have taken.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from typing import Any

import torch

from sws_dist.atomic import atomic_write_json
from sws_dist.build import RunParts
from sws_dist.checkpoint.checkpoint import describe_layout, export_weights
from sws_dist.checkpoint.writer import CheckpointWriter
from sws_dist.config.schema import DistillConfig
from sws_dist.data import pipeline, sampler
from sws_dist.data.loader import Batch, Loader
from sws_dist.data.mixup import augment_batch
from sws_dist.distributed import phase_timer
from sws_dist.distributed.collectives import average_buffers, broadcast_from_rank0, raise_on_all_ranks
from sws_dist.distributed.nonfinite import ADVICE
from sws_dist.distributed.phase_timer import PhaseTimer
from sws_dist.distributed.signals import deferred_signals
from sws_dist.distributed.step_sync import StepStatus, StepSync
from sws_dist.distributed.step_timer import SAVING, WAITING_FOR_DATA
from sws_dist.errors import RunError, Stopped
from sws_dist.logging.images import log_first_batch
from sws_dist.logging.peaks import describe_peak
from sws_dist.logging.startup import RunHeader, log_run_header
from sws_dist.logging.throughput import SlowStepDetector
from sws_dist.models.losses import LossParts
from sws_dist.prepare import describe_stream
from sws_dist.results import collect_results, log_summary
from sws_dist.run_dir import CHECKPOINTS, write_configs
from sws_dist.validation import OWN, score_run
from sws_dist.watch import StepWatch
from sws_dist.zero.engine import StepResult, all_weights_finite, backward, take_step

log = logging.getLogger(__name__)


class Trainer:
    """Train the run that ``build_run`` has built, on this rank."""

    def __init__(self, parts: RunParts) -> None:
        self.parts = parts
        self.step = 0
        self.best_top1: float | None = None
        self.history: list[dict[str, float]] = []
        self._seconds_before, self._rank_seconds_before, self._start = 0.0, 0.0, time.perf_counter()
        self._result = StepResult(applied=False, grad_norm=None)
        if parts.resumed is not None:
            state = parts.resumed.state
            self.step, self.best_top1, self.history = state.step, state.best_top1, list(state.history)
            self._seconds_before, self._rank_seconds_before = state.seconds, state.rank_seconds
        config = parts.config.train
        self._last_step = min(parts.total_steps, config.max_steps or parts.total_steps)
        self._watch = StepWatch(parts, range(self.step + 1, self._last_step + 1))
        self._loader = self._build_loader()
        schedule = parts.lr_schedule
        self._checkpoints = CheckpointWriter(
            parts.output / CHECKPOINTS,
            parts.engine,
            parts.ema,
            parts.world,
            parts.config.checkpoint,
            newest=parts.resumed.checkpoint if parts.resumed else None,
            before_decay=schedule.decay_start if schedule.is_wsd else None,
        )

    # ---- the run -------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any] | None:
        """Train to the end (or ``train.max_steps``), then write the run's results.

        Returns:
            What ``metrics.json`` holds, on every rank; None if ``train.max_steps`` came before the end.

        Raises:
            Stopped: on all ranks, once the run is saved: one of them was told to stop (see ``distributed/signals.py``).
        """
        with deferred_signals(), self.parts.heartbeat.monitoring(), closing(self._watch) as watch:
            try:
                self._log_start()
                self._checkpoints.prune()  # a kill after saving leaves one checkpoint too many
                self._train(watch)
                result = self._finish() if self.step == self.parts.total_steps else None
            except Exception as error:  # Stopped too
                if isinstance(error, RunError) or self.parts.world.size == 1:  # all ranks are here
                    self._checkpoints.complete_after_failure()
                try:
                    self.parts.recorder.close()
                except OSError as problem:  # what ended the run says more, and decides its exit code
                    log.warning("the last lines of the log cannot be written: %s", problem)
                raise
            self.parts.recorder.close()
            return result

    def _train(self, watch: StepWatch) -> None:
        heartbeat, batches = self.parts.heartbeat, iter(self._loader)
        checks = [self._checkpoints.check, self._require_no_failure, self.parts.nonfinite.check]
        sync = StepSync([*checks, SlowStepDetector().check])
        self._run_pending_evaluation()
        heartbeat.finish_step()
        watch.leave_out()
        while self.step < self._last_step:
            with watch.step(self.step + 1):
                losses = self._train_step(batches, watch.timer)
            stop = sync.collect()  # of the step before
            self.step += 1
            heartbeat.step = self.step
            times = heartbeat.finish_step()
            failed = self._failure() is not None or self._checkpoints.has_failed
            applied, writing = self._result.applied, self._checkpoints.is_writing
            sync.post(self.step, losses.total, times, applied=applied, failed=failed, writing=writing)
            watch.finish_step(self.step, losses, times.data, self._result.grad_norm)
            if stop or self._ends_epoch() or self.step == self._last_step:
                stop = sync.collect() or stop
                self._evaluate_and_save(stop)
                watch.leave_out()
                heartbeat.finish_step()
        if self.step < self.parts.total_steps:
            log.info(
                f"stopped at step {self.step} of {self.parts.total_steps} (train.max_steps); --resume auto goes on"
            )

    def _train_step(self, batches: Iterator[Batch], timer: PhaseTimer) -> LossParts:
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
            timer.begin(phase_timer.DATA)
            with parts.heartbeat.phase(WAITING_FOR_DATA):
                batch = next(batches)  # from decoding on, the timer counts phase_timer.TO_DEVICE
            seen.append(batch.indices)
            losses.append(self._compute_losses(batch, timer, is_first=self.step == 0 and not losses))
            timer.begin(phase_timer.BACKWARD)
            backward(engine, losses[-1].total)
            timer.begin(phase_timer.OPTIMIZER)
            result = take_step(engine)
            if result is not None:  # the last micro-batch of the step
                self._result = result
        if parts.ema is not None and self._result.applied:
            parts.ema.update(self.step)
        timer.begin(phase_timer.OTHER)
        applied, overflowed = self._result.applied, self._result.overflowed
        parts.nonfinite.after_step(self.step + 1, seen, applied=applied, overflowed=overflowed)
        columns = zip(*losses, strict=True)  # totals, labels' terms, teacher's terms
        return LossParts(*(torch.stack([loss.detach().float() for loss in column]).mean() for column in columns))

    def _compute_losses(self, batch: Batch, timer: PhaseTimer, is_first: bool) -> LossParts:
        """Augment one micro-batch on the device, and compute its losses."""
        parts, config = self.parts, self.parts.config
        timer.begin(phase_timer.AUGMENT)
        images, targets = augment_batch(batch, parts.data.mixing, config.augment, config.train.seed)
        images = images.to(parts.dtype)
        teacher_logits = None
        if parts.teacher is not None:
            timer.begin(phase_timer.TEACHER)
            teacher_logits = parts.teacher.logits(images, batch)
        if is_first:
            timer.begin(phase_timer.OTHER)
            log_first_batch(parts.recorder, images, batch, teacher_logits, parts.data.train.classes, config.data)
        timer.begin(phase_timer.FORWARD)
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
        is_last = self.step >= self._last_step
        if stop or is_last or self._ends_epoch(self.parts.config.checkpoint.every):
            self._save(top1, wait=stop is not None or is_last)
        if stop:
            raise Stopped(f"told to stop ({stop}): saved at step {self.step} of {self.parts.total_steps}")

    def _evaluate(self) -> float | None:
        """Score the weights, and log the scores.

        Returns:
            The weights' top-1 at the model's own depth, or None if the run was told to stop meanwhile.
        """
        scores = score_run(self.parts, self.step)
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

    def _save(self, top1: float | None, wait: bool) -> None:
        """Save the run; without ``wait`` a thread writes while training goes on. A collective."""
        parts = self.parts
        state = {
            "step": self.step,
            "epoch": self._num_epochs(self.step),
            "seconds": self._elapsed_s(),
            "rank_seconds": self._rank_seconds(),
            "top1": top1,
            "best_top1": self.best_top1,
            "history": list(self.history),
        } | describe_stream(parts.config, parts.data.order, parts.total_steps)
        if not all_weights_finite(parts.engine):
            raise RunError(
                f"the weights are not finite after step {self.step}, which is therefore not saved; the last checkpoint "
                f"is untouched. {ADVICE}"
            )
        average_buffers(parts.engine.module)
        provenance = parts.models.info.provenance | {"step": self.step, "top1": top1}
        info = dataclasses.replace(parts.models.info, provenance=provenance)
        with parts.heartbeat.phase(SAVING):
            self._checkpoints.save(info, state, wait=wait)

    def _finish(self) -> dict[str, Any]:
        """Write the run's results: weights to use, and ``metrics.json``, whose presence says that the run is done.

        Returns:
            What ``metrics.json`` holds, on every rank.
        """
        parts = self.parts
        name = "learngene" if parts.models.info.kind == "learngene" else "model"
        with raise_on_all_ranks("write the final weights"):
            if parts.world.is_rank_zero:
                assert self._checkpoints.newest is not None
                export_weights(self._checkpoints.newest, parts.output / f"{name}.safetensors")
                if parts.ema is not None:
                    export_weights(self._checkpoints.newest, parts.output / f"{name}_ema.safetensors", average=True)
        result = None
        with raise_on_all_ranks("write the results"):
            if parts.world.is_rank_zero:
                result = collect_results(parts, self.history, self.best_top1, self._elapsed_s(), self._rank_seconds())
                train = parts.config.train
                atomic_write_json(parts.output / "metrics.json", result)
                settings = {"model": parts.config.model.name, "seed": train.seed, "lr": parts.lr_schedule.peak}
                settings |= {"epochs": train.epochs, "batch": train.global_batch}
                parts.recorder.hparams(settings, {"val/top1": result["top1"]})
                if parts.recorder.failure is not None:
                    raise parts.recorder.failure
                log_summary(result, parts.output, parts.output / f"{name}.safetensors", parts.world.device.type)
        return broadcast_from_rank0(result)

    # ---- logging -------------------------------------------------------------------------------------------------

    def _log_start(self) -> None:
        """Write the first lines of the log, and the resolved configs into the run's folder."""
        parts = self.parts
        if parts.world.is_rank_zero:
            for name, text in write_configs(parts.config, parts.ds, parts.provenance, parts.output).items():
                parts.recorder.text(name, text)
        if parts.lr_schedule.warmup_steps >= parts.total_steps:
            log.warning(
                f"the learning rate only rises: optim.warmup_epochs {parts.config.optim.warmup_epochs:g} is not less "
                f"than train.epochs {parts.config.train.epochs}"
            )
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
            peak=describe_peak(parts.world.device, parts.dtype),
        )
        log_run_header(header, parts.data.train, parts.data.val)

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
        loader = pipeline.train_loader(
            data.train, data.order, positions, data.recipe, seed, config.data, parts.world.device, data.bad_train
        )
        loader.before_transfer = partial(self._watch.timer.begin, phase_timer.TO_DEVICE)
        return loader

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

    def _rank_seconds(self) -> float:
        """Return the seconds of all ranks together, whose number may have changed between two starts."""
        return round(self._rank_seconds_before + (time.perf_counter() - self._start) * self.parts.world.size, 3)

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
