"""The training loop: one optimizer step after another, evaluated and saved at the ends of epochs.

What a step does is a function of its number (see ``data/sampler.py``, ``optim.Schedule``, ``comm.seed_everything``),
so a run that is stopped and resumed takes the steps that it would have taken.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from sws_dist.atomic import atomic_write_json
from sws_dist.build import DTYPES, build_student_engine, find_checkpoint, load_image_lists, plan_expansion, train_order
from sws_dist.build_models import build_models, count_flops, describe_student, num_layers
from sws_dist.checkpoint.checkpoint import (
    describe_layout,
    export_weights,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
    set_aside_newer,
)
from sws_dist.config.schema import RunConfig
from sws_dist.data import pipeline, sampler
from sws_dist.data.bad_images import BadImages
from sws_dist.data.draws import Recipe
from sws_dist.data.loader import Batch, Loader
from sws_dist.data.mixup import Mixing, erase
from sws_dist.distributed.collectives import average_buffers, raise_on_all_ranks
from sws_dist.distributed.heartbeat import DATA, LOG, Heartbeat
from sws_dist.distributed.init import init_distributed
from sws_dist.distributed.nonfinite import NonFiniteGuard
from sws_dist.distributed.signals import deferred_signals
from sws_dist.distributed.step_sync import StepStatus, StepSync, StopAwareIterator
from sws_dist.errors import RunError, Stopped
from sws_dist.evaluate import Scores, evaluate
from sws_dist.logging.images import log_first_batch
from sws_dist.logging.recorder import Recorder
from sws_dist.logging.startup import log_run_header
from sws_dist.logging.throughput import LogWindow, SlowStepDetector
from sws_dist.models.flops import TRAIN_FACTOR
from sws_dist.models.losses import DistillationLoss, LossParts
from sws_dist.optim import LRSchedule
from sws_dist.run_dir import collect_provenance, prepare_output
from sws_dist.seed import seed_everything
from sws_dist.zero.config import precision_of, resolve_deepspeed_config
from sws_dist.zero.ema import ShardedEMA
from sws_dist.zero.engine import StepResult, all_weights_finite, take_step
from sws_dist.zero.schema import check_against_deepspeed


class Trainer:
    """One training run on this rank.

    Args:
        config: what to train.
        ds_path: the DeepSpeed JSON.
        resume: ``auto`` (the newest whole checkpoint of ``config.output``, if any), a checkpoint's folder, or None.

    Raises:
        ValueError, OSError, RunError: whatever the user can mend, on every rank.
    """

    def __init__(self, config: RunConfig, ds_path: str | Path, resume: str | None = None) -> None:
        self.config = config
        self.world = world = init_distributed(config.train.timeout_s)
        with raise_on_all_ranks("read the DeepSpeed config"):
            self.ds = resolve_deepspeed_config(ds_path, config, world.size)
            check_against_deepspeed(self.ds, ds_path, world.device)
        self.dtype = DTYPES[precision_of(self.ds)]
        self.output = prepare_output(config, resume, world)
        with raise_on_all_ranks("prepare the heartbeats"):
            self.watch = Heartbeat(self.output / "heartbeats", world, config.train.timeout_s)
        self.notes: list[str] = []
        """What the first lines of the log should say of the resume."""
        found = find_checkpoint(self.output, resume, world, self.notes)
        self.train_set, self.val_set = load_image_lists(config, self.output, resuming=found is not None, world=world)
        with raise_on_all_ranks("build the models"):
            seed_everything(config.train.seed)
            self.model, self.teacher, self.kernels = build_models(
                config, self.train_set.classes, world.device, self.dtype
            )
        expansion = None if found else plan_expansion(config, self.model)
        self.flops = count_flops(config, len(self.train_set.classes))
        self.parameters = sum(p.numel() for p in self.model.parameters())
        if self.teacher is not None:
            self.teacher.to(world.device, self.dtype)
        self.info = describe_student(config, self.model, self.train_set.classes)

        self.bad, self.bad_val = BadImages(self.train_set.bad), BadImages(self.val_set.bad)
        batches = sampler.eval_batches(len(self.val_set), world.rank, world.size, config.train.eval_batch)
        with raise_on_all_ranks("build the input pipeline"):
            self.order = train_order(config, self.train_set)
            self.recipe = Recipe(config.augment, config.data.image_size)
            self._val_loader = pipeline.eval_loader(self.val_set, batches, config.data, world.device, self.bad_val)
        images = config.train.epochs * self.order.epoch_size
        self.total_steps = images // config.train.global_batch
        if self.total_steps == 0:
            raise RunError(f"train.global_batch {config.train.global_batch} is more than the run's {images} images")
        self.schedule = LRSchedule(
            config.optim,
            config.train.global_batch,
            self.order.epoch_size / config.train.global_batch,
            self.total_steps,
        )
        self.loss = DistillationLoss(config.distill)
        self.mixing = Mixing(config.augment, len(self.train_set.classes), config.train.seed)

        self.engine, beginning = build_student_engine(config, self.model, self.ds, expansion, world, self.dtype)
        self.notes += beginning
        self.ema = ShardedEMA(self.engine, config.optim.ema_decay) if config.optim.ema_decay else None
        self._taken = StepResult(applied=False, grad_norm=None)
        self._checkpoint: Path | None = None
        self.step, self.seconds = 0, 0.0
        self.best_top1: float | None = None
        self.history: list[dict[str, float]] = []
        self._resume(found)
        self._clock = time.perf_counter()
        self.recorder = Recorder(self.output, world.is_main, self.total_steps, self.step)
        with raise_on_all_ranks("prepare to skip steps"):
            limit = config.train.skip_nonfinite
            self.nonfinite = NonFiniteGuard(limit, self.ds, self.output, self.train_set, self.recorder)

    # ---- the run -------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Train to the end (or ``train.max_steps``), then write the run's results.

        Raises:
            Stopped: on all ranks, once the run is saved: one of them was told to stop (see ``signals.py``).
        """
        with deferred_signals(), self.watch.watching():
            try:
                log_run_header(self)
                self._fit()
            finally:
                self.recorder.close()

    def _fit(self) -> None:
        last_step = min(self.total_steps, self.config.train.max_steps or self.total_steps)
        self._loader = self._batches(last_step)
        batches, window = iter(self._loader), LogWindow(self)
        ranks = StepSync([self._require_sound, self.nonfinite.judge, SlowStepDetector(self.recorder.say).judge])
        self._catch_up()
        self.watch.lap()
        while self.step < last_step:
            losses = self._train_step(batches)
            told = ranks.read()
            self.watch.step = self.step = self.step + 1
            lap, failed = self.watch.lap(), self._failure() is not None
            ranks.call(self.step, losses.total, lap, applied=self._taken.applied, failed=failed)
            window.add(losses, lap.data)
            self.recorder.advance()
            if self.step % self.config.train.log_every == 0 or self.step == last_step:
                with self.watch.doing(LOG):
                    window.log()
            if told or self._ends_epoch() or self.step == last_step:
                told = ranks.read() or told
                self._pause(told)
                window = LogWindow(self)
                self.watch.lap()
        if self.step == self.total_steps:
            self._finish()
        else:
            self.recorder.say(
                f"stopped at step {self.step} of {self.total_steps} (train.max_steps); --resume auto goes on"
            )

    def _train_step(self, batches: Iterator[Batch]) -> LossParts:
        """One optimizer step; the losses' means over this rank's micro-batches."""
        parts: list[LossParts] = []
        seen = []
        self.nonfinite.begin(self.engine.module)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = self.schedule(self.step)
        for _ in range(self.engine.gradient_accumulation_steps()):
            with self.watch.doing(DATA):
                batch = next(batches)
            seen.append(batch.indices)
            seed_everything(self.config.train.seed, batch.position)
            images = batch.images
            if batch.erase is not None:
                images = erase(images, batch.erase, self.config.augment.re_mode)
            images, targets = self.mixing(images, batch.labels, batch.position)
            images = images.to(self.dtype)
            teacher_logits = None if self.teacher is None else self.teacher(images)
            if self.step == 0 and not parts:
                log_first_batch(self, images, batch, teacher_logits)
            parts.append(self.loss(self.engine(images), targets, teacher_logits))
            self.engine.backward(parts[-1].total)
            self._taken = take_step(self.engine) or self._taken
        if self.ema is not None and self._taken.applied:
            self.ema.update()
        self.nonfinite.end(self.step + 1, seen, self._taken.applied)
        means = [torch.stack([p[i].detach().float() for p in parts]).mean() for i in range(len(LossParts._fields))]
        return LossParts(*means)

    def _catch_up(self) -> None:
        """The evaluation before the first step, or one that a stop has put off."""
        evaluated = bool(self.history) and self.history[-1]["step"] == self.step
        if self.step == 0 and self.config.train.eval_at_start:
            if self._evaluate() is None:
                raise Stopped("told to stop before the first step: there is nothing to save")
        elif self._evaluation_due() and not evaluated:
            self._pause(None)

    def _pause(self, told: str | None) -> None:
        """Evaluate and save where that is due. Told to stop, only save: an evaluation is whole, or after the resume.

        Raises:
            Stopped: on all ranks.
        """
        top1 = None
        if told is None and self._evaluation_due():
            top1 = self._evaluate()
            told = "during the evaluation" if top1 is None else None
        last = self.step in (self.total_steps, self.config.train.max_steps)
        epoch = self._epochs_done(self.step)
        if told or last or (self._ends_epoch() and epoch % self.config.checkpoint.every == 0):
            self._save(epoch, top1)
        if told:
            raise Stopped(f"told to stop ({told}): saved at step {self.step} of {self.total_steps}")

    def _evaluate(self) -> float | None:
        """Score the weights, and their average where one is kept. Returns the weights' top-1; None: told to stop."""
        average_buffers(self.engine.module)
        found = {"val": self._score()}
        if self.ema is not None and found["val"] is not None:
            with self.ema.applied():
                found["val_ema"] = self._score()
        scores = {group: s for group, s in found.items() if s is not None}
        if len(scores) < len(found):
            return None
        values = {
            f"{group}/{name}": getattr(s, name) for group, s in scores.items() for name in ("top1", "top5", "loss")
        }
        epoch = self._epochs_done(self.step)
        self.recorder.scalars(self.step, values)
        self.history.append({"epoch": epoch, "step": self.step, "seconds": self._elapsed(), **values})
        top1 = scores["val"].top1
        self.best_top1 = max(top1, self.best_top1 or 0.0)
        averaged = f"  averaged {100 * scores['val_ema'].top1:.2f} %" if "val_ema" in scores else ""
        self.recorder.say(
            f"epoch {epoch}/{self.config.train.epochs}  step {self.step}/{self.total_steps}  "
            f"val top-1 {100 * top1:.2f} %{averaged}  loss {scores['val'].loss:.4f}  ({scores['val'].images} images)"
        )
        return top1

    def _score(self) -> Scores | None:
        self.engine.eval()
        self.bad_val.clear()
        batches = StopAwareIterator(self._val_loader, self.world.device, self.watch.moved)
        with self.watch.doing("evaluating"):
            scores = evaluate(self.engine, batches, self.dtype)
        self._tell_of(self.bad_val, 0, len(self.val_set))
        self.engine.train()
        return None if batches.told else scores

    def _save(self, epoch: int, top1: float | None) -> None:
        state = {
            "step": self.step,
            "epoch": epoch,
            "seconds": self._elapsed(),
            "top1": top1,
            "best_top1": self.best_top1,
            "history": self.history,
        } | self._stream()
        if not all_weights_finite(self.engine):
            raise RunError(
                f"the weights are not finite after step {self.step}, which is therefore not saved; the last checkpoint "
                "is untouched. A lower optim.lr, more warm-up or gradient_clipping usually helps"
            )
        average_buffers(self.engine.module)
        folder, keep = self.output / "checkpoints", self.config.checkpoint
        info = self._described()
        with self.watch.doing("saving"):
            self._checkpoint = save_checkpoint(folder, self.engine, self.ema, info, self.world, state)
        if self.world.is_main:
            try:
                prune_checkpoints(folder, keep.keep_last, keep.keep_best)
            except OSError as error:  # the new checkpoint is whole: what is left of old ones costs room, no more
                self.recorder.say(f"an old checkpoint could not be deleted: {error}")

    def _finish(self) -> None:
        """The run's results: weights to use, and ``metrics.json``, whose presence says that the run is done."""
        name = "learngene" if self.info.kind == "learngene" else "model"
        with raise_on_all_ranks("write the final weights"):
            if self.world.is_main:
                assert self._checkpoint is not None
                export_weights(self._checkpoint, self.output / f"{name}.safetensors")
                if self.ema is not None:
                    export_weights(self._checkpoint, self.output / f"{name}_ema.safetensors", average=True)
        if self.world.is_main:
            result = self._results()
            atomic_write_json(self.output / "metrics.json", result)
            settings = {"model": self.config.model.name, "seed": self.config.train.seed, "lr": self.schedule.peak}
            settings |= {"epochs": self.config.train.epochs, "batch": self.config.train.global_batch}
            self.recorder.hparams(settings, {"final/top1": result["top1"]})
            self.recorder.say(f"done: top-1 {100 * result['top1']:.2f} %, {self.output / name}.safetensors")

    def _results(self) -> dict[str, Any]:
        images, teacher = self.total_steps * self.config.train.global_batch, self.flops.teacher
        last = self.history[-1]
        return {
            "model": self.config.model.name,
            "depth": num_layers(self.model),
            "parameters": self.parameters,
            "top1": last["val/top1"],
            "top5": last["val/top5"],
            "top1_ema": last.get("val_ema/top1"),
            "best_top1": self.best_top1,
            "history": self.history,
            "seed": self.config.train.seed,
            "epochs": self.config.train.epochs,
            "steps": self.total_steps,
            "images": images,
            "validation_images": len(self.val_set),
            "seconds": self._elapsed(),
            "rank_seconds": round(self._elapsed() * self.world.size, 3),
            "flops_forward": self.flops.student,
            "flops_teacher": teacher,
            "flops": None if teacher is None else images * (TRAIN_FACTOR * self.flops.student + teacher),
            **describe_layout(self.engine, self.world),
            **collect_provenance(),
        }

    # ---- help ----------------------------------------------------------------------------------------------------

    def _batches(self, last_step: int) -> Loader:
        accumulation = self.engine.gradient_accumulation_steps()
        num_micros = accumulation * self.world.size
        positions = (
            sampler.micro_batch_positions(
                step, self.config.train.global_batch, i * self.world.size + self.world.rank, num_micros
            )
            for step in range(self.step, last_step)
            for i in range(accumulation)
        )
        seed, data = self.config.train.seed, self.config.data
        return pipeline.train_loader(
            self.train_set, self.order, positions, self.recipe, seed, data, self.world.device, self.bad
        )

    def tell_of_bad_images(self) -> None:
        """Log what could not be read since the last call; RunError on all ranks if it is too much. A collective."""
        epoch = (self.step * self.config.train.global_batch - 1) // self.order.epoch_size
        self._tell_of(self.bad, epoch, self.order.epoch_size)

    def _tell_of(self, bad: BadImages, epoch: int, epoch_size: int) -> None:
        for line in bad.exchange(self.world.device, epoch, epoch_size, self.config.data.max_bad_share):
            self.recorder.say(line)

    def _ends_epoch(self) -> bool:
        return self.step > 0 and self._epochs_done(self.step) > self._epochs_done(self.step - 1)

    def _evaluation_due(self) -> bool:
        every = self.config.train.eval_every
        return self.step == self.total_steps or (self._ends_epoch() and self._epochs_done(self.step) % every == 0)

    def _epochs_done(self, step: int) -> int:
        if step == self.total_steps:  # what is left of the last epoch is less than a batch
            return self.config.train.epochs
        return step * self.config.train.global_batch // self.order.epoch_size

    def _elapsed(self) -> float:
        """Seconds of this run, over all its resumes."""
        return round(self.seconds + time.perf_counter() - self._clock, 3)

    def _stream(self) -> dict[str, int]:
        """What decides which images and draws a step sees: a run goes on only with the same."""
        return {
            "global_batch": self.config.train.global_batch,
            "seed": self.config.train.seed,
            "epoch_size": self.order.epoch_size,
            "total_steps": self.total_steps,
        }

    def _described(self) -> Any:
        top1 = self.history[-1]["val/top1"] if self.history else None
        return dataclasses.replace(self.info, provenance=self.info.provenance | {"step": self.step, "top1": top1})

    def grad_norm(self) -> float:
        """Of the latest step's gradient, before clipping."""
        norm = self._taken.grad_norm
        return math.nan if norm is None else float(norm)

    def _failure(self) -> Exception | None:
        """Why this rank cannot go on, if so."""
        return self._loader.failure or self.recorder.failure

    def _require_sound(self, answers: StepStatus) -> None:
        if answers.failed:
            with raise_on_all_ranks(f"take step {answers.step}"):
                if (failure := self._failure()) is not None:
                    raise failure

    def _resume(self, found: Path | None) -> None:
        self._checkpoint = found
        if found is None:
            return
        state = load_checkpoint(found, self.engine, self.ema, self.world, self._stream())
        for key, value in describe_layout(self.engine, self.world).items():
            if getattr(state, key) != value:
                self.notes.append(f"going on with {key} {value}; the checkpoint was written with {getattr(state, key)}")
        for aside in set_aside_newer(self.output / "checkpoints", state.step, self.world):
            self.notes.append(f"set aside as {aside}: it is later than the checkpoint that this run goes on from")
        self.step, self.seconds = state.step, state.seconds
        self.best_top1, self.history = state.best_top1, list(state.history)
