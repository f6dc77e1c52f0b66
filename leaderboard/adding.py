"""How records of others enter a folder of records: all of a submission or nothing, and nobody's record is overwritten."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from leaderboard import ledger
from leaderboard.board import VARIES, labels, one_protocol
from leaderboard.canonical import canonical, sha256_file
from leaderboard.checks import folder_problems, kept_more
from leaderboard.entering import adopt, enter, files_of, retire
from leaderboard.errors import BoardError, RecordError, RefusedError
from leaderboard.record import Record, columns_of, read_all
from leaderboard.stats import certified
from leaderboard.submission import checked, unpack

if TYPE_CHECKING:
    import pandas as pd

Kind = Literal["entered", "corrected", "rerun", "known"]
NEW = ("entered", "corrected")
UNPACKED = ".adding-"


@dataclass(frozen=True)
class Step:
    """What becomes of one record of a submission; `against` is the record of the same cell that stood already."""

    kind: Kind
    record: Record
    against: Record | None = None


@dataclass
class Plan:
    steps: list[Step] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


def add(path: str | Path, folder: str | Path, weights: bool = False, correct: bool = False, processes: int = 1) -> list[Step]:
    """Enter the records of a submission into a `records` folder and its ledger; all of them, or none and an exception.

    A cell that nobody measured is entered. One that stands already with equal verdicts is a rerun where another kind of machine
    measured it, else known; one with other verdicts is a disagreement and refuses all. With `correct`, a record that says it
    supersedes the standing one takes its place. `weights` are kept too where asked for. Killed half-way and called again, it
    finishes. Raises RefusedError with every reason,
    RecordError for a file that is no submission.
    """
    folder = Path(folder)
    with _alone(folder), tempfile.TemporaryDirectory(dir=folder, prefix=UNPACKED) as unpacked:
        root = Path(unpacked)
        manifest = unpack(path, root)
        sent = checked(root / "records", processes)
        note = {"by": manifest.by, "submission": sha256_file(path)}
        adopt(folder, {one.digest: note for one in sent})  # what a killed addition did not come to enter
        if reasons := folder_problems(folder):
            raise RefusedError([f"{folder}: {one}" for one in reasons])
        plan = _plan(root / "records", sent, folder, correct)
        if plan.refused:
            raise RefusedError(plan.refused)
        for step in plan.steps:
            _take(step, root / "records", folder, note)
            if weights and step.kind in NEW:
                _keep_weights(step.record, root / "checkpoints", folder.parent / "checkpoints")
    return plan.steps


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One addition at a time; what a killed one unpacked is removed."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        for left in folder.glob(f"{UNPACKED}*"):
            shutil.rmtree(left)
        yield
    finally:
        os.close(handle)
        with suppress(OSError):  # it holds something, as a rule
            folder.rmdir()


def _plan(came: Path, sent: list[Record], folder: Path, correct: bool) -> Plan:
    plan, here = Plan(), read_all(folder)
    stands = {_cell(one): one for one in here}
    log, theirs = ledger.entries(folder), ledger.entries(came)
    for record in sent:
        try:
            _belongs(record, here, folder)
            plan.steps.append(_step(record, came, stands.get(_cell(record)), folder, log, theirs, correct))
        except RecordError as reason:
            plan.refused.append(f"{record.id}: {reason}")
    try:
        _share_a_board(plan, here)
    except BoardError as reason:
        plan.refused.append(str(reason))
    return plan


def _share_a_board(plan: Plan, here: list[Record]) -> None:
    """Raises BoardError where those that will stand were measured differently, on other images, or twice."""
    import pandas as pd

    gone = {step.against.digest for step in plan.steps if step.kind == "corrected" and step.against is not None}
    new = [step.record for step in plan.steps if step.kind in NEW]
    records = [*(one for one in here if one.digest not in gone), *new]
    if not new:
        return
    methods, objectives = labels(records, "method"), labels(records, "objective")
    one_protocol(pd.DataFrame([{
        "suite": one.suite, "version": one.suite_version, "objective": objectives[one.id], "arch": one.cell.arch,
        "method": methods[one.id], "density": float(Fraction(one.cell.density)), "seed": one.cell.seed, "record": one.id,
        "images": one.samples.digest,
        "protocol": canonical({key: value for key, value in one.document["cell"].items() if key not in VARIES}),
    } for one in records]))  # fmt: skip


def _cell(record: Record) -> bytes:
    return canonical(record.original["cell"])


def proper_id(record: Record) -> str:
    """The id that sparsecert gives to a record of this cell (see `bench.cells.Cell.id`)."""
    cell, arch = record.cell, record.cell.arch.replace("/", "of")
    method, objective = (part.name.rpartition(":")[2] for part in (cell.method, cell.objective))
    density, sha256 = float(Fraction(cell.density)), hashlib.sha256(_cell(record)).hexdigest()
    words = [f"{cell.suite}@{cell.version}", arch, method, objective, f"d{density:g}", f"s{cell.seed}", sha256[:8]]
    return "-".join(words)


def _belongs(record: Record, here: list[Record], folder: Path) -> None:
    """Its files are called after its cell, so that none can take the place of another's; and it is of the folder's suite."""
    if record.id != (named := proper_id(record)):
        raise RecordError(f"its id is not the {named!r} of its cell; let sparsecert write it")
    if (more := kept_more(record)) is not None and more in record.checks.warnings:
        raise RecordError(f"{more}, and a board ranks by density")
    other = next((one for one in here if one.id == record.id and _cell(one) != _cell(record)), None)
    if other is not None:
        raise RecordError("a record of another cell stands here under its id")
    _replaces_nobody_else(record, here)
    evidence, own = record.evidence, f"{record.id}.safetensors"
    names = [evidence.verdicts, evidence.witnesses, evidence.weights, evidence.stored]
    proper = [f"{record.id}.parquet", f"{record.id}.witnesses.safetensors", f"../checkpoints/{own}",
              f"../checkpoints/{record.id}.stored.safetensors"]  # fmt: skip
    if wrong := [name for name, ours in zip(names, proper, strict=True) if name not in (ours, None)]:
        raise RecordError(f"its file {wrong[0]!r} is not called after it")
    suite = f"{record.suite}@{record.suite_version}"
    place = next((one for one in (folder.name, folder.parent.name) if "@" in one), suite)
    known = {place, *(f"{one.suite}@{one.suite_version}" for one in here)}
    if known != {suite}:
        raise RecordError(f"it is of {suite}, the folder is of {', '.join(sorted(known - {suite}))}; versions never mix")


def _replaces_nobody_else(record: Record, here: list[Record]) -> None:
    """A record may only take the place of one of its own cell, so nobody can make another's entry disappear."""
    for one in here:
        if _cell(one) == _cell(record):
            continue
        if record.supersedes in (one.digest, one.id):
            raise RecordError(f"it says that it supersedes {one.id}, a record of another cell")
        if one.supersedes in (record.digest, record.id):
            raise RecordError(f"{one.id}, a record of another cell that stands here, says that it supersedes it; move that away")


def _step(
    record: Record, came: Path, against: Record | None, folder: Path, log: list[ledger.Entry], theirs: list[ledger.Entry],
    correct: bool,
) -> Step:
    gone = {one.digest for one in log if one.event == "superseded"}
    if record.digest in gone:
        raise RecordError("it stood here before and was superseded")
    if against is None:
        return Step("entered", record)
    if record.digest == against.digest:
        return Step("known", record, against)
    if against.id != record.id:
        raise RecordError(f"its cell stands here already, as {against.id}")
    replaced = {record.supersedes} | {one.digest for one in theirs if (one.event, one.record) == ("superseded", record.id)}
    if against.digest in replaced and correct:
        return Step("corrected", record, against)
    way_out = "; it says that it supersedes that one, so --correct lets it" if against.digest in replaced else ""
    if record.samples.digest != against.samples.digest:
        raise RecordError(f"the record of this cell that stands here is about other test samples{way_out}")
    differ = differing(record.document["cell"], record.verdicts(came), against.verdicts(folder))
    if differ:
        raise RecordError(
            f"it disagrees with the record of this cell that stands here about {differ} of {against.samples.n} samples{way_out}"
        )
    known = _machines(against, log)
    return Step("rerun" if _another(_machine(record), known) else "known", record, against)


def differing(cell: dict[str, Any], one: pd.DataFrame, other: pd.DataFrame) -> int:
    """How many samples two verdict tables of a cell judge differently: another class, verdict, survivor, status or certificate.

    Margins, distances and draws may differ between two machines that agree.
    """
    mine, theirs = (_judged(cell, rows) for rows in (one, other))
    both = mine.index.intersection(theirs.index)
    unlike = (mine.loc[both] != theirs.loc[both]).any(axis=1)
    return int(unlike.sum()) + len(mine.index.symmetric_difference(theirs.index))


def _judged(cell: dict[str, Any], rows: pd.DataFrame) -> pd.DataFrame:
    drawn = tuple(f"{name}:" for name in ("hits", "n"))
    names = [name for name, kind in columns_of(cell).items() if kind != "number" and not name.startswith(drawn)]
    proven = {f"certified:{one['label']}": certified(rows, one["label"], one["eps"]) for one in cell["verifiers"]}
    return rows[names].assign(**proven).set_index("index").sort_index()


def _machine(record: Record) -> dict[str, Any]:
    found = record.provenance.machine
    return {"device": record.provenance.device, "machine": None if found is None else found.model_dump()}


def _machines(record: Record, log: list[ledger.Entry]) -> list[Mapping[str, Any]]:
    """Those that measured a record so far, and its reruns."""
    reruns = [one.note for one in log if (one.event, one.record, one.digest) == ("rerun", record.id, record.digest)]
    return [_machine(record), *reruns]


def _another(mine: Mapping[str, Any], known: list[Mapping[str, Any]]) -> bool:
    """Whether a machine is surely none of these: another device, or another kind of machine where both say which."""
    return all(
        mine["device"] != one["device"] or (None not in (mine["machine"], one["machine"]) and mine["machine"] != one["machine"])
        for one in known
    )


def _take(step: Step, came: Path, folder: Path, note: Mapping[str, Any]) -> None:
    record = step.record
    if step.kind == "rerun" and step.against is not None:
        name = f"reruns/{record.id}-{record.digest[:8]}.json"
        (folder / "reruns").mkdir(exist_ok=True)
        os.replace(came / f"{record.id}.json", folder / name)
        files, facts = {name: sha256_file(folder / name)}, {**note, **_machine(record), "rerun": record.digest}
        ledger.append(folder, "rerun", record.id, step.against.digest, files, facts)
    elif step.kind in NEW:
        if step.kind == "corrected":
            retire(folder, record.id, {**note, "superseded_by": record.digest})
        for name in reversed(files_of(came, record.id, record.original["evidence"])):  # the record itself comes last
            os.replace(came / name, folder / name)
        enter(folder, record.original, note)


def _keep_weights(record: Record, came: Path, folder: Path) -> None:
    for name in (Path(one).name for one in (record.evidence.weights, record.evidence.stored) if one):
        if (came / name).is_file():
            folder.mkdir(exist_ok=True)
            os.replace(came / name, folder / name)
