"""Releases: a board as it stood on a day, frozen in a folder that can be read and drawn without anything else."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import tempfile
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import Field, ValidationError

from leaderboard import ledger
from leaderboard.board import load_records, ranked
from leaderboard.canonical import digest, sha256_file
from leaderboard.challenges import notes
from leaderboard.changes import changelog
from leaderboard.checks import check_records, folder_problems
from leaderboard.errors import BoardError, RefusedError
from leaderboard.record import Count, FileName, Record, Sha256, Strict, read_all
from leaderboard.render import _escaped, markdown

if TYPE_CHECKING:
    import pandas as pd

SCHEMA: Final = 1
BOARDS = Path(__file__).parent / "boards"  # the definitions and releases that come with sparsecert
DEFINITION, DOCUMENT, CHANGELOG, PAGE = "board.toml", "release.json", "CHANGELOG.md", "board.md"
Title = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,60}@\d{1,6}$")]
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,60}$"
UNFINISHED = ".release-"  # a release that is being written, or whose writer was killed


class Board(Strict):
    """What a board is about: its title (name@version), and the suites whose records stand on it, ranked apart."""

    board: Title
    title: str
    description: str
    suites: Annotated[list[Title], Field(min_length=1)]


class Line(Strict):
    """A record that stands on the board."""

    id: FileName
    digest: Sha256
    suite: Title
    seed: int
    supersedes: str | None
    created: str
    version: str
    revision: str | None
    code: str
    status: str
    challenged: Count
    credit: str


class Before(Strict):
    release: Annotated[str, Field(pattern=NAME)]
    digest: Sha256


class MadeBy(Strict):
    version: str
    revision: str | None
    dirty: bool | None


class Release(Strict):
    """A whole release. entries: the rows of `leaderboard.board.ranked`, NaN as null; table: how they were drawn; ledgers: the
    heads of the ledgers of the records' folders; files: sha256 of all that lies beside release.json."""

    schema_: Literal[1] = Field(alias="schema")
    board: Board
    release: Annotated[str, Field(pattern=NAME)]
    date: str
    before: Before | None
    made_by: MadeBy
    ledgers: dict[str, Sha256]
    without_records: list[str]
    records: list[Line]
    entries: list[dict[str, Any]]
    notes: list[str]
    table: str
    files: dict[FileName, Sha256]
    digest: Sha256

    @property
    def title(self) -> str:
        return f"{self.board.board}/{self.release}"


# ---- making one ------------------------------------------------------------------------------------------------------


def freeze(title: str, name: str, boards: Path, records: Path, made_by: Mapping[str, Any], processes: int = 1) -> Release:
    """Writes the release <boards>/<title>/<name>/ of the records in <records>/<suite>@<v>/ (or a run's), whole or not at all.

    made_by: version, revision and dirty of this sparsecert. The date is the newest record's, not the clock's. Processes that
    freeze one board at once wait for each other. Raises RefusedError where `check` finds a problem with a record or ledger, or
    where a ledger is not the continuation of what earlier releases saw; BoardError for an unknown board, a bad or taken name, no
    records at all, or records that may not share a board.
    """
    if not re.fullmatch(NAME, name):
        raise BoardError(f"a release is called like 2026-11 or 1.0, of letters, digits, dots, dashes and _; got {name!r}")
    board, folder = read_board(title, boards), boards / title
    _refuse_taken(folder / name)
    places = {suite: _folder(records / suite) for suite in board.suites}
    present = {suite: place for suite, place in places.items() if any(place.glob("*.json"))}
    if not present:
        raise BoardError(f"there are no records of {', '.join(board.suites)} in {records}")
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        _refuse_taken(folder / name)
        earlier = releases(folder)
        _refuse(present, processes)
        if reasons := _rewritten(earlier, places):
            raise RefusedError(reasons)
        document, entries = _document(board, name, present, made_by)
        last = earlier[-1] if earlier else None
        document["before"] = None if last is None else {"release": last.release, "digest": last.digest}
        return _write(folder / name, document, entries, last)


def _refuse_taken(target: Path) -> None:
    if target.exists():
        title = f"{target.parent.name}/{target.name}"
        raise BoardError(f"the release {title} is there already and never changes; give this one another name")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time adds to a board's releases, and first removes what killed ones left; locks die with holders."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        for path in folder.glob(f"{UNFINISHED}*"):
            shutil.rmtree(path, ignore_errors=True)
        yield
    finally:
        os.close(handle)


def _rewritten(earlier: Iterable[Release], places: Mapping[str, Path]) -> list[str]:
    """A sentence on every ledger that no longer holds the line that was its last at one of these releases."""
    found = {}
    for suite, folder in places.items():
        seen = {ledger.START, ledger.head(folder), *(entry.previous for entry in ledger.entries(folder))}
        for one in earlier:
            if (head := one.ledgers.get(suite, ledger.START)) not in seen:
                found[suite] = (
                    f"{suite}: the line {head[:12]}... that the ledger ended with at release {one.title} is no longer in it: "
                    "its history was rewritten; restore the file"
                )
    return list(found.values())


def rewritten(folder: Path, suite: str, boards: Path) -> list[str]:
    """Why the ledger of a folder of records is not the continuation of what the releases of the boards in `boards` have seen.

    Raises BoardError where these releases are not whole.
    """
    known = sorted({path.parent.parent for path in boards.glob(f"*/*/{DOCUMENT}")})
    earlier = [one for board in known for one in releases(board)]
    return _rewritten(earlier, {suite: folder})


def _folder(place: Path) -> Path:
    """The folder of records that a run's folder holds, or that it is."""
    return inner if (inner := place / "records").is_dir() else place


def read_board(title: str, boards: Path) -> Board:
    """The definition of a board, in `boards` or else among those that come with sparsecert. Raises BoardError."""
    places = [place / title / DEFINITION for place in (boards, BOARDS)]
    path = next((place for place in places if re.fullmatch(r"[^/\\]+", title) and place.is_file()), None)
    if path is None:
        known = sorted({one.parent.name for place in (boards, BOARDS) for one in place.glob(f"*/{DEFINITION}")})
        raise BoardError(f"unknown board {title!r}; known: {', '.join(known)}. A board is a file {places[0]}")
    try:
        return Board.model_validate({"board": title, **tomllib.loads(path.read_text(encoding="utf-8"))})
    except (tomllib.TOMLDecodeError, ValidationError, UnicodeDecodeError) as error:
        raise BoardError(f"{path} is no definition of a board (title, description, suites): {_first(error)}") from None


def _first(error: Exception) -> str:
    if isinstance(error, ValidationError):
        detail = error.errors(include_url=False)[0]
        return f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}"
    return str(error)


def _refuse(present: Mapping[str, Path], processes: int) -> None:
    reasons = []
    for suite, folder in present.items():
        reasons += [f"{suite}: {sentence}" for sentence in folder_problems(folder)]
        for name, found in check_records(folder, processes).items():
            reasons += [f"{name}: {sentence}" for sentence in found]
        if not reasons:
            others = [one.id for one in read_all(folder) if f"{one.suite}@{one.suite_version}" != suite]
            reasons += [f"{name}: lies in the folder of {suite}, but is of another suite" for name in others]
    if reasons:
        raise RefusedError(reasons)


def _document(
    board: Board, name: str, present: Mapping[str, Path], made_by: Mapping[str, Any]
) -> tuple[dict[str, Any], pd.DataFrame]:
    import pandas as pd

    frame = pd.concat([load_records(folder) for folder in present.values()], ignore_index=True)
    entries = ranked(frame)
    standing = frame.set_index("record")
    counted = [one for folder in present.values() for one in read_all(folder) if one.id in standing.index]
    lines = [_line(one, standing.loc[one.id]) for one in counted]
    document = {
        "schema": SCHEMA, "board": board.model_dump(), "release": name, "made_by": dict(made_by),
        "date": max((line["created"] for line in lines), key=_instant),
        "ledgers": {suite: ledger.head(folder) for suite, folder in present.items()},
        "without_records": [suite for suite in board.suites if suite not in present],
        "records": lines, "entries": [_plain(entry) for entry in entries.to_dict("records")],
        "notes": notes(entries), "table": markdown(entries),
    }
    return document, entries


def _instant(moment: str) -> datetime:
    found = datetime.fromisoformat(moment)
    return found if found.tzinfo else found.astimezone()


def _line(record: Record, row: pd.Series) -> dict[str, Any]:
    made = record.provenance
    return {
        "id": record.id, "digest": record.digest, "suite": f"{record.suite}@{record.suite_version}", "seed": record.cell.seed,
        "supersedes": record.supersedes, "created": record.timing.created, "version": made.version, "revision": made.revision,
        "code": made.code, "status": row["status"], "challenged": int(row["challenged"]), "credit": row["credit"],
    }


def _plain(value: Any) -> Any:
    """As JSON can say it: NaN is null."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    value = value.item() if hasattr(value, "item") else value
    return None if value != value else value


def _write(target: Path, document: dict[str, Any], entries: pd.DataFrame, last: Release | None) -> Release:
    """All files in a folder beside, which then takes the release's name."""
    made = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=target.parent))
    try:
        made.chmod(0o755)
        entries.to_parquet(made / "board.parquet", index=False)
        entries.map(lambda one: json.dumps(one) if isinstance(one, list) else one).to_csv(made / "board.csv", index=False)
        unsigned = Release.model_validate({**document, "files": {}, "digest": "0" * 64})
        _put(made / CHANGELOG, changelog(last, unsigned))
        _put(made / PAGE, page(unsigned))
        document["files"] = {path.name: sha256_file(path) for path in sorted(made.iterdir())}
        document["digest"] = digest(document)
        _put(made / DOCUMENT, _text(document))
        try:
            os.rename(made, target)
        except OSError as error:
            raise BoardError(f"the release {target} cannot be written ({error.strerror}); give it another name") from None
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return read_release(target)


def _put(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8", newline="\n") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _text(document: Mapping[str, Any]) -> str:
    return json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


# ---- reading one -----------------------------------------------------------------------------------------------------


def read_release(folder: Path) -> Release:
    """The release in a folder, of which every byte is as it was written. Raises BoardError where it is not."""
    path = folder / DOCUMENT
    try:
        text = path.read_text(encoding="utf-8")
        document = json.loads(text)
        schema = document.get("schema")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise BoardError(f"{folder} holds no release ({type(error).__name__}: {error})") from None
    if type(schema) is not int or schema > SCHEMA:
        raise BoardError(f"{path}: schema {schema!r} is not one of 1 to {SCHEMA}, which are read here; upgrade sparsecert")
    try:
        found = Release.model_validate(document)
    except ValidationError as error:
        raise BoardError(f"{path} is no release: {_first(error)}") from None
    try:
        whole = found.digest == digest(document) and text == _text(document)
    except ValueError:  # an infinite number, or half a character, which no release has
        whole = False
    if not whole:
        raise BoardError(f"{path} was changed after it was released; restore the file")
    for name, expected in found.files.items():
        if not (folder / name).is_file() or sha256_file(folder / name) != expected:
            raise BoardError(f"{folder / name} is not the file that was released; restore it")
    return found


def releases(folder: Path) -> list[Release]:
    """All releases of a board's folder, each after the one that it names as the one before. Raises BoardError otherwise."""
    paths = sorted(path.parent for path in folder.glob(f"*/{DOCUMENT}"))
    found = [read_release(path) for path in paths if not path.name.startswith(".")]
    follows = {None if one.before is None else one.before.digest: one for one in found}
    ordered: list[Release] = []
    while len(ordered) < len(found):
        one = follows.get(ordered[-1].digest if ordered else None)
        if one is None:
            left = ", ".join(sorted(one.release for one in found if one not in ordered))
            raise BoardError(f"{folder}: {left} follow no release that is here, or the same one; restore the missing ones")
        ordered.append(one)
    return ordered


def page(release: Release) -> str:
    """The release in Markdown, of its own words and numbers alone: the same for ever."""
    board, made = release.board, release.made_by
    changed = " with uncommitted changes" if made.dirty else ""
    revision = "" if made.revision is None else f", revision {made.revision[:12]}{changed}"
    facts = [f"{board.board}, release {release.release} of {release.date[:10]}: {len(release.records)} records of "
             f"{', '.join(release.ledgers)}; sparsecert {made.version}{revision}."]  # fmt: skip
    statuses = Counter(one.status for one in release.records)
    facts.append(f"Status: {', '.join(f'{count} {status}' for status, count in sorted(statuses.items()))}.")
    if release.without_records:
        facts.append(f"Without records so far, and therefore left out: {', '.join(release.without_records)}.")
    if release.before is not None:
        facts.append(f"The release before is {release.before.release}; {CHANGELOG} says what changed.")
    parts = [f"# {_escaped(board.title)}: {release.release}", _escaped(board.description.strip()), _escaped(" ".join(facts))]
    if release.notes:
        parts.append("## Challenges\n\n" + "\n".join(f"- {_escaped(note)}" for note in release.notes))
    heads = "\n".join(f"- {_escaped(suite)}: `{head}`" for suite, head in sorted(release.ledgers.items()))
    return "\n\n".join([*parts, release.table.strip(), f"Heads of the ledgers:\n\n{heads}"]) + "\n"
