"""Progress is a bar on a terminal, a line a minute in a log, and nothing where nobody asked for it."""

from __future__ import annotations

import io
import logging
import sys

import pytest

from sws_dist import progress
from sws_dist.logging.console import setup_console


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def shown_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PATIENCE_S", 1e-9)
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)


def test_a_terminal_gets_a_bar_that_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    setup_console()
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with progress.ProgressBar("scanning train", 4000, "files", done=1000) as bar:
        bar.update(1000)
        bar._bar.refresh()
    said = terminal.getvalue()
    assert "scanning train  50 % " in said
    assert "2,000 of 4,000 files" in said
    assert said.endswith("\r")
    assert said.rsplit("\r", 2)[-2].strip() == "", "the bar is still there"


def test_a_file_gets_lines_and_no_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    setup_console()
    monkeypatch.setattr(sys, "stderr", file := io.StringIO())
    assert list(progress.track("abcd", "listing val", 4, "folders")) == ["a", "b", "c", "d"]
    with progress.ProgressBar("training", 4, "steps", in_log=False) as bar:  # training has its own lines
        bar.update()
    said = capsys.readouterr().out.splitlines()
    assert said == [f"listing val: {done} of 4 folders, 0:00:00 left" for done in (1, 2, 3, 4)]
    assert file.getvalue() == ""


@pytest.mark.parametrize(("level", "rank"), [(logging.WARNING, "0"), (logging.INFO, "1")])
def test_nothing_under_quiet_and_on_other_ranks(monkeypatch: pytest.MonkeyPatch, level: int, rank: str) -> None:
    setup_console(level)
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    assert sum(progress.track(range(5), "scanning", 5, "files")) == 10
    assert terminal.getvalue() == ""
