"""Outputs appear whole or not at all, and what a killed process left is cleared by the next one."""

import os
import subprocess
import sys

import pytest

from hyperllama.errors import HyperLlamaError
from hyperllama.files import atomic_file, atomic_folder, write_text


@pytest.fixture
def dead():
    """The id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_failure_leaves_the_old_content_and_nothing_else(tmp_path):
    write_text(tmp_path / "file", "old")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a").write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_file(tmp_path / "file") as temporary:
        temporary.write_text("new")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "folder", overwrite=True) as temporary:
        (temporary / "a").write_text("new")
        raise KeyboardInterrupt
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "a").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(tmp_path, dead):
    living = os.getppid()
    for name in (f".out.{dead}.tmp", f".out.{living}.tmp", f".other.{dead}.tmp", ".out.tmp", f".out.x.{dead}.tmp"):
        (tmp_path / name).mkdir()
    write_text(tmp_path / f".file.{dead}.tmp", "half")
    with atomic_folder(tmp_path / "out") as temporary:
        (temporary / "a").write_text("whole")
    write_text(tmp_path / "file", "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["out", "file", f".out.{living}.tmp", f".other.{dead}.tmp", ".out.tmp", f".out.x.{dead}.tmp"]
    )


def test_a_folder_that_was_moved_aside_comes_back(tmp_path, dead):
    """Killed between moving the old folder away and moving the new one in."""
    (tmp_path / f".out.{dead}.old").mkdir()
    (tmp_path / f".out.{dead}.old" / "a").write_text("old")
    with pytest.raises(HyperLlamaError, match="out already exists"), atomic_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out" / "a").read_text() == "old"
    with atomic_folder(tmp_path / "out", overwrite=True) as temporary:
        (temporary / "a").write_text("new")
    assert (tmp_path / "out" / "a").read_text() == "new" and len(list(tmp_path.iterdir())) == 1
