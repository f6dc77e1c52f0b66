"""The records that come with sparsecert, held against their own rows and against what the docs say of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from leaderboard.checks import check
from leaderboard.paper_claims import RECORDS
from leaderboard.record import read

ROOT = Path(__file__).resolve().parents[2]
OBJECTIVES = RECORDS / "mnist-objectives@1"


@pytest.mark.parametrize("path", sorted(RECORDS.glob("*/*.json")), ids=lambda path: path.stem)
def test_a_committed_record_holds_lies_in_its_suites_folder_and_was_made_by_committed_code(path: Path) -> None:
    record = read(path)
    assert check(record, path.parent) == []
    assert path.parent.name == f"{record.cell.suite}@{record.cell.version}"
    assert record.document["provenance"]["dirty"] is False


def test_the_table_of_recipes_in_the_docs_is_that_of_the_records() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.–]+) \| ([\d.–]+) \|$",
                      (ROOT / "docs" / "objectives.md").read_text(encoding="utf-8"), re.M)  # fmt: skip
    assert rows == [row_of(path) for path in sorted(OBJECTIVES.glob("*.json"))]


def row_of(path: Path) -> tuple[str, ...]:
    """Objective, clean, PGD-50, IBP, CROWN, smoothing, in percent, as the page prints them."""
    record = read(path)
    metrics = record.document["metrics"]
    proven = metrics["certified"]
    shares = [metrics["clean"], metrics["robust"]["pgd-50"], proven["ibp"], proven.get("crown"), proven.get("smoothing")]
    printed = [f"{100 * one['hits'] / one['n']:.1f}" if one else "–" for one in shares]
    return (record.cell.objective.name, *printed)
