"""The ledger of a folder of records: who was entered, and what happened to it since, in lines that are only ever added.

Every line is one JSON object in canonical form that carries the sha256 of the line before it and of itself, so no byte of it
can be changed unseen; and it carries the sha256 of every file it speaks of, so no byte of these can, either.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, get_args

from pydantic import Field, ValidationError

from leaderboard.canonical import canonical, sha256_file
from leaderboard.errors import RecordError
from leaderboard.record import Count, FileName, Sha256, Strict, first_error

NAME = "ledger.jsonl"
Event = Literal["entered", "superseded", "challenged", "contradicted", "rerun"]
EVENTS: tuple[Event, ...] = get_args(Event)
STANDING = ("entered", "superseded")  # the events that say whether a record stands in the folder
START = "0" * 64


class Entry(Strict):
    """One line: what happened to which record, and the sha256 of every file (named from the `records` folder) in it."""

    seq: Count
    previous: Sha256
    event: Event
    record: FileName
    digest: Sha256
    files: dict[str, Sha256]
    at: Annotated[str, Field(max_length=100)]
    note: dict[str, Any]

    def line(self) -> bytes:
        """The line's bytes, without its newline; the last field is the sha256 of all others."""
        own = dict(self)
        return canonical(own | {"sha256": hashlib.sha256(canonical(own)).hexdigest()})


def append(
    folder: str | Path, event: str, record: str, digest: str, files: Mapping[str, str], note: Mapping[str, Any] | None = None,
    at: str | None = None,
) -> Entry:
    """Add one line and return its entry once it is on disk; processes that do so at once wait for each other.

    A line that was torn off (a write without its end) is removed first. Entering or superseding what the ledger already says
    was entered or superseded, with the same files, adds nothing. Raises RecordError for an unknown event, a damaged ledger, a
    name or digest that is none, and for entering a record while another one stands under its name.
    """
    if event not in EVENTS:
        raise RecordError(f"{event!r} is no event of the ledger; known: {', '.join(EVENTS)}")
    with _locked(Path(folder) / NAME) as handle:
        lines = _mended(handle)
        known = _standing_of(lines, record) if event in STANDING else None
        if known is not None and (known.event, known.digest, dict(known.files)) == (event, digest, dict(files)):
            return known
        if known is not None and (event, known.event) == ("entered", "entered") and known.digest != digest:
            raise RecordError(f"{record}: another record stands under this name ({known.digest[:12]}...); move it away first")
        seq, previous = (_sound(lines[-1], len(lines)).seq + 1, _sha256(lines[-1])) if lines else (0, START)
        at = at or datetime.now(UTC).isoformat(timespec="seconds")
        try:
            entry = Entry.model_validate({
                "seq": seq, "previous": previous, "event": event, "record": record, "digest": digest, "files": dict(files),
                "at": at, "note": dict(note or {}),
            })  # fmt: skip
        except ValidationError as error:
            raise RecordError(f"{record}: cannot be written into the ledger: {first_error(error)}") from None
        handle.seek(0, os.SEEK_END)
        handle.write(entry.line() + b"\n")
        handle.flush()
        os.fsync(handle.fileno())
    return entry


def entries(folder: str | Path) -> list[Entry]:
    """Every entry in its order; none where there is no ledger. A torn last line is no entry. Raises RecordError otherwise."""
    return list(_chain(_lines(_content(Path(folder)))[0]))


def head(folder: str | Path) -> str:
    """The sha256 of the last line, which vouches for all before it; 64 zeros where there is none."""
    lines = _lines(_content(Path(folder)))[0]
    return _sha256(lines[-1]) if lines else START


def standing(found: list[Entry]) -> dict[str, Entry]:
    """The last word on whether each record stands in the folder: its entry of event "entered" or "superseded", by id."""
    return {one.record: one for one in found if one.event in STANDING}


def problems(folder: str | Path) -> list[str]:
    """Every way in which a `records` folder differs from its ledger, one sentence each; empty where all is as it was entered.

    The chain is intact to its end, every record stands in it, and every file that it lists is there with every byte equal
    (what is about superseded records need not be kept).
    """
    folder = Path(folder)
    lines, torn = _lines(_content(folder))
    try:
        found = list(_chain(lines))
    except RecordError as error:
        return [str(error)]
    torn_off = [f"{NAME}: its last line has no end; the next run mends that"] if torn else []
    return [*torn_off, *_unlisted(folder, standing(found)), *_changed(folder, found)]


def _unlisted(folder: Path, stands: Mapping[str, Entry]) -> Iterator[str]:
    for path in sorted(folder.glob("*.json")):
        entry = stands.get(path.stem)
        if entry is None:
            yield f"{path.name}: the ledger does not list it; enter it with `sparsecert leaderboard enter` if it is yours"
        elif entry.event == "superseded":
            yield f"{path.name}: the ledger says that the record of this name was superseded; run its suite again"


def _changed(folder: Path, found: list[Entry]) -> Iterator[str]:
    stands = standing(found)
    for entry in found:
        now = stands.get(entry.record)
        gone = now is None or now.event == "superseded" or now.digest != entry.digest
        for name, expected in entry.files.items():
            path = kept_as(folder, entry, name) if gone else folder / name
            if not _is_file(path):
                if not gone:
                    yield f"{name}: the ledger lists it ({entry.event}), but it is missing; restore the file"
            elif sha256_file(path) != expected:
                yield f"{path.name}: not the file that was {entry.event}, its sha256 differs from the ledger's; restore the file"


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long, say
        return False


def kept_as(folder: str | Path, entry: Entry, name: str) -> Path:
    """Where a file of a superseded record is kept, out of the way of its successor's file of the same name."""
    rest = name.removeprefix(entry.record)
    return superseded(folder) / f"{entry.record}-{entry.digest[:8]}{rest}"


def superseded(folder: str | Path) -> Path:
    """Beside the `records` of a run; inside a folder of another name, which has neighbours of its own kind."""
    folder = Path(folder)
    return (folder.parent if folder.name == "records" else folder) / "superseded"


def _sha256(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()


def _content(folder: Path) -> bytes:
    try:
        return (folder / NAME).read_bytes()
    except FileNotFoundError:
        return b""


def _lines(content: bytes) -> tuple[list[bytes], bytes]:
    """(whole lines without their newlines, what follows the last newline)."""
    *lines, torn = content.split(b"\n")
    return lines, torn


def _chain(lines: list[bytes]) -> Iterator[Entry]:
    previous = START
    for number, line in enumerate(lines, start=1):
        entry = _sound(line, number)
        if (entry.seq, entry.previous) != (number - 1, previous):
            raise RecordError(f"{NAME}: line {number} does not follow the line before it; restore the file")
        previous = _sha256(line)
        yield entry


def _sound(line: bytes, number: int) -> Entry:
    """The entry of a line that is exactly what `Entry.line` writes."""
    try:
        found = json.loads(line)
        entry = Entry.model_validate({name: found[name] for name in Entry.model_fields})
        whole = entry.line() == line and all(map(_inside, entry.files))
    except (ValueError, TypeError, KeyError, RecursionError):  # a ValidationError is a ValueError
        whole = False
    if not whole:
        raise RecordError(f"{NAME}: line {number} was changed after it was written; restore the file")
    return entry


def _inside(name: str) -> bool:
    return not Path(name).is_absolute() and ".." not in Path(name).parts and "\0" not in name


def _standing_of(lines: list[bytes], record: str) -> Entry | None:
    """The last entry of a record that says whether it stands, found without reading the lines of all others."""
    named = canonical({"record": record})[1:-1]
    own = (_sound(line, number) for number, line in enumerate(lines, start=1) if named in line)
    return standing([one for one in own if one.record == record]).get(record)


@contextmanager
def _locked(path: Path) -> Iterator[BinaryIO]:
    """The file, open for reading and adding, for one process at a time; the lock dies with its holder."""
    with open(path, "a+b") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield handle


def _mended(handle: BinaryIO) -> list[bytes]:
    """All whole lines, after what a torn write left behind them was cut off, or ended where only its newline is missing."""
    handle.seek(0)
    lines, torn = _lines(handle.read())
    if not torn:
        return lines
    try:
        _sound(torn, len(lines) + 1)
    except RecordError:
        handle.truncate(sum(len(line) + 1 for line in lines))
        return lines
    handle.write(b"\n")
    return [*lines, torn]
