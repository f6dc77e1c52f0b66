"""The counts and the rows that certify answers with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from .build import plain
from .cells import Assignment
from .question import Case
from .radii import MinimalDistance
from .sparsity import density_of

VERDICTS = ("certified", "broken", "open", "misclassified", "abstain", "timeout", "error")
ENDS = ("distance_lower", "distance_upper")


def asked(verifiers: Sequence[Assignment]) -> list[Assignment]:
    """The verifiers that were asked for, without the one that brackets the distances of `exact`."""
    return [one for one in verifiers if not isinstance(one.tool, MinimalDistance)]


def summary(case: Case, rows: pd.DataFrame) -> dict[str, Any]:
    """Counts of every verdict, measured density, accuracy per verifier and attack, seconds per stage."""
    found: dict[str, Any] = {"n": len(rows), "clean": int((rows["predicted"] == rows["label"]).sum())}
    found |= {name: int((rows["verdict"] == name).sum()) for name in VERDICTS}
    found["density"] = float(density_of(case.model))
    found["survived"] = {one.label: int(rows[f"survived:{one.label}"].sum()) for one in case.attacks}
    found["certified_by"] = {one.label: _certified(rows, one) for one in asked(case.verifiers)}
    for one in case.verifiers:
        if not one.tool.deterministic:
            found["average_certified_radius"] = math.fsum(rows[f"radius:{one.label}"]) / max(1, len(rows))
            found["abstention_rate"] = float((rows[f"status:{one.label}"] == "abstain").mean())
        if isinstance(one.tool, MinimalDistance):
            found["distance"] = _distances(rows[rows["predicted"] == rows["label"]], one)
    found["seconds"] = case.seconds
    return found


def _distances(correct: pd.DataFrame, one: Assignment) -> dict[str, Any]:
    """Of the correctly classified: mean and median of the brackets' ends; null where one has no witness within eps."""
    ends = {end: correct.get(end, pd.Series(dtype=float)).dropna() for end in ENDS}
    with_witness = int(np.isfinite(ends["distance_upper"]).sum())
    found = {"n": len(ends["distance_lower"]), "with_witness": with_witness, "up_to": str(one.tool.eps)}
    for end, values in ends.items():
        side = end.removeprefix("distance_")
        found |= {f"mean_{side}": _finite(values.mean()), f"median_{side}": _finite(values.median())}
    return {**found, "tolerance": str(one.tool.tolerance)}


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _certified(rows: pd.DataFrame, one: Assignment) -> int:
    return int((rows[f"status:{one.label}"] == "proved").sum())


def rows_of(rows: pd.DataFrame, verifiers: Sequence[Assignment]) -> list[dict[str, Any]]:
    """One JSON row per sample in input order: the best radius and margin, and each verifier's own under its label.

    The radius is about the classifier that the verdict is about: the network wherever a deterministic verifier was asked.
    """
    found = []
    for row in rows.to_dict("records"):
        one = {key: row[key] for key in ("index", "label", "predicted", "verdict", "by")}
        one["seconds"] = round(row["seconds"], 6)
        each = {verifier.label: _row_of(row, verifier) for verifier in asked(verifiers)}
        one["radius"] = max((each[verifier.label]["radius"] for verifier in _speakers(verifiers)), default=0.0)
        margins = [facts["margin"] for facts in each.values() if facts["margin"] is not None]
        one["margin"] = max(margins, default=None)
        if len(each) == 1:
            (facts,) = each.values()
            one |= {key: value for key, value in facts.items() if key not in one}
        one |= {end: _finite(row[end]) for end in ENDS if end in row}
        found.append({**one, **each})
    return found


def _speakers(verifiers: Sequence[Assignment]) -> list[Assignment]:
    """The verifiers that the verdict is made from: the deterministic ones, or smoothing where nothing else was asked."""
    deterministic = [one for one in asked(verifiers) if one.tool.deterministic]
    return deterministic or asked(verifiers)


def _row_of(row: dict[str, Any], verifier: Assignment) -> dict[str, Any]:
    label = verifier.label
    facts = {"status": row[f"status:{label}"], "radius": row[f"radius:{label}"], "margin": _finite(row[f"margin:{label}"])}
    if not verifier.tool.deterministic:
        tool = verifier.tool
        facts |= {"predicted": row[f"predicted:{label}"], "hits": row[f"hits:{label}"], "n": row[f"n:{label}"]}
        facts |= {"n0": tool.n0, "alpha": tool.alpha, "sigma": tool.sigma, "rule": tool.rule}
        if tool.rule == "sequential":
            facts |= {"looks": row[f"looks:{label}"], "radii": plain(tool.radii), "growth": plain(tool.growth)}
    return facts
