"""Prepare all tests: Triton's interpreter where there is no GPU, real images, and an order for two processes."""

from __future__ import annotations

import logging
import os
import shutil
import signal
from collections.abc import Generator
from pathlib import Path

import pytest
import torch

# Ranks that tests start train on the CPU, where they are many and exact; tests/gpu takes this back.
os.environ.setdefault("DS_ACCELERATOR", "cpu")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

from sws_dist.data import digits
from sws_dist.distributed.init import close_distributed

# What is started in the background (nohup make test &) ignores Ctrl-C, and so would every run that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The first are the longest, or wait more than they compute; the last are short, so that all processes end together.
ORDER = ("cluster", "integration", "distributed", "gpu", "kernels", "kernels_ir", "unit")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the longest tests first where several processes share them."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: ORDER.index(item.path.relative_to(Path(__file__).parent).parts[0]))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Escape what a test has printed and logged: file names that are not UTF-8 cannot be sent between processes."""
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report


@pytest.fixture(autouse=True)
def package_log() -> Generator[None, None, None]:
    """Let caplog see the package's log, which a command that ran in this process would otherwise keep to itself."""
    logger = logging.getLogger("sws_dist")
    before = list(logger.handlers), logger.level
    logger.propagate = True
    yield
    logger.handlers[:], logger.level, logger.propagate = *before, True


@pytest.fixture
def temporary_group() -> Generator[None, None, None]:
    """Leave the process group that an evaluation in this process joins, since later tests start ranks from here."""
    before = dict(os.environ)
    yield
    close_distributed()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def digits_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All digits: 1,442 training and 355 validation images."""
    root = tmp_path_factory.mktemp("data") / "digits"
    digits.write_digits(root)
    return root


@pytest.fixture(scope="session")
def few_digits(digits_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 training and 33 validation images of ten classes: an epoch is 5 steps of 16."""
    root = tmp_path_factory.mktemp("data") / "few"
    for split, count in (("train", 80), ("val", 33)):
        files = [sorted((digits_root / split / str(c)).glob("*.jpg")) for c in range(10)]
        for index in range(count):
            file = files[index % 10][index // 10]
            (root / split / file.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(file, root / split / file.parent.name)
    return root
