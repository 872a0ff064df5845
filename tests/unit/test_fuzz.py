"""Draw 2,000 configs and command lines, most of them wrong: each works or ends in one message, never in a traceback.

The draws are the same in every run (``derandomize``); hypothesis shrinks and prints an input that fails.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import pickle
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

import sws_dist.api
from sws_dist.build_models import build_models, build_student
from sws_dist.checkpoint.model_file import save_model_file
from sws_dist.cli import family, quickstart, study
from sws_dist.cli.main import COMMANDS
from sws_dist.config.loader import config_to_dict, config_to_yaml, load_config, valid_keys
from sws_dist.config.lr_schedule import LRSchedule
from sws_dist.config.schema import RunConfig
from sws_dist.data.build import list_images
from sws_dist.data.draws import Recipe
from sws_dist.data.mixup import Mixing
from sws_dist.distill.teacher import load_teacher
from sws_dist.distributed.init import close_distributed
from sws_dist.errors import RunError, Stopped
from sws_dist.learngene.file import describe_model
from sws_dist.models import SWSVisionTransformer, create_model
from sws_dist.zero import config as deepspeed_config
from sws_dist.zero import schema as deepspeed_schema
from tests.unit import images

SMALL = "quickstart/auxiliary"
SOURCE = Path(sws_dist.__file__).parent
CPU = torch.device("cpu")

# ---- What is drawn ----

INTEGERS = st.sampled_from([0, -1, 1, 2, 7, 32, 1000, 4097, 2**31, 2**63, 10**30, -(2**63)])
FLOATS = st.sampled_from([0.0, -0.5, 0.5, 1.0, 1.5, 1e-320, 1e9, 1e308, float("inf"), float("-inf"), float("nan")])
NUMBERS = st.one_of(INTEGERS, FLOATS)
TEXTS = st.one_of(
    st.sampled_from(["", " ", "auto", "null", "1.0", "1e-4", "nan", "0", "-1", "~", "$HOME", "a,b", "3,3,4", "../x"]),
    st.sampled_from(
        ["/", "/dev/null", "/proc/self/mem", "x" * 300, "a\0b", "a\nb", "\udcff", "\ufeff", "\u0663", "%s"]
    ),
    st.sampled_from(
        ["rand-m9-inc1", "rand-m9-n0-inc1", "rand-m-inc1", "rand-n99999999999-inc1", "resnet18", "sws_vit"]
    ),
    st.text(max_size=8),
)
NAMES = TEXTS.filter(lambda text: not set(text) & set("/~$") and ".." not in text)
"""Texts that name nothing outside the current folder: a command may write there."""
SCALARS = st.one_of(NUMBERS, TEXTS, st.none(), st.booleans(), st.dates())
VALUES = st.one_of(
    SCALARS,
    st.lists(SCALARS, max_size=4),
    st.dictionaries(st.one_of(TEXTS, st.integers(-1, 3), st.none(), st.booleans()), SCALARS, max_size=2),
)


def values_like(example: Any) -> st.SearchStrategy[Any]:
    """Draw values of the type of ``example``, in and out of range, and at times any other value."""
    like: st.SearchStrategy[Any]
    if isinstance(example, bool):
        like = st.booleans()
    elif isinstance(example, int):
        like = INTEGERS
    elif isinstance(example, float):
        like = FLOATS
    elif isinstance(example, list):
        count = len(example)
        like = st.lists(st.one_of(INTEGERS, FLOATS, st.sampled_from(example)), min_size=count, max_size=count)
    else:
        like = st.one_of(TEXTS, NUMBERS, st.none())
    return st.one_of(like, like, like, VALUES)


def fuzz(examples: int) -> Callable[[Any], Any]:
    return settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )


# ---- What may happen ----


def check_message(error: BaseException) -> None:
    """Check that an error is one message for the user: a ``raise`` of this package, or the system's about a file."""
    trace = "".join(traceback.format_exception(error))
    assert isinstance(error, (ValueError, OSError, RunError, Stopped)), trace
    assert not isinstance(error, ValidationError), trace  # pydantic's many lines
    last = traceback.extract_tb(error.__traceback__)[-1]
    on_purpose = Path(last.filename).is_relative_to(SOURCE) and (last.line or "").startswith("raise ")
    assert on_purpose or (isinstance(error, OSError) and error.filename is not None), trace
    assert str(error).strip(), trace


def attempt(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function. Returns what it returned, or None if it refused its input with a message."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # numpy: overflow, division by zero
        try:
            return function(*arguments)
        except Exception as error:
            check_message(error)
            return None


# ---- Run configs ----

KEYS = sorted(valid_keys())


BASE = load_config(SMALL)


def value_of(key: str) -> Any:
    value: Any = config_to_dict(BASE)
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


EXAMPLES = {key: value_of(key) for key in KEYS}
PIECES = ["m9", "m", "m99999", "mstd0.5", "mstd101", "mmax0", "n0", "n9", "n99999999999", "p.5", "w0", "inc0"]
ARGUMENTS = ["patch_size", "embed_dim", "num_heads", "num_classes", "img_size", "schedule", "mlp_ratio", "depth"]
MODELS = ["resnet18", "sws_vit", "sws_aux_tiny_patch16_224", "sws_des_tiny_patch16_224", "vit"]
TELLING = {
    "augment.auto_augment": st.lists(st.sampled_from(PIECES), max_size=3).map(lambda p: "-".join(["rand", *p, "inc1"])),
    "augment.color_jitter": st.one_of(NUMBERS, st.lists(NUMBERS, max_size=4)),
    "augment.affine": st.dictionaries(st.sampled_from(["degrees", "translate", "scale", "fill"]), VALUES),
    "model.name": st.sampled_from(MODELS),
    "model.kwargs": st.dictionaries(st.one_of(st.sampled_from(ARGUMENTS), TEXTS), st.one_of(INTEGERS, SCALARS)),
    "model.schedule": st.lists(st.one_of(st.integers(-1, 3), INTEGERS), max_size=6),
    "model.depth": st.one_of(st.integers(-1, 9), NUMBERS),
}
"""Key -> values that reach further than those of its type."""


def values_of(key: str) -> st.SearchStrategy[Any]:
    like = values_like(EXAMPLES[key])
    return st.one_of(TELLING[key], TELLING[key], like) if key in TELLING else like


ENTRIES = st.sampled_from([*KEYS, *TELLING]).flatmap(lambda key: st.tuples(st.just(key), values_of(key)))


def use(config: RunConfig) -> None:
    """Do what a run does with its config before it trains."""
    deepspeed_config.resolve_deepspeed_config({}, config, 1)
    recipe, mixing = Recipe(config.augment, config.data.image_size), Mixing(config.augment, 10, config.train.seed)
    sizes = np.array([[1, 60_000], [3, 5], [500, 375]], dtype=np.int32)
    draws = recipe.draw(config.train.seed, np.arange(3), sizes)
    assert (draws.crop_shape >= 1).all()
    assert (draws.crop_start >= 0).all()
    assert (draws.crop_start + draws.crop_shape <= sizes).all()
    for part in (draws.affine, draws.operations and draws.operations.matrix, draws.operations and draws.operations[1]):
        assert part is None or np.isfinite(part).all()
    if mixing.changes_images:
        assert 0 <= mixing.draw(0)[1] <= 1
    schedule = LRSchedule(config.optim, config.train.global_batch, 10.5, 10, 100)
    assert all(np.isfinite(schedule(step)) for step in (0, 1, 50, 99))
    if config.model != BASE.model:
        with torch.device("meta"):
            build_student(config, 10)


@fuzz(100)
@given(
    name=st.sampled_from([*MODELS, "vit_tiny_patch16_224"]),
    arguments=st.dictionaries(st.sampled_from(ARGUMENTS), st.one_of(INTEGERS, INTEGERS, SCALARS), min_size=1),
)
def test_model_arguments(name: str, arguments: dict[str, Any]) -> None:
    if name.startswith("sws_") or arguments.get("depth") not in (1000, 4097, 2**31):  # timm would build all layers
        with torch.device("meta"):
            attempt(lambda: create_model(name, **arguments))


def read_and_use(path: Path | str, overrides: list[str]) -> None:
    use(load_config(path, overrides))


@fuzz(700)
@given(st.lists(ENTRIES, min_size=1, max_size=3))
def test_config_keys_on_the_command_line(entries: list[tuple[str, Any]]) -> None:
    overrides = []
    for key, value in entries:
        text = value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True)
        overrides.append(f"{key}={text.removesuffix('...' + chr(10)).strip()}")
    attempt(read_and_use, SMALL, overrides)


@fuzz(200)
@given(override=st.one_of(st.text(), st.tuples(st.sampled_from(KEYS), st.text()).map("=".join)))
def test_any_text_as_an_override(override: str) -> None:
    attempt(read_and_use, SMALL, [override])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def places(folder: Path, few_digits: Path) -> Iterator[list[str]]:
    """Make files and folders, right and wrong, in the current folder. Yields their names, and one that is not there."""
    model = SWSVisionTransformer(schedule=(2, 1), img_size=32, patch_size=16, embed_dim=16, num_heads=2, num_classes=10)
    about = {"mean": [0.4] * 3, "std": [0.2] * 3, "image_size": 32, "crop_pct": 1.0, "interpolation": "bicubic"}
    save_model_file(
        folder / "gene.safetensors", describe_model(model, "learngene", preprocessing=about), model.state_dict()
    )
    whole = (folder / "gene.safetensors").read_bytes()
    contents = {
        "empty": b"",
        "cut.safetensors": whole[: len(whole) // 2],
        "zeros.safetensors": bytes(300),
        "text.safetensors": b"not a model",
        "weights.pth": pickle.dumps(os.getcwd),
        "list.pth": pickle.dumps([1, 2]),
        "text.txt": "kein Bild, nur Wörter\n".encode("latin-1"),
        "list.txt": b"a.jpg 0\nb.jpg\n",
        "metrics.json": b"{}",
        "bad.tar": b"x" * 1000,
        "bad.yaml": b"model: [",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    torch.save({"state_dict": {"a": torch.zeros(2)}}, folder / "odd.pth")
    for name in ("hollow", "classes/a", "one/train/0", "runs/depthX", "runs2/depth5/tuned", "caf\udce9/train/0"):
        (folder / name).mkdir(parents=True)
    images.noise(20, 30).save(folder / "one/train/0/a.png")
    (folder / "runs2/depth5/tuned/metrics.json").write_text("[]")
    shutil.copytree(few_digits, folder / "digits")
    before = Path.cwd()
    os.chdir(folder)
    yield [*sorted(path.name for path in folder.iterdir()), "one/train", "digits/val", "digits/val/0", "nowhere"]
    os.chdir(before)


@fuzz(200)
@given(entries=st.lists(ENTRIES, max_size=3), top=VALUES, base=st.one_of(st.just(SMALL), VALUES))
def test_config_files(folder: Path, entries: list[tuple[str, Any]], top: Any, base: Any) -> None:
    """Write the keys as a mapping of mappings; a value that is a mapping already has them inside."""
    content: Any = {"base": base} | (top if isinstance(top, dict) else {})
    for key, value in entries:
        group, *inner = key.split(".")
        content[group] = {inner[0]: value} if inner else value
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(content if entries else top))
    attempt(read_and_use, file, [])
    config = attempt(load_config, file)
    if config is not None:
        file.write_text(config_to_yaml(config))
        assert load_config(file) == config


@fuzz(100)
@given(
    content=st.one_of(st.binary(max_size=60), st.sampled_from([b"[" * 3000, b"&a [*a]", b"? [1]\n: 2", b"\xff\xfe"]))
)
def test_config_files_of_any_bytes(folder: Path, content: bytes) -> None:
    file = folder / "run.yaml"
    file.write_bytes(content)
    attempt(read_and_use, file, [])
    attempt(deepspeed_config.load_deepspeed_config, file)


def read_files(overrides: list[str]) -> None:
    config = load_config(SMALL, overrides)
    train, _ = list_images(config.data)
    build_models(config, train.classes, CPU, torch.float32, {}, 100)
    load_teacher(config.distill, train.classes, config.data)


FILE_KEYS = ["data.root", "data.train_split", "data.val_split", "data.classes", "distill.teacher"]
FILE_KEYS += ["distill.teacher_weights", "model.initial_checkpoint", "model.initial_learngene"]


@fuzz(150)
@given(data=st.data())
def test_files_of_a_run(places: list[str], data: st.DataObject) -> None:
    """Name files and folders of all kinds as images, classes, teacher and initial weights."""
    names = st.one_of(st.sampled_from(places), NAMES)
    drawn = data.draw(st.dictionaries(st.sampled_from(FILE_KEYS), names, max_size=3))
    right = {"data.root": "digits", "distill.teacher": "null", "model.name": "sws_vit"}
    right["model.kwargs"] = "{schedule: [1, 1], patch_size: 16, embed_dim: 16, num_heads: 2}"
    attempt(read_files, [f"{key}={value}" for key, value in (right | drawn).items()])


# ---- DeepSpeed configs ----

GROUPS = {
    name: [field.alias or key for key, field in model.model_fields.items()]
    for name, model in deepspeed_schema.MODELS.items()
}
DS_KEYS = sorted({*deepspeed_config.HONOURED, *(f"{group}.{key}" for group, keys in GROUPS.items() for key in keys)})
DS_KEYS += ["zero_optimization.offload_param.device", "zero_optimization.offload_optimizer.ratio", "aio", "nonsense"]

DS_ENTRIES = st.one_of(
    st.tuples(st.sampled_from(sorted(deepspeed_config.HONOURED)), st.one_of(NUMBERS, VALUES)),
    st.tuples(st.sampled_from(DS_KEYS), VALUES),
)


@fuzz(400)
@given(
    entries=st.lists(DS_ENTRIES, min_size=1, max_size=3),
    ranks=st.sampled_from([1, 1, 2, 7]),
)
def test_deepspeed_configs(folder: Path, entries: list[tuple[str, Any]], ranks: int) -> None:
    content: dict[str, Any] = {}
    for key, value in entries:
        *groups, last = key.split(".")
        inner = content
        for group in groups:
            inner[group] = found if isinstance(found := inner.get(group), dict) else {}
            inner = inner[group]
        inner[last] = value
    file = folder / "ds.json"
    file.write_text(json.dumps(content, default=str))

    def read() -> None:
        ds = deepspeed_config.resolve_deepspeed_config(file, BASE, ranks)
        deepspeed_schema.check_against_deepspeed(ds, file, CPU)
        assert np.isfinite(ds["gradient_clipping"])
        assert ds["gradient_clipping"] >= 0

    attempt(read)


# ---- Command lines ----


class _Parser(Exception):
    """Brings the parser of a command out of it."""


def options_of(command: str, monkeypatch: pytest.MonkeyPatch) -> list[argparse.Action]:
    """Return the options of a command."""

    def bring(parser: argparse.ArgumentParser) -> None:
        raise _Parser(parser)

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", bring)
        with pytest.raises(_Parser) as caught:
            call(command, [])
    return [action for action in caught.value.args[0]._actions if action.option_strings]


def words_for(option: argparse.Action, places: list[str]) -> st.SearchStrategy[list[str]]:
    """Draw an option with a value, mostly of the type that it takes."""
    name = option.option_strings[-1]
    if option.nargs == 0:
        return st.just([name])
    if option.type in (int, float):
        values = st.one_of(st.sampled_from(["1", "2", "3"]), INTEGERS.map(str), NUMBERS.map(str), NAMES)
    elif option.type is Path:
        values = st.one_of(st.sampled_from(places), st.sampled_from(places), NAMES)
    else:
        values = st.one_of(NAMES, st.sampled_from([*(option.choices or []), *SHORT_WORDS, *places]))
    return values.map(lambda value: [f"{name}={value}"])


def call(command: str, arguments: list[str]) -> None:
    sys.argv = [f"sws {command}", *arguments]
    import_module(f"sws_dist.cli.{command.replace('-', '_')}").main()


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let commands run inside this process, and undo what they do to it. Nothing trains: that part is left out."""
    monkeypatch.setattr(sws_dist.api, "train", lambda *_, **__: None)
    for module in (quickstart, study, family):
        monkeypatch.setattr(module, "perform", lambda command: None)
    monkeypatch.setattr("sws_dist.cli.train.install_handlers", lambda: None)
    monkeypatch.setattr("sws_dist.cli.finetune.install_handlers", lambda: None)
    monkeypatch.setattr(sys, "argv", sys.argv)
    environment = dict(os.environ)
    yield
    close_distributed()
    os.environ.clear()
    os.environ.update(environment)


SHORT_WORDS = ["even", "3,3", "1,1", "0,1,1", "output=x", "train.seed=-1", "train.global_batch=3", "data.root=one"]
COMPLETE = {
    "train": "--config quickstart/auxiliary --deepspeed_config zero2",
    "expand": "--learngene gene.safetensors --depth 3 --out out.safetensors",
    "finetune": "--from gene.safetensors --data digits/train --output out",
    "evaluate": "--checkpoint gene.safetensors --data digits/val --num-threads 1",
    "export": "--from gene.safetensors --depth 3 --out exported",
    "classify": "gene.safetensors digits/val/0 --num-threads 1",
    "push": "hollow --repo me/pets",
    "convert": "--out out.safetensors",
    "scan": "--data one",
    "show-batch": "--config quickstart/auxiliary --set data.root=digits --set train.global_batch=8 --out out.png",
    "plan": "--config quickstart/auxiliary --deepspeed_config zero2 --images 1000 --classes 10",
    "submit": "auxiliary --time 9 --dry-run --config quickstart/auxiliary --deepspeed_config zero2",
    "report": "--runs runs",
    "teach": "--config quickstart/auxiliary --set data.root=digits --out logits",
    "quickstart": "",
    "study": "--size tiny",
}
"""Command -> arguments with which it works, but for ``convert``, ``report`` and ``teach``, which need a run, and
``push``, which needs the network."""


def test_every_command_has_arguments() -> None:
    assert set(COMPLETE) == set(COMMANDS)


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("command", COMPLETE)
def test_command_lines(
    command: str, places: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Add options with files, numbers or texts, right or wrong, to complete arguments or to none."""
    drawn = st.one_of([words_for(option, places) for option in options_of(command, monkeypatch)])
    complete = COMPLETE[command].split()

    @fuzz(50)
    @given(options=st.lists(drawn, max_size=3), start=st.sampled_from([complete, complete, complete, complete[:1]]))
    def run(options: list[list[str]], start: list[str]) -> None:
        arguments = [*(complete if command == "submit" else start), *itertools.chain(*options)]
        try:
            attempt(call, command, arguments)
        except SystemExit as left:
            assert left.code in (0, 2), left.code  # noqa: PT017  --help, or argparse's own message
        finally:
            close_distributed()
            capsys.readouterr()

    run()
