"""Test where results may be written, and what a name that is not UTF-8 becomes in them."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sws_dist.atomic import atomic_write_text


def test_a_folder_is_not_written_over(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match="a folder; expected the path of a file to write"):
        atomic_write_text(tmp_path, "text")


def test_a_pipe_is_written_into_and_stays(tmp_path: Path) -> None:
    """The same holds for /dev/null, which a file would otherwise replace for the whole machine."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as pool:
        text = pool.submit(pipe.read_text)
        atomic_write_text(pipe, "scores")
        assert text.result(timeout=600) == "scores"
    assert pipe.is_fifo()


def test_a_name_that_is_not_utf_8_is_written_as_it_is(tmp_path: Path) -> None:
    atomic_write_text(tmp_path / "script", f"cd {os.fsdecode(b'caf' + bytes([0xE9]))}\n")
    assert (tmp_path / "script").read_bytes() == b"cd caf\xe9\n"
