"""Run configs: every file loads, and whatever is wrong in one is named with its file and the nearest valid key."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sws_dist.config.loader import config_to_yaml, load_config, valid_keys
from sws_dist.config.paths import escape_path
from sws_dist.config.resume import compare_with_own_config
from sws_dist.errors import ConfigError
from sws_dist.zero.config import resolve_deepspeed_config

ROOT = Path(__file__).parents[2]
RUNS = sorted((ROOT / "configs" / "runs").rglob("*.yaml"))
SHARDINGS = sorted((ROOT / "configs" / "deepspeed").glob("*.json"))

MINIMAL = """
output: runs/x
model: {name: sws_vit}
data: {root: data/x}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return path


def refused(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


@pytest.mark.parametrize("path", RUNS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_run_config_loads_and_survives_a_round_trip(path: Path, tmp_path: Path) -> None:
    run = load_config(path)
    (tmp_path / "again.yaml").write_text(config_to_yaml(run))
    assert load_config(tmp_path / "again.yaml") == run


@pytest.mark.parametrize("sharding", SHARDINGS, ids=lambda p: p.name)
@pytest.mark.parametrize("world_size", [1, 8])
def test_every_deepspeed_config_resolves_for_every_run(sharding: Path, world_size: int) -> None:
    assert len(RUNS) > 10
    for path in RUNS:
        offload = "offload" in sharding.name
        run = load_config(path, ["optim.name=cpu_adam"] if offload else [])
        ds = resolve_deepspeed_config(sharding, run, world_size)
        batch = ds["train_micro_batch_size_per_gpu"] * ds["gradient_accumulation_steps"] * world_size
        assert batch == ds["train_batch_size"] == run.train.global_batch


def test_published_recipe_is_in_the_files() -> None:
    """The figures of the paper's released settings (DESIGN section 4), read back from what a user would run."""
    runs = ROOT / "configs" / "runs"
    small, base = (load_config(runs / f"auxiliary_{size}.yaml") for size in ("small", "base"))
    assert (small.train.epochs, base.train.epochs, small.train.global_batch) == (150, 100, 512)
    assert (small.optim.lr, small.optim.lr_batch, small.optim.min_lr) == (5e-4, 512, 1e-5)
    assert (small.optim.warmup_epochs, small.optim.warmup_lr, small.optim.weight_decay) == (5, 1e-6, 0.05)
    assert (small.model.drop_path, small.optim.ema_decay) == (0.1, 0.99996)
    assert (small.distill.kind, small.distill.alpha, small.distill.tau) == ("soft", 1.0, 1.0)
    for size, rate in (("small", 5e-5), ("base", 1e-5)):
        descendant = load_config(runs / f"descendant_{size}.yaml")
        assert (descendant.optim.lr, descendant.optim.min_lr, descendant.optim.warmup_epochs) == (rate, 1e-6, 0)
        assert (descendant.train.epochs, descendant.distill.teacher) == (10, None)
        assert descendant.augment == small.augment
    augment = small.augment
    assert augment.auto_augment == "rand-m9-mstd0.5-inc1"
    assert (augment.re_prob, augment.mixup, augment.cutmix, augment.mixup_switch_prob) == (0.25, 0.8, 1.0, 0.5)
    assert (augment.smoothing, augment.num_repeats, small.data.crop_pct) == (0.1, 3, 0.875)


def test_scratch_twins_differ_only_in_what_they_are_for() -> None:
    """The comparison is fair only if the twin has the auxiliary model's recipe and budget."""
    for size in ("tiny", "small", "base"):
        auxiliary, scratch = (
            load_config(ROOT / "configs" / "runs" / f"{kind}_{size}.yaml") for kind in ("auxiliary", "scratch")
        )
        assert scratch.distill.teacher is None
        for part in ("data", "augment", "optim", "train"):
            assert getattr(scratch, part) == getattr(auxiliary, part), (size, part)


def test_overrides_win_and_keep_yaml_types(file: Path) -> None:
    run = load_config(file, ["train.epochs=3", "optim.lr=1e-3", "model.schedule=[2, 2]", "optim.lr_batch=null"])
    assert (run.train.epochs, run.optim.lr, run.model.schedule, run.optim.lr_batch) == (3, 1e-3, (2, 2), None)


def test_an_empty_mapping_takes_what_was_there_away(file: Path) -> None:
    assert load_config(file, ["model.kwargs={embed_dim: 64}", "model.kwargs={num_heads: 2}"]).model.kwargs == {
        "embed_dim": 64,
        "num_heads": 2,
    }
    assert load_config(file, ["model.kwargs={embed_dim: 64}", "model.kwargs={}"]).model.kwargs == {}


def test_base_gives_keys_and_the_file_wins(file: Path, tmp_path: Path) -> None:
    child = tmp_path / "child.yaml"
    child.write_text("base: run.yaml\ntrain: {epochs: 7}\nmodel: {depth: 4}\n")
    run = load_config(child)
    assert (run.train.epochs, run.model.depth, run.model.name, run.output) == (7, 4, "sws_vit", "runs/x")
    file.write_text("base: child.yaml\n")
    assert "names itself as its base" in refused(child)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.epoch=3", "unknown key train.epoch; did you mean train.epochs?"),
        ("optim.epochs=3", "unknown key optim.epochs; did you mean train.epochs?"),
        ("trian.epochs=3", "unknown key trian; did you mean train?"),
        ("train.epochs=three", "train.epochs = 'three'"),
        ("train.epochs='3'", "train.epochs = '3'"),
        ("train.epochs=0", "train.epochs = 0: input should be greater than or equal to 1"),
        ("data.interpolation=cubic", "data.interpolation = 'cubic'"),
        ("model.compile=1", "model.compile = 1"),
        ("optim.betas=[0.9]", "optim.betas"),
        ("train.epochs", "expected key=value"),
        ("optim.lr=.nan", "optim.lr = nan: input should be a finite number"),
        ("optim.lr=.inf", "optim.lr = inf: input should be a finite number"),
        ("optim.betas=[0.9, 1.0]", "optim.betas [0.9, 1.0]: each has to be at least 0 and below 1"),
        ("optim.lr_batch=0", "optim.lr_batch = 0: input should be greater than or equal to 1"),
        ("train.eval_batch=4097", "train.eval_batch = 4097: input should be less than or equal to 4096"),
        ("train.seed=4294967296", "train.seed = 4294967296: input should be less than 4294967296"),
        ("data.mean=[123.7, 116.3, 103.5]", "data.mean [123.7, 116.3, 103.5]: each has to be from 0 to 1"),
        ("data.std=[0, 1, 1]", "data.std [0.0, 1.0, 1.0]: each has to be from 0.001 to 1"),
        ("augment.affine.fill=[0, 0, 256]", "augment.affine.fill [0, 0, 256]: each has to be from 0 to 255"),
        ("augment.ratio=[2.0, 1.0]", "augment.ratio [2.0, 1.0]: expected [smallest, largest], both from 0.01 to 100"),
        ("model.schedule=[3, 0]", "model.schedule [3, 0]: expected a count above 0 for each stage"),
        ("model.operators.attention=fa4", "= 'fa4': input should be 'auto', 'triton', 'cudnn' or 'flash'"),
        ("model.operators.mlp=torch", "unknown key model.operators.mlp"),
        ("model={kernels: reference, operators: {attention: flash}}", "but model.kernels is reference; set it to auto"),
        ("output=''", "output is empty; give the folder that the run is to write"),
    ],
)
def test_what_is_wrong_is_named(file: Path, override: str, said: str) -> None:
    message = refused(file, override)
    assert said in message
    assert f"--set {override}" in message or "--set 'train.epochs'" in message


def test_errors_name_the_file_that_holds_the_key(file: Path, tmp_path: Path) -> None:
    file.write_text(MINIMAL + "train: {epocs: 3}\n")
    child = tmp_path / "child.yaml"
    child.write_text("base: run.yaml\noptim: {lr: fast}\n")
    lines = refused(child).splitlines()
    assert f"{file}:5: unknown key train.epocs; did you mean train.epochs?" in lines
    assert any(line.startswith(f"{child}:2: optim.lr = 'fast'") for line in lines)


def test_missing_and_duplicate_keys(file: Path) -> None:
    file.write_text("model: {name: sws_vit}\ndata: {root: x}\n")
    assert "the key output is missing" in refused(file)
    file.write_text(MINIMAL + "train: {epochs: 3}\ntrain: {seed: 1}\n")
    assert refused(file) == f"{file}:6: the key 'train' appears twice; remove one"


def test_unreadable_files(tmp_path: Path, file: Path) -> None:
    assert "No such file" in refused(tmp_path / "nowhere.yaml")
    assert "it is a folder" in refused(tmp_path)


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        (b"output: [", 1, "not valid YAML: expected the node content"),
        (b"output: x\n\tmodel: {}\n", 2, "there is a tab; indent with spaces"),
        (b"output: x\nmodel:\n\tname: x\n", 3, "there is a tab; indent with spaces"),
        (b"output: x\noutput: y\n", 2, "the key 'output' appears twice; remove one"),
        (b"model: {name: a, depth: 3, name: b}\n", 1, "the key 'name' appears twice; remove one"),
        (b"output: x\n3: y\n", 2, "the key 3 is not a name; put it in quotes"),
        (b"[a, b]: y\n", 1, "the key ['a', 'b'] is not a name"),
        (b"output: a: b\n", 1, "not valid YAML: mapping values are not allowed here"),
        (b"output: x\n---\noutput: y\n", 2, "expected a single document in the stream"),
        (b"output: !!int x\n", None, "not valid YAML: invalid literal for int"),
        (b"output: !!bool x\n", None, "not valid YAML: 'x'"),
        (b"output: !!int {a: 1}\n", 1, "not valid YAML: expected a scalar node"),
        (b"output: x\ntrain: !!set {a}\n", 2, "could not determine a constructor for the tag"),
        (b"- a list\n", None, "expected a mapping of keys (output, model, data, ...), found list"),
        (b"", None, "expected a mapping of keys (output, model, data, ...), found an empty file"),
        (b"# nothing\n", None, "found an empty file"),
        (b"output: \xff\n", None, "not UTF-8 text (byte 8 is 0xff); save it as UTF-8"),
        (b"\xff\xfeo\x00", None, "not UTF-8 text (byte 0 is 0xff); save it as UTF-8"),
        (b"output: \x00\n", None, "not valid YAML: unacceptable character"),
        (b"[" * 5000, None, "not valid YAML: nested too deeply"),
    ],
)
def test_a_file_that_is_no_config_is_refused_in_one_line(file: Path, text: bytes, line: int | None, said: str) -> None:
    file.write_bytes(text)
    message = refused(file)
    assert message.startswith(f"{file}:{line}: " if line else f"{file}: ")
    assert said in message
    assert "\n" not in message


def test_a_byte_order_mark_is_skipped(file: Path) -> None:
    file.write_bytes(b"\xef\xbb\xbf" + MINIMAL.replace("runs/x", "runs/Bär").encode())
    assert load_config(file).output == "runs/Bär"


@pytest.mark.parametrize(
    ("written", "value"),
    [("1e-3", 1e-3), ("1E3", 1000.0), ("+.5", 0.5), ("1_0", 10), ("5.", 5.0), ("010", 10), ("2.5e+1", 25.0)],
)
def test_numbers_are_those_that_a_reader_sees(file: Path, written: str, value: float) -> None:
    assert load_config(file, [f"optim.lr={written}"]).optim.lr == value


@pytest.mark.parametrize("written", ["yes", "no", "on", "off", "y", "1"])
def test_only_true_and_false_are_booleans(file: Path, written: str) -> None:
    """YAML 1.1 would take ``no`` for false, also where a name stands."""
    assert "model.compile = " in refused(file, f"model.compile={written}")
    assert load_config(file, ["model.compile=true"]).model.compile
    name = written if written.isalpha() else f"'{written}'"
    assert load_config(file, [f"model.name={name}"]).model.name == written


@pytest.mark.parametrize("override", ["train.timeout_s=1:30", "train.epochs=0x10", "optim.lr=.inf", "optim.lr=.nan"])
def test_values_of_yaml_that_surprise_are_refused(file: Path, override: str) -> None:
    assert f"--set {override}: {override.split('=')[0]} = " in refused(file, override)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train=null", "train = None"),
        ("train.epochs.x=3", "train.epochs = {'x': 3}"),
        ("model.schedule.0=3", "model.schedule = {'0': 3}"),
        ("optim.betas=[0.9, [1]]", "optim.betas.1 = [1]"),
        ("augment.affine={degres: 3}", "unknown key augment.affine.degres; did you mean augment.affine.degrees?"),
        ("output=", "output = None"),
        ("train..epochs=3", "unknown key train."),
        ("train={epochs: 1, epochs: 2}", "the key 'epochs' appears twice"),
        ("train.epochs=[", "not valid YAML"),
    ],
)
def test_overrides_of_lists_groups_and_null(file: Path, override: str, said: str) -> None:
    message = refused(file, override)
    assert message.startswith(f"--set {override}: ")
    assert said in message


def test_paths_are_expanded(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DATA", "/data")
    monkeypatch.delenv("NOWHERE", raising=False)
    file.write_text("output: ~/runs\nmodel: {name: sws_vit}\ndata: {root: '${DATA}/x', classes: $DATA/names.txt}\n")
    run = load_config(file, ["distill.teacher=~/t.safetensors", "distill.teacher_weights=$DATA/w.pth"])
    assert (run.output, run.data.root, run.data.classes) == ("/home/me/runs", "/data/x", "/data/names.txt")
    assert (run.distill.teacher, run.distill.teacher_weights) == ("/home/me/t.safetensors", "/data/w.pth")
    assert load_config(file, ["output=~", "data.root=."]).output == "/home/me"
    said = refused(file, "data.root=$NOWHERE/x")
    assert said.startswith("--set data.root=$NOWHERE/x: data.root: $NOWHERE/x: the environment variable NOWHERE is not")
    file.write_text(file.read_text().replace("~/runs", "$NOWHERE"))
    assert refused(file).startswith(f"{file}:1: output: $NOWHERE: the environment variable NOWHERE is not set")
    assert load_config(file, ["output=x"]).output == "x"  # the value that counts
    assert "there is no home folder of ~nobody-here" in refused(file, "output=~nobody-here/x")
    name = load_config(file, ["output=x", "model.name=$DATA~"]).model.name
    assert name == "$DATA~"  # not a path


STRANGE = [
    *("a b", " a ", "a #b", "a: b", "50%", "a$b", "$HOME", "~", "~x", "'a'", '"', "Bär 图", "[a", "{a}", "a\\b", "."),
    *(
        "2026",
        "1e3",
        "010",
        "1:30",
        "2026-01-01",
        "yes",
        "no",
        "null",
        "true",
        ".inf",
        "=",
        "<<",
        "? a",
        "!!str a",
        ".",
    ),
]


@pytest.mark.parametrize("name", STRANGE)
def test_strange_paths_survive(file: Path, tmp_path: Path, name: str) -> None:
    """In an override, and in the config that a run writes beside its checkpoints and a job reads again."""
    for path in (f"{tmp_path}/{name}", name):
        run = load_config(file, [f"data.root={escape_path(path)}"])
        assert os.path.abspath(run.data.root) == os.path.abspath(path)
        (tmp_path / "again.yaml").write_text(config_to_yaml(run))
        assert load_config(tmp_path / "again.yaml") == run
        assert yaml.safe_load(config_to_yaml(run))["data"]["root"] == escape_path(run.data.root)


def test_a_path_that_is_not_unicode_is_refused(file: Path) -> None:
    assert "output" in refused(file, "output=caf\udce9")  # what Python makes of a byte in Latin-1


def test_shipped_configs_are_read_in_any_locale() -> None:
    program = "from sws_dist import load_config; print(load_config('auxiliary_small').model.name)"
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=600)
    assert done.stdout == "sws_aux_small_patch16_224\n", done.stderr


def test_configs_are_frozen(file: Path) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_config(file).output = "elsewhere"


def test_the_page_of_keys_is_up_to_date() -> None:
    import runpy

    page = runpy.run_path(str(ROOT / "docs" / "make.py"))["page"]
    assert (ROOT / "docs" / "config.md").read_text() == page(), "run make docs"
    for key in valid_keys():
        if key not in {"model", "model.operators", "data", "augment", "distill", "optim", "train", "checkpoint"}:
            assert f"`{key}`" in page(), key


def test_a_run_starts_from_one_thing(file: Path) -> None:
    """A learngene or a checkpoint; and the keys of an expansion need a learngene."""
    gene, checkpoint = "model.initial_learngene=a.safetensors", "model.initial_checkpoint=b.safetensors"
    assert "both given" in refused(file, gene, checkpoint)
    assert load_config(file, [gene, checkpoint, "model.initial_checkpoint=null"]).model.initial_learngene
    assert "no model.initial_learngene" in refused(file, "model.plan=proportional")
    assert "no model.initial_learngene" in refused(file, "model.expand=read", checkpoint)
    assert "there is no distill.teacher that they are of" in refused(file, "distill.teacher_weights=w.pth")
    assert load_config(file, [gene, "model.plan=[0, 0, 1]"]).model.plan == (0, 0, 1)
    assert "model.plan = 'odd': input should be 'even', 'proportional' or 'spaced'" in refused(
        file, gene, "model.plan=odd"
    )
    assert "model.expand" in refused(file, gene, "model.expand=gather")


def test_contradictions_name_the_source_of_the_key(file: Path) -> None:
    said = refused(file, "model.cuda_graphs=true", "model.compile=true")
    assert said.startswith("--set model.cuda_graphs=true: model.cuda_graphs: torch.compile (model.compile) cannot see")
    said = refused(file, "augment.scale=[0.5, 1.2]")
    expected = "augment.scale [0.5, 1.2]: expected [smallest, largest], both from 1e-06 to 1"
    assert said == f"--set augment.scale=[0.5, 1.2]: {expected}"
    said = refused(file, "augment.num_repeats=3", "augment.num_crops=4")
    assert said.startswith("--set augment.num_crops=4: augment.num_crops 4: augment.num_repeats 3 repeats each image")
    assert "augment.affine.scale [0.0, 1.0]: expected" in refused(file, "augment.affine.scale=[0.0, 1.0]")


def test_an_elastic_run_from_before_branches_were_scaled_goes_on_without(tmp_path: Path) -> None:
    """Its config does not have the key, whose default scales them."""
    unscaled = load_config("quickstart/auxiliary", ["model.elastic.branch_scaling=0"])
    lines = [line for line in config_to_yaml(unscaled).splitlines() if "branch_scaling" not in line]
    (tmp_path / "config.yaml").write_text("\n".join(lines))
    assert compare_with_own_config(tmp_path, unscaled) == unscaled
    with pytest.raises(ConfigError, match=r"model\.elastic\.branch_scaling 1\.0 \(it was 0\.0\)"):
        compare_with_own_config(tmp_path, load_config("quickstart/auxiliary"))
