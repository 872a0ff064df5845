"""Build the model of a run, the student, with its initial weights, and count what the run computes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from timm.layers import use_reentrant_ckpt
from torch import nn

from sws_dist.checkpoint.foreign_model import describe_file
from sws_dist.checkpoint.load_model import load_initial_weights
from sws_dist.checkpoint.model_file import (
    ModelInfo,
    describe_other_normalisation,
    describe_preprocessing,
    find_model_info,
)
from sws_dist.config.schema import ModelConfig, RunConfig
from sws_dist.distill.teacher import count_teacher_flops
from sws_dist.learngene.elastic import ElasticDepth, stage_repeats
from sws_dist.learngene.file import describe_model
from sws_dist.models import SWSVisionTransformer, create_model, geometry
from sws_dist.models.flops import TRAIN_FACTOR, forward_flops
from sws_dist.models.image_size import image_size_arguments, require_image_size
from sws_dist.models.kernel_backend import enable_cuda_graphs, select_kernels

log = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The precision that a DeepSpeed config asks for -> the model's dtype."""


@dataclass(frozen=True)
class ModelParts:
    """The models of a run, before DeepSpeed wraps the student."""

    student: Any
    """With its initial weights; on the meta device if it starts from a learngene, which is written into its shards
    later."""
    kernels: str
    """A log message: which code runs the student's stages."""
    flops: Flops
    elastic: ElasticDepth | None
    """The depth of each step; None: always the model's own."""
    eval_repeats: dict[str, tuple[int, ...] | None]
    """Suffix of a score's name -> repeats of each stage; the model's own come last, with suffix "". None: a model that
    has no stages."""
    num_parameters: int
    info: ModelInfo
    """Metadata of the run's weight files."""


class Flops(NamedTuple):
    """Floating-point operations of one forward pass over one image."""

    student: int
    """At the model's own depth."""
    layer: int
    """The operations of one layer more, where the depth is drawn for each step; else 0."""
    teacher: int | None
    """0 where none runs; None: torch cannot count the operations of this model."""


def build_models(
    config: RunConfig,
    classes: Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
    provenance: dict[str, Any],
    epoch_size: int,
) -> ModelParts:
    """Build the student.

    Args:
        epoch_size: number of images of an epoch.
        provenance: what ``collect_provenance`` returned, for the run's weight files.
        device, dtype: where and in what it will run, once DeepSpeed has moved it there.

    Raises:
        ValueError: an unknown model or argument, weights that do not fit, kernels that cannot run.
    """
    with torch.device("meta") if config.model.initial_learngene else nullcontext():
        student = build_student(config, len(classes))
    if config.model.initial_checkpoint:
        _load_initial_checkpoint(student, config, classes)
    if not config.model.initial_learngene:  # on the meta device nothing can run; our models are built for their images
        require_image_size(student, f"model.name {config.model.name}", config.data.image_size)
    elastic = elastic_depth(config, student, epoch_size)
    if config.optim.ema_decay and any(b.is_floating_point() for b in student.buffers()):
        raise ValueError(
            f"optim.ema_decay: {config.model.name} has running statistics, which are not averaged; "
            "set optim.ema_decay to null"
        )
    eval_repeats = _eval_repeats(config, student)
    num_depths = len({*(elastic.depths if elastic else ()), *config.train.eval_depths, None})
    kernels = _configure_execution(config.model, student, elastic, num_depths, device, dtype)
    num_parameters = sum(p.numel() for p in student.parameters())
    return ModelParts(
        student=student,
        kernels=kernels,
        flops=count_flops(config, len(classes)),
        elastic=elastic,
        eval_repeats=eval_repeats,
        num_parameters=num_parameters,
        info=_describe_student(config, student, classes, provenance),
    )


def elastic_depth(config: RunConfig, student: Any, epoch_size: int) -> ElasticDepth | None:
    """Return the depth of each step, or None where none is drawn.

    Args:
        epoch_size: number of images of an epoch.

    Raises:
        ValueError: a model without a choice of depths, or depths that it cannot be trained at.
    """
    if config.model.elastic is None:
        return None
    if not (isinstance(student, SWSVisionTransformer) and student.is_shared):
        raise ValueError(
            "model.elastic: only an auxiliary model, whose stages share weights, can be trained at many depths; leave "
            "it out here"
        )
    steps_per_epoch = epoch_size / config.train.global_batch
    return ElasticDepth(config.model.elastic, student.schedule, config.train.seed, steps_per_epoch)


def _eval_repeats(config: RunConfig, student: Any) -> dict[str, tuple[int, ...] | None]:
    """Return what ``ModelParts.eval_repeats`` holds."""
    if not config.train.eval_depths:
        return {"": student.schedule if isinstance(student, SWSVisionTransformer) else None}
    if not isinstance(student, SWSVisionTransformer):
        raise ValueError(
            f"train.eval_depths: {config.model.name} has one depth, only models of ours have a choice; leave it out"
        )
    plan = config.train.eval_plan or (config.model.elastic.plan if config.model.elastic else "even")
    repeats = {depth: stage_repeats(student.schedule, depth, plan) for depth in config.train.eval_depths}
    for depth, found in repeats.items():
        if min(found) < 1 and plan != "spaced":
            raise ValueError(
                f"train.eval_depths {depth}: the {len(found)} stages need a layer each; train.eval_plan: spaced "
                "leaves some out"
            )
    return {**{f"_depth{depth}": found for depth, found in repeats.items()}, "": student.schedule}


def _configure_execution(
    config: ModelConfig,
    student: Any,
    elastic: ElasticDepth | None,
    num_depths: int,
    device: torch.device,
    dtype: torch.dtype,
) -> str:
    """Choose kernels, CUDA graphs, recomputation and compilation. Returns a log message about the kernels.

    Args:
        num_depths: number of depths that the run trains or scores, the model's own among them.
    """
    kernels = select_kernels(config.kernels, student, device, dtype, config.operators)
    if config.cuda_graphs:
        repeats = [elastic.repeats(depth) for depth in elastic.depths] if elastic else []
        kernels += f", {enable_cuda_graphs(student, device, repeats)}"
    if config.grad_checkpointing:
        if use_reentrant_ckpt():
            raise ValueError(
                "model.grad_checkpointing: timm is set to reentrant checkpointing (TIMM_REENTRANT_CKPT), which fails "
                "under ZeRO-2 and can be silently wrong under ZeRO-3; unset it"
            )
        try:
            student.set_grad_checkpointing(True)
        except (AssertionError, AttributeError):  # timm asserts, or the model has no such method
            raise ValueError(f"model.grad_checkpointing: {config.name} cannot recompute its activations") from None
    if config.compile and num_depths > 1:
        _compile_stages(student, num_depths)
    elif config.compile:
        student.compile()
    return kernels


def _compile_stages(student: Any, num_depths: int) -> None:
    """Compile the stages one by one, so that not each depth of the whole model is another graph.

    The stages share a graph for each repeat count. With drop-path, the rates of a stage's positions, which are other
    ones at each depth, are part of the graph.
    """
    limit = 2 * len(student.blocks) * num_depths  # in training and in evaluation
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, limit)
    for stage in student.blocks:
        stage.compile()


def build_student(config: RunConfig, num_classes: int) -> Any:
    """Build the configured model with random weights.

    Raises:
        ValueError: an unknown model or argument, or one that is given elsewhere.
    """
    if "num_classes" in config.model.kwargs:
        raise ValueError(f"num_classes in model.kwargs: a model has a label for each class of the data, {num_classes}")
    kwargs: dict[str, Any] = {"num_classes": num_classes, **_model_arguments(config)}
    if config.model.drop_path:
        kwargs["drop_path_rate"] = config.model.drop_path
    if config.model.elastic is not None:
        if "branch_scaling" in config.model.kwargs:
            raise ValueError("branch_scaling in model.kwargs: with model.elastic it is model.elastic.branch_scaling")
        kwargs["branch_scaling"] = config.model.elastic.branch_scaling
    return create_model(config.model.name, **kwargs)


def _model_arguments(config: RunConfig) -> dict[str, Any]:
    """Return the arguments that say what the model computes: the config's, and the size of its images."""
    layers = {"depth": config.model.depth, "schedule": config.model.schedule}
    given = {key: value for key, value in layers.items() if value is not None}
    return image_size_arguments(config.model.name, config.data.image_size) | config.model.kwargs | given


def _load_initial_checkpoint(model: Any, config: RunConfig, classes: Sequence[str]) -> None:
    """Load ``model.initial_checkpoint``, and compare the geometries, which equal shapes could hide."""
    path = config.model.initial_checkpoint
    assert path is not None
    is_ours = isinstance(model, SWSVisionTransformer)
    info = find_model_info(path) if is_ours else describe_file(path, config.model.name)
    if info is not None and (note := describe_other_normalisation(path, info, config.data)) is not None:
        log.warning(note)
    if info is not None and is_ours:
        ours = geometry(model)
        differ = [
            f"{key}: {info.kwargs[key]} in the file, {ours[key]} in the config"
            for key in ("schedule", "patch_size", "num_heads", "class_token", "global_pool", "norm_eps")
            if key in info.kwargs and info.kwargs[key] != ours[key]
        ]
        scaling = info.kwargs.get("branch_scaling", 0.0)  # at the schedule's own depth it has no effect
        if len(set(info.trained_depths)) > 1 and scaling != ours["branch_scaling"]:
            differ.append(f"branch_scaling: {scaling} in the file, {ours['branch_scaling']} in the config")
        if differ:
            raise ValueError(f"model.initial_checkpoint {path} is of another model: {'; '.join(differ)}")
    elif info is not None:
        _warn_of_other_arguments(model, info, config)
    load_initial_weights(model, path, classes, config.data.image_size, use_ema=config.model.initial_ema)


def _warn_of_other_arguments(model: nn.Module, info: ModelInfo, config: RunConfig) -> None:
    """Warn of arguments of a file's timm model that this run's lacks: the shapes do not show a head count."""
    given = _model_arguments(config)
    others = [
        f"{key}: {value}"
        for key, value in info.kwargs.items()
        if key != "img_size" and value not in (given.get(key), getattr(model, key, None))
    ]
    if others:
        log.warning(
            f"model.initial_checkpoint {config.model.initial_checkpoint}: its model was built with "
            f"{', '.join(others)}, this run's is not (model.kwargs)"
        )


def count_flops(config: RunConfig, num_classes: int) -> Flops:
    """Count the operations of student and teacher."""
    size = config.data.image_size
    student = forward_flops(lambda: build_student(config, num_classes), size)
    layer = count_layer(config, num_classes) if config.model.elastic else 0
    online = config.distill.logits is None
    return Flops(student, layer, count_teacher_flops(config.distill, size) if online else 0)


def count_layer(config: RunConfig, num_classes: int) -> int:
    """Count the operations of one layer of an auxiliary model."""

    def build(extra: int) -> Any:
        model = build_student(config, num_classes)
        model.set_repeats((model.schedule[0] + extra, *model.schedule[1:]))
        return model

    own, deeper = (forward_flops(partial(build, extra), config.data.image_size) for extra in (0, 1))
    return deeper - own


def step_flops(flops: Flops, elastic: ElasticDepth | None, global_batch: int, depth: int | None = None) -> int | None:
    """Return the operations of a step, the teacher's among them; None if torch cannot count those.

    Args:
        depth: the layers that the step runs; None: the model's own.
    """
    if flops.teacher is None:
        return None
    layers = 0 if depth is None or elastic is None else depth - sum(elastic.schedule)
    return global_batch * (TRAIN_FACTOR * (flops.student + layers * flops.layer) + flops.teacher)


def training_flops(flops: Flops, elastic: ElasticDepth | None, total_steps: int, global_batch: int) -> int | None:
    """Return the operations of a whole run; None if torch cannot count the teacher's."""
    depths = {None: total_steps} if elastic is None else elastic.count_steps(total_steps)
    found = 0
    for depth, count in depths.items():
        if (one := step_flops(flops, elastic, global_batch, depth)) is None:
            return None
        found += count * one
    return found


def num_layers(model: nn.Module) -> int | None:
    """Return the number of layers that an image passes through; None for models that are not ours."""
    return sum(model.schedule) if isinstance(model, SWSVisionTransformer) else None


def _find_expansion(initial_checkpoint: str | None) -> dict[str, Any] | None:
    """Return plan and learngene of the descendant that a run starts from, however often it was fine-tuned before."""
    info = find_model_info(initial_checkpoint) if initial_checkpoint else None
    known = info.provenance if info else {}
    if "plan" in known:
        return {"plan": known["plan"], "learngene": known.get("learngene")}
    if start := known.get("initial_learngene"):
        return {"plan": None, "learngene": start}
    return known.get("expansion")


def _describe_student(
    config: RunConfig, model: nn.Module, classes: Sequence[str], provenance: dict[str, Any]
) -> ModelInfo:
    """Return what the run's weight files will say of the student."""
    about: dict[str, Any] = {
        "preprocessing": describe_preprocessing(config.data),
        "classes": list(classes),
        "provenance": {
            "run": config.output,
            "model": config.model.name,
            "epochs": config.train.epochs,
            "seed": config.train.seed,
            "teacher": config.distill.teacher,
            "teacher_logits": config.distill.logits,
            "initial_checkpoint": config.model.initial_checkpoint,
            "initial_learngene": config.model.initial_learngene,
            "expansion": _find_expansion(config.model.initial_checkpoint),
            **provenance,
        },
    }
    if isinstance(model, SWSVisionTransformer):
        if model.is_shared:
            elastic = config.model.elastic
            own = sum(model.schedule)
            about["trained_depths"] = [elastic.min_depth, elastic.max_depth] if elastic else [own, own]
            about["provenance"]["elastic_plan"] = elastic.plan if elastic else None
        return describe_model(model, "learngene" if model.is_shared else "model", **about)
    return ModelInfo("model", config.model.name, _model_arguments(config), len(classes), **about)
