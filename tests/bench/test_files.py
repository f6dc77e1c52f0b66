"""Files are whole or absent, and what a killed writer left behind goes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.files import locked, sweep, write_whole


def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fails(temporary: Path) -> None:
        temporary.write_text("half")
        raise ValueError("no luck")

    with pytest.raises(ValueError, match="no luck"):
        write_whole(path, fails)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_leftovers_of_dead_writers_go_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for name in (f".a.json.{dead.pid}.part", f".b.json.{os.getpid()}.part", "c.part"):
        (tmp_path / name).write_text("")
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".b.json.{os.getpid()}.part", "c.part"]


def test_a_lock_is_free_again_when_its_holder_was_killed(tmp_path: Path) -> None:
    program = "import sys, time; from pathlib import Path; from bench.files import locked\n"
    program += "with locked(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "x.lock")], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    holder.kill()
    holder.wait()
    with locked(tmp_path / "x.lock"):
        assert (tmp_path / "x.lock").exists()
