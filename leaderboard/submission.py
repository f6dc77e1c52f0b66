"""A submission: one ZIP file with the records of a run and all that speaks for them, read without trusting a byte of it."""

from __future__ import annotations

import hashlib
import json
import re
import stat
import zipfile
import zlib
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from leaderboard import ledger
from leaderboard.canonical import canonical, sha256_file
from leaderboard.checks import check_records, folder_problems
from leaderboard.errors import RecordError, RefusedError
from leaderboard.record import Record, Sha256, read_all

MANIFEST = "manifest.json"
PLACES = r"(records|records/reruns|checkpoints)"
MEMBER = re.compile(PLACES + r"/[^./\\:\x00-\x1f][^/\\:\x00-\x1f]{0,249}\.(jsonl|json|parquet|safetensors)")
LIMITS = {"jsonl": 2**28, "json": 2**24, "parquet": 2**28, "safetensors": 2**31}  # bytes, unpacked, of one file by its kind
LARGEST = 2**34  # of all together
MOST = 100_000  # files
LOWERED = ("challenged", "contradicted")


class Manifest(BaseModel):
    """What a submission says of itself: who sends it, and the sha256 of every file in it."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    format: Literal["sparsecert submission 1"] = "sparsecert submission 1"
    by: Annotated[str, Field(max_length=100, pattern=r"^[^\x00-\x1f\x7f]*$")] = ""
    created: Annotated[str, Field(max_length=40)]
    head: Sha256
    files: dict[str, Sha256]


def pack(folder: str | Path, out: str | Path, by: str = "", weights: bool = True, processes: int = 1) -> Manifest:
    """Write the records of a `records` folder, their rows, witnesses, ledger and weights into the ZIP file `out`.

    Without `weights`, and where there are none, the densities cannot be counted again by who receives it. Raises RefusedError
    where `leaderboard check` finds a problem or a record was challenged, RecordError for a folder without records.
    """
    folder = Path(folder)
    records = checked(folder, processes)
    if not records:
        raise RecordError(f"{folder}: there are no records to submit; run a suite first")
    members = dict(_members(folder, records, weights))
    files = {name: sha256_file(path) for name, path in members.items()}
    created = datetime.now(UTC).isoformat(timespec="seconds")
    try:
        manifest = Manifest(by=by, created=created, head=ledger.head(folder), files=files)
    except ValidationError as error:
        raise RecordError(f"--by is one short line of text, not {by!r}") from error
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(zipfile.ZipInfo(MANIFEST), canonical(manifest.model_dump()), zipfile.ZIP_DEFLATED)
        for name, path in members.items():
            archive.write(path, name)
    return manifest


def _members(folder: Path, records: list[Record], weights: bool) -> Iterator[tuple[str, Path]]:
    yield f"records/{ledger.NAME}", folder / ledger.NAME
    found = ledger.entries(folder)
    standing = {(one.record, one.digest) for one in ledger.standing(found).values() if one.event == "entered"}
    for entry in found:
        if (entry.record, entry.digest) in standing:
            yield from ((f"records/{name}", folder / name) for name in entry.files)
    for record in records if weights else ():
        for path in (folder / one for one in (record.evidence.weights, record.evidence.stored) if one):
            if path.is_file():
                yield f"checkpoints/{path.name}", path


def checked(folder: str | Path, processes: int = 1) -> list[Record]:
    """The records of a folder that may be submitted: all of them hold. Raises RefusedError with every problem otherwise."""
    folder = Path(folder)
    reasons = [*folder_problems(folder)]
    reasons += [f"{name}: {one}" for name, found in check_records(folder, processes).items() for one in found]
    if reasons:
        raise RefusedError(reasons)
    found = ledger.entries(folder)
    stands = {(one.record, one.digest) for one in ledger.standing(found).values()}
    if lowered := {one.record for one in found if one.event in LOWERED and (one.record, one.digest) in stands}:
        raise RefusedError([f"{name}: it was challenged; run its cell again for one that holds" for name in sorted(lowered)])
    return read_all(folder)


def unpack(path: str | Path, into: str | Path) -> Manifest:
    """The files of a submission under the folder `into`, each as its manifest says, or RecordError and no word believed.

    No file lands anywhere else, none is a link, none is larger than `LIMITS` once unpacked, and nothing is unpickled.
    """
    path, into = Path(path), Path(into)
    try:
        with zipfile.ZipFile(path) as archive:
            members = {one.filename: one for one in archive.infolist()}
            _legal(path.name, archive.infolist())
            manifest = _manifest(path.name, archive)
            if missing := members.keys() - {MANIFEST} ^ manifest.files.keys():
                raise RecordError(f"{path.name}: {min(missing)} is in the file or in its manifest, but not in both")
            for name, expected in manifest.files.items():
                _unpack(archive, members[name], into / name, expected)
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, ValueError, RuntimeError, zlib.error) as error:
        raise RecordError(f"{path.name}: cannot be read as a submission ({type(error).__name__}: {error})") from None
    return manifest


def _legal(where: str, members: list[zipfile.ZipInfo]) -> None:
    """Raises RecordError for what no submission holds, before a byte of it is unpacked."""
    names = [one.filename for one in members]
    if len(members) > MOST or sum(one.file_size for one in members) > LARGEST:
        raise RecordError(f"{where}: more than {MOST} files or {LARGEST >> 30} GiB once unpacked")
    if len({name.casefold() for name in names}) < len(names):
        raise RecordError(f"{where}: a name stands twice in it")
    for one in members:
        name, kind = one.filename, one.filename.rpartition(".")[2]
        if name != MANIFEST and not MEMBER.fullmatch(name):
            raise RecordError(f"{where}: {name!r} is no file of a submission")
        if stat.S_IFMT(one.external_attr >> 16) not in (0, stat.S_IFREG) or one.flag_bits & 1:
            raise RecordError(f"{where}: {name!r} is a link, a device or encrypted")
        if one.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise RecordError(f"{where}: {name!r} is packed in another way than stored or deflated")
        if one.file_size > LIMITS[kind]:
            raise RecordError(f"{where}: {name!r} has {one.file_size} bytes once unpacked, at most {LIMITS[kind]} are read")


def _manifest(where: str, archive: zipfile.ZipFile) -> Manifest:
    try:
        return Manifest.model_validate(json.loads(archive.read(MANIFEST)))
    except (KeyError, ValueError, RecursionError) as error:  # a ValidationError is a ValueError
        raise RecordError(f"{where}: its {MANIFEST} is missing or not one of a submission ({_first_line(error)})") from None


def _first_line(error: BaseException) -> Any:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _unpack(archive: zipfile.ZipFile, member: zipfile.ZipInfo, to: Path, expected: str) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    total = hashlib.sha256()
    with archive.open(member) as source, to.open("xb") as target:  # zipfile never gives more than the size that was checked
        while piece := source.read(2**20):
            total.update(piece)
            target.write(piece)
    if total.hexdigest() != expected:
        raise RecordError(f"{member.filename}: not the file that the manifest names, its sha256 differs; have it sent again")
