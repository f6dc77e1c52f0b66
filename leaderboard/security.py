"""Security curves: robust accuracy over eps, from the distances of the witnesses that attacks have left in the verdict rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from leaderboard.errors import BoardError
from leaderboard.plot import COLOURS, DASHES
from leaderboard.row_checks import correct
from leaderboard.stats import ball, interval

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("eps", "hits", "n", "share", "low", "high", "searched")
POINTS = 100
FORMATS = (".svg", ".png")


def security_curve(
    rows: pd.DataFrame, cell: Mapping[str, Any], labels: Sequence[str], grid: Iterable[Fraction | float]
) -> pd.DataFrame:
    """A row per eps of the grid, ascending: how many samples no attack of `labels` has broken within eps, never rising with eps.

    A witness at distance d breaks every eps >= d, whatever eps its attack was given; so attacks at several eps and minimum-norm
    attacks, whose witness is the nearest they found, go into one curve. Columns: eps; hits of n samples, their share with its
    95 % Wilson interval (low, high); searched, whether some attack was allowed to go as far. A share is an upper bound on the
    robust accuracy, and beyond what was searched it is no more than the last one that was. Raises BoardError for a label
    that is none of the cell's attacks, for none at all, and for attacks in different norms.
    """
    import pandas as pd

    attacks = _chosen(dict(cell), labels)
    nearest = np.minimum.reduce([_distance(dict(cell), rows, attack) for attack in attacks])
    standing, largest = correct(rows).to_numpy(), max(ball(dict(cell), attack)[1] for attack in attacks)
    points = []
    for eps in sorted({Fraction(one) for one in grid}):
        hits = int((standing & (nearest > float(eps))).sum())
        low, high = interval(hits, len(rows))
        share = hits / len(rows) if len(rows) else float("nan")
        points.append((float(eps), hits, len(rows), share, low, high, eps <= largest))
    return pd.DataFrame(points, columns=list(COLUMNS))


def even_grid(cell: Mapping[str, Any], labels: Sequence[str], points: int = POINTS) -> list[Fraction]:
    """`points` + 1 evenly spaced eps from 0 to the largest that an attack of `labels` was given, and each of theirs."""
    given = [ball(dict(cell), attack)[1] for attack in _chosen(dict(cell), labels)]
    return sorted({*(max(given) * step / points for step in range(points + 1)), *given})


def labels_of(cell: Mapping[str, Any], names: Sequence[str] = ()) -> list[str]:
    """The labels of the attacks that have one of the names, or labels; without names, of all in the norm of the cell's threat.

    Raises BoardError where there is none.
    """
    threat, attacks = dict(cell)["threat"], dict(cell)["attacks"]
    wanted = [one for one in attacks if {one["name"], one["label"]} & set(names)]
    found = wanted if names else [one for one in attacks if ball(dict(cell), one)[0] == threat["norm"]]
    if not found:
        known = ", ".join(one["label"] for one in attacks) or "none"
        words = f"called {' or '.join(names)}" if names else f"in {threat['norm']}"
        raise BoardError(f"the cell has no attack {words}; its attacks: {known}")
    return [one["label"] for one in found]


def _chosen(cell: dict[str, Any], labels: Sequence[str]) -> list[dict[str, Any]]:
    by_label = {one["label"]: one for one in cell["attacks"]}
    for label in labels:
        if label not in by_label:
            raise BoardError(f"the cell has no attack {label!r}; its attacks: {', '.join(by_label) or 'none'}")
    norms = sorted({ball(cell, by_label[label])[0] for label in labels})
    if len(norms) != 1:
        words = f"the attacks {', '.join(labels)} measure in {' and '.join(norms)}" if labels else "no attack was named"
        raise BoardError(f"a security curve needs attacks of one norm, but {words}")
    return [by_label[label] for label in labels]


def _distance(cell: dict[str, Any], rows: pd.DataFrame, attack: dict[str, Any]) -> np.ndarray:
    """How far the attack's witness of each sample is, inf without one.

    One that is run on the rest only has no distance where another attack within its ball was first; that one's counts.
    """
    norm, eps = ball(cell, attack)
    found = np.full(len(rows), np.inf)
    for other in [attack, *cell["attacks"]] if attack.get("rest") else [attack]:
        other_norm, other_eps = ball(cell, other)
        if other_norm == norm and other_eps <= eps:
            broken = (correct(rows) & ~rows[f"survived:{other['label']}"]).to_numpy(dtype=bool)
            distance = rows[f"distance:{other['label']}"].to_numpy(dtype=float)
            found = np.where(broken & ~np.isnan(distance), np.minimum(found, distance), found)
    return found


def draw(curves: Mapping[str, pd.DataFrame], norm: str, path: Path) -> Path:
    """An SVG or PNG with a line per named curve and its 95 % band, as far as was searched; equal curves give equal bytes.

    Raises BoardError for any other ending of the file's name.
    """
    import matplotlib
    from matplotlib.figure import Figure

    if path.suffix not in FORMATS:
        raise BoardError(f"a curve is drawn as {' or '.join(FORMATS)}, got {path.name!r}")
    style: Any = {"svg.hashsalt": "security", "text.parse_math": False, "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(6, 4), layout="constrained")
        axis = figure.subplots()
        for place, (name, curve) in enumerate(curves.items()):
            seen, colour = curve[curve["searched"]], COLOURS[place % len(COLOURS)]
            words: dict[str, Any] = {"label": name.lstrip("_") or "unnamed", "linestyle": DASHES[place % len(DASHES)]}
            axis.step(seen["eps"], 100 * seen["share"], where="post", color=colour, **words)
            band: dict[str, Any] = {"step": "post", "color": colour, "alpha": 0.15, "linewidth": 0}
            axis.fill_between(seen["eps"], 100 * seen["low"], 100 * seen["high"], **band)
        axis.set(xlabel=f"eps ({norm}, pixels in [0,1])", ylabel="robust accuracy, %", ylim=(0, 102))
        axis.set_xlim(left=0)
        figure.legend(loc="outside lower center", ncols=1 if len(curves) < 4 else 2, frameon=False)
        unstamped = {"Date": None, "Creator": None} if path.suffix == ".svg" else {"Software": None}
        figure.savefig(path, dpi=150, metadata=unstamped)
    return path
