"""Certified and attacked accuracy over eps: what was proven or broken at several radii, never one taken for the other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from leaderboard.stats import UNION, WORST

from .build import build
from .cells import Assignment
from .evaluate import ContradictionError, evaluate
from .radii import Ladder, MinimalDistance
from .threat import Threat


def measure(
    model: nn.Module, x: Tensor, y: Tensor, rows: pd.DataFrame, threat: Threat, steps: Sequence[Fraction],
    attacks: Sequence[Assignment], verifiers: Sequence[Assignment],
) -> pd.DataFrame:  # fmt: skip
    """Per sample: correct; each deterministic verifier's largest proven radius; the distance of the nearest witness, or inf.

    rows: the samples' verdicts at the threat's eps; their certificates and counterexamples are used and not asked for again.
    Every attack runs at every step and at the threat's eps. Raises ContradictionError where any witness lies within any of the
    proven radii.
    """
    clean = rows["predicted"].to_numpy() == rows["label"].to_numpy()
    ladders = [_ladder(one, rows[clean], threat, steps) for one in verifiers if climbs(one)]
    settled = [_ladder(one, rows[clean], threat, ()) for one in verifiers if one.tool.deterministic and not climbs(one)]
    spread = [_at(one, threat, eps) for one in attacks for eps in sorted({*steps, threat.eps})]
    widest = Threat(threat.norm, max(steps))
    found = evaluate(model, x, y, rows["index"].tolist(), widest, spread, [*ladders, *settled]).rows
    out = pd.DataFrame({"index": found["index"], "correct": found["predicted"] == found["label"]})
    for one in ladders:
        out[f"radius:{one.label}"] = found[f"radius:{one.label}"]
    out["distance"] = _nearest(found, [one.label for one in spread])
    for one in verifiers:
        if f"survived:{one.label}" in rows:
            _against_counterexamples(one, model, x, y, rows, out)
            out["distance"] = np.minimum(out["distance"], _nearest(rows, [one.label]))
    return out


def climbs(one: Assignment) -> bool:
    """Whether a verifier answers at one eps, so that a curve needs it asked at several."""
    return one.tool.deterministic and not isinstance(one.tool, MinimalDistance)


def _ladder(one: Assignment, rows: pd.DataFrame, threat: Threat, steps: Sequence[Fraction]) -> Assignment:
    """The verifier at every step but the threat's own eps, at which it has answered."""
    known = torch.from_numpy(rows[f"radius:{one.label}"].to_numpy(dtype=np.float64, copy=True))
    return Assignment(one.label, one.spec, Ladder(one.tool, tuple(eps for eps in steps if eps != threat.eps), known))


def _at(one: Assignment, threat: Threat, eps: Fraction) -> Assignment:
    tool = build("attack", {**one.spec, "norm": threat.norm, "eps": eps})
    return Assignment(f"{one.label} at {eps}", one.spec, tool, rest=one.rest)


def _nearest(found: pd.DataFrame, labels: Sequence[str]) -> np.ndarray:
    """The smallest distance of a witness per correctly classified sample, else inf."""
    nearest = np.full(len(found), np.inf)
    for label in labels:
        broken = (found["predicted"] == found["label"]).to_numpy() & ~found[f"survived:{label}"].to_numpy(dtype=bool)
        nearest[broken] = np.fmin(nearest[broken], found[f"distance:{label}"].to_numpy()[broken])  # NaN: broken by another
    return nearest


def _against_counterexamples(
    one: Assignment, model: nn.Module, x: Tensor, y: Tensor, rows: pd.DataFrame, measured: pd.DataFrame
) -> None:
    """Raises ContradictionError where a counterexample of the verifier `one`, in the rows, lies within a proven radius."""
    distance = _nearest(rows, [one.label])
    for name in (name for name in measured if name.startswith("radius:")):
        for k in np.flatnonzero(measured[name].to_numpy() >= distance):
            facts = {
                "index": int(rows["index"].iloc[k]), "label": int(y[k]), "verifier": name.partition(":")[2],
                "norm": one.tool.norm, "radius": float(measured[name].iloc[k]), "attack": one.label,
                "distance": float(distance[k]),
            }  # fmt: skip
            again = one.tool(model, x[k : k + 1], y[k : k + 1]).witness  # a verdict row does not hold the image itself
            witness = x[k] if again is None or not bool(torch.isfinite(again).all()) else again[0]
            facts["predicted"] = int(model(witness[None].to(x)).argmax(1))
            raise ContradictionError(facts, x[k].cpu(), witness.cpu())


# ---- the table -------------------------------------------------------------------------------------------------------


def points(measured: pd.DataFrame, steps: Sequence[Fraction]) -> list[dict[str, Any]]:
    """Rows of the curve: how many of the measured samples each verifier certifies at each step, and how many survive all attacks.

    `union` is any deterministic verifier. Each row: kind (certified / attacked), by, eps, exact, count, n, share.
    """
    radii = {name.partition(":")[2]: measured[name].to_numpy() for name in measured if name.startswith("radius:")}
    if len(radii) > 1:
        radii[UNION] = np.maximum.reduce(list(radii.values()))
    out = []
    for eps in sorted(steps):
        held = {name: (radius >= float(eps)) & (radius > 0) for name, radius in radii.items()}
        unbroken = measured["correct"].to_numpy() & (measured["distance"].to_numpy() > float(eps))
        out += [_point("certified", name, float(eps), str(eps), hits) for name, hits in held.items()]
        out.append(_point("attacked", WORST, float(eps), str(eps), unbroken))
    return out


def smoothed_points(rows: pd.DataFrame, label: str, steps: Iterable[Fraction]) -> list[dict[str, Any]]:
    """The whole curve of a smoothing verifier from its stored radii: a row at each radius and step; attacks say nothing of it."""
    judged = rows[rows[f"status:{label}"] != "timeout"]
    radius = judged[f"radius:{label}"].to_numpy()
    named: Mapping[float, str | None] = {float(far): None for far in radius if far > 0} | {float(eps): str(eps) for eps in steps}
    return [_point("certified", label, eps, named[eps], radius >= eps) for eps in sorted(named)]


def _point(kind: str, by: str, eps: float, exact: str | None, hits: np.ndarray) -> dict[str, Any]:
    count, n = int(hits.sum()), len(hits)
    return {"kind": kind, "by": by, "eps": eps, "exact": exact, "count": count, "n": n, "share": count / n if n else None}
