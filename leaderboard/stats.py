"""The single definition of every metric as a function of verdict rows, and how sure one may be of a share."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

WORST = "worst"
UNION = "union"
# Without exponents: Fraction("1e999999999") would be exact and never finish.
FRACTION = r"^[0-9]{1,15}(\.[0-9]{1,15}|/[0-9]{1,15})?$"


@lru_cache(maxsize=2**16)
def interval(hits: float, n: int, level: float = 0.95) -> tuple[float, float]:
    """The Wilson score interval (low, high) in [0, 1] of a share of `hits` in `n` samples; (0, 1) where n is 0.

    `hits` may be fractional (a mean over seeds). Raises ValueError unless 0 <= hits <= n. Wilson 1927, through
    statsmodels.
    """
    if not 0 <= hits <= n:
        raise ValueError(f"{hits} hits of {n} samples is no share")
    if n == 0:
        return 0.0, 1.0
    from statsmodels.stats.proportion import proportion_confint

    low, high = proportion_confint(hits, n, alpha=1 - level, method="wilson")
    return max(0.0, float(low)), min(1.0, float(high))


def high_probability_accuracy(share: float, n: int, alpha: float, rho: float = 0.001) -> float:
    """A lower bound, right with probability 1 - rho, on the share of the n samples whose certificate is right (0 at least).

    Each of the n certificates fails by itself with probability up to alpha. Cohen et al. (arXiv 1902.02918, appendix; their
    code is the formula) take off alpha + sqrt(alpha (1 - alpha) ln(1/rho) / n) + ln(1/rho) / (3 n), which lacks the 2 of
    Bernstein's inequality under the root and fails in up to 4 rho of all cases where alpha n is some tens or more. So the exact
    quantile 1 - rho of Binomial(n, alpha) is taken off where it is more.
    """
    from scipy.stats import binom

    noise = math.sqrt(alpha * (1 - alpha) * math.log(1 / rho) / n) + math.log(1 / rho) / (3 * n)
    return max(0.0, share - max(alpha + noise, float(binom.ppf(1 - rho, n, alpha)) / n))


def exact(value: Any) -> Fraction:
    """A stored number, which may be text like "8/255". Raises ValueError for text with an exponent, a sign or anything else."""
    if isinstance(value, str) and not re.match(FRACTION, value):
        raise ValueError(f"{value[:40]!r} is no number like '8/255' or '0.05'")
    return Fraction(value) if isinstance(value, str) else Fraction(str(value))


def number(value: Any) -> float:
    """The float nearest to a stored number, which may be text like "8/255"; of text, only what `exact` takes."""
    return float(exact(value)) if isinstance(value, str) else float(value)


def is_smoothing(verifier: dict[str, Any]) -> bool:
    """True for a certificate about the smoothed classifier g (it has a sigma), False for one about the network f."""
    return "sigma" in verifier


def threat_verifiers(cell: dict[str, Any]) -> list[dict[str, Any]]:
    """The deterministic verifiers whose norm is the cell's threat's: the ones that `certified.union` joins."""
    return [v for v in cell["verifiers"] if not is_smoothing(v) and v["norm"] == cell["threat"]["norm"]]


def ball(cell: dict[str, Any], attack: dict[str, Any]) -> tuple[str, Fraction]:
    """The (norm, eps) of an attack: its own, else the cell's threat's."""
    threat = cell["threat"]
    return attack.get("norm") or threat["norm"], exact(attack.get("eps") or threat["eps"])


def within_threat(cell: dict[str, Any], attack: dict[str, Any]) -> bool:
    """True if the attack stays in the cell's threat: its norm, and no larger eps."""
    norm, eps = ball(cell, attack)
    return bool(norm == cell["threat"]["norm"] and eps <= exact(cell["threat"]["eps"]))


def breakers(cell: dict[str, Any], rows: pd.DataFrame) -> list[dict[str, Any]]:
    """The attacks, and the verifiers that look for counterexamples of their own."""
    return [*cell["attacks"], *(one for one in cell["verifiers"] if f"survived:{one['label']}" in rows)]


def asked(rows: pd.DataFrame, label: str) -> pd.Series:
    """Which samples a verifier was asked about (its status is not "skipped")."""
    return rows[f"status:{label}"] != "skipped"


def certified(rows: pd.DataFrame, label: str, eps: Any) -> pd.Series:
    """Which samples a verifier certified at radius eps, a fraction as text; radius 0 certifies nothing, at any eps."""
    radius = rows[f"radius:{label}"]
    return asked(rows, label) & (radius >= number(eps)) & (radius > 0)


def outcome(cell: dict[str, Any], rows: pd.DataFrame, metric: str) -> pd.Series:
    """Whether each sample that counts is a hit for `metric`; a bool Series indexed by the image's number.

    clean: predicted is the label. robust.L: still so on attack L's x_adv; robust.worst: on that of every attack within the
    threat and on every counterexample that a verifier found there. certified.L: among the samples L was asked about, radius
    at least L's eps. certified.union: radius at least the threat's eps from one of the deterministic verifiers of the
    threat's norm. Raises KeyError for an unknown metric.
    """
    kind, _, label = metric.partition(".")
    counts = rows["index"].notna()
    if metric == "clean":
        hits = rows["predicted"] == rows["label"]
    elif kind == "robust":
        labels = [one["label"] for one in breakers(cell, rows) if within_threat(cell, one)] if label == WORST else [label]
        hits = rows[[f"survived:{one}" for one in labels]].all(axis=1)
    elif metric == f"certified.{UNION}":
        labels = [v["label"] for v in threat_verifiers(cell)]
        counts = _any(asked(rows, one) for one in labels)
        hits = _any(certified(rows, one, cell["threat"]["eps"]) for one in labels)
    elif kind == "certified":
        counts = asked(rows, label)
        hits = certified(rows, label, {v["label"]: v["eps"] for v in cell["verifiers"]}[label])
    else:
        raise KeyError(metric)
    return hits[counts].set_axis(rows["index"][counts])


def _any(columns: Any) -> pd.Series:
    first, *others = columns
    for column in others:
        first = first | column
    return first


def _share(cell: dict[str, Any], rows: pd.DataFrame, metric: str) -> dict[str, Any]:
    hits = outcome(cell, rows, metric)
    return {"hits": int(hits.sum()), "n": len(hits)}


def _smoothed(rows: pd.DataFrame, label: str) -> dict[str, Any]:
    radii = rows[f"radius:{label}"][asked(rows, label)]
    # fsum rounds once, so the mean does not depend on how a machine adds up.
    average = math.fsum(radii) / len(radii) if len(radii) else 0.0
    return {"average_radius": average, "abstained": int((rows[f"status:{label}"] == "abstain").sum())}


def metrics_of(cell: dict[str, Any], rows: pd.DataFrame) -> dict[str, Any]:
    """The whole `metrics` block of a record, derived from its verdict rows alone, in plain ints and floats.

    Definitions: see `outcome`; a smoothing verifier adds the mean radius over the samples it was asked about and the
    number of abstentions. Raises ValueError for an attack called "worst", a verifier called "union" or a label twice.
    """
    attacks = [a["label"] for a in cell["attacks"]]
    verifiers = {v["label"]: v for v in cell["verifiers"]}
    if WORST in attacks or UNION in verifiers:
        raise ValueError(f"the labels {WORST!r} and {UNION!r} are taken by the metrics over all attacks and verifiers")
    if len(set(attacks)) < len(attacks) or len(verifiers) < len(cell["verifiers"]):
        raise ValueError(f"a label stands twice among {attacks} or {[v['label'] for v in cell['verifiers']]}")
    inside = any(within_threat(cell, a) for a in cell["attacks"])
    robust = {label: _share(cell, rows, f"robust.{label}") for label in [*attacks, *([WORST] if inside else [])]}
    proven = {label: _share(cell, rows, f"certified.{label}") for label in verifiers}
    for label, verifier in verifiers.items():
        if is_smoothing(verifier):
            proven[label] |= _smoothed(rows, label)
    if threat_verifiers(cell):
        proven[UNION] = _share(cell, rows, f"certified.{UNION}")
    return {"clean": _share(cell, rows, "clean"), "robust": robust, "certified": proven}
