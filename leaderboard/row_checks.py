"""What verdict rows must say for sure: proofs, attacks, verdicts and smoothing counts that agree with each other."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from fractions import Fraction
from itertools import pairwise, product
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from leaderboard.stats import asked, ball, breakers, certified, exact, is_smoothing, number, threat_verifiers, within_threat

if TYPE_CHECKING:
    import pandas as pd

# A verdict table's columns by name, a frame or arrays: comparing these is many times quicker than comparing pandas' series.
Columns: TypeAlias = "pd.DataFrame | Mapping[str, np.ndarray]"

VERDICTS = ("misclassified", "broken", "certified", "open", "timeout", "error")
STATUSES = ("proved", "broken", "open", "abstain", "misclassified", "skipped", "timeout", "error")
# Each of these answers with the best of its own margin and those of the bounds before it (the raw margins have no order).
ORDER = ("ibp", "crown-ibp", "crown")
RADIUS_TOLERANCE = 1e-12
# A float32 image moved by exactly eps may measure this much further in float64.
DISTANCE_ALLOWANCE = 1e-6
CLEAR_MARGIN = 1e-3  # of logits; near zero, float64 decides, so rounding moves a margin by a thousandth of this at most
LEAST_GROWTH = Fraction(101, 100)  # of the looks of a sequential test: with less, there are too many to go through
MOST_DRAWS = 10**9


def problems(cell: dict[str, Any], rows: pd.DataFrame) -> list[str]:
    """Every way in which the rows of a cell contradict themselves, one sentence each, with the samples' numbers."""
    checks = (attacks, verifiers, proofs_against_attacks, order_of_verifiers, monotone_in_eps, smoothing, verdicts)
    columns = {name: rows[name].to_numpy() for name in rows}
    return [sentence for one in checks for sentence in one(cell, columns)]


def where(rows: Columns, offends: Any, sentence: str) -> Iterator[str]:
    """The sentence and the first few samples for which it holds; nothing where there are none."""
    found = rows["index"][offends].tolist()
    if found:
        named = ", ".join(str(index) for index in found[:5])
        yield f"{sentence}: {'sample' if len(found) == 1 else 'samples'} {named}" + (
            f" and {len(found) - 5} more" if len(found) > 5 else ""
        )


def _only(rows: Columns, mask: Any) -> Columns:
    return {name: rows[name][mask] for name in rows}


def correct(rows: Columns) -> Any:
    return rows["predicted"] == rows["label"]


def attacks(cell: dict[str, Any], rows: Columns) -> Iterator[str]:
    """A misclassified image cannot survive; a correct one was really attacked, and a broken one inside the ball."""
    for attack in cell["attacks"]:
        label, eps = attack["label"], ball(cell, attack)[1]
        survived, distance = rows[f"survived:{label}"], rows[f"distance:{label}"]
        yield from where(rows, ~correct(rows) & survived, f"misclassified, yet said to survive {label}")
        if "first" in attack:
            yield f"{label} was run on its first images only, which no attack may be: those it never saw would count as survivors"
        yield from where(rows, correct(rows) & survived & np.isnan(distance), f"said to survive {label}, but never attacked")
        broken, (by_another, before) = correct(rows) & ~survived, _broken_by_others(cell, rows, attack)
        inside = (distance <= float(eps) + DISTANCE_ALLOWANCE) | (np.isnan(distance) & by_another)
        yield from where(rows, broken & ~inside, (
            f"broken by {label}, but the distance of the witness is outside its ball of {eps}"
        ))
        yield from where(rows, before & ~np.isnan(distance), f"{label} is for what no other attack has broken, but was run")


def _broken_by_others(cell: dict[str, Any], rows: Columns, attack: dict[str, Any]) -> tuple[Any, Any]:
    """Of an attack with `rest`, which counts what others have broken in a ball within its own as broken, without a distance:

    (broken by some other one, whose distance stands there; broken by one that is sure to have been run before). Else nothing.
    """
    by_another = before = rows["index"] != rows["index"]
    norm, eps = ball(cell, attack)
    for other in cell["attacks"] if attack.get("rest") else ():
        other_norm, other_eps = ball(cell, other)
        if other is attack or other_norm != norm or other_eps > eps:
            continue
        measured = ~np.isnan(rows[f"distance:{other['label']}"])
        hit = correct(rows) & ~rows[f"survived:{other['label']}"] & measured
        by_another = by_another | hit
        before = before | (hit & (not other.get("rest")))
    return by_another, before


def verifiers(cell: dict[str, Any], rows: Columns) -> Iterator[str]:
    """Statuses are known words, a radius is a finite number from 0, proved means one above 0, and nobody picks who is asked."""
    for verifier in cell["verifiers"]:
        label = verifier["label"]
        yield from _skipped(verifier, rows)
        status, radius = rows[f"status:{label}"], rows[f"radius:{label}"]
        yield from where(rows, ~np.isin(status, STATUSES), f"status:{label} is none of {', '.join(STATUSES)}")
        yield from where(rows, ~((radius >= 0) & (radius < float("inf"))), f"radius:{label} is no finite number from 0")
        yield from where(rows, (status == "proved") & ~(radius > 0), f"{label} says proved with radius 0")
        # Smoothing may prove a radius that is too small for the suite's question: open, with a radius.
        may_prove = ("proved", "open") if is_smoothing(verifier) else ("proved",)
        yield from where(rows, ~np.isin(status, may_prove) & (radius > 0), f"{label} has a radius without having proved it")


def _skipped(verifier: dict[str, Any], rows: Columns) -> Iterator[str]:
    """A smoothing verifier with `first` skips the samples after these, all of them; every other one skips none."""
    label, first, asked_about = verifier["label"], verifier.get("first"), len(rows["index"])
    if "first" in verifier and not is_smoothing(verifier):
        yield f"{label} was asked about its first images only, which only smoothing may be: all others judge the same images"
    elif isinstance(first, int) and not isinstance(first, bool) and first > 0:
        asked_about = first
    elif "first" in verifier:
        yield f"`first` of {label} is no whole number from 1: {first!r:.40}"
    skips = rows[f"status:{label}"] == "skipped"
    wrong = skips != (np.arange(len(skips)) >= asked_about)
    yield from where(rows, wrong, f"status:{label} says skipped of other samples than those after the first {asked_about}")


def proofs_against_attacks(cell: dict[str, Any], rows: Columns) -> Iterator[str]:
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
        for attack in breakers(cell, rows):
            norm, eps = ball(cell, attack)
            if norm != verifier["norm"]:
                continue
            inside = (rows[f"distance:{attack['label']}"] <= radius) | (radius >= float(eps))
            broken = correct(rows) & ~rows[f"survived:{attack['label']}"]
            yield from where(rows, broken & inside & (radius > 0), f"certified by {label}, yet broken by {attack['label']}")


def order_of_verifiers(cell: dict[str, Any], rows: Columns) -> Iterator[str]:
    """Of two bounds asked about the same ball, the one that includes the other certifies no less."""
    for one, other in product(cell["verifiers"], cell["verifiers"]):
        names = tuple(v["name"].replace("_", "-") for v in (one, other))
        if names not in {*pairwise(ORDER), (ORDER[0], ORDER[-1])}:
            continue
        if (one["norm"], exact(one["eps"])) != (other["norm"], exact(other["eps"])):
            continue
        answered = np.isin(rows[f"status:{other['label']}"], ("proved", "open"))  # a time-out or error proves nothing
        lost = answered & (rows[f"radius:{one['label']}"] > rows[f"radius:{other['label']}"])
        yield from where(rows, lost, f"certified by {one['label']}, but not by {other['label']}, which includes it")


def monotone_in_eps(cell: dict[str, Any], rows: Columns) -> Iterator[str]:
    """What interval bounds certify in a ball, they certify in every smaller one: inclusion keeps their order.

    Of all verifiers only `ibp` promises that: the relaxations of the others are chosen anew for every ball. A margin that
    rounding could have made is left out.
    """
    for large, small in product(cell["verifiers"], cell["verifiers"]):
        same_question = {**large, "eps": "", "label": ""} == {**small, "eps": "", "label": ""}
        if small["name"] != ORDER[0] or not same_question or exact(small["eps"]) >= exact(large["eps"]):
            continue
        sure = (rows[f"radius:{large['label']}"] > 0) & (rows[f"margin:{large['label']}"] > CLEAR_MARGIN)
        lost = sure & (rows[f"status:{small['label']}"] == "open")
        yield from where(rows, lost, f"certified by {large['label']}, but not by {small['label']}, which asks for less")


def smoothing(cell: dict[str, Any], rows: Columns) -> Iterator[str]:
    """Radii follow from the counts: by Clopper-Pearson for the rule `fixed`, by testing again on the looks for `sequential`.

    No rule exceeds sigma Phi^-1(alpha^(1/n)).
    """
    for verifier in cell["verifiers"]:
        if not is_smoothing(verifier):
            continue
        label = verifier["label"]
        if "alpha" not in verifier:
            yield f"verifier {label} records no alpha, so its radii cannot be derived again"
            continue
        answered = _only(rows, asked(rows, label) & ~np.isin(rows[f"status:{label}"], ("timeout", "error")))
        hits, n = answered[f"hits:{label}"], answered[f"n:{label}"]
        impossible = (hits < 0) | (hits > n) | (n < 1)
        yield from where(answered, impossible, f"hits:{label} is no count out of n:{label}")
        yield from _radii(verifier, _only(answered, ~impossible))
        abstains = (answered[f"status:{label}"] == "abstain") != (answered[f"predicted:{label}"] == -1)
        yield from where(answered, abstains, f"status:{label} and predicted:{label} disagree about abstaining")


def _radii(verifier: dict[str, Any], rows: Columns) -> Iterator[str]:
    label, alpha, sigma = verifier["label"], number(verifier["alpha"]), number(verifier["sigma"])
    hits, n, radius = (rows[f"{name}:{label}"] for name in ("hits", "n", "radius"))
    yield from where(rows, radius > certified_radius(n, n, alpha, sigma) + RADIUS_TOLERANCE, (
        f"radius:{label} is above what any {label} run of its n can prove"
    ))
    rule, full = verifier.get("rule", "fixed"), verifier.get("n")
    if not isinstance(full, int) or not 0 < full <= MOST_DRAWS or exact(verifier.get("growth", 2)) < LEAST_GROWTH:
        yield f"verifier {label} records no number of draws n up to {MOST_DRAWS}, or a growth of looks below {LEAST_GROWTH}"
        return
    right = rows[f"predicted:{label}"] == rows["label"]
    if rule == "sequential":
        yield from _sequential(verifier, rows, right)
    elif rule != "fixed":
        yield f"verifier {label} follows the rule {rule!r}, which is none of fixed, sequential"
    elif verifier.get("curtail"):
        yield from _curtailed(verifier, rows, right)
    else:
        yield from where(rows, n != full, f"n:{label} is not the {full} draws that the rule fixed was to take")
        wrong = ~(abs(radius - certified_radius(hits, n, alpha, sigma) * right) <= RADIUS_TOLERANCE)
        yield from where(rows, wrong, f"radius:{label} is not the one that hits:{label} out of n:{label} prove")


def _curtailed(verifier: dict[str, Any], rows: Columns, right: Any) -> Iterator[str]:
    """The radius is eps or 0, and the draws that were left out could not have changed which."""
    label, alpha, sigma = verifier["label"], number(verifier["alpha"]), number(verifier["sigma"])
    hits, n, radius = (rows[f"{one}:{label}"] for one in ("hits", "n", "radius"))
    full, eps = verifier["n"], number(verifier["eps"])
    worst, best = (certified_radius(least, full + 0 * n, alpha, sigma) >= eps for least in (hits, hits + full - n))
    yield from where(rows, (n > full) | (worst != best), f"n:{label} stopped while the remaining draws could matter")
    yield from where(rows, radius != eps * (worst & right), f"radius:{label} is not the one that hits:{label} decide")


def _sequential(verifier: dict[str, Any], rows: Columns, right: Any) -> Iterator[str]:
    """The radius is the largest of the grid that the stored looks certify, all smaller ones being certified as well."""
    label, alpha, sigma, n = verifier["label"], number(verifier["alpha"]), number(verifier["sigma"]), verifier["n"]
    if f"looks:{label}" not in rows:
        yield f"column 'looks:{label}' is missing, so the sequential test cannot be run again"
        return
    grid = sorted({number(one) for one in (verifier["eps"], *verifier.get("grid", ()))})
    planned = schedule(n, exact(verifier.get("growth", "11/10")))
    bad, wrong = [], []
    last = zip(rows[f"n:{label}"], rows[f"hits:{label}"], strict=True)
    for text, end, radius, counts in zip(rows[f"looks:{label}"], last, rows[f"radius:{label}"], right, strict=True):
        looks = parsed(str(text))
        fits = bool(looks) and looks[-1] == end and tuple(at for at, _ in looks) == planned[: len(looks)]
        steps = pairwise([(0, 0), *looks])
        bad.append(not (fits and all(0 <= there[1] - here[1] <= there[0] - here[0] for here, there in steps)))
        wrong.append(not bad[-1] and radius != (retested(looks, grid, n, alpha, sigma) if counts else 0.0))
    yield from where(rows, bad, f"looks:{label} is no run of the schedule that ends with hits:{label} out of n:{label}")
    yield from where(rows, wrong, f"radius:{label} is not the one that looks:{label} prove")


def schedule(n: int, growth: Fraction, chunk: int = 100) -> tuple[int, ...]:
    """The draws after which a sequential run of at most n looks: whole chunks, each `growth` times the last, n at the end."""
    looks = [min(n, chunk)]
    while looks[-1] < n:
        looks.append(min(n, max(looks[-1] + chunk, chunk * int(looks[-1] * growth / chunk))))
    return tuple(looks)


def parsed(text: str) -> list[tuple[int, int]]:
    """[(n, hits), ...] of "n:hits n:hits ..."; empty where the text is anything else."""
    if not re.fullmatch(r"\d{1,12}:\d{1,12}( \d{1,12}:\d{1,12})*", text):
        return []
    return [(int(n), int(hits)) for n, _, hits in (one.partition(":") for one in text.split())]


def retested(looks: list[tuple[int, int]], grid: list[float], n_max: int, alpha: float, sigma: float) -> float:
    """The largest radius of the ascending grid up to which each one is certified at some look, 0 where the first is not.

    Half of alpha is the mixture of likelihood ratios over Beta(1, 1/4) cut to (Phi(r / sigma), 1) reaching 2 / alpha (Ville's
    inequality), half the Clopper-Pearson bound at the last planned look. What underflows is -inf or NaN and certifies nothing.
    """
    from scipy.special import betaincc, betaln, ndtr

    n, hits = (np.array(column, dtype=np.float64) for column in zip(*looks, strict=True))
    missed, proven = n - hits, 0.0
    final = float(certified_radius(hits[-1:], n[-1:], alpha / 2, sigma)[0]) if n[-1] == n_max else 0.0
    for radius in grid:
        p = ndtr(radius / sigma)
        with np.errstate(divide="ignore", invalid="ignore"):
            weight = betaln(hits + 1, missed + 0.25) - betaln(1, 0.25)
            tails = np.log(betaincc(hits + 1, missed + 0.25, p)) - np.log(betaincc(1, 0.25, p))
            wealth = weight + tails - (hits * np.log(p) + missed * np.log1p(-p))
        if not ((wealth >= np.log(2 / alpha) + 1e-6).any() or final >= radius):
            break
        proven = radius
    return proven


def certified_radius(hits: np.ndarray, n: np.ndarray, alpha: float, sigma: float) -> np.ndarray:
    """sigma Phi^-1(p) with p the lower Clopper-Pearson bound of hits of n at 1 - alpha; 0 where p <= 1/2.

    Cohen et al., arXiv 1902.02918, theorem 1 and section 3.2.2.
    """
    from scipy.special import betaincinv, ndtri

    hits, n = np.asarray(hits, dtype=np.float64), np.asarray(n, dtype=np.float64)
    inner = betaincinv(np.maximum(hits, 1), np.maximum(n - hits, 0) + 1, alpha)
    p = np.where(hits >= n, alpha ** (1 / n), np.where(hits < 1, 0.0, inner))
    return np.where(p > 0.5, sigma * ndtri(np.maximum(p, 0.5)), 0.0)


def verdicts(cell: dict[str, Any], rows: Columns) -> Iterator[str]:
    """The typed verdict agrees with the columns it sums up, and `by` names who decided it."""
    verdict, by = rows["verdict"], rows["by"]
    broken, broken_by = _broken(cell, rows)
    proven, proven_by = _proven(cell, rows)
    failed = {word: _any_status(cell, rows, word) for word in ("timeout", "error")}
    yield from where(rows, ~np.isin(verdict, VERDICTS), f"verdict is none of {', '.join(VERDICTS)}")
    yield from where(rows, (verdict == "misclassified") == correct(rows), (
        "verdict misclassified and predicted == label do not exclude each other"
    ))
    yield from where(rows, (verdict == "broken") & ~(correct(rows) & broken_by), "verdict broken, but not by the attack named")
    yield from where(rows, (verdict == "certified") & ~(correct(rows) & proven_by), (
        "verdict certified, but not by the verifier named"
    ))
    yield from where(rows, broken & (verdict != "broken"), "broken under the cell's threat, but the verdict is another")
    yield from where(rows, proven & ~np.isin(verdict, ("certified", "broken")) & correct(rows), (
        "certified under the cell's threat, but the verdict is another"
    ))
    for word, happened in failed.items():
        yield from where(rows, (verdict == word) & ~happened, f"verdict {word}, but no verifier has that status")
    nobody = np.isin(verdict, ("misclassified", "open")) & (by != "")
    yield from where(rows, nobody, "`by` names somebody although the verdict is nobody's")


def _broken(cell: dict[str, Any], rows: Columns) -> tuple[Any, Any]:
    """(broken by some attack within the threat, broken by the one of them that `by` names)."""
    under_threat = named = rows["index"] != rows["index"]
    for attack in (one for one in breakers(cell, rows) if within_threat(cell, one)):
        hit = correct(rows) & ~rows[f"survived:{attack['label']}"]
        own = ~np.isnan(rows[f"distance:{attack['label']}"]) if attack.get("rest") else True  # not what others had broken
        named = named | (hit & own & (rows["by"] == attack["label"]))
        under_threat = under_threat | hit
    return under_threat, named


def _proven(cell: dict[str, Any], rows: Columns) -> tuple[Any, Any]:
    """(certified at the threat by some deterministic verifier, certified by the verifier that `by` names)."""
    under_threat = named = rows["index"] != rows["index"]
    for verifier in cell["verifiers"]:
        label = verifier["label"]
        named = named | (certified(rows, label, verifier["eps"]) & (rows["by"] == label))
    for verifier in threat_verifiers(cell):
        under_threat = under_threat | certified(rows, verifier["label"], cell["threat"]["eps"])
    return under_threat, named


def _any_status(cell: dict[str, Any], rows: Columns, word: str) -> Any:
    found = rows["index"] != rows["index"]
    for verifier in cell["verifiers"]:
        found = found | (rows[f"status:{verifier['label']}"] == word)
    return found
