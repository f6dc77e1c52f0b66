"""Accuracy against density as an SVG fragment that goes straight into a page: same input, same bytes."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from leaderboard.board import UNRANKED

if TYPE_CHECKING:
    import pandas as pd

# Legible on white and on black, and apart for the colour-blind; marker and dash repeat what the colour says.
COLOURS = ("#0f83c4", "#d1690f", "#0f9d75", "#c2639a", "#9b8200", "#7a6fd0", "#c9473f", "#6d8891")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", "-.", ":")
# Drawn in this colour and then renamed, so that axes and text take the page's own in light and dark.
INK = "#010203"


def svg(entries: pd.DataFrame, panels: dict[str, str], salt: str) -> str:
    """One `<svg>` element: a panel per metric (name to title), a line per method and architecture, its 95 % intervals as bars.

    `entries` are rows of `ranked` of one objective; the unranked reference is a level line. `salt` keeps the element ids of
    several plots on a page apart.
    """
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {
        "svg.hashsalt": salt, "svg.fonttype": "none", "text.parse_math": False, "axes.spines.top": False, "font.size": 9,
        "axes.spines.right": False, "figure.constrained_layout.use": True, "font.family": "sans-serif",
        **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(3.6 * len(panels), 3.4))
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axis, (metric, title) in zip(axes, panels.items()):
            _panel(axis, entries, metric, title)
        axes[0].set_ylabel("share of test images, %")
        handles, labels = axes[0].get_legend_handles_labels()
        if handles:
            figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _fragment(out.getvalue())


def _fragment(text: str) -> str:
    """Without the XML prologue, whose document type names an address outside; ink becomes the page's colour."""
    return text[text.index("<svg") :].replace(INK, "currentColor")


def _panel(axis: Any, entries: pd.DataFrame, metric: str, title: str) -> None:
    pruned, reference = entries[entries["rank"] != UNRANKED], entries[entries["rank"] == UNRANKED]
    for place, ((method, arch), line) in enumerate(pruned.groupby(["method", "arch"], sort=True)):
        _line(axis, line.sort_values("density"), metric, _name(entries, method, arch), place)
    for _, row in reference.iterrows():
        if row[metric] == row[metric]:
            name = _name(entries, row["method"], row["arch"])
            axis.axhline(100 * row[metric], color="#808080", linewidth=1, dashes=(1, 2), label=name)
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
        color=COLOURS[place % len(COLOURS)], marker=MARKERS[place % len(MARKERS)], linestyle=DASHES[place % len(DASHES)],
        linewidth=1.4, elinewidth=0.9, capsize=2, markersize=5,
    )


def _name(entries: pd.DataFrame, method: str, arch: str) -> str:
    # a leading underscore would hide the line from the legend
    return (method if entries["arch"].nunique() == 1 else f"{method}, {arch}").lstrip("_") or "unnamed"
