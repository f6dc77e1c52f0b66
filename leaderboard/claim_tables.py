"""The claims held against records, for a terminal and in Markdown."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

from leaderboard.paper_claims import Line
from leaderboard.render import _escaped

if TYPE_CHECKING:
    from rich.console import Console

HEADINGS = ("claim", "data set", "published", "measured here", "result, points", "verdict")


def cells(line: Line) -> list[str]:
    """The texts of a line's row, as HEADINGS name them."""
    return [line.text, line.place, line.printed or "–", measured_at(line), result(line), line.verdict]


def measured_at(line: Line) -> str:
    """The setting and the budget, such as `cnn_small, density 0.05, pgd-20 at 1/10; 15,000 images, 3+1+3 epochs`."""
    if not line.setting:
        return "–"
    found = line.setting
    metric = "clean" if found["metric"] == "clean" else f"{' and '.join(found['attacks'])} at {found['eps']}"
    return f"{found['arch']}, density {float(Fraction(found['density'])):g}, {metric}; {line.budget}"


def result(line: Line) -> str:
    """The mean (difference) in points with its interval, every seed's own, and which networks take no part."""
    found, out = line.measured, f"take no part: {', '.join(line.left_out)}" if line.left_out else ""
    if found is None:
        return out or "–"
    sign = "" if line.kind == "near-zero" else "+"
    mean, low, high = (f"{100 * found[key]:{sign}.1f}" for key in ("mean", "low", "high"))
    each = ", ".join(f"{100 * one:{sign}.1f}" for one in found["by_seed"].values())
    alone = "one seed" if len(found["by_seed"]) == 1 else f"{len(found['by_seed'])} seeds: {each}"
    return f"{mean} [{low}, {high}], {found['images']:,} images, {alone}" + (f"; {out}" if out else "")


def terminal(lines: list[Line], console: Console) -> None:
    """Prints one table, then the notes."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_lines=True)
    for heading in HEADINGS:
        table.add_column(heading, overflow="fold")
    for line in lines:  # Text, not strings: a name may hold what rich takes for markup
        table.add_row(*(Text(cell) for cell in cells(line)), style="dim" if line.measured is None else "")
    console.print(table)
    for note in notes(lines):
        console.print(f"note: {note}", highlight=False, markup=False)


def markdown(lines: list[Line]) -> str:
    """The same table and notes in Markdown; names cannot break out of their cell."""
    rows = [HEADINGS, ["---"] * len(HEADINGS), *([_escaped(cell) for cell in cells(line)] for line in lines)]
    text = "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"
    return text + "".join(f"\n- {_escaped(note)}" for note in notes(lines)) + ("\n" if notes(lines) else "")


def notes(lines: list[Line]) -> list[str]:
    """Every line's notes, with what they are about."""
    return [f"{line.text}, {line.data}, {line.setting['arch']}: {note}" for line in lines for note in line.notes]
