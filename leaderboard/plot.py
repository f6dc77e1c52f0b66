"""Pictures of a board as SVG files, for light and dark, that stand alone or in a page: same input, same bytes."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from leaderboard.board import UNRANKED

if TYPE_CHECKING:
    import pandas as pd

# Legible on white and on black, and apart for the colour-blind; marker and dash repeat what the colour says.
COLOURS = ("#0f83c4", "#d1690f", "#0f9d75", "#c2639a", "#9b8200", "#7a6fd0", "#c9473f", "#6d8891")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", "-.", ":")
# Drawn in this colour and then renamed, so that axes and text take the reader's own in light and dark.
INK = "#010203"
INKS = "<style>svg{color:#1b1f23}@media(prefers-color-scheme:dark){svg{color:#e8eaed}}</style>"
REFERENCE = "#808080"


@dataclass(frozen=True)
class Curve:
    """Shares at radii: `known` is a step that holds up to its radius (proven) or from it on (broken)."""

    name: str
    radii: Sequence[float]
    shares: Sequence[float]
    proven: bool


def by_density(entries: pd.DataFrame, panels: Mapping[str, str], salt: str) -> str:
    """Accuracy against density: a panel per metric (name to title), a line per method and architecture, 95 % intervals as bars.

    `entries` are rows of `ranked` of one objective; the unranked reference is a level line. `salt` keeps the element ids of
    several plots on a page apart.
    """
    return _svg([(_densities, entries, metric, title) for metric, title in panels.items()], salt, "share of test images, %")


def pareto(entries: pd.DataFrame, panels: Sequence[tuple[str, str, str, str]], salt: str) -> str:
    """One metric against another: a panel for each (x, its words, y, its words), a mark per entry, and a line through the best.

    The best are those that no other entry of the objective beats in both; of sizes in bytes less is better. The unranked
    reference is a cross.
    """
    return _svg([(_trade, entries, *panel) for panel in panels], salt, None)


def curves(panels: Mapping[str, Sequence[Curve]], radius: str, salt: str) -> str:
    """Accuracy against the radius: a panel per title; proven shares are full lines, those that attacks left are dashed."""
    return _svg([(_steps, lines, title, radius) for title, lines in panels.items()], salt, "share of test images, %")


def _svg(panels: Sequence[tuple[Any, ...]], salt: str, label: str | None, across: int = 4) -> str:
    """An `<svg>` element with a panel for each (function, arguments after the axis), and one legend for all."""
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {
        "svg.hashsalt": salt, "svg.fonttype": "none", "text.parse_math": False, "axes.spines.top": False, "font.size": 9,
        "axes.spines.right": False, "figure.constrained_layout.use": True, "font.family": "sans-serif",
        **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    }
    wide, high = min(across, len(panels)), -(-len(panels) // across)
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(3.6 * wide, 3.1 * high))
        axes = figure.subplots(high, wide, sharey=label is not None, squeeze=False).ravel()
        for axis, (draw, *arguments) in zip(axes, panels):
            draw(axis, *arguments)
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        for axis in axes[::wide] if label else ():
            axis.set_ylabel(label)
        _legend(figure, axes[: len(panels)], min(4, 2 * wide))
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _fragment(out.getvalue())


def _legend(figure: Any, axes: Any, across: int) -> None:
    named = {name: handle for axis in axes for handle, name in zip(*axis.get_legend_handles_labels())}
    figure.set_figheight(figure.get_figheight() + 0.2 * -(-len(named) // across))  # inches a line
    if named:
        figure.legend(named.values(), named, loc="outside lower center", ncols=min(across, len(named)), frameon=False)


def _fragment(text: str) -> str:
    """Without the XML prologue, whose document type names an address outside; ink becomes the reader's colour."""
    opening, rest = text[text.index("<svg") :].split(">", 1)
    return f"{opening}>{INKS}{rest}".replace(INK, "currentColor")


def _densities(axis: Any, entries: pd.DataFrame, metric: str, title: str) -> None:
    pruned, reference = entries[entries["rank"] != UNRANKED], entries[entries["rank"] == UNRANKED]
    for place, ((method, arch), line) in enumerate(pruned.groupby(["method", "arch"], sort=True)):
        _line(axis, line.sort_values("density"), metric, _name(entries, method, arch), place)
    for _, row in reference.iterrows():
        if row[metric] == row[metric]:
            name = _name(entries, row["method"], row["arch"])
            axis.axhline(100 * row[metric], color=REFERENCE, linewidth=1, dashes=(1, 2), label=name)
    densities = sorted(set(pruned["density"]))
    if densities:
        axis.set_xscale("log")
        axis.set_xticks(densities, [f"{one:g}" for one in densities])
        axis.set_xticks([], minor=True)
        axis.set_xlim(densities[0] / 1.3, densities[-1] * 1.3)
    axis.set_ylim(0, 102)
    axis.set_xlabel("density (share of weights kept)")
    axis.set_title(title)


def _line(axis: Any, line: pd.DataFrame, metric: str, name: str, place: int) -> None:
    middle = 100 * line[metric]
    bars = [middle - 100 * line[f"{metric}:low"], 100 * line[f"{metric}:high"] - middle]
    axis.errorbar(
        # a little aside of each other, or equal densities would hide each other's bars
        line["density"] * 1.015 ** (place % 8 - 3), middle, yerr=[bar.clip(lower=0) for bar in bars], label=name,
        linestyle=DASHES[place % len(DASHES)], linewidth=1.4, elinewidth=0.9, capsize=2, markersize=5, **_mark(place),
    )


def _trade(axis: Any, entries: pd.DataFrame, x: str, x_words: str, y: str, y_words: str) -> None:
    from matplotlib.ticker import LogLocator

    small = x == "bytes"  # less of it is better, and sizes span decades
    known = entries[entries[x].notna() & entries[y].notna()]
    scale = {x: 1 / 1000 if small else 100.0, y: 100.0}
    pruned = known[known["rank"] != UNRANKED]
    for place, ((method, arch), own) in enumerate(pruned.groupby(["method", "arch"], sort=True)):
        axis.plot(
            scale[x] * own[x], scale[y] * own[y], linestyle="", markersize=6, label=_name(entries, method, arch), **_mark(place),
        )
    for _, row in known[known["rank"] == UNRANKED].iterrows():
        name = _name(entries, row["method"], row["arch"])
        axis.plot([scale[x] * row[x]], [scale[y] * row[y]], linestyle="", marker="x", color=REFERENCE, label=name)
    best = front(known[x] if not small else -known[x], known[y])
    edge = known[best].sort_values([x, y])
    axis.plot(scale[x] * edge[x], scale[y] * edge[y], color=REFERENCE, linewidth=1, linestyle=":", zorder=1)
    if small and len(known):
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_xticks([], minor=True)
    low, high = axis.get_ylim()
    middle, high = (low + high) / 2, max(high, (low + high) / 2 + 1)  # less than two points are not worth a picture's height
    axis.set_ylim(max(min(low, middle - 1), -high / 10), high)
    axis.set(xlabel=x_words, ylabel=y_words)


def front(one: pd.Series, other: pd.Series) -> list[bool]:
    """Which entries no other one beats, by being at least as good in both (more is better) and better in one."""
    pairs = list(zip(one.tolist(), other.tolist()))
    return [not any((c >= a and d > b) or (c > a and d >= b) for c, d in pairs) for a, b in pairs]


def _steps(axis: Any, lines: Sequence[Curve], title: str, radius: str) -> None:
    names = sorted({one.name for one in lines})
    for one in lines:
        place = names.index(one.name)
        axis.plot(
            one.radii, [100 * share for share in one.shares], drawstyle="steps-pre" if one.proven else "steps-post",
            linestyle="-" if one.proven else "--", linewidth=1.4, color=COLOURS[place % len(COLOURS)],
            label=_shown(f"{one.name}, {'proven' if one.proven else 'attacked'}"),
        )
    axis.set(ylim=(0, 102), xlabel=radius, title=title)
    axis.set_xlim(left=0)


def _mark(place: int) -> dict[str, str]:
    """A colour and a marker that no other of 64 places has together."""
    return {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[(place + place // len(COLOURS)) % len(MARKERS)]}


def _name(entries: pd.DataFrame, method: str, arch: str) -> str:
    return _shown(method if entries["arch"].nunique() == 1 else f"{method}, {arch}")


def _shown(name: str) -> str:
    # a leading underscore would hide the line from the legend
    return name.lstrip("_") or "unnamed"
