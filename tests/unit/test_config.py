"""Run configs: every file loads, and whatever is wrong in one is named with its file and the nearest valid key."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from sws_dist.config.loader import config_to_yaml, load_config, valid_keys
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
    assert f"{file}: unknown key train.epocs; did you mean train.epochs?" in lines
    assert any(line.startswith(f"{child}: optim.lr = 'fast'") for line in lines)


def test_missing_and_duplicate_keys(file: Path) -> None:
    file.write_text("model: {name: sws_vit}\ndata: {root: x}\n")
    assert "the key output is missing" in refused(file)
    file.write_text(MINIMAL + "train: {epochs: 3}\ntrain: {seed: 1}\n")
    assert re.search(r"line 6: the key 'train' appears twice", refused(file))


def test_unreadable_files(tmp_path: Path, file: Path) -> None:
    assert "No such file" in refused(tmp_path / "nowhere.yaml")
    file.write_text("output: [")
    assert "not valid YAML" in refused(file)
    file.write_text("- a list")
    assert "expected a mapping" in refused(file)


def test_configs_are_frozen(file: Path) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_config(file).output = "elsewhere"


def test_the_page_of_keys_is_up_to_date() -> None:
    import runpy

    page = runpy.run_path(str(ROOT / "docs" / "make.py"))["page"]
    assert (ROOT / "docs" / "config.md").read_text() == page(), "run make docs"
    for key in valid_keys():
        if key not in {"model", "data", "augment", "distill", "optim", "train", "checkpoint"}:
            assert f"`{key}`" in page(), key


def test_a_run_starts_from_one_thing(file: Path) -> None:
    """A learngene or a checkpoint; and the keys of an expansion need a learngene."""
    gene, checkpoint = "model.initial_learngene=a.safetensors", "model.initial_checkpoint=b.safetensors"
    assert "both given" in refused(file, gene, checkpoint)
    assert load_config(file, [gene, checkpoint, "model.initial_checkpoint=null"]).model.initial_learngene
    assert "no model.initial_learngene" in refused(file, "model.plan=proportional")
    assert "no model.initial_learngene" in refused(file, "model.expand=read", checkpoint)
    assert load_config(file, [gene, "model.plan=[0, 0, 1]"]).model.plan == (0, 0, 1)
    assert "model.plan = 'odd': input should be 'even' or 'proportional'" in refused(file, gene, "model.plan=odd")
    assert "model.expand" in refused(file, gene, "model.expand=gather")


def test_contradictions_name_the_source_of_the_key(file: Path) -> None:
    said = refused(file, "model.cuda_graphs=true", "model.compile=true")
    assert said.startswith("--set model.cuda_graphs=true: model.cuda_graphs: torch.compile (model.compile) cannot see")
    said = refused(file, "augment.scale=[0.5, 1.2]")
    expected = "augment.scale [0.5, 1.2]: expected [smallest, largest], both from 1e-06 to 1"
    assert said == f"--set augment.scale=[0.5, 1.2]: {expected}"
    assert "augment.affine.scale [0.0, 1.0]: expected" in refused(file, "augment.affine.scale=[0.0, 1.0]")
