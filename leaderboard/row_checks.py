"""What verdict rows must say for sure: proofs, attacks, verdicts and smoothing counts that agree with each other."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise, product
from typing import TYPE_CHECKING, Any

from leaderboard.stats import asked, certified, is_smoothing, number, threat_verifiers

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

VERDICTS = ("misclassified", "broken", "certified", "open", "timeout", "error")
STATUSES = ("proved", "open", "abstain", "misclassified", "skipped", "timeout", "error")
# Each of these answers with the best of its own margin and those of the bounds before it (the raw margins have no order).
ORDER = ("ibp", "crown-ibp", "crown")
RADIUS_TOLERANCE = 1e-12
# A float32 image moved by exactly eps may measure this much further in float64.
DISTANCE_ALLOWANCE = 1e-6


def problems(cell: dict[str, Any], rows: pd.DataFrame) -> list[str]:
    """Every way in which the rows of a cell contradict themselves, one sentence each, with the samples' numbers."""
    checks = (attacks, verifiers, proofs_against_attacks, order_of_verifiers, smoothing, verdicts)
    return [sentence for one in checks for sentence in one(cell, rows)]


def where(rows: pd.DataFrame, offends: Any, sentence: str) -> Iterator[str]:
    """The sentence and the first few samples for which it holds; nothing where there are none."""
    found = rows["index"][offends].tolist()
    if found:
        named = ", ".join(str(index) for index in found[:5])
        yield f"{sentence}: {'sample' if len(found) == 1 else 'samples'} {named}" + (
            f" and {len(found) - 5} more" if len(found) > 5 else ""
        )


def correct(rows: pd.DataFrame) -> pd.Series:
    return rows["predicted"] == rows["label"]


def attacks(cell: dict[str, Any], rows: pd.DataFrame) -> Iterator[str]:
    """A misclassified image cannot survive; a correct one was really attacked, and a broken one inside the ball."""
    for attack in cell["attacks"]:
        label, eps = attack["label"], ball(cell, attack)[1]
        survived, distance = rows[f"survived:{label}"], rows[f"distance:{label}"]
        yield from where(rows, ~correct(rows) & survived, f"misclassified, yet said to survive {label}")
        spared = distance.isna() & (rows.reset_index().index < attack.get("first", len(rows)))
        yield from where(rows, correct(rows) & survived & spared, f"said to survive {label}, but never attacked")
        broken = correct(rows) & ~survived
        yield from where(rows, broken & ~(distance <= float(eps) + DISTANCE_ALLOWANCE), (
            f"broken by {label}, but the distance of the witness is outside its ball of {eps}"
        ))


def verifiers(cell: dict[str, Any], rows: pd.DataFrame) -> Iterator[str]:
    """Statuses are known words, a radius is a finite number from 0, and proved means a radius above 0."""
    for verifier in cell["verifiers"]:
        label = verifier["label"]
        status, radius = rows[f"status:{label}"], rows[f"radius:{label}"]
        yield from where(rows, ~status.isin(STATUSES), f"status:{label} is none of {', '.join(STATUSES)}")
        yield from where(rows, ~((radius >= 0) & (radius < float("inf"))), f"radius:{label} is no finite number from 0")
        yield from where(rows, (status == "proved") & ~(radius > 0), f"{label} says proved with radius 0")
        # Smoothing may prove a radius that is too small for the suite's question: open, with a radius.
        may_prove = ("proved", "open") if is_smoothing(verifier) else ("proved",)
        yield from where(rows, ~status.isin(may_prove) & (radius > 0), f"{label} has a radius without having proved it")


def ball(cell: dict[str, Any], attack: dict[str, Any]) -> tuple[str, Fraction]:
    """The (norm, eps) of an attack: its own, else the cell's threat's."""
    threat = cell["threat"]
    return attack.get("norm") or threat["norm"], Fraction(str(attack.get("eps") or threat["eps"]))


def proofs_against_attacks(cell: dict[str, Any], rows: pd.DataFrame) -> Iterator[str]:
    """Certified implies correct, and robust against every attack of the norm whose witness lies within the radius.

    The witness's measured distance decides; an attack with no larger an eps than the radius lies within it by its ball.
    Smoothing speaks of another classifier and is not compared.
    """
    for verifier in cell["verifiers"]:
        if is_smoothing(verifier):
            continue
        label = verifier["label"]
        radius = rows[f"radius:{label}"]
        yield from where(rows, (radius > 0) & ~correct(rows), f"certified by {label}, yet misclassified")
        for attack in cell["attacks"]:
            norm, eps = ball(cell, attack)
            if norm != verifier["norm"]:
                continue
            inside = (rows[f"distance:{attack['label']}"] <= radius) | (radius >= float(eps))
            broken = correct(rows) & ~rows[f"survived:{attack['label']}"]
            yield from where(rows, broken & inside & (radius > 0), f"certified by {label}, yet broken by {attack['label']}")


def order_of_verifiers(cell: dict[str, Any], rows: pd.DataFrame) -> Iterator[str]:
    """Of two bounds asked about the same ball, the one that includes the other certifies no less."""
    for one, other in product(cell["verifiers"], cell["verifiers"]):
        names = tuple(v["name"].replace("_", "-") for v in (one, other))
        if names not in {*pairwise(ORDER), (ORDER[0], ORDER[-1])}:
            continue
        if (one["norm"], Fraction(one["eps"])) != (other["norm"], Fraction(other["eps"])):
            continue
        answered = rows[f"status:{other['label']}"].isin(("proved", "open"))  # a time-out or error proves nothing
        lost = answered & (rows[f"radius:{one['label']}"] > rows[f"radius:{other['label']}"])
        yield from where(rows, lost, f"certified by {one['label']}, but not by {other['label']}, which includes it")


def smoothing(cell: dict[str, Any], rows: pd.DataFrame) -> Iterator[str]:
    """Radii follow from the counts: Clopper-Pearson for the rule `fixed`; no rule exceeds sigma Phi^-1(alpha^(1/n))."""
    for verifier in cell["verifiers"]:
        if not is_smoothing(verifier):
            continue
        label = verifier["label"]
        if "alpha" not in verifier:
            yield f"verifier {label} records no alpha, so its radii cannot be derived again"
            continue
        answered = rows[asked(rows, label) & ~rows[f"status:{label}"].isin(("timeout", "error"))]
        hits, n = answered[f"hits:{label}"], answered[f"n:{label}"]
        impossible = (hits < 0) | (hits > n) | (n < 1)
        yield from where(answered, impossible, f"hits:{label} is no count out of n:{label}")
        yield from _radii(verifier, answered[~impossible])
        abstains = (answered[f"status:{label}"] == "abstain") != (answered[f"predicted:{label}"] == -1)
        yield from where(answered, abstains, f"status:{label} and predicted:{label} disagree about abstaining")


def _radii(verifier: dict[str, Any], rows: pd.DataFrame) -> Iterator[str]:
    label, alpha, sigma = verifier["label"], number(verifier["alpha"]), number(verifier["sigma"])
    hits, n, radius = (rows[f"{name}:{label}"].to_numpy() for name in ("hits", "n", "radius"))
    yield from where(rows, radius > certified_radius(n, n, alpha, sigma) + RADIUS_TOLERANCE, (
        f"radius:{label} is above what any {label} run of its n can prove"
    ))
    if verifier.get("rule", "fixed") != "fixed":  # a sequential test's radius is not Clopper-Pearson at the stopping n
        return
    right = (rows[f"predicted:{label}"] == rows["label"]).to_numpy()
    expected = certified_radius(hits, n, alpha, sigma) * right
    wrong = ~(abs(radius - expected) <= RADIUS_TOLERANCE)
    yield from where(rows, wrong, f"radius:{label} is not the one that hits:{label} out of n:{label} prove")


def certified_radius(hits: np.ndarray, n: np.ndarray, alpha: float, sigma: float) -> np.ndarray:
    """sigma Phi^-1(p) with p the lower Clopper-Pearson bound of hits of n at 1 - alpha; 0 where p <= 1/2.

    Cohen et al., arXiv 1902.02918, theorem 1 and section 3.2.2.
    """
    import numpy as np
    from scipy.special import betaincinv, ndtri

    hits, n = np.asarray(hits, dtype=np.float64), np.asarray(n, dtype=np.float64)
    inner = betaincinv(np.maximum(hits, 1), np.maximum(n - hits, 0) + 1, alpha)
    p = np.where(hits >= n, alpha ** (1 / n), np.where(hits < 1, 0.0, inner))
    return np.where(p > 0.5, sigma * ndtri(np.maximum(p, 0.5)), 0.0)


def verdicts(cell: dict[str, Any], rows: pd.DataFrame) -> Iterator[str]:
    """The typed verdict agrees with the columns it sums up, and `by` names who decided it."""
    verdict, by = rows["verdict"], rows["by"]
    broken, broken_by = _broken(cell, rows)
    proven, proven_by = _proven(cell, rows)
    failed = {word: _any_status(cell, rows, word) for word in ("timeout", "error")}
    yield from where(rows, ~verdict.isin(VERDICTS), f"verdict is none of {', '.join(VERDICTS)}")
    yield from where(rows, (verdict == "misclassified") == correct(rows), (
        "verdict misclassified and predicted == label do not exclude each other"
    ))
    yield from where(rows, (verdict == "broken") & ~(correct(rows) & broken_by), "verdict broken, but not by the attack named")
    yield from where(rows, (verdict == "certified") & ~(correct(rows) & proven_by), (
        "verdict certified, but not by the verifier named"
    ))
    yield from where(rows, broken & (verdict != "broken"), "broken under the cell's threat, but the verdict is another")
    yield from where(rows, proven & ~verdict.isin(("certified", "broken")) & correct(rows), (
        "certified under the cell's threat, but the verdict is another"
    ))
    for word, happened in failed.items():
        yield from where(rows, (verdict == word) & ~happened, f"verdict {word}, but no verifier has that status")
    nobody = verdict.isin(("misclassified", "open")) & (by != "")
    yield from where(rows, nobody, "`by` names somebody although the verdict is nobody's")


def _broken(cell: dict[str, Any], rows: pd.DataFrame) -> tuple[pd.Series, pd.Series]:
    """(broken by some attack within the threat, broken by the attack that `by` names)."""
    under_threat = named = rows["index"] != rows["index"]
    norm, limit = cell["threat"]["norm"], Fraction(cell["threat"]["eps"])
    for attack in cell["attacks"]:
        hit = correct(rows) & ~rows[f"survived:{attack['label']}"]
        named = named | (hit & (rows["by"] == attack["label"]))
        its_norm, eps = ball(cell, attack)
        if its_norm == norm and eps <= limit:
            under_threat = under_threat | hit
    return under_threat, named


def _proven(cell: dict[str, Any], rows: pd.DataFrame) -> tuple[pd.Series, pd.Series]:
    """(certified at the threat by some deterministic verifier, certified by the verifier that `by` names)."""
    under_threat = named = rows["index"] != rows["index"]
    for verifier in cell["verifiers"]:
        label = verifier["label"]
        named = named | (certified(rows, label, verifier["eps"]) & (rows["by"] == label))
    for verifier in threat_verifiers(cell):
        under_threat = under_threat | certified(rows, verifier["label"], cell["threat"]["eps"])
    return under_threat, named


def _any_status(cell: dict[str, Any], rows: pd.DataFrame, word: str) -> pd.Series:
    found = rows["index"] != rows["index"]
    for verifier in cell["verifiers"]:
        found = found | (rows[f"status:{verifier['label']}"] == word)
    return found
