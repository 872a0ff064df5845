"""The plan of a family's runs: which configs, from which weights, with which teacher."""

from __future__ import annotations

from pathlib import Path

import pytest

from sws_dist.cli import study
from sws_dist.cli.commands import Command
from sws_dist.cli.family import AT_DEPTHS, AUXILIARIES, Family
from sws_dist.config.loader import load_config
from sws_dist.config.shipped import find_run_config


def overrides(command: Command) -> dict[str, str]:
    words = command.words
    return dict(words[i + 1].split("=", 1) for i, word in enumerate(words) if word == "--set")


def config(command: Command) -> str:
    return command.words[command.words.index("--config") + 1]


@pytest.fixture
def families(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Family]:
    monkeypatch.chdir(tmp_path)  # not in a checkout: configs go by their names
    return make_families((*AUXILIARIES, *AT_DEPTHS))


def make_families(compared: tuple[str, ...]) -> list[Family]:
    small = study.DATA_SETS["fashion-mnist"].sizes["small"]
    return study.make_families(Path("out"), small, compared, (3, 4), ("data.root=data/d",), ())


def test_all_learn_from_the_first_seeds_teacher(families: list[Family]) -> None:
    for family in families:
        for command in (*family.auxiliary_commands(), *family.depth_commands()):
            sets = overrides(command)
            taught = not config(command).endswith(("scratch_full", "teacher", "untaught"))
            assert sets.get("distill.teacher") == ("out/seed3/teacher/model.safetensors" if taught else None)
            assert sets["train.seed"] == str(family.seed)
            assert sets["data.root"] == "data/d"
    assert overrides(families[0].teacher_command())["output"] == "out/seed3/teacher"


def test_every_run_of_a_depth(families: list[Family]) -> None:
    commands = list(families[1].depth_commands())
    assert [(config(c), overrides(c)["model.depth"]) for c in commands] == [
        (f"study/{kind}", depth) for kind in reversed(AT_DEPTHS) for depth in ("12", "5")
    ]
    for command in commands:
        sets = overrides(command)
        expanded = f"out/seed4/depth{sets['model.depth']}/expanded.safetensors"
        assert sets.get("model.initial_checkpoint") == (expanded if config(command).endswith("tuned") else None)
        assert sets.get("train.epochs") == ("10" if config(command).endswith(("_full", "_taught")) else None)
    assert len({command.done for command in commands}) == len(commands)


def test_models_of_one_depth_are_scored_with_scaled_branches(families: list[Family]) -> None:
    commands = list(families[1].scaled_commands(Path("data/d/val")))
    assert [command.done for command in commands] == [
        Path(f"out/seed4/{name}/scaled.json") for name in ("fixed", "tleg", "unshared")
    ]
    for command in commands:
        said = " ".join(command.words)
        assert "--branch-scaling 1" in said
        assert "--data data/d/val" in said
        assert ("--plan spaced" in said) == ("unshared" in said)
        assert "--depths 5,6,7,8,9,11,12,13,14,15,16" in said


def test_some_of_the_runs(families: list[Family]) -> None:
    """The auxiliary model is always one of them, and nothing is expanded that is not fine-tuned."""
    family = make_families(("fixed", "scratch_full"))[0]
    assert [overrides(c)["output"] for c in family.auxiliary_commands()] == ["out/seed3/auxiliary", "out/seed3/fixed"]
    assert {config(c) for c in family.depth_commands()} == {"study/scratch_full"}
    assert not list(family.expand_commands())
    assert len(list(families[0].expand_commands())) == 2


def test_the_configs_are_there_and_load(families: list[Family]) -> None:
    for name in ("quickstart", "study"):
        for run in ("teacher", *AUXILIARIES, *AT_DEPTHS):
            if name == "study" or run in ("teacher", "auxiliary", "tuned", "scratch", "scratch_full"):
                loaded = load_config(find_run_config(f"{name}/{run}"))
                assert (loaded.model.elastic is not None) == (run in ("auxiliary", "untaught"))
                assert (loaded.distill.teacher is None) == (run in ("teacher", "untaught", "scratch_full"))
