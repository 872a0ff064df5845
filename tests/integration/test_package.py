"""The wheel, installed away from the checkout: commands, configs by name, training, and jobs work from it alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

from sws_dist.checkpoint.model_file import save_model_file
from sws_dist.learngene.file import describe_model
from sws_dist.models import SWSVisionTransformer
from tests.launching import REPOSITORY, free_port

SOURCES = ("sws_dist", "kernels", "configs", "launcher", "setup.py", "pyproject.toml", "README.md", "LICENSE")
PREPROCESSING = {"mean": [0.5] * 3, "std": [0.5] * 3, "image_size": 32, "crop_pct": 1.0, "interpolation": "bicubic"}


@dataclass(frozen=True)
class Installed:
    """A virtual environment that holds the wheel; all other packages are those of the Python that runs the tests."""

    venv: Path
    folder: Path
    """An empty folder to work in."""

    def run(self, *command: object, code: int = 0, path: Path | None = None) -> str:
        """Run a program of the environment in ``folder``. Returns what it prints."""
        words = [str(word) for word in command]
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        folders = [str(path)] * (path is not None) + [str(self.venv / "bin"), environment["PATH"]]
        environment |= {"PATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(words, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def python(self, code: str) -> str:
        return self.run(self.venv / "bin" / "python", "-c", code).strip()


def build_wheel(folder: Path) -> Path:
    """Build from a copy: building in place would leave its files in the checkout."""
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        if (REPOSITORY / name).is_dir():
            shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(REPOSITORY / name, source)
    # With isolation, pip would first download setuptools.
    isolation = ["--no-build-isolation"] if find_spec("setuptools") else []
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", *isolation, "--wheel-dir", folder, source], check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    root = tmp_path_factory.mktemp("package")
    wheel = build_wheel(root)
    venv = root / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    # A .pth file adds the folder but does not read the .pth files in there: the checkout's editable install stays out.
    (site_packages,) = venv.glob("lib/python*/site-packages")
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--python", venv / "bin" / "python"]
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--ignore-installed", wheel], check=True)
    (root / "work").mkdir()
    return Installed(venv, root / "work")


def train_arguments(data: Path, output: str) -> Sequence[str]:
    """Two steps of the quickstart's teacher, with configs by name."""
    sets = [f"data.root={data}", f"output={output}", "train.max_steps=2", "train.global_batch=16", "train.log_every=1"]
    configs = ["--config", "quickstart/teacher", "--deepspeed_config", "zero2"]
    return [*configs, *(part for override in sets for part in ("--set", override))]


def test_the_wheel_is_what_is_imported(installed: Installed) -> None:
    files = installed.python("import sws_dist, sws_kernels; print(sws_dist.__file__); print(sws_kernels.__file__)")
    for file in files.splitlines():
        assert installed.venv in Path(file).parents, file
    package = Path(files.splitlines()[0]).parent
    assert (package / "py.typed").is_file()
    version = installed.python(
        "import sws_dist, importlib.metadata as m; print(sws_dist.__version__, m.version('sws-dist'))"
    )
    assert len(set(version.split())) == 1


def test_every_config_of_the_checkout_is_found_by_name(installed: Installed) -> None:
    names = [
        str(p.relative_to(REPOSITORY / "configs/runs").with_suffix(""))
        for p in REPOSITORY.glob("configs/runs/**/*.yaml")
    ]
    code = f"import sws_dist; print([sws_dist.load_config(name).output for name in {names!r}])"
    assert "runs/auxiliary_small" in installed.python(code)
    said = installed.run("sws", "train", "--config", "quickstart/techer", "--deepspeed_config", "zero2", code=1)
    assert "did you mean quickstart/teacher" in said


def test_help(installed: Installed) -> None:
    assert "show-batch" in installed.run("sws", "--help")
    assert installed.run("sws", "evaluate", "--help").startswith("usage: sws evaluate")
    assert installed.run(installed.venv / "bin" / "python", "-m", "sws_dist", "--version").startswith("sws-dist ")


def test_one_process_trains(installed: Installed, few_digits: Path) -> None:
    said = installed.run("sws", "train", *train_arguments(few_digits, "runs/alone"))
    assert "stopped at step 2 of 60" in said
    assert (installed.folder / "runs/alone/checkpoints/step-00000002").is_dir()


def test_deepspeed_trains(installed: Installed, few_digits: Path) -> None:
    # The deepspeed command of the environment below starts that environment's Python, which has the checkout.
    launcher = [installed.venv / "bin" / "python", "-m", "deepspeed.launcher.runner", "--quiet"]
    launcher += ["--num_accelerators", "2", "--master_port", str(free_port())]
    said = installed.run(*launcher, "--module", "sws_dist.cli.train", *train_arguments(few_digits, "runs/two"))
    assert "stopped at step 2 of 60" in said
    assert "1 node x 2 rank(s)" in said
    chatter = [word for word in ("[INFO]", "[WARNING]", "FutureWarning", "exits successfully") if word in said]
    assert not chatter, said


def test_a_learngene_is_expanded_and_scored(installed: Installed, few_digits: Path) -> None:
    model = SWSVisionTransformer(schedule=(2, 1), img_size=32, patch_size=8, embed_dim=32, num_heads=2, num_classes=10)
    info = describe_model(model, "learngene", preprocessing=PREPROCESSING, classes=[str(digit) for digit in range(10)])
    save_model_file(installed.folder / "learngene.safetensors", info, model.state_dict())
    said = installed.run(
        "sws", "expand", "--learngene", "learngene.safetensors", "--depth", 3, "--out", "d3.safetensors"
    )
    assert "3 layers from stages 0,0,1" in said
    said = installed.run("sws", "evaluate", "--quiet", "--checkpoint", "d3.safetensors", "--data", few_digits / "val")
    assert said.startswith("top-1 ")
    assert said.endswith("over 33 images\n"), "and nothing else"


def test_a_job_keeps_the_installed_code(installed: Installed) -> None:
    """The snapshot has a checkout's layout, and what the job starts there imports the snapshot."""
    fake = installed.folder / "bin"
    fake.mkdir()
    (fake / "sbatch").write_text("#!/bin/sh\necho 4711\n")
    (fake / "sbatch").chmod(0o755)
    submit = ["sws", "submit", "auxiliary", "--config", "auxiliary_small", "--deepspeed_config", "zero2_bf16"]
    options = ["--gpus-per-node", "8", "--time", "60", "--set", "output=runs/job", "--quiet"]
    assert installed.run(*submit, *options, path=fake) == "4711\n"
    (job,) = (installed.folder / "runs/job/jobs").iterdir()
    code = job / "code"
    assert sorted(path.name for path in code.iterdir()) == [
        "COMMIT", "configs", "kernels", "launcher", "sws_dist", "sws_kernels",
    ]  # fmt: skip
    assert not (code / "sws_dist" / "configs").exists()
    where = "import sws_dist, sws_kernels; from sws_dist import source_tree as t; "
    where += "print(sws_dist.__file__, sws_kernels.__file__, t.configs_folder(), t.launcher_folder())"
    python = installed.venv / "bin" / "python"
    said = installed.run("env", f"PYTHONPATH={code}", python, "-c", where)
    assert all(code in Path(place).parents for place in said.split()), said
    help_text = installed.run("env", f"PYTHONPATH={code}", python, code / "launcher" / "train.py", "--help")
    assert help_text.startswith("usage: train.py")
