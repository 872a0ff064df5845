"""Define what a run trains: frozen dataclasses that check themselves. This module imports no torch.

A run config owns the model, the data, the recipe, the global batch and the output folder. How the run is
sharded (ZeRO stage, precision, micro batch, accumulation, clipping) belongs to the DeepSpeed JSON, see
``zero/config.py``. Every key is listed here with its default; ``loader.py`` reads the YAML files.

A key's annotation says two things beside its type: a ``PathStr`` is expanded (``paths.py``), and a ``MayChange`` may
have another value when the run is resumed (``resume.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

# Strict: "3" is not a number and 1 is not a boolean. A value of the wrong type is an error; so are NaN and infinity.
_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

_T = TypeVar("_T")
IS_PATH = "is a path"
MAY_CHANGE = "may change"
PathStr = Annotated[str, IS_PATH]
MayChange = Annotated[_T, MAY_CHANGE]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
DEFAULT_CROP_PCT = 0.875
DEFAULT_IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "ppm", "pgm", "pbm")
MAX_BAD_SHARE = 0.1
MAX_BATCH = 4096
"""The largest number of images that are decoded as one batch on one rank."""
MAX_TRACED = 100
"""The largest number of steps that are traced: each takes megabytes."""
MAX_LAYERS = 1000
"""The largest number of layers that an image passes through."""
IMAGE_SIZES = (8, 8192)
"""The smallest and the largest height and width of a model's input, in pixels."""
DEFAULT_NUM_THREADS = 4
MAX_THREADS = 1024
MAX_SEED = 2**32 - 1


class KeyConflictError(ValueError):
    """Values that are valid one by one and contradict each other.

    Args:
        key: the key, inside its own group, whose source the message names.
        message: what is wrong and what would be right.
    """

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


def _require_range(key: str, dotted: str, low_high: tuple[float, float], least: float, most: float) -> None:
    if not least <= low_high[0] <= low_high[1] <= most:
        raise KeyConflictError(
            key, f"{dotted} {list(low_high)}: expected [smallest, largest], both from {least:g} to {most:g}"
        )


def _require_each(key: str, dotted: str, values: Sequence[float], least: float, most: float) -> None:
    if not all(least <= value <= most for value in values):
        raise KeyConflictError(key, f"{dotted} {list(values)}: each has to be from {least:g} to {most:g}")


@dataclass(frozen=True, config=_STRICT)
class ElasticConfig:
    """The depths at which an auxiliary model is trained; each step draws one."""

    min_depth: int = Field(ge=1, le=MAX_LAYERS)
    """The smallest depth. Every stage has to have a layer, so it is at least the number of stages."""
    max_depth: int = Field(ge=1, le=MAX_LAYERS)
    """The largest depth."""
    start_epoch: float = Field(default=0.0, ge=0)
    """Epochs at the start that are trained at the model's own depth alone; may be a fraction. Where training is short
    for its task, most depths gain."""
    rule: Literal["uniform", "sandwich"] = "uniform"
    """Draw every depth equally often (``uniform``), or take the smallest, the largest and a random one in turn
    (``sandwich``)."""
    plan: Literal["even", "proportional"] = "even"
    """The layers that each stage has at a drawn depth, as ``sws expand --plan`` takes them."""
    branch_scaling: float = Field(default=1.0, ge=0, le=2)
    """Exponent p: at a depth at which a stage runs k times instead of the schedule's r, its branches are multiplied by
    (r / k)^p, which an expansion multiplies into the descendant's weights."""

    @model_validator(mode="after")
    def _check_order(self) -> ElasticConfig:
        if self.min_depth > self.max_depth:
            raise KeyConflictError(
                "max_depth", f"model.elastic: min_depth {self.min_depth} is above max_depth {self.max_depth}"
            )
        return self


@dataclass(frozen=True, config=_STRICT)
class OperatorsConfig:
    """Who computes each operator of a stage that the Triton kernels run. auto: the fastest, which are ours so far."""

    attention: MayChange[Literal["auto", "triton", "cudnn", "flash"]] = "auto"
    """Attention by our kernel, cuDNN's or PyTorch's FlashAttention. The last two take fp16 and bf16 alone on a GPU, and
    their gradients are not the same to the bit from run to run."""
    linear_gelu: MayChange[Literal["auto", "triton", "torch"]] = "auto"
    """The MLP's first product with GELU: one kernel of ours, or two of PyTorch's."""
    add_layer_norm: MayChange[Literal["auto", "triton", "torch"]] = "auto"
    """The residual add with LayerNorm: one kernel of ours, or two of PyTorch's."""


@dataclass(frozen=True, config=_STRICT)
class ModelConfig:
    """The model that is trained, and what it starts from."""

    name: str
    """Any timm model; ours are ``sws_vit``, ``sws_aux_{tiny,small,base}_patch16_224``, ``sws_des_...``, and
    ``tleg_vit`` (the auxiliary model of TLEG, another method)."""
    depth: int | None = Field(default=None, ge=1, le=MAX_LAYERS)
    """Layers of a descendant (``sws_des_*``) or of ``tleg_vit``."""
    schedule: tuple[int, ...] | None = None
    """Repeats of each stage's layer in an auxiliary model (``sws_aux_*``), for example ``[3, 3, 4, 3, 3]``."""
    elastic: ElasticConfig | None = None
    """Train an auxiliary model at many depths, so that descendants of all of them are good before any fine-tuning; null
    trains it at its own depth alone, as the paper does."""
    drop_path: float = Field(default=0.0, ge=0, lt=1)
    """Drop-path rate (stochastic depth) at the last position; it grows linearly from 0 at the first."""
    grad_checkpointing: MayChange[bool] = False
    """Recompute each stage's activations in backward: less memory, a third more time."""
    kernels: MayChange[Literal["auto", "triton", "reference"]] = "auto"
    """The code that runs the stages of our models: PyTorch (``reference``), or the Triton kernels. ``auto`` takes
    Triton on a CUDA device of compute capability 8.0 or more where the model allows it, and logs its choice; ``triton``
    where it cannot run is an error."""
    operators: OperatorsConfig = OperatorsConfig()
    cuda_graphs: MayChange[bool] = False
    """Launch each stage's kernels as one CUDA graph forward and one backward (Triton kernels only; not under ZeRO-3,
    nor with ``compile``): for small models, whose kernels are shorter than their launches. On an H200 a step of ViT-Ti
    with 256 images then takes 14 ms instead of 34, one of ViT-S 31 instead of 34."""
    compile: MayChange[bool] = False
    """Run the model through ``torch.compile`` (not under ZeRO-3)."""
    initial_checkpoint: MayChange[PathStr | None] = None
    """A file of weights to start from: a descendant written by ``sws expand``, any other file of this trainer, or a
    ``.safetensors`` or PyTorch file of a timm model. A head of other labels is drawn anew, position embeddings of
    another size are resampled, and all else has to fit."""
    initial_ema: bool = True
    """With ``initial_checkpoint``: take the averaged weights where the file has them beside others."""
    initial_learngene: MayChange[PathStr | None] = None
    """A learngene to start a descendant from, without an expanded file: each rank fills its own shards from it. A head
    for other labels is drawn from ``train.seed``, the position embedding resampled to ``data.image_size``."""
    plan: Literal["even", "proportional", "spaced"] | tuple[int, ...] = "even"
    """With ``initial_learngene``: the layers of each stage, as ``sws expand --plan`` takes them."""
    expand: MayChange[Literal["auto", "read", "broadcast"]] = "auto"
    """The way in which the ranks get the learngene: each reads its part of the file (``read``), or rank 0 sends it
    (``broadcast``); ``auto`` reads if all of them see the same file."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the timm constructor: ``patch_size``, ``embed_dim``, ``num_heads``, ..."""

    @model_validator(mode="after")
    def _check_layers(self) -> ModelConfig:
        schedule = self.schedule if self.schedule is not None else (1,)
        if min(schedule, default=0) < 1 or sum(schedule) > MAX_LAYERS:
            raise KeyConflictError(
                "schedule",
                f"model.schedule {list(schedule)}: expected a count above 0 for each stage, {MAX_LAYERS} layers in all "
                "at most",
            )
        return self

    @model_validator(mode="after")
    def _check_operators(self) -> ModelConfig:
        if self.kernels == "reference" and self.operators != OperatorsConfig():
            raise KeyConflictError(
                "operators",
                "model.operators says who computes the parts of a stage that the Triton kernels run, but model.kernels "
                "is reference; set it to auto or triton, or leave model.operators out",
            )
        return self

    @model_validator(mode="after")
    def _check_start(self) -> ModelConfig:
        """Check that the model starts from one thing, and that an expansion has a learngene."""
        if self.initial_learngene is not None and self.initial_checkpoint is not None:
            raise KeyConflictError(
                "initial_learngene",
                "model.initial_learngene and model.initial_checkpoint are both given; a run starts from one of them: "
                "set the other to null",
            )
        for key, given, default in (("plan", self.plan, "even"), ("expand", self.expand, "auto")):
            if self.initial_learngene is None and given != default:
                raise KeyConflictError(
                    key, f"model.{key} says how a learngene is expanded, but there is no model.initial_learngene"
                )
        return self

    @model_validator(mode="after")
    def _check_graphs(self) -> ModelConfig:
        if self.cuda_graphs and self.compile:
            raise KeyConflictError(
                "cuda_graphs",
                "model.cuda_graphs: torch.compile (model.compile) cannot see into a CUDA graph; set one of the two to "
                "false",
            )
        return self


@dataclass(frozen=True, config=_STRICT)
class DataConfig:
    """The images, how they are read, and how they are normalised."""

    root: MayChange[PathStr]
    """The folder of the data set; see ``train_split``."""
    train_split: MayChange[PathStr] = "train"
    """Inside ``root``: a folder of class folders, a folder of WebDataset ``*.tar`` shards, or a text file of
    ``<path> <label>`` lines."""
    val_split: MayChange[PathStr] = "val"
    """The same as ``train_split``, for the validation images. It is not read where ``val_share`` is set."""
    val_share: float | None = Field(default=None, gt=0, lt=1)
    """Hold out this share of each class's training images for validation. ``val_seed`` and an image's path decide
    which, so that each start takes the same."""
    val_seed: int = Field(default=0, ge=0)
    """Seed of the images that ``val_share`` holds out."""
    classes: MayChange[PathStr | None] = None
    """A file of class names, one on each line; the labels take their order instead of that of the sorted folders."""
    image_extensions: tuple[str, ...] = DEFAULT_IMAGE_EXTENSIONS
    """For tar shards: extensions of a sample's image, without the leading dot. The first that a sample has is taken, so
    that it is one training image: ``[jpg, png]`` takes ``1.jpg`` of ``1.jpg`` and ``1.seg.png``."""
    label_key: str = "label"
    """For tar shards: the key of the label in a sample's ``.json``, where there is no ``.cls``."""
    shuffle_shards: int | None = Field(default=None, ge=1)
    """For tar shards: shuffle images among this many shards at a time, which are then read nearly in sequence; null
    shuffles among all, as timm does."""
    trust_manifest: MayChange[bool] = False
    """Take the list that ``sws scan`` has kept as it is. With many millions of files, listing them and asking for the
    size of each takes minutes; files that were added, changed or removed since the scan are then not noticed."""
    lists: MayChange[PathStr | None] = None
    """A folder for what is kept about each split: the lists of ``sws scan --lists``, the index of tar shards. It serves
    data sets in folders that cannot be written; null keeps these files beside the splits."""
    max_bad_share: MayChange[float] = Field(default=MAX_BAD_SHARE, ge=0, le=1)
    """Unreadable images are left out or replaced by others; the run stops where they exceed this share of an epoch."""
    image_size: int = Field(default=224, ge=IMAGE_SIZES[0], le=IMAGE_SIZES[1])
    """Height and width of the model's input."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Subtracted from the red, green and blue channel (of 0 to 1)."""
    std: tuple[float, float, float] = IMAGENET_STD
    """The channels are divided by this afterwards."""
    crop_pct: float = Field(default=DEFAULT_CROP_PCT, ge=0.1, le=1)
    """In evaluation the shorter side becomes ``image_size / crop_pct``, then the centre is cropped."""
    crop_mode: Literal["center", "squash"] = "center"
    """In evaluation the image keeps its aspect ratio (``center``), or both its sides become ``image_size / crop_pct``
    (``squash``), as some of timm's models want it."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """The filter of all resizing, in training and evaluation."""
    num_threads: MayChange[int] = Field(default=DEFAULT_NUM_THREADS, ge=1, le=MAX_THREADS)
    """Number of DALI threads of one rank."""
    prefetch: MayChange[int] = Field(default=2, ge=1, le=64)
    """Number of batches that DALI prepares ahead."""
    device: MayChange[Literal["auto", "cpu", "gpu"]] = "auto"
    """The device on which DALI decodes; ``auto`` takes the GPU that the rank trains on, if there is one."""
    hw_decoder_load: MayChange[float | None] = Field(default=None, ge=0, le=1)
    """Share of the JPEG files that the GPU's hardware decoder takes (A100, H100, ...); null leaves it to DALI."""

    @model_validator(mode="after")
    def _check_ranges(self) -> DataConfig:
        _require_each("mean", "data.mean", self.mean, 0, 1)
        _require_each("std", "data.std", self.std, 1e-3, 1)
        return self


@dataclass(frozen=True, config=_STRICT)
class AffineConfig:
    """Map every image by a random affine transform (torchvision's RandomAffine)."""

    degrees: float = Field(default=0.0, ge=0, le=360)
    """Largest rotation, in either direction."""
    translate: float = Field(default=0.0, ge=0, lt=1)
    """Largest shift, as a share of the image's side."""
    scale: tuple[float, float] = (1.0, 1.0)
    """Smallest and largest scale."""
    fill: tuple[int, int, int] = (0, 0, 0)
    """Colour (RGB) of the area outside the image."""

    @model_validator(mode="after")
    def _check_ranges(self) -> AffineConfig:
        _require_range("scale", "augment.affine.scale", self.scale, 0.01, 100)
        _require_each("fill", "augment.affine.fill", self.fill, 0, 255)
        return self


@dataclass(frozen=True, config=_STRICT)
class AugmentConfig:
    """Augmentation of training images, with timm's names and meaning."""

    scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest area of the cropped window, as shares of the image's area."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest aspect ratio (width over height) of the window."""
    hflip: float = Field(default=0.5, ge=0, le=1)
    """Probability that an image is mirrored."""
    affine: AffineConfig | None = None
    """A random rotation, shift and scale; null for none."""
    auto_augment: str | None = None
    """timm's RandAugment string, for example ``rand-m9-mstd0.5-inc1``."""
    color_jitter: float | tuple[float, ...] | None = None
    """Largest change of brightness, contrast and saturation: one number or three. Unused beside ``auto_augment``, as
    in timm (whose own default is 0.4)."""
    re_prob: float = Field(default=0.0, ge=0, le=1)
    """Probability that a box of the image is erased."""
    re_mode: Literal["pixel", "const", "rand"] = "pixel"
    """The box is filled with noise (``pixel``), the mean colour (``const``), or one random colour (``rand``)."""
    mixup: float = Field(default=0.0, ge=0, le=1000)
    """The alpha of mixup's Beta distribution; 0 for no mixup."""
    cutmix: float = Field(default=0.0, ge=0, le=1000)
    """The alpha of cutmix's Beta distribution; 0 for no cutmix."""
    mixup_switch_prob: float = Field(default=0.5, ge=0, le=1)
    """Probability of cutmix where both are on."""
    smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Label smoothing: the share of the target that is spread over all classes."""
    num_repeats: int = Field(default=1, ge=1, le=1000)
    """Repeated augmentation: the number of times an image appears in a row, each time drawn anew."""
    num_crops: int = Field(default=1, ge=1, le=64)
    """Crops of an image that is decoded once, each drawn anew, all in one micro-batch (FKD), whose size it has to
    divide. Each crop counts as an image, so one pass over all images takes this many epochs."""

    @model_validator(mode="after")
    def _check_repeats(self) -> AugmentConfig:
        if self.num_repeats > 1 and self.num_crops > 1:
            raise KeyConflictError(
                "num_crops",
                f"augment.num_crops {self.num_crops}: augment.num_repeats {self.num_repeats} repeats each image too; "
                "set one of the two to 1",
            )
        return self

    @model_validator(mode="after")
    def _check_ranges(self) -> AugmentConfig:
        _require_range("scale", "augment.scale", self.scale, 1e-6, 1)
        _require_range("ratio", "augment.ratio", self.ratio, 0.01, 100)
        return self


@dataclass(frozen=True, config=_STRICT)
class DistillConfig:
    """The teacher, and its part in the loss."""

    teacher: PathStr | None = None
    """A timm model name, or a ``.safetensors`` file that names its own model, as this trainer's do."""
    teacher_weights: PathStr | None = None
    """Local weights for a timm name (``.safetensors``, ``.pth``). No hub is ever asked."""
    teacher_ema: bool = True
    """Take the averaged weights where ``teacher_weights`` has them beside others."""
    logits: PathStr | None = None
    """A folder that ``sws teach`` wrote: its logits are read, and no teacher runs. They have to be those of this run's
    images, augmentation and seed, and of ``teacher``; without a ``teacher`` the logits of any teacher are taken."""
    kind: Literal["soft", "hard"] = "soft"
    """Learn the teacher's whole distribution (``soft``), or its most likely label (``hard``)."""
    alpha: float = Field(default=1.0, ge=0, le=1)
    """Weight of the teacher's term in the loss; the labels' term has weight 1 - alpha."""
    tau: float = Field(default=1.0, ge=0.01, le=1000)
    """Temperature of the soft targets."""
    reduction: Literal["batchmean", "elements"] = "batchmean"
    """``elements`` also divides by the number of classes, as the paper's released code does."""

    @model_validator(mode="after")
    def _check_teacher(self) -> DistillConfig:
        if self.teacher_weights is not None and self.teacher is None and self.logits is None:
            raise KeyConflictError(
                "teacher_weights",
                "distill.teacher_weights: there is no distill.teacher that they are of; name it, or set the weights to "
                "null too",
            )
        return self


@dataclass(frozen=True, config=_STRICT)
class OptimConfig:
    """The optimizer, its learning rate, and the moving average of the weights."""

    name: MayChange[Literal["adamw", "fused_adam", "cpu_adam", "muon"]] = "adamw"
    """torch's AdamW, DeepSpeed's FusedAdam (GPU), DeepSpeed's CPUAdam (for CPU offload), or Muon for the weights of
    the Linear layers inside ``blocks`` and torch's AdamW for the rest. A resumed run may change from one Adam to
    another."""
    lr: float = Field(default=5e-4, gt=0, le=1000)
    """The highest learning rate; see ``lr_batch``."""
    lr_batch: int | None = Field(default=512, ge=1)
    """``lr`` is meant for this global batch and scales with it linearly; null takes ``lr`` as it is."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """After the warm-up the learning rate falls along a cosine over the whole run, or it stays and falls in the last
    ``decay_epochs`` alone (``wsd``: warm-up, stable, decay). From a checkpoint before the decay a run of ``wsd`` may go
    on with other ``epochs`` and ``decay_epochs``."""
    decay_epochs: float = Field(default=0.0, ge=0, le=1_000_000)
    """Length of the decay of ``wsd`` in epochs; a fraction is allowed."""
    min_lr: float = Field(default=1e-5, ge=0, le=1000)
    """The learning rate at the end of the run; never above the highest rate."""
    warmup_lr: float = Field(default=1e-6, ge=0, le=1000)
    """The learning rate at the start of the warm-up."""
    warmup_epochs: float = Field(default=0.0, ge=0, le=1_000_000)
    """Length of the linear warm-up in epochs; a fraction is allowed."""
    weight_decay: float = Field(default=0.05, ge=0, le=1000)
    """Decay of weight matrices; biases, norms, position embedding and class token do not decay."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's averaging factors of the gradient and of its square."""
    eps: float = Field(default=1e-8, gt=0, le=1)
    """Added to Adam's denominator."""
    momentum: float = Field(default=0.95, ge=0, lt=1)
    """Muon's averaging factor of the gradient."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Factor of the moving average of the weights in each step; less in a run's first steps. null keeps none."""

    @model_validator(mode="after")
    def _check_ranges(self) -> OptimConfig:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise KeyConflictError("betas", f"optim.betas {list(self.betas)}: each has to be at least 0 and below 1")
        return self

    @model_validator(mode="after")
    def _check_schedule(self) -> OptimConfig:
        if (self.schedule == "wsd") != (self.decay_epochs > 0):
            raise KeyConflictError(
                "decay_epochs",
                f"optim.decay_epochs {self.decay_epochs:g}: schedule wsd needs a number above 0, and cosine needs none "
                f"(optim.schedule is {self.schedule})",
            )
        return self


@dataclass(frozen=True, config=_STRICT)
class TrainConfig:
    """Length, batch, seed, evaluation and logging of the run."""

    epochs: int = Field(default=100, ge=1, le=1_000_000)
    """Number of passes over the training images; the learning-rate schedule spans them."""
    global_batch: int = Field(default=512, ge=1, le=10_000_000)
    """Images in one optimizer step, over all ranks and accumulation steps."""
    seed: int = Field(default=0, ge=0, lt=MAX_SEED + 1)
    """Seed of weights, order, augmentation, mixing and drop-path."""
    max_steps: MayChange[int | None] = Field(default=None, ge=1)
    """Stop (and save) after this many steps, and leave the schedule as it is: for trials and tests."""
    eval_batch: MayChange[int] = Field(default=128, ge=1, le=MAX_BATCH)
    """Number of images in one evaluation batch of one rank."""
    eval_every: MayChange[int] = Field(default=1, ge=1)
    """Number of epochs between two evaluations, each at the end of a step; there is always one after the last epoch."""
    eval_depths: MayChange[tuple[int, ...]] = ()
    """Further depths at which a model of ours is scored in each evaluation, as if it had been expanded to them."""
    eval_plan: MayChange[Literal["even", "proportional", "spaced"] | None] = None
    """The expansion plan of ``eval_depths``; null takes that of ``model.elastic``, else ``even``. Only ``spaced`` may
    leave layers out, so that a model whose layers share no weights can be scored below its own depth."""
    eval_at_start: MayChange[bool] = False
    """Evaluate before the first step too, to score an expanded descendant untrained."""
    log_every: MayChange[int] = Field(default=50, ge=1)
    """Number of steps between two lines of the log."""
    timeout_s: MayChange[int] = Field(default=1800, ge=1, le=10_000_000)
    """Seconds without progress after which every rank ends, with a message that names who is missing."""
    skip_nonfinite: MayChange[int] = Field(default=0, ge=0)
    """Number of steps in a row that may be skipped, with weights and averages untouched, because their loss or
    gradient is infinite or NaN; one more stops the run."""
    profile: MayChange[tuple[int, int] | None] = None
    """First and last step, as the log counts them, that torch's profiler traces on rank 0 (``[20, 22]``); the trace is
    written to ``profile/`` in the run's folder."""

    @model_validator(mode="after")
    def _check_ranges(self) -> TrainConfig:
        _require_each("eval_depths", "train.eval_depths", self.eval_depths, 1, MAX_LAYERS)
        if self.profile is not None and not 1 <= self.profile[0] <= self.profile[1] < self.profile[0] + MAX_TRACED:
            raise KeyConflictError(
                "profile",
                f"train.profile {list(self.profile)}: expected the first and the last step, from 1 on, "
                f"{MAX_TRACED} steps at most",
            )
        return self


@dataclass(frozen=True, config=_STRICT)
class CheckpointConfig:
    """When the run is saved, and which checkpoints are kept."""

    every: MayChange[int] = Field(default=1, ge=1)
    """Number of epochs between two checkpoints, each at the end of a step; there is always one after the last epoch."""
    keep_last: MayChange[int] = Field(default=2, ge=1)
    """Number of newest checkpoints that are kept."""
    keep_best: MayChange[bool] = True
    """Keep the checkpoint with the best validation top-1 as well. The last one before the decay of ``wsd`` is always
    kept."""
    background: MayChange[bool] = True
    """Write while training goes on, from a copy in host memory: on each rank as many bytes as its share of weights,
    optimizer state and moving average, 12 to 16 for each parameter. Otherwise training waits, and nothing is copied."""


@dataclass(frozen=True, config=_STRICT)
class RunConfig:
    """A whole run config, with all its groups."""

    output: MayChange[PathStr]
    """The run's folder: configs, log, TensorBoard events, checkpoints, metrics, final weights."""
    model: ModelConfig
    data: DataConfig
    augment: AugmentConfig = AugmentConfig()
    distill: DistillConfig = DistillConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @model_validator(mode="after")
    def _check_output(self) -> RunConfig:
        if not self.output.strip():
            raise KeyConflictError("output", "output is empty; give the folder that the run is to write")
        return self

    @model_validator(mode="after")
    def _check_decay(self) -> RunConfig:
        warmup, decay = self.optim.warmup_epochs, self.optim.decay_epochs
        if decay and warmup + decay > self.train.epochs:
            raise KeyConflictError(
                "optim.decay_epochs",
                f"optim.decay_epochs {decay:g} and optim.warmup_epochs {warmup:g} are more than the "
                f"{self.train.epochs} of train.epochs",
            )
        return self

    @model_validator(mode="after")
    def _check_elastic_start(self) -> RunConfig:
        elastic = self.model.elastic
        if elastic is not None and elastic.start_epoch >= self.train.epochs:
            raise KeyConflictError(
                "model.elastic.start_epoch",
                f"model.elastic.start_epoch {elastic.start_epoch:g}: no depth would be drawn in train.epochs "
                f"{self.train.epochs}",
            )
        return self
