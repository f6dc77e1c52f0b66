"""What the verdict rows of one record say sample by sample: where its attacks and verifiers disagree, and curves over radii."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import and_, or_
from typing import TYPE_CHECKING, Any

from leaderboard.plot import Curve
from leaderboard.stats import asked, ball, breakers, certified, is_smoothing, threat_verifiers, within_threat

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    Mask = np.ndarray[Any, np.dtype[np.bool_]]  # a truth per sample

POINTS = 100  # of a curve that has more steps than that
RIM = 0.9  # of the largest distance: an attack at one eps has its witnesses above, whatever they differ by


@dataclass(frozen=True)
class Disagreement:
    """Samples on which attacks and verifiers do not say the same, by their numbers in the test set."""

    title: str
    samples: list[int]


def disagreements(cell: dict[str, Any], rows: pd.DataFrame) -> list[Disagreement]:
    """Every kind of disagreement that the rows hold, with its samples; kinds without a sample are left out."""
    numbers = rows["index"].to_numpy()
    return [Disagreement(title, numbers[mask].tolist()) for title, mask in _kinds(cell, rows) if mask.any()]


def _kinds(cell: dict[str, Any], rows: pd.DataFrame) -> Iterator[tuple[str, Mask]]:
    correct = _mask(rows["predicted"] == rows["label"])
    attacks = [one["label"] for one in breakers(cell, rows) if within_threat(cell, one)]
    eps = cell["threat"]["eps"]
    survived = {one: _mask(rows[f"survived:{one}"]) for one in attacks}
    proved = {one["label"]: _mask(certified(rows, one["label"], eps)) for one in threat_verifiers(cell)}
    if survived and proved:
        yield "survives every attack, and no verifier proves it", correct & _all(survived) & ~_any(proved)
    for one in survived if len(survived) > 1 else ():
        yield f"broken by {one} only", correct & ~survived[one] & _all(_without(survived, one))
    for one in proved if len(proved) > 1 else ():
        yield f"proved by {one} only", proved[one] & ~_any(_without(proved, one))
    for verifier in cell["verifiers"]:
        yield from _answers(verifier, rows)


def _answers(verifier: dict[str, Any], rows: pd.DataFrame) -> Iterator[tuple[str, Mask]]:
    label = verifier["label"]
    status = rows[f"status:{label}"].to_numpy(dtype=object)
    for word, meaning in (("timeout", "not settled in time"), ("error", "could not be asked")):
        yield f"{label}: {meaning}", status == word
    if is_smoothing(verifier):
        answered = (status != "skipped") & (status != "abstain") & (status != "timeout") & (status != "error")
        other = _mask(rows[f"predicted:{label}"] != rows["predicted"])
        yield f"{label}: the smoothed classifier gives another class", answered & other


def _mask(column: pd.Series) -> Mask:
    return column.to_numpy(dtype=bool)


def _without(masks: Mapping[str, Mask], name: str) -> dict[str, Mask]:
    return {other: mask for other, mask in masks.items() if other != name}


def _any(masks: Mapping[str, Mask]) -> Mask:
    return reduce(or_, masks.values())


def _all(masks: Mapping[str, Mask]) -> Mask:
    return reduce(and_, masks.values())


# ---- one sample ------------------------------------------------------------------------------------------------------


def columns(cell: dict[str, Any], rows: pd.DataFrame) -> list[str]:
    """The attacks (and verifiers that look for counterexamples) by name, then the verifiers."""
    return [*(f"{one['label']}, attack" for one in breakers(cell, rows)), *(one["label"] for one in cell["verifiers"])]


def answers(cell: dict[str, Any], row: dict[str, Any]) -> list[str]:
    """What each of them said about one sample, in words and in the order of `columns`."""
    finders = [*cell["attacks"], *(one for one in cell["verifiers"] if f"survived:{one['label']}" in row)]
    said = [_attacked(row[f"survived:{one['label']}"], row.get(f"distance:{one['label']}")) for one in finders]
    return [*said, *(_verified(row, one["label"]) for one in cell["verifiers"])]


def _attacked(survived: bool, distance: float | None) -> str:
    if survived:
        return "survived"
    return "broken" if distance is None or distance != distance else f"broken at {distance:.4g}"


def _verified(row: dict[str, Any], label: str) -> str:
    status, radius, margin = (row[f"{name}:{label}"] for name in ("status", "radius", "margin"))
    words = [status, *([f"radius {radius:.4g}"] if radius > 0 else []), *([f"margin {margin:.3g}"] if margin == margin else [])]
    return ", ".join(words)


# ---- over radii ------------------------------------------------------------------------------------------------------


def curves(cell: dict[str, Any], rows: pd.DataFrame) -> dict[str, list[Curve]]:
    """By norm, and by smoothing verifier, the shares over the radius; only what says more than one number.

    The dashed line is the share of images that are right and have no known witness within the radius, which robust accuracy
    cannot exceed: from distances of attacks at several eps, or minimal ones. A full line is the share with a certificate of at
    least the radius, which robust accuracy cannot fall below (for smoothing: that of the smoothed classifier).
    """
    found: dict[str, list[Curve]] = {}
    for norm in dict.fromkeys(ball(cell, one)[0] for one in breakers(cell, rows)):
        attacked = _attack_curve(cell, rows, norm)
        if attacked is not None:
            found.setdefault(norm, []).append(attacked)
    for verifier in cell["verifiers"]:
        proven = _proof_curve(rows, verifier["label"])
        if proven is not None:
            about = f"{verifier['norm']}, smoothed classifier" if is_smoothing(verifier) else verifier["norm"]
            found.setdefault(about, []).append(proven)
    return found


def _attack_curve(cell: dict[str, Any], rows: pd.DataFrame, norm: str) -> Curve | None:
    import numpy as np

    labels = [one["label"] for one in breakers(cell, rows) if ball(cell, one)[0] == norm]
    correct = (rows["predicted"] == rows["label"]).to_numpy()
    nearest = np.full(len(rows), np.inf)
    for label in labels:
        broken = ~rows[f"survived:{label}"].to_numpy() & ~rows[f"distance:{label}"].isna().to_numpy()
        nearest = np.minimum(nearest, np.where(broken, rows[f"distance:{label}"], np.inf))
    at = nearest[correct & np.isfinite(nearest)]
    if not len(at) or (at < RIM * at.max()).mean() < 1 - RIM:
        return None
    radii = [0.0, *_spread(np.unique(at))]
    return Curve("attacks", radii, [(correct.sum() - (at <= one).sum()) / len(rows) for one in radii], proven=False)


def _proof_curve(rows: pd.DataFrame, label: str) -> Curve | None:
    import numpy as np

    counts = asked(rows, label).to_numpy()
    radius = rows[f"radius:{label}"].to_numpy()[counts]
    known = np.unique(radius[radius > 0])
    if len(known) < 2:
        return None
    radii = _spread(known)
    shares = [(radius >= one).mean() for one in radii]
    return Curve(label, [0.0, *radii], [shares[0], *shares], proven=True)


def _spread(known: Any) -> list[float]:
    """At most POINTS of the sorted values, the first and the last among them."""
    import numpy as np

    chosen = np.linspace(0, len(known) - 1, min(POINTS, len(known))).round().astype(int)
    return [float(one) for one in known[chosen]]
