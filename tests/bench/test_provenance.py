"""Where a number comes from: a checkout whose sources are not those of its commit says so."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import provenance


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "bench" / "methods").mkdir(parents=True)
    (tmp_path / "bench" / "run.py").write_text("pass\n")
    identity = ["-c", "user.name=A. Name", "-c", "user.email=a@example.org"]
    for words in (["init", "-q"], ["add", "-A"], [*identity, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True, capture_output=True)
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    provenance.revision.cache_clear()
    yield tmp_path
    provenance.revision.cache_clear()


@pytest.mark.parametrize(
    "name, dirty",
    [("bench/run.py", True), ("bench/methods/mine.py", True), ("notes.txt", False), ("bench/methods/notes.txt", False)],
)
def test_a_source_that_no_commit_knows_makes_the_tree_dirty(checkout: Path, name: str, dirty: bool) -> None:
    (checkout / name).write_text("changed\n")
    assert provenance.revision()[1] is dirty


def test_a_tree_as_it_was_committed_is_clean(checkout: Path) -> None:
    commit, dirty = provenance.revision()
    assert commit is not None
    assert len(commit) == 40
    assert dirty is False
