"""The ledger: nothing is lost, and no byte of a stored file changes unseen."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from leaderboard import ledger
from leaderboard.canonical import canonical, sha256_file
from leaderboard.checks import check_records, folder_problems
from leaderboard.entering import adopt, enter, retire
from leaderboard.errors import RecordError
from leaderboard.record import Record

from .conftest import Run

ROOT = Path(__file__).resolve().parents[2]


def filled(run: Run) -> Record:
    """A record with every kind of stored file, entered."""
    record = run.add()
    witnesses = run.records / f"{record.id}.witnesses.safetensors"
    save_file({"index": np.array([14]), "images": np.zeros((1, 1, 2, 2), np.float32)}, witnesses)
    record = run.edit(record, lambda one: one["evidence"].update(
        witnesses=witnesses.name, witnesses_sha256=sha256_file(witnesses)
    ))  # fmt: skip
    enter(run.records, record.original)
    return record


def stored_files(run: Run) -> list[Path]:
    return sorted(path for folder in ("records", "checkpoints") for path in (run.root / folder).iterdir())


def problems(run: Run) -> list[str]:
    """As `leaderboard check` finds them, the quickest first: any is enough."""
    found = ledger.problems(run.records) or folder_problems(run.records)
    return found or [one for found in check_records(run.records).values() for one in found]


def changed(path: Path, at: int, chance: random.Random) -> Iterator[None]:
    """The file with one byte replaced by another, and whole again after."""
    before = path.read_bytes()
    path.write_bytes(before[:at] + bytes([before[at] ^ chance.randrange(1, 256)]) + before[at + 1 :])
    yield
    path.write_bytes(before)


def every_change_is_caught(run: Run, places: Callable[[Path], list[int]], chance: random.Random) -> None:
    for path in stored_files(run):
        for at in places(path):
            for _ in changed(path, at, chance):
                found = problems(run)
                assert found, f"byte {at} of {path.name}"
                assert any(path.name in one for one in found), found
    assert problems(run) == []


def test_any_changed_byte_of_any_stored_file_is_caught_with_the_files_name(run: Run) -> None:
    filled(run)
    chance = random.Random(6)
    assert {path.name.partition(".")[2] for path in stored_files(run)} == {
        "json", "jsonl", "parquet", "safetensors", "witnesses.safetensors"
    }  # fmt: skip

    def places(path: Path) -> list[int]:
        size = path.stat().st_size
        return [0, size - 1, *(chance.randrange(size) for _ in range(6))]

    every_change_is_caught(run, places, chance)


@pytest.mark.slow
def test_every_byte_of_every_stored_file_is_watched(run: Run) -> None:
    filled(run)
    every_change_is_caught(run, lambda path: list(range(path.stat().st_size)), random.Random(6))


def test_a_byte_of_a_superseded_record_is_watched_too(run: Run) -> None:
    record = filled(run)
    assert retire(run.records, record.id) == record.digest
    enter(run.records, run.add().original)
    assert problems(run) == []
    for path in sorted((run.root / "superseded").iterdir()):
        for _ in changed(path, 100, random.Random(0)):
            assert any(path.name in one for one in problems(run))
    assert len(list((run.root / "superseded").iterdir())) == 3


@pytest.mark.parametrize(
    "spoil, sentence",
    [
        (lambda lines: [lines[0], lines[2]], "line 2 does not follow the line before it"),
        (lambda lines: [lines[1], lines[0], lines[2]], "line 1 does not follow the line before it"),
        (lambda lines: [*lines, lines[2]], "line 4 does not follow the line before it"),
        (lambda lines: lines[:2], "c.json: the ledger does not list it"),
        (lambda lines: [lines[0].replace('"a"', '"b"'), *lines[1:]], "line 1 was changed after it was written"),
        (lambda lines: [" " + lines[0], *lines[1:]], "line 1 was changed after it was written"),
        (lambda lines: ["[]", *lines[1:]], "line 1 was changed after it was written"),
    ],
)
def test_a_ledger_that_was_rewritten_is_named(tmp_path: Path, spoil: Callable[[list[str]], list[str]], sentence: str) -> None:
    for name in "abc":
        (tmp_path / f"{name}.json").write_text(name)
        ledger.append(tmp_path, "entered", name, name * 64, {f"{name}.json": sha256_file(tmp_path / f"{name}.json")})
    path = tmp_path / ledger.NAME
    path.write_text("\n".join(spoil(path.read_text().splitlines())) + "\n")
    assert any(sentence in one for one in ledger.problems(tmp_path))
    if "does not list" not in sentence:
        with pytest.raises(RecordError, match="restore the file"):
            ledger.entries(tmp_path)


def test_the_head_vouches_for_every_line(tmp_path: Path) -> None:
    heads = {ledger.head(tmp_path)}
    for name in "abc":
        ledger.append(tmp_path, "entered", name, "0" * 64, {})
        heads.add(ledger.head(tmp_path))
    assert len(heads) == 4
    assert [one.record for one in ledger.entries(tmp_path)] == ["a", "b", "c"]


@pytest.mark.parametrize("lost", [1, 2, 100, 10_000])
def test_a_line_torn_off_at_any_place_is_no_entry_and_is_in_nobodys_way(tmp_path: Path, lost: int) -> None:
    ledger.append(tmp_path, "entered", "a", "0" * 64, {})
    whole = (tmp_path / ledger.NAME).read_bytes()
    ledger.append(tmp_path, "entered", "b", "0" * 64, {})
    torn = (tmp_path / ledger.NAME).read_bytes()[: -min(lost, len(whole) - 1)]
    (tmp_path / ledger.NAME).write_bytes(torn)
    assert [one.record for one in ledger.entries(tmp_path)] == ["a"]
    assert ledger.problems(tmp_path) == ["ledger.jsonl: its last line has no end; the next run mends that"]
    ledger.append(tmp_path, "entered", "c", "0" * 64, {})
    assert [one.record for one in ledger.entries(tmp_path)] == (["a", "b", "c"] if lost == 1 else ["a", "c"])
    assert ledger.problems(tmp_path) == []


def test_what_the_ledger_knows_already_is_not_said_twice(tmp_path: Path) -> None:
    first = ledger.append(tmp_path, "entered", "a", "0" * 64, {})
    ledger.append(tmp_path, "entered", "ab", "0" * 64, {})
    assert ledger.append(tmp_path, "entered", "a", "0" * 64, {}) == first
    assert ledger.append(tmp_path, "superseded", "a", "0" * 64, {}).seq == 2
    assert ledger.append(tmp_path, "entered", "a", "1" * 64, {}).seq == 3
    assert ledger.append(tmp_path, "challenged", "a", "1" * 64, {}).seq == 4
    assert ledger.append(tmp_path, "challenged", "a", "1" * 64, {}).seq == 5


def test_an_unknown_event_and_a_damaged_last_line_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="'exited' is no event of the ledger"):
        ledger.append(tmp_path, "exited", "a", "0" * 64, {})
    (tmp_path / ledger.NAME).write_text("{}\n")
    with pytest.raises(RecordError, match="line 1 was changed"):
        ledger.append(tmp_path, "entered", "a", "0" * 64, {})


def test_a_record_is_never_entered_over_another_that_stands(tmp_path: Path) -> None:
    ledger.append(tmp_path, "entered", "a", "0" * 64, {})
    with pytest.raises(RecordError, match="a: another record stands under this name"):
        ledger.append(tmp_path, "entered", "a", "1" * 64, {})
    assert len(ledger.entries(tmp_path)) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"files": []}, {"files": {"x": 5}}, {"files": {"x\0": "0" * 64}}, {"record": []}, {"record": "../../x"}, {"record": ".x"},
        {"digest": 5}, {"digest": ""}, {"event": "frobbed"}, {"note": []}, {"at": 1}, {"seq": True}, {"seq": 0.0},
    ],
)
def test_a_line_with_right_hashes_and_wrong_types_is_named(tmp_path: Path, change: dict[str, Any]) -> None:
    own: dict[str, Any] = {"seq": 0, "previous": "0" * 64, "event": "superseded", "record": "a", "digest": "0" * 64}
    own |= {"files": {}, "at": "", "note": {}, **change}
    line = canonical({**own, "sha256": hashlib.sha256(canonical(own)).hexdigest()})
    (tmp_path / ledger.NAME).write_bytes(line + b"\n")
    assert ledger.problems(tmp_path) == ["ledger.jsonl: line 1 was changed after it was written; restore the file"]
    with pytest.raises(RecordError, match="restore the file"):
        ledger.entries(tmp_path)


def test_what_is_no_name_or_digest_is_not_written(tmp_path: Path) -> None:
    for record, digest in (("../../x", "0" * 64), ("a", "0")):
        with pytest.raises(RecordError, match="cannot be written into the ledger"):
            ledger.append(tmp_path, "entered", record, digest, {})
    assert ledger.entries(tmp_path) == []


def test_a_file_whose_name_is_too_long_to_exist_is_missing(tmp_path: Path) -> None:
    ledger.append(tmp_path, "entered", "a", "0" * 64, {"x" * 5000: "0" * 64})
    assert any("is missing" in one for one in ledger.problems(tmp_path))


def test_a_ledger_never_points_out_of_its_folder(tmp_path: Path) -> None:
    ledger.append(tmp_path, "entered", "a", "0" * 64, {"../../secret": "0" * 64})
    assert ledger.problems(tmp_path) == ["ledger.jsonl: line 1 was changed after it was written; restore the file"]


WRITER = """
import sys
from pathlib import Path
from leaderboard import ledger
from leaderboard.canonical import sha256_file
folder, who, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
for number in range(count):
    path = folder / f"{who}-{number}.json"
    path.write_text(path.name)
    ledger.append(folder, "entered", path.stem, "0" * 64, {path.name: sha256_file(path)})
"""


@pytest.mark.parametrize("count", [40, pytest.param(500, marks=pytest.mark.slow)])
def test_two_processes_that_write_at_once_lose_none(tmp_path: Path, count: int) -> None:
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), who, str(count)], cwd=ROOT) for who in ("left", "right")
    ]
    assert [writer.wait(300) for writer in writers] == [0, 0]
    found = ledger.entries(tmp_path)
    assert {one.record for one in found} == {f"{who}-{number}" for who in ("left", "right") for number in range(count)}
    assert len(found) == 2 * count
    assert ledger.problems(tmp_path) == []


# ---- entering and making room ----------------------------------------------------------------------------------------


def test_a_whole_record_that_nobody_entered_is_adopted_and_one_that_does_not_hold_is_not(run: Run) -> None:
    whole, other = run.add(), run.add(seed=1)
    (run.records / other.evidence.verdicts).write_bytes(b"")
    (run.records / "text.json").write_text("{")
    assert adopt(run.records) == [whole.id]
    assert adopt(run.records) == []
    assert [one.split(":")[0] for one in ledger.problems(run.records)] == ["text.json", f"{other.id}.json"]


def test_a_record_that_was_changed_after_it_was_entered_is_never_adopted(run: Run) -> None:
    record = filled(run)
    run.edit(record, lambda one: one["checks"].update(warnings=["none"]))  # signed again, and whole by itself
    assert adopt(run.records) == []
    assert any(f"{record.id}.json: not the file that was entered" in one for one in problems(run))


def test_a_superseded_record_does_not_come_back_with_another_clock(run: Run) -> None:
    record = filled(run)
    retire(run.records, record.id)
    run.add()
    shutil.copy(run.root / "superseded" / f"{record.id}-{record.digest[:8]}.witnesses.safetensors",
                run.records / f"{record.id}.witnesses.safetensors")  # fmt: skip
    run.write({**record.original, "timing": {"created": "2026-11-22T09:00:00Z", "seconds": {}}})
    assert check_records(run.records) == {record.id: []}
    assert adopt(run.records) == []


def test_a_record_makes_room_with_all_its_files_and_a_killed_move_is_finished(run: Run) -> None:
    record = filled(run)
    names = {path.name for path in run.records.iterdir()} - {ledger.NAME}
    entry = ledger.append(run.records, "superseded", record.id, record.digest, ledger.entries(run.records)[0].files)
    assert any("superseded" in one for one in problems(run))  # killed here
    assert adopt(run.records) == []
    assert {path.name for path in run.records.iterdir()} == {ledger.NAME}
    assert {path.name for path in (run.root / "superseded").iterdir()} == {
        ledger.kept_as(run.records, entry, name).name for name in names
    }
    assert problems(run) == []
    assert retire(run.records, record.id) == record.digest
    assert retire(run.records, "nobody") is None


def test_a_damaged_record_makes_room_and_is_not_thrown_away(run: Run) -> None:
    record = filled(run)
    path = run.records / f"{record.id}.json"
    path.write_text("{")
    assert retire(run.records, record.id) == record.digest
    assert not path.exists()
    assert [one.read_text() for one in (run.root / "superseded").glob("*-changed-*.json")] == ["{"]


def test_a_record_from_before_the_ledger_makes_room_and_is_listed_then(run: Run) -> None:
    record = run.add()
    assert retire(run.records, record.id) == record.digest
    assert [(one.event, one.digest) for one in ledger.entries(run.records)] == [("superseded", record.digest)]
    assert json.loads((run.root / "superseded" / f"{record.id}-{record.digest[:8]}.json").read_text()) == record.original


def test_a_record_that_supersedes_one_that_still_stands_is_named(run: Run) -> None:
    first = filled(run)
    second = run.edit(run.add(seed=1), lambda one: one.update(supersedes=first.digest))
    enter(run.records, second.original)
    assert f"{second.id}: says that it supersedes {first.id}, which still stands; move one of the two away" in problems(run)


def test_a_ledger_that_lists_another_digest_or_no_rows_is_named(run: Run) -> None:
    record = run.add()
    path = run.records / f"{record.id}.json"
    ledger.append(run.records, "entered", record.id, "0" * 64, {path.name: sha256_file(path)})
    first, second = problems(run)
    assert "the ledger lists the digest 000000000000..." in first
    assert f"does not list its verdict table {record.evidence.verdicts}" in second
