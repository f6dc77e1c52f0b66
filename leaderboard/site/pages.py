"""The site's pages as text: the board, the methods, the numbers that papers report. Names are escaped by the templates."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from leaderboard.board import GROUP, UNRANKED
from leaderboard.headlines import headlines, resolution
from leaderboard.paper_claims import HERE
from leaderboard.record import Record
from leaderboard.render import columns, place
from leaderboard.site.downloads import KINDS, TABLES
from leaderboard.site.plots import Figure, file_name
from leaderboard.site.sources import Contents, threat

if TYPE_CHECKING:
    from jinja2 import Environment

PROBLEMS = 5  # of whole folders, on the first page; `leaderboard check` names them all
REPORTED_BY = ("source", "dataset", "architecture", "metric")  # the columns that a reader filters by


@cache
def environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    return Environment(
        loader=PackageLoader("leaderboard"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        autoescape=select_autoescape(["html", "j2"]),
    )


def page(template: str, **contents: Any) -> str:
    """The page of a template; `up` leads from its folder to the site's."""
    return environment().get_template(f"site/{template}").render(**{"up": "", "here": "", **contents}) + "\n"


def asset(name: str) -> str:
    """The text of the style sheet or of the script."""
    environment_ = environment()
    assert environment_.loader is not None
    return environment_.loader.get_source(environment_, f"site/{name}")[0]


def record_page(record: str) -> str:
    """Where a record's page lies, as the file's name; `quote` makes an address of it."""
    return f"record/{record}.html"


def method_page(name: str) -> str:
    return f"method/{file_name(name, 'html')}"


# ---- the board -------------------------------------------------------------------------------------------------------


def index(contents: Contents, rows: list[dict[str, Any]], figures: list[Figure]) -> str:
    """The first page: the board with its filters, headline numbers, pictures and what all records share."""
    board = contents.board
    kept = contents.kept.values()
    counting = set(contents.frame["record"])
    return page(
        "index.html.j2", here="index", title=contents.title, metrics=columns(board), rows=rows, choices=_choices(rows),
        count=len(kept), problems=contents.problems[:PROBLEMS], more_problems=len(contents.problems) - PROBLEMS,
        troubled=_pages(one.record.id for one in kept if one.problems),
        superseded=_pages(one.record.id for one in kept if one.record.id not in counting),
        downloads={words: [(f"{name}.{kind}", title) for kind, title in KINDS.items()] for name, words in TABLES.items()},
        headlines=_headlines(contents), resolution=list(_resolution(contents)), figures=[_shown(one) for one in figures],
        notes=[*_notes([one.record for one in kept]), ("ledgers", "; ".join(contents.ledgers) or "none")],
    )


def _pages(records: Iterable[str]) -> list[tuple[str, str]]:
    return [(one, quote(record_page(one))) for one in records]


def board_rows(contents: Contents) -> Iterator[dict[str, Any]]:
    """What the table shows of every entry of the board, in its order; shares in percent."""
    metrics = columns(contents.board)
    sizes = contents.board[contents.board["rank"] != UNRANKED].groupby(GROUP).size().to_dict()
    threats = dict(zip(contents.frame["record"], map(threat, contents.frame["protocol"])))
    for entry in contents.board.to_dict(orient="records"):
        first = contents.kept[entry["records"][0]].record
        yield {
            **{name: entry[name] for name in ("objective", "method", "arch", "status", "challenged")},
            **ranking(entry, sizes.get(tuple(entry[name] for name in GROUP), 0)), "threat": threats[entry["records"][0]],
            "suite": f"{entry['suite']}@{entry['version']}", "page": quote(method_page(first.cell.method.name)),
            "records": [(seed, quote(record_page(one))) for seed, one in zip(entry["seeds"], entry["records"])],
            "density": f"{entry['density']:g}", "measured": f"{entry['measured']:.4f}",
            "numbers": [number(entry, name) for name in metrics], "bytes": entry["bytes"], "size": _kilobytes(entry["bytes"]),
            "csr": _kilobytes(entry["bytes:csr"]),
        }


def ranking(entry: Mapping[str, Any], of: int) -> dict[str, Any]:
    """The rank among `of` entries, and its range as shares of them for a bar."""
    if entry["rank"] == UNRANKED:
        return {"rank": None, "place": UNRANKED, "span": None, "of": of}
    best, _, worst = entry["ranks"].partition("–")
    low, high = 100 * (int(best) - 1) / of, 100 * int(worst or best) / of
    span = {"low": round(low, 1), "high": round(high, 1), "value": round(100 * (int(entry["rank"]) - 0.5) / of, 1)}
    return {"rank": int(entry["rank"]), "place": place(entry), "span": span, "of": of}


def number(entry: Mapping[str, Any], metric: str) -> dict[str, Any] | None:
    """What one cell of the table shows; shares in percent."""
    if entry[metric] != entry[metric]:
        return None
    seeds = entry[f"{metric}:seeds"]
    notes = ["seeds " + ", ".join(f"{100 * value:.1f}" for value in seeds)] if len(seeds) > 1 else []
    if entry.get(f"{metric}:radius") is not None:
        notes.append(f"average radius {entry[f'{metric}:radius']:.3f}, abstained {100 * entry[f'{metric}:abstained']:.1f} %")
        notes.append(f"with high probability at least {100 * entry[f'{metric}:high-probability']:.1f}")
    low, high = (entry[f"{metric}:{end}"] for end in ("low", "high"))
    return {**percents(entry[metric], low, high), "notes": "; ".join(notes), "headline": metric == entry["headline"]}


def percents(value: float, low: float, high: float) -> dict[str, float]:
    return {"value": round(100 * value, 1), "low": round(100 * low, 1), "high": round(100 * high, 1)}


def _kilobytes(size: float) -> str:
    return "" if size != size else f"{size / 1000:,.1f}"


def _choices(rows: list[dict[str, Any]]) -> dict[str, list[str]]:
    """What there is to filter by, in the order of a list: densities from the densest, all else by name."""
    names = ("suite", "objective", "method", "density", "arch", "threat", "status")
    found = {name: sorted({row[name] for row in rows}) for name in names}
    found["density"].sort(key=float, reverse=True)
    return found


def _shown(figure: Figure) -> dict[str, Any]:
    """A figure as the page needs it; the size is that of the picture, so that nothing moves once it is there."""
    opening = figure.svg[: figure.svg.index(">")]
    sides = (opening.partition(f'{side}="')[2].partition("pt")[0] for side in ("width", "height"))
    wide, high = (round(float(points) * 4 / 3) for points in sides)
    names = ("title", "shows", "suite", "objective", "arch")
    return {**{name: getattr(figure, name) for name in names}, "url": quote(figure.file), "width": wide, "height": high}


def _headlines(contents: Contents) -> dict[str, Any] | None:
    found = headlines(contents.frame, contents.board)
    if found.empty:
        return None
    headings = ["method", "board", "dense, %", "ratio", "area, %", "per kB"]
    return {"headings": headings, "rows": [_headline(row.to_dict()) for _, row in found.iterrows()]}


def _headline(row: dict[str, Any]) -> dict[str, Any]:
    suite = f"{row['suite']}@{row['version']}"
    cells = [
        (row["method"], row["method"]), (f"{suite}, {row['objective']}, {row['arch']}, by {row['headline']}", suite),
        _cell(100 * row["dense"], "{:.1f}"),
        _cell(row["ratio"], "{:g}", row["ratio:low"], row["ratio:high"]),
        _cell(100 * row["area"], "{:.1f}", 100 * row["area:low"], 100 * row["area:high"]),
        _cell(100 * row["per_kilobyte"], "{:.2f}"),
    ]
    return {**{name: row[name] for name in ("objective", "arch", "method")}, "suite": suite, "cells": cells}


def _cell(value: float, form: str, low: float = float("nan"), high: float = float("nan")) -> tuple[str, Any]:
    """(text, what to sort by): a number, with its interval where there is one."""
    if value != value:
        return UNRANKED, ""
    between = f" [{form.format(low)}, {form.format(high)}]" if low == low and high == high else ""
    return form.format(value) + between, value


def _resolution(contents: Contents) -> Iterator[tuple[str, str]]:
    for _, row in resolution(contents.frame, contents.board).iterrows():
        yield f"{row['suite']}@{row['version']}, {row['objective']}, {row['arch']}, density {row['density']:g}", row["note"]


def _notes(records: list[Record]) -> list[tuple[str, str]]:
    """What all records share, or the few ways in which they differ."""
    facts = {
        "test samples": {f"{one.samples.n} ({one.samples.rule}), digest {one.samples.digest[:12]}" for one in records},
        "threat": {f"{one.cell.threat.norm}, eps {one.cell.threat.eps}" for one in records},
        "sparsecert": {one.provenance.version for one in records},
        "revision": {revision(one) for one in records},
        "code": {one.provenance.code[:12] for one in records},
        "python": {one.provenance.python for one in records},
        "packages": {f"{name} {version}" for one in records for name, version in one.provenance.packages.items()},
        "device": {f"{one.provenance.device}, {one.provenance.threads} threads" for one in records},
        "data": {f"{one.cell.data.name} {one.provenance.data[:12]}" for one in records},
        "measured": {one.timing.created[:10] for one in records},
    }
    return [(name, "; ".join(sorted(values))) for name, values in facts.items() if values]


def revision(record: Record) -> str:
    if record.provenance.revision is None:
        return "not from a checkout"
    return record.provenance.revision[:12] + (" with uncommitted changes" if record.provenance.dirty else "")


# ---- methods, and what papers report ---------------------------------------------------------------------------------


def methods(contents: Contents, rows: list[dict[str, Any]], about: Mapping[str, str]) -> dict[str, str]:
    """The page of every pruning method and the list of them, by file name; `about` says what a method does, by its name."""
    entries: dict[str, list[tuple[dict[str, Any], list[Record]]]] = {}
    for row, ids in zip(rows, contents.board["records"]):
        records = [contents.kept[one].record for one in ids]
        entries.setdefault(records[0].cell.method.name, []).append((row, records))
    listed, pages = [], {}
    for name, own in sorted(entries.items()):
        text = about.get(name, "")
        pages[method_page(name)] = _method(contents, name, own, text)
        first = text.partition("\n\n")[0].replace("\n", " ")
        listed.append({"name": name, "page": quote(method_page(name)), "entries": len(own), "about": first})
    return {**pages, "methods.html": page("methods.html.j2", here="methods", methods=listed)}


def _method(contents: Contents, name: str, entries: list[tuple[dict[str, Any], list[Record]]], about: str) -> str:
    settings = {row["method"]: _fields(records[0].document["cell"]["method"]) for row, records in entries}
    scopes = sorted({one.sparsity.scope for _, records in entries for one in records})
    rows = [row for row, _ in entries]
    return page(
        "method.html.j2", up="../", name=name, about=about, settings=settings.items(), scopes=scopes,
        metrics=columns(contents.board), rows=rows, choices=_choices(rows),
    )


def _fields(part: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} = {value}" for key, value in part.items() if key not in ("name", "label"))


def reported() -> str:
    """The numbers of published_results.csv, which nobody here measured."""
    import pandas as pd

    table = pd.read_csv(HERE / "published_results.csv", dtype=str, keep_default_na=False)
    choices = {name: sorted(set(table[name]) - {""}) for name in REPORTED_BY}
    return page(
        "reported.html.j2", here="reported", headings=list(table), rows=table.to_dict(orient="records"), choices=choices
    )
