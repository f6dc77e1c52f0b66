"""A ranked board for a terminal, for a README, and as one page that needs nothing else."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leaderboard.board import BOARD, UNRANKED, counting, metrics_in, smoothed_in
from leaderboard.checks import check_all
from leaderboard.record import Record, read_all

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


def place(entry: pd.Series) -> str:
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


def page(run_folder: str | Path, ranked: pd.DataFrame, path: str | Path) -> None:
    """Writes one self-contained HTML page: table, plots, provenance of every record with the problems that `check` finds.

    It asks for nothing outside itself, holds no date but the records' own, and is the same for the same input; `path` holds
    either the whole new page or what was there before.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=PackageLoader("leaderboard"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        autoescape=select_autoescape(["html", "j2"]),
    )
    problems = check_all(run_folder)
    records = read_all(Path(run_folder) / "records")
    metrics = {} if ranked.empty else columns(ranked)
    html = environment.get_template("board.html.j2").render(
        title=", ".join(sorted({f"{one.suite}@{one.suite_version}" for one in records})) or "sparsecert",
        metrics=metrics,
        rows=[_row(entry, metrics) for _, entry in ranked.iterrows()],
        plots=list(_plots(ranked)),
        choices={name: _choices(ranked, name) for name in ("objective", "method", "density")},
        records=_provenance(records, problems),
        troubled=sum(map(bool, problems.values())),
        notes=_notes(records),
    )
    _write(Path(path), html)


def _row(entry: pd.Series, metrics: dict[str, str]) -> dict[str, Any]:
    plain = {name: entry[name] for name in ("objective", "method", "arch", "seeds", "headline")}
    ranked = None if entry["rank"] == UNRANKED else int(entry["rank"])
    numbers = [_number(entry, name) for name in metrics]
    return {
        **plain, "rank": ranked, "place": place(entry), "density": f"{entry['density']:g}", "numbers": numbers,
        "measured": f"{entry['measured']:.4f}", "suite": f"{entry['suite']}@{entry['version']}",
    }


def _number(entry: pd.Series, metric: str) -> dict[str, Any] | None:
    """What one cell of the page's table shows; shares in percent."""
    if entry[metric] != entry[metric]:
        return None
    middle, low, high = (round(100 * entry[f"{metric}{end}"], 1) for end in ("", ":low", ":high"))
    notes = [f"n {entry[f'{metric}:n']:.0f}"]
    if len(entry[f"{metric}:seeds"]) > 1:
        notes.append("seeds " + ", ".join(f"{100 * value:.1f}" for value in entry[f"{metric}:seeds"]))
    if f"{metric}:radius" in entry.index:
        notes.append(f"average radius {entry[f'{metric}:radius']:.3f}")
        notes.append(f"abstained {100 * entry[f'{metric}:abstained']:.1f} %")
        notes.append(f"with high probability at least {100 * entry[f'{metric}:high-probability']:.1f}")
    return {
        "value": middle, "low": low, "high": high, "width": round(high - low, 1), "notes": "; ".join(notes),
        "headline": metric == entry["headline"],
    }


def _choices(ranked: pd.DataFrame, name: str) -> list[str]:
    values = sorted(set(ranked[name]), reverse=name == "density")
    return [f"{value:g}" if isinstance(value, float) else value for value in values]


def _plots(ranked: pd.DataFrame) -> Iterator[dict[str, Any]]:
    from leaderboard.plot import svg

    for title, entries in () if ranked.empty else boards(ranked):
        panels = {name: heading for name, heading in columns(entries).items() if name != "clean"}
        if panels:
            picture, shown = svg(entries, panels, title), ", ".join(panels.values())
            yield {"title": title, "objective": entries["objective"].iloc[0], "svg": picture, "shows": shown}


def _provenance(records: list[Record], problems: dict[str, list[str]]) -> list[dict[str, Any]]:
    counted = {one.id for one in counting(records)}
    return [
        {
            "id": one.id, "record": one, "problems": problems[one.id], "counts": one.id in counted,
            "packages": ", ".join(f"{name} {version}" for name, version in sorted(one.provenance.packages.items())),
            "seconds": ", ".join(f"{stage} {took:g} s" for stage, took in one.timing.seconds.items()),
            "kept": f"{one.sparsity.kept} of {one.sparsity.total} ({one.sparsity.kept / one.sparsity.total:.4%})",
            "document": json.dumps(one.document, indent=1, sort_keys=True, ensure_ascii=False),
        }
        for one in records
    ]


def _notes(records: list[Record]) -> list[tuple[str, str]]:
    """What all records share, or the few ways in which they differ."""
    facts = {
        "test samples": {f"{one.samples.n} ({one.samples.rule}), digest {one.samples.digest[:12]}" for one in records},
        "threat": {f"{one.cell.threat.norm}, eps {one.cell.threat.eps}" for one in records},
        "sparsecert": {one.provenance.version for one in records},
        "revision": {_revision(one) for one in records},
        "code": {one.provenance.code[:12] for one in records},
        "python": {one.provenance.python for one in records},
        "packages": {f"{name} {version}" for one in records for name, version in one.provenance.packages.items()},
        "device": {f"{one.provenance.device}, {one.provenance.threads} threads" for one in records},
        "data": {one.provenance.data[:12] for one in records},
        "measured": {one.timing.created[:10] for one in records},
    }
    return [(name, "; ".join(sorted(values))) for name, values in facts.items() if values]


def _revision(record: Record) -> str:
    if record.provenance.revision is None:
        return "not from a checkout"
    return record.provenance.revision[:12] + (" with uncommitted changes" if record.provenance.dirty else "")


def _write(path: Path, text: str) -> None:
    """The file under `path` is at any moment the old one or the whole new one."""
    tag = hashlib.sha256(text.encode()).hexdigest()[:8]
    temporary = path.with_name(f".{path.name}.{tag}.{os.getpid()}.part")
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
