"""The ``sws`` command: it finds commands and configs, says what is wrong, and imports torch only to do something."""

from __future__ import annotations

import ast
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import sws_dist
from sws_dist.cli import main as cli
from sws_dist.cli.classify import find_images
from sws_dist.cli.commands import in_checkout, train_command
from sws_dist.config.loader import load_config
from sws_dist.config.shipped import find_deepspeed_config, find_run_config
from sws_dist.errors import ConfigError
from sws_dist.logging import console
from sws_dist.zero.config import load_deepspeed_config
from tests.launching import REPOSITORY

FOLDER = REPOSITORY / "sws_dist" / "cli"


def sws(*arguments: str, code: int = 0, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
    """Run ``sws`` so that importing torch fails."""
    program = "import sys; sys.modules['torch'] = None; from sws_dist.cli.main import main; main()"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == code, done.stdout + done.stderr
    return done


PARTS = {"--init--", "main", "common", "commands", "family", "report-chart", "report-runs"}
"""The modules of ``cli`` that are no commands themselves."""


def test_every_command_is_listed_as_its_module_describes_itself() -> None:
    modules = {path.stem.replace("_", "-") for path in FOLDER.glob("*.py")} - PARTS
    assert modules == set(cli.COMMANDS)
    for name, about in cli.COMMANDS.items():
        doc = ast.get_docstring(ast.parse((FOLDER / f"{name.replace('-', '_')}.py").read_text()))
        assert doc is not None
        assert doc.splitlines()[0] == f"{about}.", name


def test_every_command_has_a_launch_script_whose_name_hides_no_standard_module() -> None:
    scripts = {path.stem for path in (REPOSITORY / "launcher").glob("*.py")}
    assert scripts == {name.replace("-", "_") for name in cli.COMMANDS}
    assert not scripts & sys.stdlib_module_names


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("expand --learngene x --out y --depth 0", "argument --depth: '0': expected a whole number from 1 to 1000"),
        ("expand --learngene x --out y --depth 1.5", "argument --depth: '1.5': expected a whole number from 1 to 1000"),
        (
            "evaluate --checkpoint x --data y --batch 4097",
            "argument --batch: '4097': expected a whole number from 1 to",
        ),
        ("evaluate --checkpoint x --data y --crop-pct nan", "--crop-pct: 'nan': expected a number from 0.1 to 1"),
        ("scan --data x --num-threads -1", "argument --num-threads: '-1': expected a whole number from 1 to 1024"),
        ("show-batch --config quickstart/auxiliary --step -1", "argument --step: '-1': expected a whole number from 0"),
        ("quickstart --seed 4294967296", "argument --seed: '4294967296': expected a whole number from 0 to 4294967295"),
        ("evaluate --checkpoint x --data y --depths 0-3", "--depths: '0-3': expected depths from 1 to 1000"),
        ("evaluate --checkpoint x --data y --depths 5 --predictions p", "--predictions do not go with it"),
        ("evaluate --checkpoint x --data y --plan spaced", "say how --depths are expanded, and there are none"),
    ],
)
def test_wrong_options(command: str, said: str) -> None:
    assert said in sws(*command.split(), code=2).stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--learngene x --dtype bf16", "--dtype goes with --checkpoint"),
        ("--learngene x --ema", "--ema goes with --checkpoint"),
        ("--checkpoint x --heads 6", "--heads goes with --released"),
    ],
)
def test_options_that_convert_would_not_heed(options: str, said: str) -> None:
    assert said in sws("convert", *options.split(), "--out", "y", code=2).stderr


def test_more_images_than_a_step_has_cannot_be_shown() -> None:
    said = sws("show-batch", "--config", "auxiliary_small", "--batch", "1024", code=1).stderr
    assert said == "error: --batch 1024: expected a divisor of train.global_batch 512, at most 4096\n"


def test_help_and_version() -> None:
    assert sws("--help").stdout == sws().stdout == cli.usage() + "\n"
    assert sws("--version").stdout == f"sws-dist {sws_dist.__version__}\n"
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert citation["version"] == sws_dist.__version__


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_a_command_imports_no_torch(name: str) -> None:
    said = sws(name, "--help").stdout
    assert said.startswith(f"usage: sws {name} ")
    assert "--quiet" in said
    assert "--debug" in said


def test_an_unknown_command() -> None:
    assert sws("trian", code=2).stderr == "sws: there is no command 'trian'; did you mean train?\n"
    assert "the commands are train, expand" in sws("xyz", code=2).stderr


def test_a_wrong_config_is_reported_without_torch() -> None:
    config, ds = ("--config", "auxiliary_small"), ("--deepspeed_config", "zero2")
    said = sws("train", *config, *ds, "--set", "train.epoch=3", code=1).stderr
    assert said == "error: --set train.epoch=3: unknown key train.epoch; did you mean train.epochs?\n"
    assert "did you mean auxiliary_small" in sws("train", "--config", "auxiliary_smal", *ds, code=1).stderr
    assert "did you mean zero2_bf16" in sws("train", *config, "--deepspeed_config", "zero2_bf61", code=1).stderr
    assert "the following arguments are required: --config" in sws("train", code=2).stderr


def test_debug_shows_where_an_error_comes_from() -> None:
    said = sws("train", "--debug", "--config", "nowhere", "--deepspeed_config", "zero2", code=1).stderr
    assert "Traceback" in said
    assert "ConfigError" in said


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, sws_dist; dir(sws_dist); sws_dist.load_config('auxiliary_small'); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0
    assert set(sws_dist.__all__) <= set(dir(sws_dist))
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        _ = sws_dist.trian  # type: ignore[attr-defined]


def test_type_checkers_see_every_public_name() -> None:
    tree = ast.parse((REPOSITORY / "sws_dist" / "__init__.py").read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert set(sws_dist.__all__) - {"__version__"} <= imported


def test_configs_are_found_by_path_then_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    configs = REPOSITORY / "configs"
    assert find_run_config("quickstart/teacher") == configs / "runs" / "quickstart" / "teacher.yaml"
    assert find_deepspeed_config("zero3") == configs / "deepspeed" / "zero3.json"
    (tmp_path / "auxiliary_small").mkdir()  # a folder of that name is no config
    assert find_run_config("auxiliary_small") == configs / "runs" / "auxiliary_small.yaml"
    (tmp_path / "zero3").write_text("{}")
    assert find_deepspeed_config("zero3") == Path("zero3")
    with pytest.raises(ConfigError, match=r"those that ship are auxiliary_base, .*quickstart/teacher"):
        find_run_config("xyz")


def test_a_config_may_build_on_a_shipped_one(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("base: auxiliary_small\noutput: runs/mine\n")
    config = load_config(tmp_path / "mine.yaml")
    assert (config.output, config.model.name) == ("runs/mine", "sws_aux_small_patch16_224")


def test_a_deepspeed_config_may_be_given_as_its_content() -> None:
    given = {"zero_optimization": {"stage": 1}}
    assert load_deepspeed_config(given) == given
    with pytest.raises(ConfigError, match="deepspeed_config: unknown key zero_optimisation"):
        load_deepspeed_config({"zero_optimisation": {"stage": 1}})


def test_options_that_are_paths_are_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shell expands ``--config ~/x``, and not ``--config=~/x`` nor what is in quotes."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RUNS", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("epochs: 1")
    for written in ("~/mine.yaml", "$RUNS/mine.yaml", "${RUNS}/mine.yaml"):
        said = sws("train", f"--config={written}", "--deepspeed_config", "zero2", code=1).stderr
        assert f"{tmp_path}/mine.yaml:1: unknown key epochs; did you mean train.epochs?\n" in said
    said = sws("report", "--runs", "$NOWHERE/x", code=2).stderr
    assert "argument --runs: $NOWHERE/x: the environment variable NOWHERE is not set" in said
    said = sws("train", "--resume", "~nobody-here", "--config=x", "--deepspeed_config=zero2", code=2).stderr
    assert "argument --resume: ~nobody-here: there is no home folder of ~nobody-here" in said


@pytest.mark.parametrize("stray", [{"RANK": "3"}, {"RANK": "1", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}])
def test_a_stray_rank_does_not_silence_a_command_of_one_process(
    digits_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stray: dict[str, str]
) -> None:
    for name, value in stray.items():
        monkeypatch.setenv(name, value)
    found = tmp_path / "found.json"
    scan = [sys.executable, "launcher/scan.py", "--data", str(digits_root / "val"), "--json", str(found)]
    done = subprocess.run(scan, cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
    assert "355" in done.stdout
    resources = ("--gpus-per-node=8", "--time=1")
    said = sws("submit", "auxiliary", "--config=auxiliary_small", "--deepspeed_config=zero2", *resources, "--dry-run")
    assert said.stdout.startswith("#!/bin/bash\n")
    assert "error: " in sws("report", "--runs", str(tmp_path), code=1).stderr


def test_the_current_folder_may_be_scanned(digits_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = [sys.executable, str(REPOSITORY / "launcher" / "scan.py"), "--data", ".", "--json", str(tmp_path / "f.json")]
    for folder, prefix in ((digits_root, 1797), (digits_root / "val", 355)):
        done = subprocess.run(scan, cwd=folder, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        assert f'"images": {prefix}' in (tmp_path / "f.json").read_text()
    assert (digits_root / "val.manifest.jsonl").is_file()


def test_a_name_that_the_locale_cannot_write_is_shown_escaped(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    program = "from sws_dist.cli.common import *; setup_console(); log.info('Bär'); print_result('\\u56fe')"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=600)
    assert done.stdout == "B\\xe4r\n\\u56fe\n", done.stderr


def test_the_quickstart_prints_commands_that_can_be_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    assert in_checkout()
    assert train_command("", "quickstart/teacher", Path("runs/teacher"), 0).words[:2] == ("python", "launcher/train.py")
    here = train_command("", "quickstart/teacher", Path("runs/teacher"), 0, ranks=2).words
    assert Path(here[here.index("--config") + 1]).is_file()
    assert Path(here[here.index("--deepspeed_config") + 1]).is_file()
    assert "launcher/train.py" in here
    assert here[:3] == ("python", "-m", "deepspeed.launcher.runner")  # its script fails where a path has a space
    monkeypatch.chdir(tmp_path)
    assert train_command("", "quickstart/teacher", Path("runs/teacher"), 0).words[:2] == ("sws", "train")
    away = train_command("", "quickstart/teacher", Path("runs/teacher"), 0, ranks=2).words
    assert away[away.index("--module") + 1] == "sws_dist.cli.train"
    assert find_run_config(away[away.index("--config") + 1]).is_file()


def test_deepspeed_says_only_what_a_user_can_act_on() -> None:
    """Only lines that the installed DeepSpeed really prints are hidden; all else stays."""
    from deepspeed.utils import logger

    console.setup_console()
    hidden = "Setting accelerator to CPU. If you have GPU or other accelerator, we were unable to detect it."
    record = logging.LogRecord("DeepSpeed", logging.WARNING, "", 0, hidden, (), None)
    assert not logger.filter(record)
    record.msg = "something else"
    assert logger.filter(record)
    source = Path(sys.modules["deepspeed"].__file__ or "").parent / "accelerator" / "real_accelerator.py"
    assert re.search(r"Setting accelerator to CPU", source.read_text())


def test_a_command_that_reads_images_says_that_dali_is_missing(tmp_path: Path) -> None:
    """DALI is an extra: planning, expanding and exporting do without."""
    hide = "import sys; sys.modules['nvidia.dali'] = None; from sws_dist.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", hide, "scan", "--data", str(tmp_path)], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 1
    assert "DALI, which reads images, is missing: pip install 'sws-dist[dali]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_classify_lists_each_image_once_where_links_lead_back(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("b.jpg", "in/a.jpg", "._b.jpg", "notes.txt"):
        (tmp_path / name).write_bytes(b"1")
    for name in ("again", "more", "in/up"):
        (tmp_path / name).symlink_to(tmp_path)
    assert list(find_images([tmp_path])) == [f"{tmp_path}/b.jpg", f"{tmp_path}/in/a.jpg"]
