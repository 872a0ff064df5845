"""What to train: YAML files read into frozen, checked dataclasses. Imports no torch.

A run config owns the model, the data, the recipe, the global batch and the output folder. How the run is
sharded (ZeRO stage, precision, micro batch, accumulation, clipping) belongs to the DeepSpeed JSON, see
``ds_config.py``. Every key is listed, with its default, in this file.

    config = load("configs/runs/quickstart/auxiliary.yaml", ["train.epochs=3"])
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_type_hints

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from sws_dist.errors import ConfigError

# Strict: "3" is not a number, 1 is not a boolean. Whoever mistypes a value hears of it.
_STRICT = ConfigDict(extra="forbid", strict=True)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MAX_BAD_SHARE = 0.1


@dataclass(frozen=True, config=_STRICT)
class ModelConfig:
    name: str
    """Any timm model; ours are ``sws_vit``, ``sws_aux_{tiny,small,base}_patch16_224``, ``sws_des_...``."""
    depth: int | None = Field(default=None, ge=1)
    """Layers of a descendant (``sws_des_*``)."""
    schedule: tuple[int, ...] | None = None
    """Repeats of each stage's layer in an auxiliary model (``sws_aux_*``), for example ``[3, 3, 4, 3, 3]``."""
    drop_path: float = Field(default=0.0, ge=0, lt=1)
    """Stochastic depth at the last position, growing linearly from 0 at the first."""
    grad_checkpointing: bool = False
    """Recompute each stage's activations in backward: less memory, a third more time."""
    kernels: Literal["auto", "triton", "reference"] = "reference"
    """Who runs the stages of our models: PyTorch (``reference``), or the Triton kernels. ``auto`` takes Triton on a
    CUDA device of compute capability 8.0 or more where the model allows it, and says what it took; ``triton`` where
    it cannot run is an error. The kernels have not run on a GPU yet, so they are for you to ask for."""
    cuda_graphs: bool = False
    """Launch each stage's kernels as one CUDA graph forward and one backward (Triton kernels only; not under ZeRO-3,
    nor with ``compile``): for small models, whose kernels are shorter than their launches. Not run on a GPU yet."""
    compile: bool = False
    """Run the model through ``torch.compile`` (not under ZeRO-3)."""
    initial_checkpoint: str | None = None
    """A ``.safetensors`` file of weights to start from: a descendant written by ``launcher/expand.py``."""
    initial_learngene: str | None = None
    """A learngene to start a descendant from, without an expanded file: each rank fills its own shards from it. A head
    for other labels is drawn from ``train.seed``, the position embedding resampled to ``data.image_size``."""
    plan: Literal["even", "proportional"] | tuple[int, ...] = "even"
    """With ``initial_learngene``: the layers of each stage, as ``launcher/expand.py --plan`` has them."""
    expand: Literal["auto", "read", "broadcast"] = "auto"
    """How the ranks get the learngene: each reads its part of the file (``read``), or rank 0 sends it (``broadcast``);
    ``auto`` reads if all of them see the same file."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the timm constructor: ``patch_size``, ``embed_dim``, ``num_heads``, ..."""


@dataclass(frozen=True, config=_STRICT)
class DataConfig:
    root: str
    """The data set's folder; see ``train_split``."""
    train_split: str = "train"
    """Inside ``root``: a folder of class folders, a folder of WebDataset ``*.tar`` shards, or a text file of
    ``<path> <label>`` lines."""
    val_split: str = "val"
    """The same for the validation images."""
    classes: str | None = None
    """A file of class names, one a line, whose order the labels take instead of the sorted folders'."""
    shuffle_shards: int | None = Field(default=None, ge=1)
    """Tar shards: shuffle images among this many shards at a time, which are then read nearly in sequence; null: among
    all, as timm does."""
    max_bad_share: float = Field(default=MAX_BAD_SHARE, ge=0, le=1)
    """Unreadable images are left out or replaced by others; beyond this share of an epoch the run stops."""
    image_size: int = Field(default=224, ge=8)
    """Height and width of the model's input."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Subtracted from the red, green and blue channel (of 0 to 1)."""
    std: tuple[float, float, float] = IMAGENET_STD
    """What the channels are divided by afterwards."""
    crop_pct: float = Field(default=0.875, gt=0, le=1)
    """Evaluation: the shorter side becomes ``image_size / crop_pct``, then the centre is cropped."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """The filter of every resizing, in training and evaluation."""
    num_threads: int = Field(default=4, ge=1)
    """DALI threads of one rank."""
    prefetch: int = Field(default=2, ge=1)
    """Batches that DALI prepares ahead."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """Where DALI decodes; ``auto`` takes the GPU that the rank trains on, if there is one."""
    hw_decoder_load: float | None = Field(default=None, ge=0, le=1)
    """Share of the JPEG files that the GPU's hardware decoder takes (A100, H100, ...); null: DALI's own choice."""


@dataclass(frozen=True, config=_STRICT)
class AffineConfig:
    """Random affine map of every image (torchvision's RandomAffine)."""

    degrees: float = Field(default=0.0, ge=0)
    """Largest turn, either way."""
    translate: float = Field(default=0.0, ge=0, lt=1)
    """Largest shift, as a share of the image's side."""
    scale: tuple[float, float] = (1.0, 1.0)
    """Smallest and largest enlargement."""
    fill: tuple[int, int, int] = (0, 0, 0)
    """Colour of what comes in from outside the image."""


@dataclass(frozen=True, config=_STRICT)
class AugmentConfig:
    """timm's names and timm's meaning."""

    scale: tuple[float, float] = (0.08, 1.0)
    """Area of the cropped window, as a share of the image's."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Its width over its height."""
    hflip: float = Field(default=0.5, ge=0, le=1)
    """Chance of being mirrored."""
    affine: AffineConfig | None = None
    """A random turn, shift and enlargement; null: none."""
    auto_augment: str | None = None
    """timm's RandAugment string, for example ``rand-m9-mstd0.5-inc1``."""
    color_jitter: float | tuple[float, ...] | None = None
    """Largest change of brightness, contrast and saturation: one number or three. Unused beside ``auto_augment``, as
    in timm (whose own default is 0.4)."""
    re_prob: float = Field(default=0.0, ge=0, le=1)
    """Chance that a box of the image is erased."""
    re_mode: Literal["pixel", "const", "rand"] = "pixel"
    """What fills it: noise, the mean colour, or one random colour."""
    mixup: float = Field(default=0.0, ge=0)
    """alpha of the Beta distribution of mixup's share; 0: no mixup."""
    cutmix: float = Field(default=0.0, ge=0)
    """alpha for cutmix; 0: no cutmix."""
    mixup_switch_prob: float = Field(default=0.5, ge=0, le=1)
    """Chance of cutmix where both are on."""
    smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of the target that is spread over all classes."""
    num_repeats: int = Field(default=1, ge=1)
    """Repeated augmentation: how often an image appears in a row, each time drawn anew."""


@dataclass(frozen=True, config=_STRICT)
class DistillConfig:
    teacher: str | None = None
    """A timm model name, or a ``.safetensors`` file that this trainer wrote (it names its own model)."""
    teacher_weights: str | None = None
    """Local weights for a timm name (``.safetensors``, ``.pth``). No hub is ever asked."""
    kind: Literal["soft", "hard"] = "soft"
    """The teacher's whole distribution (``soft``), or its most likely label (``hard``)."""
    alpha: float = Field(default=1.0, ge=0, le=1)
    """Weight of the teacher's term; 1 - alpha weighs the labels'."""
    tau: float = Field(default=1.0, gt=0)
    """Temperature of the soft targets."""
    reduction: Literal["batchmean", "elements"] = "batchmean"
    """``elements`` also divides by the number of classes, as the paper's released code does."""


@dataclass(frozen=True, config=_STRICT)
class OptimConfig:
    name: Literal["adamw", "fused_adam", "cpu_adam"] = "adamw"
    """torch's AdamW, DeepSpeed's FusedAdam (GPU) or DeepSpeed's CPUAdam (for CPU offload)."""
    lr: float = Field(default=5e-4, gt=0)
    """The highest learning rate; see ``lr_batch``."""
    lr_batch: int | None = 512
    """``lr`` is meant for this global batch and scales with it linearly; null: take ``lr`` as it is."""
    min_lr: float = Field(default=1e-5, ge=0)
    """Where the cosine ends; never above the highest rate."""
    warmup_lr: float = Field(default=1e-6, ge=0)
    """Where the warm-up begins."""
    warmup_epochs: float = Field(default=0.0, ge=0)
    """Length of the linear warm-up; a fraction is allowed."""
    weight_decay: float = Field(default=0.05, ge=0)
    """Of weight matrices; biases, norms, position embedding and class token do not decay."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's averaging of the gradient and of its square."""
    eps: float = Field(default=1e-8, gt=0)
    """Adam's denominator is at least this."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Exponential moving average of the weights, per step; null: none is kept."""


@dataclass(frozen=True, config=_STRICT)
class TrainConfig:
    epochs: int = Field(default=100, ge=1)
    """Passes over the training images; the schedule's length."""
    global_batch: int = Field(default=512, ge=1)
    """Images in one optimizer step, over all ranks and accumulation steps."""
    seed: int = Field(default=0, ge=0)
    """Of weights, order, augmentation, mixing and drop-path."""
    max_steps: int | None = Field(default=None, ge=1)
    """Stop (and save) after this many steps, leaving the schedule as it is: for trials and tests."""
    eval_batch: int = Field(default=128, ge=1)
    """Images in one evaluation batch of one rank."""
    eval_every: int = Field(default=1, ge=1)
    """Epochs between evaluations (the last epoch is always evaluated)."""
    eval_at_start: bool = False
    """Evaluate before the first step too: what an expanded descendant knows untrained."""
    log_every: int = Field(default=50, ge=1)
    """Steps between two lines of the log."""
    timeout_s: int = Field(default=1800, ge=1)
    """Seconds without progress after which every rank ends, with a message that names who is missing."""
    skip_nonfinite: int = Field(default=0, ge=0)
    """How many steps in a row may be skipped, with weights and averages untouched, because their loss or gradient is
    infinite or NaN; one more stops the run."""


@dataclass(frozen=True, config=_STRICT)
class CheckpointConfig:
    every: int = Field(default=1, ge=1)
    """Epochs between checkpoints (the last epoch is always saved)."""
    keep_last: int = Field(default=2, ge=1)
    """How many of the newest checkpoints are kept."""
    keep_best: bool = True
    """Keep the checkpoint with the best validation top-1 as well."""


@dataclass(frozen=True, config=_STRICT)
class RunConfig:
    output: str
    """The run's folder: configs, log, TensorBoard events, checkpoints, metrics, final weights."""
    model: ModelConfig
    data: DataConfig
    augment: AugmentConfig = AugmentConfig()
    distill: DistillConfig = DistillConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Read a run config; ``overrides`` are ``key=value`` strings with dotted keys and YAML values.

    A file may name another one under ``base:`` (relative to itself); its own keys win.

    Raises:
        ConfigError: with every unknown, missing, duplicate or ill-typed key, the file it stands in and the
            nearest valid key.
    """
    values, sources = _read_with_bases(Path(path), seen=())
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {override!r}: expected key=value, for example --set train.epochs=3")
        source = f"--set {override}"
        value = _parse(text, source)
        for part in reversed(key.split(".")):
            value = {part: value}
        _merge(values, value, sources, source)
    _check_start(values, sources, path)
    try:
        # By way of JSON: pydantic's strict mode takes mappings for dataclasses and lists for tuples only from there.
        return TypeAdapter(RunConfig).validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(e, sources, str(path)) for e in error.errors())) from None


def _check_start(values: dict[str, Any], sources: dict[str, str], path: str | Path) -> None:
    """A model starts from one thing; and what describes an expansion needs a learngene."""
    model = values.get("model")
    given = {key for key, value in model.items() if value is not None} if isinstance(model, dict) else set()
    if {"initial_learngene", "initial_checkpoint"} <= given:
        raise ConfigError(
            f"{sources.get('model.initial_learngene', path)}: model.initial_learngene and model.initial_checkpoint are "
            "both given; a run starts from one of them: set the other to null"
        )
    for key in sorted({"plan", "expand"} & given):
        if "initial_learngene" not in given and model and model[key] != getattr(ModelConfig, key):
            raise ConfigError(
                f"{sources.get(f'model.{key}', path)}: model.{key} says how a learngene is expanded, but there is no "
                "model.initial_learngene"
            )


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Plain dictionaries and lists: what ``to_yaml`` writes and TensorBoard shows."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, (tuple, list)) else value

    return plain(dataclasses.asdict(config))


def to_yaml(config: RunConfig) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False)


class _Loader(yaml.SafeLoader):
    """YAML with unique keys, and with 5e-4 as a number (YAML 1.1 takes it for a string)."""


def _construct_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[str, Any]:
    pairs = [(loader.construct_object(k, deep=True), v, k) for k, v in node.value]
    seen: set[str] = set()
    for key, _, key_node in pairs:
        if key in seen:
            raise ConfigError(f"line {key_node.start_mark.line + 1}: the key {key!r} appears twice; remove one")
        seen.add(key)
    return {key: loader.construct_object(value, deep=True) for key, value, _ in pairs}


_Loader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _parse(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not valid YAML: {error}") from None


def _read_with_bases(path: Path, seen: tuple[Path, ...]) -> tuple[dict[str, Any], dict[str, str]]:
    if path.resolve() in seen:
        raise ConfigError(f"{path}: names itself as its base, by way of {', '.join(map(str, seen))}")
    try:
        text = path.read_text()
    except OSError as error:
        raise ConfigError(f"cannot read the config file {path}: {error.strerror}") from None
    own = _parse(text, str(path))
    if not isinstance(own, dict):
        raise ConfigError(f"{path}: expected a mapping of keys (output, model, data, ...), found {type(own).__name__}")
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    base = own.pop("base", None)
    if base is not None:
        values, sources = _read_with_bases(path.parent / str(base), (*seen, path.resolve()))
    _merge(values, own, sources, str(path))
    return values, sources


def _merge(into: dict[str, Any], new: dict[str, Any], sources: dict[str, str], source: str, prefix: str = "") -> None:
    """Merge ``new`` into ``into``, mappings key by key, and remember where each key came from."""
    for key, value in new.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, dict):
            if not isinstance(into.get(key), dict):
                into[key] = {}
            _merge(into[key], value, sources, source, dotted + ".")
            sources.setdefault(dotted, source)
        else:
            into[key] = value
            sources[dotted] = source


def _explain(error: Any, sources: dict[str, str], path: str) -> str:
    """One line for one pydantic error: where, which key, what is wrong, what would be right."""
    # pydantic also names the alternative that it tried: function-..., literal[...], tuple[...]
    keys = [str(part) for part in error["loc"] if not str(part).startswith("function-") and "[" not in str(part)]
    dotted = ".".join(keys)
    source = next((sources[p] for n in range(len(keys), 0, -1) if (p := ".".join(keys[:n])) in sources), path)
    kind, message = error["type"], error["msg"]
    if kind == "unexpected_keyword_argument":
        return f"{source}: unknown key {dotted}{_suggest(keys)}"
    if kind in ("missing", "missing_argument"):
        return f"{source}: the key {dotted} is missing"
    return f"{source}: {dotted} = {error['input']!r}: {message[0].lower()}{message[1:]}"


def _suggest(keys: list[str]) -> str:
    """The same name in another group, else the nearest valid key of the same group, else all of the group."""
    *parents, name = keys
    groups: dict[str, list[str]] = {}
    for key in valid_keys():
        parent, _, last = key.rpartition(".")
        groups.setdefault(parent, []).append(last)
    for parent, names in groups.items():
        if name in names:
            return f"; did you mean {parent}.{name}?"
    here = groups.get(".".join(parents), [])
    for near in difflib.get_close_matches(name, here, n=1):
        return f"; did you mean {'.'.join([*parents, near])}?"
    return f"; valid here: {', '.join(here)}" if here else ""


def valid_keys(cls: type = RunConfig, prefix: str = "") -> Iterator[str]:
    """Every dotted key that a run config may hold."""
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        yield prefix + field.name
        for inner in (hints[field.name], *get_args(hints[field.name])):
            if dataclasses.is_dataclass(inner):
                yield from valid_keys(cast(type, inner), f"{prefix}{field.name}.")
