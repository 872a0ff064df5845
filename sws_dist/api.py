"""Train, expand and evaluate from Python: what the commands ``sws train``, ``sws expand`` and ``sws evaluate`` call.

``import sws_dist`` offers these functions under its own name; see there. In the examples, ``data/digits`` is what
``python -m sws_dist.data.digits data/digits`` writes.
"""

from __future__ import annotations

import atexit
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from sws_dist.checkpoint.open_model import find_run_weights, open_model
from sws_dist.class_names import name_labels
from sws_dist.config.loader import load_config
from sws_dist.config.resume import finished_metrics
from sws_dist.config.schema import DEFAULT_NUM_THREADS, MAX_BATCH, RunConfig
from sws_dist.data.tar_shards import DEFAULT_KEYS, SampleKeys
from sws_dist.distributed.collectives import gather_on_rank0, raise_on_all_ranks
from sws_dist.distributed.init import close_distributed, init_distributed
from sws_dist.inference import input_config
from sws_dist.learngene.expand import build_descendant, plan_layers
from sws_dist.learngene.file import Learngene, load_learngene
from sws_dist.models import SWSVisionTransformer
from sws_dist.models.evaluation_mode import evaluation_mode
from sws_dist.models.image_size import require_image_size
from sws_dist.progress import track
from sws_dist.scoring import Predictions, Scores, save_predictions, score_batches

if TYPE_CHECKING:
    from sws_dist.data.manifest import Manifest

__all__ = ["evaluate", "evaluate_depths", "expand", "train"]

EVALUATION_TIMEOUT_S = 1800
_OF_ONE_FILE = {"model_name", "use_ema", "predictions"}
"""Arguments of ``evaluate`` that say how one file is read or written."""

log = logging.getLogger(__name__)


def train(
    config: RunConfig | str | Path,
    deepspeed_config: str | Path | Mapping[str, Any],
    *,
    resume: str | None = None,
) -> dict[str, Any] | None:
    """Train the model that ``config`` describes, on this rank. A collective of all ranks.

    A single process trains alone. To train on several ranks, start the program that calls this function with
    ``deepspeed``, ``torchrun`` or ``srun``. The process group stays open until the process ends.

    Args:
        config: what to train: what ``load_config`` returned, a YAML file, or the name of a shipped config.
        deepspeed_config: how the run is sharded: a DeepSpeed JSON file, the name of a shipped one (``zero2_bf16``), or
            its content.
        resume: ``auto`` goes on from the newest valid checkpoint of ``config.output``, if there is one, and trains no
            run that is finished; a path goes on from that checkpoint. None starts anew. The config has to be that of
            the run that goes on, but for keys that docs/config.md marks.

    Returns:
        What the run's ``metrics.json`` holds, on every rank: ``top1`` and ``top5`` (shares in [0, 1]), ``history`` (one
        dictionary an evaluation), ``parameters``, ``steps``, ``seconds``, ... The weights are in
        ``<config.output>/learngene.safetensors`` for a model whose stages share weights, else in ``model.safetensors``.
        None if ``train.max_steps`` stopped the run before its end. The log goes to Python's ``logging``, under
        ``sws_dist``; ``sws_dist.logging.console.setup_console`` shows it as the commands do.

    Raises:
        ValueError, OSError: a wrong config, data or weights that cannot be read.
        RunError: the same where several ranks run: all of them raise it together.
        Stopped: a signal told the run to stop, and it has saved (see ``sws_dist/distributed/signals.py``).

    Examples:
        >>> import sws_dist
        >>> config = sws_dist.load_config("quickstart/auxiliary", [
        ...     "output=runs/auxiliary", "data.root=data/digits", "distill.teacher=null",
        ...     "train.global_batch=721", "train.epochs=1"])
        >>> metrics = sws_dist.train(config, {"zero_optimization": {"stage": 1}})
        >>> metrics["steps"], metrics["validation_images"]
        (2, 355)
    """
    from sws_dist.build import build_run  # needs DeepSpeed and DALI
    from sws_dist.trainer import Trainer

    run = config if isinstance(config, RunConfig) else load_config(config)
    if resume and (metrics := finished_metrics(run)) is not None:
        return metrics
    atexit.register(close_distributed)
    return Trainer(build_run(run, deepspeed_config, resume)).run()


def expand(
    learngene: Learngene | str | Path,
    depth: int,
    *,
    plan: str | Sequence[int] = "even",
    num_classes: int | None = None,
    image_size: int | None = None,
    seed: int = 0,
    branch_scaling: float | None = None,
) -> SWSVisionTransformer:
    """Expand a learngene into a descendant: copy each stage's layer to as many layers as the plan says.

    The layers of TLEG's learngene are not copied, but computed from theta_A and theta_B; they need no plan.

    Args:
        learngene: what ``load_learngene`` returned, or its file. With ``spaced`` or explicit layers it may be a
            ``model.safetensors`` too, whose layers are then taken.
        depth: the descendant's layers. A depth below the number of stages drops stages, with a warning in the log.
        plan: ``even`` (as many layers to each stage, the remainder to the earliest), ``proportional`` to the
            learngene's own schedule, ``spaced`` (stages at even distances), or the stage of each layer:
            ``[0, 0, 1, 2, 3, 4]``.
        num_classes: another number than the learngene's gives a fresh head.
        image_size: height and width in pixels; another size than the learngene's resamples the position embedding.
        seed: of a fresh head.
        branch_scaling: exponent of the factors that the branches of repeated layers get. Default: as the auxiliary
            model was trained. 1 makes descendants of one that was trained at its own depth alone better untuned.

    Returns:
        The descendant: a float32 model on the CPU that maps images [batch, 3, image_size, image_size] to logits
        [batch, num_classes]. Its state dict fits plain timm's ViT (``sws_dist.models.geometry.timm_arguments``), and
        ``pretrained_cfg`` says how its images are normalised.

    Raises:
        ValueError: a file that holds no learngene, or a plan of the wrong length, range or order.

    Examples:
        >>> import sws_dist, torch
        >>> learngene = sws_dist.load_learngene("runs/auxiliary/learngene.safetensors")
        >>> model = sws_dist.expand(learngene, depth=8, num_classes=37, image_size=48)
        >>> len(model.blocks), model(torch.zeros(2, 3, 48, 48)).shape
        (8, torch.Size([2, 37]))
    """
    source = learngene if isinstance(learngene, Learngene) else load_learngene(learngene)
    layers = plan_layers(source.info, depth, plan)
    options = {"num_classes": num_classes, "image_size": image_size, "seed": seed, "branch_scaling": branch_scaling}
    return build_descendant(source, layers, **options)[1]


def evaluate(
    model: nn.Module | str | Path,
    data: str | Path,
    *,
    model_name: str | None = None,
    classes: str | Path | Sequence[str] | None = None,
    numeric_classes: bool = False,
    use_ema: bool = True,
    image_size: int | None = None,
    crop_pct: float | None = None,
    batch_size: int = 128,
    num_threads: int = DEFAULT_NUM_THREADS,
    predictions: str | Path | None = None,
    shard_keys: SampleKeys = DEFAULT_KEYS,
) -> Scores:
    """Score a model on a folder of images, each image counted once. A collective of all ranks, which share the images.

    Each call leaves some idle threads behind, since DALI never frees those of its input; a process that scores hundreds
    of times should do so in processes of their own.

    Args:
        model: maps images [batch, 3, height, width] to logits [batch, classes]: a timm model (whose
            ``pretrained_cfg`` says how its images are normalised, resized and cropped), or what ``sws evaluate`` opens:
            a file of weights, a finished run, a timm folder, an ONNX file of ``sws export``. A model is moved to this
            rank's device.
        data: a folder of class folders or of tar shards; its classes may be fewer than the model's labels. Their names
            are matched with those of the labels, if the model knows them or knows as many labels as ImageNet has;
            otherwise the sorted folders are labels 0, 1, 2, ...
        model_name: the timm model that a file's weights are of; not needed for files that say it, as ours do.
        classes: what the model's labels are called, in order, or a file with one name a line.
        numeric_classes: True if the folders are called by the numbers of their labels.
        use_ema: take averaged weights where the file has them beside others.
        image_size: height and width in pixels; a file's model is built for another size than its own.
        crop_pct: share of the resized image that is cropped; None: the model's own.
        batch_size: images at a time on one rank.
        num_threads: threads of one rank that decode images.
        predictions: an ``.npz`` file to write, with arrays ``path``, ``label`` and ``logits`` (float32), one row an
            image.
        shard_keys: how a sample's image and label are called in tar shards.

    Returns:
        Top-1, top-5 and loss over all images, the same on every rank.

    Raises:
        ValueError: weights that do not fit, a model that does not say how it wants its images, other classes than the
            model's, or too many unreadable images. A ``RunError`` where several ranks run.

    Examples:
        >>> import sws_dist
        >>> model = sws_dist.expand("runs/auxiliary/learngene.safetensors", depth=10)
        >>> scores = sws_dist.evaluate(model, "data/digits/val")
        >>> scores == sws_dist.evaluate("runs/auxiliary/learngene.safetensors", "data/digits/val")
        True
        >>> scores.images
        355
    """
    from sws_dist.data import manifest, pipeline, sampler  # needs DALI
    from sws_dist.data.bad_images import BadImages, describe_bad_files

    atexit.register(close_distributed)
    world = init_distributed(EVALUATION_TIMEOUT_S)
    with raise_on_all_ranks("load the model and list the images"):
        if not 1 <= batch_size <= MAX_BATCH:
            raise ValueError(f"a batch of {batch_size} images: expected 1 to {MAX_BATCH}")
        place = Path(os.path.abspath(data))
        if isinstance(model, nn.Module):
            scored, name = model, "the model"
        else:
            scored, name = open_model(model, model_name, image_size=image_size, use_ema=use_ema), str(model)
        config = input_config(scored, name, place.parent, image_size, crop_pct, num_threads)
        require_image_size(scored, name, config.image_size)
        labels = name_labels(scored, name, place, classes=classes, numeric=numeric_classes, keys=shard_keys)
        images = manifest.scan(place.parent, place.name, labels, keys=shard_keys)
    for line in (*images.notes, *describe_bad_files(images.bad)):
        log.warning(line)
    scored.to(world.device)
    dtype, bad = next(scored.parameters()).dtype, BadImages(images.bad)
    batches = sampler.eval_batches(len(images), world.rank, world.size, batch_size)
    loader = pipeline.eval_loader(images, batches, config, world.device, bad)
    kept: list[Predictions] = []
    keep = None if predictions is None else lambda batch, logits: kept.append(Predictions.of(batch, logits))
    with evaluation_mode(scored):
        scores = score_batches(scored, track(loader, "evaluating", len(batches), "batches"), dtype, keep)
    for line in bad.exchange(world.device, None, len(images), config.max_bad_share):
        log.warning(line)
    if predictions is not None:
        _write_predictions(predictions, kept, images, scores)
    return scores


def _write_predictions(path: str | Path, kept: list[Predictions], images: Manifest, scores: Scores) -> None:
    """Write the predictions of all ranks. A collective; its error names the scores, which took long to get."""
    gathered = gather_on_rank0(kept)
    with raise_on_all_ranks("write the predictions"):
        if gathered is not None:
            try:
                save_predictions(path, [part for rank in gathered for part in rank], images)
            except OSError as error:
                raise OSError(f"{path}: cannot be written ({error.strerror or error}); {scores}") from None


def evaluate_depths(
    learngene: Learngene | str | Path,
    data: str | Path,
    depths: Sequence[int],
    *,
    plan: str = "even",
    branch_scaling: float | None = None,
    image_size: int | None = None,
    **options: Any,
) -> dict[int, Scores]:
    """Score a learngene's descendants of several depths as they leave it, untuned. A collective of all ranks.

    Args:
        learngene: what ``load_learngene`` returned, its file, or the folder of the auxiliary model's run.
        data: a folder of class folders.
        depths: numbers of layers.
        plan, branch_scaling, image_size: how the learngene is expanded; see ``expand``.
        options: further arguments of ``evaluate``, such as ``batch_size``; not those of a single model's file
            (``model_name``, ``use_ema``, ``predictions``).

    Returns:
        depth -> top-1, top-5 and loss over all images, the same on every rank.

    Raises:
        ValueError: a file that holds no learngene, a depth or a plan that it cannot have, or what ``evaluate`` refuses;
            ``RunError`` where several ranks run.

    Examples:
        >>> import sws_dist
        >>> scores = sws_dist.evaluate_depths("runs/auxiliary", "data/digits/val", [5, 10])
        >>> scores[10] == sws_dist.evaluate("runs/auxiliary", "data/digits/val")
        True
    """
    atexit.register(close_distributed)
    init_distributed(EVALUATION_TIMEOUT_S)
    with raise_on_all_ranks("read the learngene"):
        if taken := _OF_ONE_FILE & options.keys():
            raise ValueError(f"evaluate_depths takes no {', '.join(sorted(taken))}: it scores models, not their files")
        if isinstance(learngene, Learngene):
            source = learngene
        else:
            source = load_learngene(find_run_weights(learngene) or learngene)
        if isinstance(depths, (int, str)):
            raise ValueError(f"depths {depths!r}: expected a list of numbers of layers, such as [6, 9, 12]")
        for depth in depths:  # a wrong one should not cost the scores of those before it
            plan_layers(source.info, depth, plan)
    scores = {}
    for depth in depths:
        with raise_on_all_ranks(f"expand the learngene to {depth} layers"):
            model = expand(source, depth, plan=plan, branch_scaling=branch_scaling, image_size=image_size)
        scores[depth] = evaluate(model, data, image_size=image_size, **options)
    return scores
