"""The examples in the docstrings of the public functions, on real images."""

from __future__ import annotations

import doctest
import subprocess
import sys
from pathlib import Path

import sws_dist

# In this order: each uses what those before it have made.
EXAMPLES = ("load_config", "create_model", "train", "load_learngene", "expand", "evaluate", "evaluate_depths")


def run_examples() -> int:
    """Run the examples of all public functions. Returns how many failed."""
    finder, runner = doctest.DocTestFinder(recurse=False), doctest.DocTestRunner()
    for name in EXAMPLES:
        (test,) = finder.find(getattr(sws_dist, name), name)
        assert test.examples, f"{name} has no example"
        runner.run(test)
    return runner.summarize().failed


def test_examples(tmp_path: Path, digits_root: Path) -> None:
    """In a process of its own: training joins a process group, and sets what a launcher sets."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "digits").symlink_to(digits_root)
    code = "import sys; from tests.integration.test_examples import run_examples; sys.exit(run_examples())"
    path = [str(Path(__file__).parents[2]), *sys.path]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}; {code}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
