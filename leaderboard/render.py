"""A ranked board for a terminal and for a README; `leaderboard.site` makes web pages of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from leaderboard.board import BOARD, UNRANKED, metrics_in, smoothed_in

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console
    from rich.table import Table

TITLES = {"clean": "clean", "robust.worst": "robust", "certified.union": "certified"}
EMPTY = "No records yet."


def columns(entries: pd.DataFrame) -> dict[str, str]:
    """The metrics that a board shows (name to heading): clean, robust (worst case), certified (union), smoothing, headline."""
    smoothed = {name: name.partition(".")[2] for name in smoothed_in(entries)}
    wanted = {**TITLES, **smoothed}
    wanted |= {name: name for name in entries["headline"].unique() if name not in wanted}
    shown = set(metrics_in(entries))
    return {name: title for name, title in wanted.items() if name in shown and entries[name].notna().any()}


def percent(entry: pd.Series, metric: str) -> str:
    """A share with its 95 % interval, such as `83.1 [79.0, 86.6]`, or a dash where the entry has none."""
    if entry[metric] != entry[metric]:
        return UNRANKED
    low, high = 100 * entry[f"{metric}:low"], 100 * entry[f"{metric}:high"]
    return f"{100 * entry[metric]:.1f} [{low:.1f}, {high:.1f}]"


def place(entry: pd.Series | Mapping[str, str]) -> str:
    """The rank, and the range of ranks that paired tests leave possible where that is more than one."""
    return entry["rank"] if entry["ranks"] == entry["rank"] else f"{entry['rank']} ({entry['ranks']})"


def who(entry: pd.Series, entries: pd.DataFrame) -> str:
    return f"{entry['method']}, {entry['arch']}" if entries["arch"].nunique() > 1 else str(entry["method"])


def per_seed(entry: pd.Series) -> str:
    """The headline's value for every seed."""
    return ", ".join(f"{100 * value:.1f}" for value in entry[f"{entry['headline']}:seeds"])


def boards(ranked: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """(title, entries) of every suite's objective."""
    for (suite, version, objective), entries in ranked.groupby(BOARD, sort=True):
        by = " and ".join(entries["headline"].unique())
        yield f"{suite}@{version}, {objective}, ranked by {by}", entries


def headings(entries: pd.DataFrame) -> list[str]:
    return ["rank", "method", "density", *columns(entries).values(), "per seed"]


def cells(entry: pd.Series, entries: pd.DataFrame) -> list[str]:
    numbers = [percent(entry, metric) for metric in columns(entries)]
    return [place(entry), who(entry, entries), f"{entry['density']:g}", *numbers, per_seed(entry)]


def terminal(ranked: pd.DataFrame, console: Console) -> None:
    """Prints one table per objective; shares in percent with 95 % intervals, the headline's values per seed last.

    Where the console is too narrow, each interval goes under its number; where it still is, the values per seed go.
    """
    if ranked.empty:
        console.print(EMPTY)
    # measured as on an endless console, for on this one a table never measures more than what there is
    endless = console.options.update(width=10_000)
    for title, entries in boards(ranked):
        for narrow, seeds in ((False, True), (True, True), (True, False)):
            table = _table(title, entries, narrow, seeds)
            if console.measure(table, options=endless).maximum <= console.width:
                break
        console.print(table)


def _table(title: str, entries: pd.DataFrame, narrow: bool, seeds: bool) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    # Text, not strings: a name may hold what rich takes for markup
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in headings(entries)[: None if seeds else -1]:
        named = heading == "method"
        table.add_column(Text(heading), justify="left" if named else "right", no_wrap=not named, overflow="fold")
    for _, entry in entries.iterrows():
        shown = cells(entry, entries)
        if narrow:  # 82.8 [78.1, 86.0] becomes 82.8 over 78.1–86.0, and the seeds stand one under the other
            shares = [one.replace(" [", "\n").replace(", ", "–").rstrip("]") for one in shown[3:-1]]
            shown = [*shown[:3], *shares, per_seed(entry).replace(", ", "\n")]
        style = "dim" if entry["rank"] == UNRANKED else ""
        table.add_row(*(Text(cell) for cell in shown[: len(table.columns)]), style=style)
    return table


def markdown(ranked: pd.DataFrame) -> str:
    """The same tables in Markdown, with a heading each; names cannot break out of their cell."""
    if ranked.empty:
        return EMPTY + "\n"
    parts = []
    for title, entries in boards(ranked):
        names = headings(entries)
        lines = [names, ["---:" if name != "method" else "---" for name in names]]
        lines += [[_escaped(cell) for cell in cells(entry, entries)] for _, entry in entries.iterrows()]
        parts.append(f"### {_escaped(title)}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n")
    return "\n".join(parts)


def _escaped(text: str) -> str:
    for char, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "\\|"), ("`", "\\`"), ("\n", " ")):
        text = text.replace(char, entity)
    return text.replace("*", "\\*").replace("_", "\\_")
