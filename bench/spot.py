"""Spot checks: random samples of a record are run again whole, so that a falsified verdict is met with a known probability."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from attacks import FGSM, PGD
from leaderboard.errors import LeaderboardError

from .cells import Assignment
from .claims import Claims, Finding, Outside, claims_of_record
from .errors import UserError
from .evaluate import ContradictionError, Evaluation, evaluate
from .replay import (
    DISTANCE_TOLERANCE,
    SHARES,
    about_its_samples,
    alike,
    breakers,
    chance,
    drawn,
    executed,
    same_counts,
    same_margin,
    same_proof,
    survivors,
)  # fmt: skip
from .together import OTHER_ALONE, costly, depends_on_batch, in_batch_of_old, pixels_of


@dataclass(frozen=True)
class Spot:
    """What came out for a record of `samples` verdict rows, of which those of the samples `drawn` were made again."""

    name: str
    findings: list[Finding]
    samples: int
    drawn: list[int]
    seed: int
    notes: list[str]

    @property
    def holds(self) -> bool:
        return all(one.holds for one in self.findings)

    @property
    def caught(self) -> dict[float, float]:
        """The probability that a false row would have been among those drawn, by the false share (at least one is false)."""
        return {} if not self.samples else {share: chance(self.samples, len(self.drawn), share) for share in SHARES}

    def as_json(self) -> dict[str, Any]:
        failed = [{"what": one.what, "by": one.by, "sample": one.sample, "why": one.why} for one in self.findings if one.why]
        caught = {f"{share:g}": value for share, value in self.caught.items()}
        return {
            "name": self.name, "holds": self.holds, "failed": failed, "samples": self.samples, "drawn": self.drawn,
            "seed": self.seed, "caught": caught, "notes": self.notes,
        }

    def sentences(self) -> Iterator[str]:
        """What to print: the failures, what is worth knowing, and how likely a false record would have been caught."""
        noted: dict[tuple[str, str, str], list[Finding]] = defaultdict(list)
        for one in self.findings:
            if one.why:
                sample = "" if one.sample is None else f" of sample {one.sample}"
                yield f"{self.name}: fails: {one.what}{sample}{_by(one)}: {one.why}"
            elif one.note:
                noted[one.what, one.by, one.note].append(one)
        for same in noted.values():
            yield f"{self.name}: note: {same[0].what}{_of_samples(same)}{_by(same[0])}: {same[0].note}"
        for note in self.notes:
            yield f"{self.name}: note: {note}"
        if self.caught:
            floored = {share: math.floor(1000 * value) / 1000 for share, value in self.caught.items()}  # 99.97 % is not 100 %
            words = ", ".join(f"{value:.1%} if {share:.0%} were false" for share, value in floored.items())
            yield (
                f"{self.name}: {len(self.drawn)} of {self.samples} samples were run again (--seed {self.seed}), "
                f"{'all as recorded' if self.holds else 'not all as recorded'}; a false verdict would have been met with "
                f"probability {words}"
            )


def _by(one: Finding) -> str:
    return f" by {one.by}" if one.by else ""


def _of_samples(same: Sequence[Finding]) -> str:
    numbers = [str(one.sample) for one in same if one.sample is not None]
    more = f" and {len(numbers) - 5} more" if len(numbers) > 5 else ""
    return f" of sample{'s' if len(numbers) > 1 else ''} {', '.join(numbers[:5])}{more}" if numbers else ""


def spot_checks(records: Sequence[Path], count: int, seed: int, outside: Outside) -> tuple[list[Spot], list[str]]:
    """(what came out for every record that could be run, why each of the others could not).

    Of each record `count` samples, the same ones for the same seed. Raises UserError where not one could be run.
    """
    if count < 1 or seed < 0:
        raise UserError(f"--spot must be a whole number from 1 and --seed one from 0, got {count} and {seed}")
    found, left = [], []
    for path in records:
        try:
            found.append(spot_check(path, count, seed, outside))
        except (UserError, LeaderboardError) as reason:
            left.append(f"{path.stem}: not run again: {reason}")
    if left and not found:
        raise UserError(f"no record could be run again; {left[0]}")
    return found, left


def spot_check(path: Path, count: int, seed: int, outside: Outside) -> Spot:
    """`count` random samples of a record, each run again whole: clean prediction, every verifier's answer, every attack.

    What reading the record alone shows is among the findings. Raises UserError or RecordError where it cannot be run, such as
    without its checkpoint.
    """
    claims = claims_of_record(path, outside)
    total = len(claims.rows)
    if not about_its_samples(claims):
        return Spot(claims.name, claims.findings, total, [], seed, claims.notes)
    chosen = drawn(np.random.default_rng(seed), range(total), count)
    numbers = claims.rows["index"].iloc[chosen].tolist()
    findings = [*claims.findings, *_whole(claims, chosen)]
    findings += executed(claims, [number for number in numbers if number in claims.witnesses])
    return Spot(claims.name, findings, total, numbers, seed, claims.notes)


def _whole(claims: Claims, chosen: Sequence[int]) -> Iterator[Finding]:
    """The rows `chosen` made again: those that were asked the same verifiers together.

    The noise of our own PGD is the image's own, so it runs on these images alone, and once more in the batch of old only where
    the answer is another then (kernels round otherwise). All other attacks run in the batch of old. A verifier whose bounds
    depend on the batch runs in the batch of old where its answer is another one; another margin alone is only noted.
    """
    alone = [one for one in claims.attacks if isinstance(one.tool, (PGD, FGSM)) and one.tool.seed is not None]
    doubtful: list[tuple[str, int]] = []
    unsure: list[tuple[Assignment, int]] = []
    for labels, rows in _by_verifiers(claims, chosen).items():
        x, y, index = pixels_of(claims, rows)
        asked = [replace(one, first=None) for one in claims.verifiers if one.label in labels]
        try:
            out = evaluate(claims.model, x, y, index, claims.threat, alone, asked)
        except ContradictionError as found:
            yield Finding("certificate", str(found.facts["verifier"]), int(found.facts["index"]), str(found))
            continue
        yield from _answers(claims, rows, asked, out, unsure)
        doubtful += _doubtful(claims, rows, out)
    for again in in_batch_of_old(claims, unsure):
        why, _ = _same_answer(again.giver, claims.rows.iloc[again.at], again.found)
        yield Finding("answer", again.asked.label, int(claims.rows["index"][again.at]), why, "" if why else OTHER_ALONE)
    for (by, at), survived in survivors(claims, doubtful):
        yield _survival(claims, by, at, survived, by in {one.label for one in alone})


def _by_verifiers(claims: Claims, chosen: Sequence[int]) -> dict[tuple[str, ...], list[int]]:
    """The rows by the labels of the verifiers that were asked about them: a suite may ask one about the first few only."""
    groups = defaultdict(list)
    for at in chosen:
        groups[tuple(v.label for v in claims.verifiers if claims.rows[f"status:{v.label}"][at] != "skipped")].append(at)
    return groups


def _answers(
    claims: Claims, at: Sequence[int], asked: Sequence[Assignment], out: Evaluation, unsure: list[tuple[Assignment, int]]
) -> Iterator[Finding]:
    """What follows from predictions and answers as they are; `unsure` gets those that are to be made in the batch of old."""
    for k, row in enumerate(at):
        recorded, found = claims.rows.iloc[row], out.rows.iloc[k]
        number = int(recorded["index"])
        off = recorded["predicted"] != found["predicted"]
        why = f"predicted as {found['predicted']}, recorded is {recorded['predicted']}" if off else ""
        yield Finding("clean prediction", "", number, why)
        for one in asked:
            why, note = _same_answer(one, recorded, found)
            if why and depends_on_batch(one):
                unsure.append((one, row))
            else:
                yield Finding("answer", one.label, number, why, note)


def _same_answer(one: Assignment, recorded: pd.Series, found: pd.Series) -> tuple[str, str]:
    """(why the verifier's answer is another than the recorded one, a note)."""
    was, is_now = (str(row[f"status:{one.label}"]) for row in (recorded, found))
    if not one.tool.deterministic and "error" not in (was, is_now):
        return same_counts(one, recorded, found)
    proven, claimed = (float(row[f"radius:{one.label}"]) for row in (found, recorded))
    if claimed > 0 and proven > claimed * (1 + DISTANCE_TOLERANCE):
        return f"proves radius {proven:.6g}, recorded is {claimed:.6g}", ""
    if claimed > 0:
        return same_proof(one, recorded, found)
    if was == "timeout" or (costly(one) and "proved" not in (was, is_now)):
        return "", ""  # out of time here or there; broken by whichever looked first, or left open
    margins = (found[f"margin:{one.label}"], recorded[f"margin:{one.label}"])
    if was != is_now:
        said = f"answers {is_now} (margin {margins[0]:.6g}), recorded is {was} (margin {margins[1]:.6g})"
        return ("", said) if all(alike(one, 0.0) for one in margins) else (said, "")  # too near to zero to tell
    return ("", "") if costly(one) else same_margin(one, *margins)


def _doubtful(claims: Claims, at: Sequence[int], out: Evaluation) -> Iterator[tuple[str, int]]:
    """(breaker, row) of every answer that must be asked for again in the batch of old: it is another one, or depends on it."""
    for one in breakers(claims):
        name = f"survived:{one.label}"
        for k, row in enumerate(at):
            asked = claims.rows["predicted"][row] == claims.rows["label"][row] and _was_asked(claims, one, row)
            if asked and not (name in out.rows and out.rows[name][k] == claims.rows[name][row]):
                yield one.label, row


def _was_asked(claims: Claims, one: Assignment, row: int) -> bool:
    """An attack that left a distance; a verifier that did not take over what others had settled."""
    if one in claims.attacks:
        return not pd.isna(claims.rows[f"distance:{one.label}"][row])
    status, survived = claims.rows[f"status:{one.label}"][row], bool(claims.rows[f"survived:{one.label}"][row])
    return status == "open" or not survived


def _survival(claims: Claims, by: str, at: int, survived: bool, alone: bool) -> Finding:
    number, recorded = int(claims.rows["index"][at]), bool(claims.rows[f"survived:{by}"][at])
    if survived == recorded:
        words = "breaks" if recorded else "does not break"
        note = f"{by} {words} it when it is attacked alone; in its batch of old the answer is the recorded one" if alone else ""
        return Finding("attack", by, number, note=note)
    if survived and number in claims.witnesses and claims.rows["by"][at] == by:
        return Finding("attack", by, number, note=f"{by} does not break it again; its stored witness counts")
    return Finding("attack", by, number, f"{by} breaks it now, recorded is that it survives" if recorded else
                   f"{by} does not break it again")  # fmt: skip
