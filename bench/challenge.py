"""A challenge: witnesses that are executed on a record's network, and kept where they refute what the record says."""

from __future__ import annotations

import glob
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from attacks.lp import distance
from leaderboard.canonical import sha256_file
from leaderboard.challenges import FOLDER, SCHEMA, Challenge, Credit, Effect, Sample, effects
from leaderboard.ledger import append
from leaderboard.record import Record, read
from verifiers.rounding import in_float64

from .claims import Claims, Outside, claims_of_record
from .errors import UserError
from .evaluate import predict
from .files import locked, make_folder, write_json
from .replay import about_its_samples, breakers
from .threat import within
from .witnesses import load_witnesses, save_witnesses


@dataclass(frozen=True)
class Judged:
    """A witness of a sample: what it refutes, or why it counts for nothing."""

    index: int
    sample: Sample | None
    why: str = ""


@dataclass(frozen=True)
class Outcome:
    """What became of every witness; `path` is the file of the challenge, None where nothing counted and nothing was written."""

    record: str
    judged: list[Judged]
    path: Path | None

    @property
    def contradicted(self) -> list[Sample]:
        return [one.sample for one in self.judged if one.sample is not None and one.sample.was == "certified"]

    @property
    def challenged(self) -> list[Sample]:
        return [one.sample for one in self.judged if one.sample is not None and one.sample.was == "robust"]

    def as_json(self) -> dict[str, Any]:
        refused = [{"index": one.index, "why": one.why} for one in self.judged if one.sample is None]
        counted = [one.sample.model_dump() for one in self.judged if one.sample is not None]
        return {
            "record": self.record, "file": None if self.path is None else str(self.path), "samples": counted,
            "refused": refused, "contradicted": [one.index for one in self.contradicted],
        }


def challenge(path: Path, images: Path, by: str, outside: Outside) -> Outcome:
    """Executes the witnesses (one image per sample, as `bench.witnesses` writes them) against the record, keeps what counts.

    One counts if it lies in [0,1], is misclassified in float64 by the network that the record was measured on, and either lies
    inside the exact ball of an attack under the cell's threat that the sample is said to survive (the sample is challenged),
    or within the radius that a deterministic verifier has certified (the record is contradicted). Smoothing certificates are
    about another classifier. `by` is who gets the credit. Raises UserError or RecordError for what cannot be run, such as a
    record without its checkpoint.
    """
    _check_credit(by)
    claims = claims_of_record(path, outside)
    about_its_samples(claims)
    if wrong := [one.why for one in claims.findings if one.why]:
        raise UserError(f"{path.name} does not hold by itself, so it cannot be challenged: {wrong[0]}")
    witnesses = load_witnesses(images, tuple(claims.samples.pixels(slice(0, 1)).shape[1:]))
    record = read(path)
    judged = list(_judged(claims, witnesses, effects(path.parent).get(record.digest, Effect())))
    counted = [one.sample for one in judged if one.sample is not None]
    return Outcome(record.id, judged, _keep(path.parent, record, by, counted, witnesses) if counted else None)


def _check_credit(by: str) -> None:
    try:
        TypeAdapter(Credit).validate_python(by)
    except ValidationError:
        raise UserError(f"--by is the name that gets the credit, one line of 1 to 100 characters, got {by!r}") from None


def _judged(claims: Claims, witnesses: Mapping[int, Tensor], before: Effect) -> Iterator[Judged]:
    rows, double = claims.rows, in_float64(claims.model)
    where = {int(number): at for at, number in enumerate(rows["index"])}
    known = {(one.index, label) for made in before.challenges for one in made.samples for label in one.refutes}
    for number, image in witnesses.items():
        if number not in where:
            yield Judged(number, None, "the record has no such sample")
            continue
        at = where[number]
        x, witness = claims.samples.pixels(slice(at, at + 1)), image[None].to(claims.samples.device)
        far, predicted = float(distance(witness, x, claims.threat.norm)), int(predict(double, witness.double()))
        inside = bool(within(witness, x, claims.threat.norm, claims.threat.eps))
        certified = _uncertified(claims, at, witness, x)
        refuted = dict.fromkeys([*certified, *(_unsurvived(claims, at, witness, x) if inside else [])])
        new = [label for label in refuted if (number, label) not in known]
        if not bool(((witness >= 0) & (witness <= 1)).all()):
            yield Judged(number, None, "a pixel is not in [0,1]")
        elif rows["predicted"][at] != rows["label"][at]:
            yield Judged(number, None, "the sample is misclassified without any attack")
        elif predicted == rows["label"][at]:
            yield Judged(number, None, f"the network classifies the witness correctly, as {predicted}")
        elif new:
            was: Any = "certified" if set(new) & set(certified) else "robust"
            yield Judged(number, Sample(index=number, was=was, refutes=new, distance=far, predicted=predicted))
        else:
            yield Judged(number, None, _why_not(claims, at, far, inside, bool(refuted)))


def _uncertified(claims: Claims, at: int, witness: Tensor, x: Tensor) -> list[str]:
    """The deterministic verifiers whose certificate of the row holds the witness inside."""
    proven = [(one, float(claims.rows[f"radius:{one.label}"][at])) for one in claims.verifiers if one.tool.deterministic]
    held = [(one, Fraction(radius)) for one, radius in proven if radius > 0]
    return [one.label for one, radius in held if bool(within(witness, x, one.tool.norm, radius))]


def _unsurvived(claims: Claims, at: int, witness: Tensor, x: Tensor) -> list[str]:
    """The attacks (and looking verifiers) under the threat that the row is said to survive, whose ball holds the witness."""
    threat = claims.threat
    if claims.rows["verdict"][at] == "broken":
        return []
    under = [one for one in breakers(claims) if one.tool.norm == threat.norm and one.tool.eps <= threat.eps]
    survived = [one for one in under if claims.rows[f"survived:{one.label}"][at]]
    return [one.label for one in survived if bool(within(witness, x, one.tool.norm, one.tool.eps))]


def _why_not(claims: Claims, at: int, far: float, inside: bool, refuted: bool) -> str:
    """Of a misclassified witness of a correctly classified sample."""
    if not inside:
        return f"its distance is {far:.9g}, outside the ball of {claims.threat.eps} and of every certificate"
    if refuted:
        return "the sample has been challenged already"
    if claims.rows["verdict"][at] == "broken":
        return f"the sample is recorded as broken already, by {claims.rows['by'][at]}"
    return "no attack of the record is said to be survived at this distance, and no certificate reaches it"


def _keep(folder: Path, record: Record, by: str, samples: list[Sample], witnesses: Mapping[int, Tensor]) -> Path:
    """Witnesses and challenge first, the ledger's line last: only what it lists counts."""
    place = make_folder(folder / FOLDER)
    with locked(place / ".lock"):
        number = next(n for n in itertools.count(1) if not any(place.glob(f"{glob.escape(record.id)}.{n}.*")))
        path = place / f"{record.id}.{number}.json"
        images = path.with_suffix(".safetensors")
        made = Challenge(
            schema=SCHEMA, record=record.id, digest=record.digest, by=by, witnesses=images.name, samples=samples,
            when=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        save_witnesses(images, {one.index: witnesses[one.index] for one in samples})
        write_json(path, made.model_dump(by_alias=True))
        files = {f"{FOLDER}/{one.name}": sha256_file(one) for one in (path, images)}
        note = {"by": by, "samples": [one.index for one in samples]}
        append(folder, "contradicted" if made.contradicts else "challenged", record.id, record.digest, files, note, made.when)
    return path
