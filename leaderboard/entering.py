"""How a record comes to stand in a folder of records, and how it makes room for its successor, without a moment of untruth."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from leaderboard import ledger
from leaderboard.canonical import digest, sha256_file
from leaderboard.errors import RecordError

EVIDENCE = ("verdicts", "witnesses")  # the files that lie beside a record; weights lie elsewhere and need not be kept


def files_of(folder: str | Path, name: str, evidence: Mapping[str, Any]) -> dict[str, str]:
    """{file name: sha256} of a record's JSON and of the evidence beside it that is there. Raises OSError without the JSON."""
    folder = Path(folder)
    beside = [str(evidence[key]) for key in EVIDENCE if evidence.get(key)]
    found = [f"{name}.json", *(one for one in beside if Path(one).name == one and (folder / one).is_file())]
    return {one: sha256_file(folder / one) for one in found}


def enter(folder: str | Path, document: Mapping[str, Any], note: Mapping[str, Any] | None = None) -> ledger.Entry:
    """Write a record that is whole on disk into the ledger; once it is there, no byte of its files may change."""
    name = document["id"]
    return ledger.append(folder, "entered", name, document["digest"], files_of(folder, name, document["evidence"]), note)


def retire(folder: str | Path, name: str, note: Mapping[str, Any] | None = None) -> str | None:
    """Move a record and its rows to `superseded`, so that another one may be written; its digest, None where none was.

    To be called before any of its files is touched: what is left in the folder at any moment is a whole record or none.
    Killed half-way and called again, it finishes what it began and returns the same digest.
    """
    folder = Path(folder)
    stands = ledger.standing(ledger.entries(folder)).get(name)
    path = folder / f"{name}.json"
    found = _signed(path)
    if stands is not None and stands.event == "entered":
        stands = ledger.append(folder, "superseded", name, stands.digest, stands.files, note)
    elif found is not None and (stands is None or found["digest"] != stands.digest):  # whole, and never entered
        files = files_of(folder, name, found["evidence"])
        stands = ledger.append(folder, "superseded", name, found["digest"], files, note)
    if stands is None:
        return None
    _move(folder, stands)
    if path.is_file():  # damaged, or put there by hand
        os.replace(path, _kept(folder) / f"{name}-changed-{sha256_file(path)[:8]}.json")
    return stands.digest


def adopt(folder: str | Path, notes: Mapping[str, Mapping[str, Any]] | None = None) -> list[str]:
    """Enter every whole record that the ledger does not list, as a killed run leaves it; their ids.

    `notes` are those of the ledger by the record's digest, where somebody knows where it came from.
    What does not hold is left alone, for `problems` to name, and what the ledger says was superseded is moved away.
    """
    folder = Path(folder)
    log, found = ledger.entries(folder), list[str]()
    stands, gone = ledger.standing(log), {one.digest for one in log if one.event == "superseded"}
    for path in sorted(folder.glob("*.json")):
        entry = stands.get(path.stem)
        if entry is not None and entry.event == "superseded" and sha256_file(path) == entry.files.get(path.name):
            _move(folder, entry)
        elif entry is None or entry.event == "superseded":
            document = _whole(path)
            if document is not None and document["digest"] not in gone:
                enter(folder, document, (notes or {}).get(document["digest"]))
                found.append(path.stem)
    return found


def _whole(path: Path) -> dict[str, Any] | None:
    from leaderboard.checks import check
    from leaderboard.record import read

    try:
        record = read(path)
    except RecordError:
        return None
    return None if check(record, path.parent) else record.original


def _signed(path: Path) -> dict[str, Any] | None:
    """A record's JSON if its digest is its own."""
    try:
        found = json.loads(path.read_bytes())
        return found if found["digest"] == digest(found) and isinstance(found["evidence"], dict) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _move(folder: Path, entry: ledger.Entry) -> None:
    """The files of a superseded record to where they are kept, the JSON first, since it is what makes it readable."""
    for name in sorted(entry.files, key=lambda one: not one.endswith(".json")):
        path = folder / name
        if path.is_file() and sha256_file(path) == entry.files[name]:
            os.replace(path, _kept(folder) / ledger.kept_as(folder, entry, name).name)


def _kept(folder: Path) -> Path:
    place = ledger.superseded(folder)
    place.mkdir(exist_ok=True)
    return place
