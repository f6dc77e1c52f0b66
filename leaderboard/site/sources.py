"""What a site is about: records, the board they make, and what is known to be wrong with them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leaderboard.board import load_records, ranked
from leaderboard.checks import check_records, folder_problems
from leaderboard.errors import BoardError
from leaderboard.ledger import Entry, entries, head
from leaderboard.paper_claims import record_folders
from leaderboard.record import Record, read_all

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Kept:
    """A record, the folder it lies in, what `check` finds wrong with it and what the ledger says of it."""

    record: Record
    folder: Path
    problems: tuple[str, ...]
    history: tuple[Entry, ...]


@dataclass(frozen=True)
class Contents:
    """Every record by its id, those that count as a row of `frame` each (leaderboard.board.load), and the board they make.

    `ledgers` are the last lines' digests of the folders that have one; `problems` are those of the folders as a whole, such as a
    ledger that does not fit its files.
    """

    kept: Mapping[str, Kept]
    frame: pd.DataFrame
    board: pd.DataFrame
    ledgers: tuple[str, ...]
    problems: tuple[str, ...]

    @property
    def title(self) -> str:
        return ", ".join(sorted({f"{one.record.suite}@{one.record.suite_version}" for one in self.kept.values()}))


def gather(places: Iterable[Path], processes: int = 1) -> Contents:
    """The contents of run folders, folders of records, or folders of several of either; a record found twice is taken once.

    Every record is checked, by so many processes. Raises BoardError where a place holds no records, or two that may not share a
    board; RecordError for one that cannot be read.
    """
    import pandas as pd

    kept: dict[str, Kept] = {}
    frames, ledgers, wrong = [], list[str](), list[str]()
    for folder in dict.fromkeys(own.resolve() for place in places for own in record_folders(place)):
        new = [one for one in read_all(folder) if _is_new(one, kept)]
        problems, history = check_records(folder, processes), _by_record(entries(folder))
        if history:  # a folder without a ledger is one that nobody has promised anything about
            ledgers.append(f"{head(folder)[:16]} ({sum(map(len, history.values()))} lines)")
            wrong += folder_problems(folder)
        kept |= {one.id: Kept(one, folder, tuple(problems[one.id]), tuple(history.get(one.id, ()))) for one in new}
        frame = load_records(folder)
        frames.append(frame[frame["record"].isin([one.id for one in new])])
    frame = pd.concat(frames, ignore_index=True)
    return Contents(dict(sorted(kept.items())), frame, ranked(frame), tuple(ledgers), tuple(wrong))


def _by_record(history: Iterable[Entry]) -> dict[str, list[Entry]]:
    found: dict[str, list[Entry]] = {}
    for one in history:
        found.setdefault(one.record, []).append(one)
    return found


def _is_new(record: Record, kept: Mapping[str, Kept]) -> bool:
    other = kept.get(record.id)
    if other is not None and other.record.digest != record.digest:
        raise BoardError(f"{record.id} lies in {other.folder} and, with other content, in another folder; name only one of them")
    return other is None


def threat(protocol: str) -> str:
    """The threat in a frame's `protocol`, such as "linf 8/255"."""
    found: dict[str, Any] = json.loads(protocol)["threat"]
    return f"{found['norm']} {found['eps']}"
