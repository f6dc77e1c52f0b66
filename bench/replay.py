"""Does a record hold? Its witnesses are executed again, a random part of its certificates is proven again."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import hypergeom
from torch import Tensor, nn

from attacks.lp import distance
from verifiers import UnsupportedNetworkError
from verifiers.rounding import in_float64

from .cells import Assignment
from .checkpoints import load_checkpoint, network
from .claims import Claims, Finding, Outside, claims_of_folder, claims_of_record, json_of, never_reached, tool_of
from .errors import UserError
from .evaluate import ATTACK_BATCH, ContradictionError, evaluate, predict
from .threat import within
from .together import OTHER_ALONE, OTHER_MARGIN, costly, depends_on_batch, in_batch_of_old, pixels_of

SHARES = (0.01, 0.05, 0.10)
MARGIN_TOLERANCE = 1e-3  # of a margin of size 1 or more: what another processor may round otherwise
DISTANCE_TOLERANCE = 1e-6
FLIPPED = 1e-4  # the share of noise draws that another processor may classify otherwise


@dataclass(frozen=True)
class Replay:
    """What came out: every finding, how many certificates there are, how many of them were proven again, drawn with what seed."""

    name: str
    findings: list[Finding]
    certificates: int
    spot: int
    notes: list[str]
    seed: int | None = None

    @property
    def holds(self) -> bool:
        return all(finding.holds for finding in self.findings)

    @property
    def caught(self) -> dict[float, float]:
        """The probability that the spot checks would have met at least one false certificate, by the false share."""
        return {} if not self.certificates else {share: chance(self.certificates, self.spot, share) for share in SHARES}

    def as_json(self) -> dict[str, Any]:
        findings = [
            {"what": one.what, "by": one.by, "sample": one.sample, "holds": one.holds, "why": one.why, "note": one.note}
            for one in self.findings
        ]
        caught = {f"{share:g}": value for share, value in self.caught.items()}
        return {
            "name": self.name, "holds": self.holds, "findings": findings, "certificates": self.certificates, "spot": self.spot,
            "seed": self.seed, "caught": caught, "notes": self.notes,
        }


def chance(certificates: int, spot: int, share: float) -> float:
    """The probability that `spot` of the certificates, drawn without replacement, hold a false one if a share is false.

    At least one is false then; rounded up. Hypergeometric.
    """
    false = max(1, math.ceil(share * certificates))
    return float(hypergeom.sf(0, certificates, false, min(spot, certificates)))


def replay(path: Path, spot: int, seed: int, outside: Outside) -> Replay:
    """Every check of a record, of a folder that certify wrote, or of a contradiction.

    Digests, all clean predictions, all stored witnesses, `spot` random certificates, and `spot` random broken samples whose
    witness is not stored. The same seed draws the same ones. Raises UserError or RecordError where the files are none of these.
    """
    if spot < 0 or seed < 0:
        raise UserError(f"--spot and --seed must be whole numbers from 0, got {spot} and {seed}")
    if path.is_dir() or path.name == "answer.json":
        return _replayed(claims_of_folder(path if path.is_dir() else path.parent, outside), spot, seed)
    if "schema" not in (facts := json_of(path)) and {"verifier", "attack", "radius"} <= set(facts):
        return _contradiction(path, facts, outside)
    return _replayed(claims_of_record(path, outside), spot, seed)


def _replayed(claims: Claims, spot: int, seed: int) -> Replay:
    if not about_its_samples(claims):
        return Replay(claims.name, claims.findings, 0, 0, claims.notes, seed)
    rows, random, certificates = claims.rows, np.random.default_rng(seed), _certificates(claims)
    chosen = drawn(random, certificates, spot)
    broken = np.flatnonzero(rows["verdict"] == "broken").tolist()
    unseen = [at for at in broken if int(rows["index"][at]) not in claims.witnesses]
    findings = [*claims.findings, *_clean(claims), *_proven_again(claims, chosen), *executed(claims, list(claims.witnesses))]
    findings += _broken_again(claims, drawn(random, unseen, spot))
    return Replay(claims.name, findings, len(certificates), len(chosen), claims.notes, seed)


def about_its_samples(claims: Claims) -> bool:
    """Whether the rows are about the images that are here, in their order; a finding says so where they are not."""
    samples, rows = claims.samples, claims.rows
    said = list(zip(rows["index"].tolist(), rows["label"].tolist(), strict=True))
    same = said == list(zip(samples.index.tolist(), samples.labels.tolist(), strict=True))
    if not same:
        claims.findings.append(Finding("samples", why="the verdict rows are about other images or labels than the data has"))
    return same


def drawn(random: np.random.Generator, items: Sequence[Any], count: int) -> list[Any]:
    """`count` of the items (all, where there are fewer) without replacement, in their order."""
    at = random.permutation(len(items))[:count]
    return [items[i] for i in sorted(at)]


# ---- clean predictions -----------------------------------------------------------------------------------------------


def _clean(claims: Claims) -> Iterator[Finding]:
    if not claims.about_f:
        return
    asked = np.flatnonzero(~never_reached(claims.rows, claims.verifiers))
    found = [predict(claims.model, pixels_of(claims, part.tolist())[0]).cpu().numpy() for part in _parts(asked)]
    recorded = claims.rows["predicted"].to_numpy()[asked]
    off = np.concatenate([*found, np.zeros(0, dtype=np.int64)]) != recorded
    index = claims.rows["index"].to_numpy()[asked][off].tolist()
    why = f"{len(index)} of {len(asked)} samples are predicted otherwise: {', '.join(map(str, index[:5]))}" if index else ""
    yield Finding("clean predictions", why=why, note=f"{len(asked)} samples")


def _parts(at: np.ndarray) -> list[np.ndarray]:
    return [at[i : i + ATTACK_BATCH] for i in range(0, len(at), ATTACK_BATCH)]


# ---- certificates ----------------------------------------------------------------------------------------------------


def _certificates(claims: Claims) -> list[tuple[int, int]]:
    """(verifier, row) of every radius above 0 that is claimed."""
    columns = [claims.rows[f"radius:{one.label}"].to_numpy() for one in claims.verifiers]
    return [(v, int(at)) for v, radius in enumerate(columns) for at in np.flatnonzero(radius > 0)]


def _proven_again(claims: Claims, chosen: Iterable[tuple[int, int]]) -> Iterator[Finding]:
    """Each certificate by the verifier that claimed it; a costly one may have taken it over, so it gets all the others."""
    by_verifier = defaultdict(list)
    for verifier, at in chosen:
        by_verifier[verifier].append(at)
    everyone = [replace(one, first=None) for one in claims.verifiers]
    unsure: list[tuple[Assignment, int]] = []
    for verifier, rows in by_verifier.items():
        one = everyone[verifier]
        x, y, index = pixels_of(claims, rows)
        try:
            out = evaluate(claims.model, x, y, index, claims.threat, [], everyone if costly(one) else [one])
        except ContradictionError as found:
            yield Finding("certificate", one.label, int(found.facts["index"]), str(found))
            continue
        for k, at in enumerate(rows):
            compare = same_proof if one.tool.deterministic else same_counts
            why, note = compare(one, claims.rows.iloc[at], out.rows.iloc[k])
            if why and depends_on_batch(one):
                unsure.append((one, at))
            else:
                yield Finding("certificate", one.label, index[k], why, note)
    for again in in_batch_of_old(claims, unsure):
        why, _ = same_proof(again.giver, claims.rows.iloc[again.at], again.found)
        yield Finding("certificate", again.asked.label, int(claims.rows["index"][again.at]), why, "" if why else OTHER_ALONE)


def same_proof(one: Assignment, recorded: pd.Series, found: pd.Series) -> tuple[str, str]:
    """(why it fails, a note): proven to the recorded radius again, and by the recorded margin where that has one meaning.

    A margin that depends on the batch accuses nobody.
    """
    radius, margin = (name + one.label for name in ("radius:", "margin:"))
    if not found[radius] >= recorded[radius]:
        status = found[f"status:{one.label}"]
        return f"radius {recorded[radius]:.6g} is recorded, but {one.label} answers {status} with {found[radius]:.6g}", ""
    return ("", "") if costly(one) else same_margin(one, found[margin], recorded[margin])  # a costly one's may be another's


def same_margin(one: Assignment, found: float, recorded: float) -> tuple[str, str]:
    if alike(found, recorded):
        return "", ""
    if depends_on_batch(one) and math.isfinite(found) and math.isfinite(recorded):
        return "", OTHER_MARGIN
    return f"its margin is {found:.6g}, recorded is {recorded:.6g}: another network or another verifier", ""


def alike(found: float, recorded: float) -> bool:
    """Whether two margins are one, up to what another processor may round otherwise; NaN is only like NaN."""
    if math.isnan(found) or math.isinf(found):
        return found == recorded or (math.isnan(found) and math.isnan(recorded))
    return abs(found - recorded) <= MARGIN_TOLERANCE * max(1.0, abs(found))


def same_counts(one: Assignment, recorded: pd.Series, found: pd.Series) -> tuple[str, str]:
    """(why it fails, a note): the same seed gives the same draws, and so the same hits."""
    predicted, hits, n, radius = (f"{name}:{one.label}" for name in ("predicted", "hits", "n", "radius"))
    off = abs(int(found[hits]) - int(recorded[hits]))
    counts = f"{found[hits]} hits of {found[n]} draws, recorded are {recorded[hits]} of {recorded[n]}"
    if found[predicted] != recorded[predicted] or found[n] != recorded[n] or off > max(1, FLIPPED * recorded[n]):
        return f"{counts} (class {found[predicted]}, recorded {recorded[predicted]})", ""
    if off == 0 and recorded[radius] > found[radius] + DISTANCE_TOLERANCE:
        return f"the counts prove radius {found[radius]:.6g}, recorded is {recorded[radius]:.6g}", ""
    return "", counts if off else ""


# ---- broken samples --------------------------------------------------------------------------------------------------


def executed(claims: Claims, numbers: Sequence[int]) -> Iterator[Finding]:
    """The stored witnesses of these samples: each inside the exact ball and [0,1], and misclassified in float64."""
    rows = claims.rows
    where = {int(number): at for at, number in enumerate(rows["index"])}
    for number in numbers:
        if number not in where or rows["verdict"][where[number]] != "broken":
            yield Finding("witness", sample=number, why="a witness is stored of a sample that is not recorded as broken")
    known = np.array([where[number] for number in numbers if number in where], dtype=np.int64)
    double = in_float64(claims.model)
    for part in _parts(known):
        x, y, index = pixels_of(claims, part.tolist())
        witness = torch.stack([claims.witnesses[one] for one in index]).to(x.device)
        predicted, far = predict(double, witness.double()), distance(witness, x, claims.threat.norm)
        inside = within(witness, x, claims.threat.norm, claims.threat.eps)
        for k, at in enumerate(part):
            by = str(rows["by"][at])
            recorded = float(rows[f"distance:{by}"][at]) if f"distance:{by}" in rows else math.nan
            why = ""
            if not inside[k]:
                why = f"its distance is {float(far[k]):.9g}, outside the ball of {claims.threat.eps}, or a pixel is not in [0,1]"
            elif predicted[k] == y[k]:
                why = f"the network classifies it correctly, as {int(y[k])}"
            elif abs(float(far[k]) - recorded) > DISTANCE_TOLERANCE:
                why = f"its distance is {float(far[k]):.9g}, recorded is {recorded:.9g}"
            yield Finding("witness", by, index[k], why)


def _broken_again(claims: Claims, chosen: Sequence[int]) -> Iterator[Finding]:
    """Broken samples without a stored witness: the tool that broke them must do so again, on the images it had together."""
    known, asked = {one.label for one in breakers(claims)}, []
    for at in chosen:
        if (by := str(claims.rows["by"][at])) in known:
            asked.append((by, at))
        else:
            number = int(claims.rows["index"][at])
            yield Finding("attack", by, number, "broken by a tool that the record does not name, or that breaks nothing")
    for (by, at), survived in survivors(claims, asked):
        yield Finding("attack", by, int(claims.rows["index"][at]), f"{by} does not break it again" if survived else "")


def breakers(claims: Claims) -> list[Assignment]:
    """The verifiers that look for counterexamples, asked about every sample, and the attacks."""
    return [*(replace(one, first=None) for one in claims.verifiers if getattr(one.tool, "falsifies", False)), *claims.attacks]


def survivors(claims: Claims, asked: Iterable[tuple[str, int]]) -> Iterator[tuple[tuple[str, int], bool]]:
    """Whether each (breaker's label, row) survives when the breaker runs again, an attack on the images it had together."""
    tools = {one.label: one for one in breakers(claims)}
    groups: dict[tuple[str, tuple[int, ...]], list[int]] = defaultdict(list)
    for by, at in asked:
        groups[by, _together(claims, by, at) if tools[by] in claims.attacks else (at,)].append(at)
    for (by, together), rows in groups.items():
        x, y, index = pixels_of(claims, together)
        split = ([tools[by]], []) if tools[by] in claims.attacks else ([], [tools[by]])
        survived = evaluate(claims.model, x, y, index, claims.threat, *split).rows.set_index("index")[f"survived:{by}"]
        for at in rows:
            yield (by, at), bool(survived[int(claims.rows["index"][at])])


def _together(claims: Claims, by: str, at: int) -> tuple[int, ...]:
    """The rows that the attack `by` saw in one batch with this one: its noise may depend on them.

    It has left a distance in all that it saw; with `rest` it did not see what others had broken.
    """
    first = at - at % claims.batch
    batch = claims.rows.iloc[first : first + claims.batch]
    seen = (first + np.flatnonzero(batch[f"distance:{by}"].notna())).tolist()
    start = seen.index(at) // ATTACK_BATCH * ATTACK_BATCH if at in seen else 0
    return tuple(seen[start : start + ATTACK_BATCH]) if at in seen else (at,)


# ---- contradictions --------------------------------------------------------------------------------------------------


def _contradiction(path: Path, facts: dict[str, Any], outside: Outside) -> Replay:
    """A contradiction holds if the verifier certifies the image, whose witness lies within the radius and is misclassified.

    The network classifies the image, in float32 as it was certified, as its label; the witness is executed in float64.
    """
    weights = path.with_suffix(".safetensors")
    tensors, card = load_checkpoint(weights)
    if card is None or not {"image", "witness"} <= set(tensors):
        raise UserError(f"{weights} is not the file of a contradiction: it needs a card, an image and a witness")
    state = {name.removeprefix("weights."): value for name, value in tensors.items() if name.startswith("weights.")}
    model, image, witness = network(state, card, weights), tensors["image"][None], tensors["witness"][None]
    try:
        radius, norm = Fraction(float(facts["radius"])), str(facts["norm"])
        label, index, attack = int(facts["label"]), int(facts["index"]), str(facts["attack"])
        legal, inside = (bool(within(one, image, norm, radius)) for one in (image, witness))
        far = float(distance(witness, image, norm))
        clean, predicted = int(predict(model, image)), int(predict(in_float64(model), witness.double()))
    except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as reason:
        raise UserError(f"{path} does not fit its {weights.name}: {type(reason).__name__}: {reason}") from reason
    if radius <= 0:
        raise UserError(f"{path} is no contradiction: a certified radius is above 0, got {facts['radius']!r}")
    why = ""
    if not legal:
        why = "the image has a pixel that is not in [0,1]"
    elif clean != label:
        why = f"the network classifies the image itself as {clean}, not as {label}"
    elif not inside:
        why = f"the witness lies at distance {far:.9g}, outside the certified radius {float(radius):.9g} or [0,1]"
    elif predicted == label:
        why = f"the witness is classified correctly, as {label}"
    note = f"distance {far:.9g} of the certified {float(radius):.9g}, predicted {predicted} instead of {label}"
    replayed = Replay(path.stem, [Finding("contradiction", attack, index, why, note)], 0, 0, [])
    if not why:
        verifier = str(facts["verifier"])
        try:
            found = _certified_again(verifier, model, image, label, norm, radius, outside)
            replayed.findings.append(Finding("certificate", verifier, index, found))
        except (UserError, UnsupportedNetworkError) as reason:
            replayed.notes.append(f"the certificate itself was not made again: {reason}")
    return replayed


def _certified_again(
    verifier: str, model: nn.Module, image: Tensor, label: int, norm: str, radius: Fraction, outside: Outside
) -> str:
    """Why the verifier of this name does not certify the image to the radius; empty if it does. Raises UserError."""
    tool = tool_of("verifier", {"name": verifier, "norm": norm, "eps": radius}, outside)
    if not tool.deterministic:
        return f"{verifier} certifies another classifier, which no witness of the network contradicts"
    proof = tool(model, image, torch.tensor([label]))
    if (proven := float(proof.radius[0])) >= radius:
        return ""
    return f"radius {float(radius):.9g} is claimed, but {verifier} answers {proof.status[0]} with {proven:.9g}"
