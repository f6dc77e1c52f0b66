"""Challenges: images that refute what a record says of its samples, and what is left of its numbers then."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import Field, ValidationError, model_validator

from leaderboard.canonical import sha256_file
from leaderboard.errors import RecordError
from leaderboard.ledger import Entry, entries, standing
from leaderboard.record import Count, FileName, Sha256, Strict

if TYPE_CHECKING:
    import pandas as pd

SCHEMA: Final = 1
FOLDER = "challenges"  # inside the folder of records
EVENTS = ("challenged", "contradicted")
BROKEN_BY = "challenge"
Credit = Annotated[str, Field(pattern=r"^\S(.{0,98}\S)?$")]  # one line


class Sample(Strict):
    """A sample and its witness: an image at `distance` (in the norm of the cell's threat) that the network takes for `predicted`.

    refutes: the labels of the attacks that the sample is said to survive and of the verifiers whose certificate holds the
    witness inside; `was` is "certified" where there is one of the latter.
    """

    index: Count
    was: Literal["robust", "certified"]
    refutes: Annotated[list[str], Field(min_length=1)]
    distance: Annotated[float, Field(ge=0)]
    predicted: int


class Challenge(Strict):
    """Who refuted which samples of which record; the witnesses lie beside in `witnesses` (see bench.witnesses)."""

    schema_: Literal[1] = Field(alias="schema")
    record: FileName
    digest: Sha256
    by: Credit
    when: str
    witnesses: FileName
    samples: Annotated[list[Sample], Field(min_length=1)]

    @model_validator(mode="after")
    def _once(self) -> Challenge:
        if len({one.index for one in self.samples}) < len(self.samples):
            raise ValueError("a sample stands twice in one challenge")
        return self

    @property
    def contradicts(self) -> bool:
        """Whether a deterministic certificate is among what was refuted."""
        return any(one.was == "certified" for one in self.samples)


@dataclass(frozen=True)
class Effect:
    """What has happened to a record since it was entered."""

    challenges: tuple[Challenge, ...] = ()
    rerun: bool = False

    @property
    def status(self) -> str:
        """measured, rerun (by a second machine, with equal verdicts), challenged or contradicted; the worst counts."""
        if any(one.contradicts for one in self.challenges):
            return "contradicted"
        return "challenged" if self.challenges else "rerun" if self.rerun else "measured"

    @property
    def samples(self) -> frozenset[int]:
        """The numbers of the refuted samples."""
        return frozenset(sample.index for one in self.challenges for sample in one.samples)

    @property
    def credit(self) -> tuple[str, ...]:
        """Who refuted them, in order, everyone once."""
        return tuple(dict.fromkeys(one.by for one in self.challenges))

    def lowered(self, rows: pd.DataFrame) -> pd.DataFrame:
        """The verdict rows as they stand after the challenges: broken where an attack was said to be survived, unproven
        where a certificate was refuted. The rows given stay as they are."""
        rows = rows.copy()
        for sample in (sample for one in self.challenges for sample in one.samples):
            at = rows["index"] == sample.index
            survived = [name for name in (f"survived:{label}" for label in sample.refutes) if name in rows]
            rows.loc[at, survived] = False
            for label in (label for label in sample.refutes if f"radius:{label}" in rows):
                rows.loc[at, [f"radius:{label}", f"status:{label}"]] = [0.0, "open"]
            rows.loc[at, ["verdict", "by"]] = ["broken", BROKEN_BY] if survived else ["open", ""]
        return rows


def effects(folder: str | Path) -> dict[str, Effect]:
    """What the ledger of a `records` folder says of every record to which something happened, by the record's digest.

    Raises RecordError where the ledger or a challenge is not what it was.
    """
    folder = Path(folder)
    challenges: dict[str, list[Challenge]] = defaultdict(list)
    rerun = set()
    for entry in entries(folder):
        if entry.event in EVENTS:
            challenges[entry.digest].append(_read(folder, entry))
        elif entry.event == "rerun":
            rerun.add(entry.digest)
    return {digest: Effect(tuple(challenges[digest]), digest in rerun) for digest in {*challenges, *rerun}}


def contradicted(folder: str | Path) -> list[str]:
    """The ids of the records that stand in a `records` folder with a contradicted certificate. Raises RecordError."""
    happened, stands = effects(folder), standing(entries(folder))
    entered = [one for one in stands.values() if one.event == "entered" and one.digest in happened]
    return sorted(one.record for one in entered if happened[one.digest].status == "contradicted")


def _read(folder: Path, entry: Entry) -> Challenge:
    """The challenge of a ledger's entry, every byte of its files as it was entered. Raises RecordError."""
    for name, expected in entry.files.items():
        path = folder / name
        if not path.is_file():
            raise RecordError(f"{name}: the ledger lists this challenge, but it is missing; restore the file")
        if sha256_file(path) != expected:
            raise RecordError(f"{name}: not the file of the challenge that was entered, its sha256 differs; restore the file")
    text = next((name for name in entry.files if name.endswith(".json")), "")
    try:
        found = Challenge.model_validate_json((folder / text).read_bytes())
    except (ValidationError, OSError) as error:
        raise RecordError(f"{text or entry.record}: no challenge that can be read ({str(error).splitlines()[0]})") from None
    if (found.record, found.digest, found.contradicts) != (entry.record, entry.digest, entry.event == "contradicted"):
        raise RecordError(f"{text}: says another thing than its entry in the ledger, {entry.event} {entry.record}")
    return found


def notes(frame: pd.DataFrame) -> list[str]:
    """A sentence on every entry (or record) of a board that was challenged or contradicted."""
    return [_note(row) for _, row in frame.iterrows() if row["challenged"]]


def _note(row: Any) -> str:
    what = f"{row['suite']}@{row['version']}, {row['objective']}, {row['method']}, {row['arch']}, density {row['density']:g}"
    count = f"{row['challenged']} sample{'s' if row['challenged'] > 1 else ''}"
    if row["status"] == "contradicted":
        return f"{what}: a certificate is contradicted by a witness found by {row['credit']}; the entry is frozen and has no rank"
    return f"{what}: {count} refuted by {row['credit']}, and the numbers are lowered"
