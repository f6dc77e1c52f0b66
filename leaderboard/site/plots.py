"""The pictures of a board: accuracy against density, what is traded for what, and curves over the radius."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from leaderboard import plot
from leaderboard.board import GROUP
from leaderboard.plot import Curve
from leaderboard.render import columns
from leaderboard.site.sources import Contents

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

FIGURE = ["suite", "version", "objective", "arch"]
Curves = Mapping[str, Mapping[str, list[Curve]]]
GRID = 60  # radii at which curves of several seeds are averaged


@dataclass(frozen=True)
class Figure:
    """A picture, its file, and what it is about, so that a page can hide it with the entries it shows."""

    file: str
    title: str
    shows: str
    suite: str
    objective: str
    arch: str
    svg: str


def tasks(contents: Contents, curves: Curves) -> Iterator[tuple[pd.DataFrame, Curves]]:
    """The entries of every suite, objective and architecture with their records' curves (`samples.curves`, by record id)."""
    for _, entries in contents.board.groupby(FIGURE, sort=True):
        yield entries, {record: curves[record] for own in entries["records"] for record in own if curves.get(record)}


def figures(task: tuple[pd.DataFrame, Curves]) -> list[Figure]:
    """What there is to draw of one suite, objective and architecture."""
    entries, curves = task
    suite, version, objective, arch = (entries[name].iloc[0] for name in FIGURE)
    about = {"suite": f"{suite}@{version}", "objective": str(objective), "arch": str(arch)}
    title = f"{suite}@{version}, {objective}, {arch}"
    panels = {name: words for name, words in columns(entries).items() if name != "clean"}
    trades, found = list(_trades(entries, panels)), []
    if panels and len(entries) > 1:
        shows = f"{', '.join(panels.values())} accuracy against density per method, with 95 % intervals"
        found.append(_figure("density", title, shows, about, plot.by_density(entries, panels, f"density {title}")))
    if trades and len(entries) > 1:
        shows = "; ".join(f"{y_words} against {x_words}" for _, x_words, _, y_words in trades)
        found.append(_figure("pareto", title, shows, about, plot.pareto(entries, trades, f"pareto {title}")))
    for radius, lines in _by_radius(entries, curves).items():
        shows = f"accuracy over the {radius} radius, a panel per density: proven (full lines), left by attacks (dashed)"
        drawn = plot.curves(lines, f"{radius} radius, pixels in [0,1]", f"curves {title} {radius}")
        found.append(_figure(f"curves {radius}", title, shows, about, drawn))
    return found


def _figure(kind: str, title: str, shows: str, about: dict[str, str], svg: str) -> Figure:
    return Figure(file_name(f"{kind} {title}", "svg"), title, shows, **about, svg=svg)


def file_name(words: str, ending: str) -> str:
    """A plain file name for any words, and another one for any other words."""
    tag = hashlib.sha256(words.encode()).hexdigest()[:8]
    return f"{re.sub('[^A-Za-z0-9.@]+', '-', words)[:80].strip('-.')}-{tag}.{ending}"


def _trades(entries: pd.DataFrame, panels: Mapping[str, str]) -> Iterator[tuple[str, str, str, str]]:
    if "robust.worst" in panels:
        yield "clean", "clean accuracy, %", "robust.worst", "robust accuracy, %"
    for name, words in panels.items():
        if name.startswith("certified.") and entries["bytes"].notna().any():
            yield "bytes", "stored weights, kB", name, f"{words} accuracy, %"


def _by_radius(entries: pd.DataFrame, curves: Curves) -> dict[str, dict[str, list[Curve]]]:
    """By norm (or smoothed norm), by density, a curve per method and prover: the mean over its seeds."""
    found: dict[str, dict[str, list[Curve]]] = {}
    for key, group in entries.groupby(GROUP, sort=True):
        for _, entry in group.iterrows():
            own = [curves.get(record, {}) for record in entry["records"]]
            for radius in dict.fromkeys(name for one in own for name in one):
                lines = _means(entry["method"], [one.get(radius, []) for one in own])
                found.setdefault(radius, {}).setdefault(f"density {key[-1]:g}", []).extend(lines)
    return found


def _means(method: str, seeds: list[list[Curve]]) -> Iterator[Curve]:
    import numpy as np

    for name, proven in dict.fromkeys((line.name, line.proven) for lines in seeds for line in lines):
        own = [line for lines in seeds for line in lines if (line.name, line.proven) == (name, proven)]
        grid = np.linspace(0, max(line.radii[-1] for line in own), GRID)
        mean = np.mean([_at(line, grid) for line in own], axis=0)
        yield Curve(f"{method}, {name}" if proven else method, grid.tolist(), mean.tolist(), proven)


def _at(line: Curve, grid: np.ndarray) -> np.ndarray:
    """The step function at other radii: beyond its last one nothing is proven, and what was broken stays so."""
    import numpy as np

    radii = np.array(line.radii)
    places = np.searchsorted(radii, grid, side="left") if line.proven else np.searchsorted(radii, grid, side="right") - 1
    return np.append(line.shares, 0.0 if line.proven else line.shares[-1])[places]
