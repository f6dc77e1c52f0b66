from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from leaderboard.board import load, ranked
from leaderboard.record import read_all
from leaderboard.render import markdown, page, terminal
from leaderboard.stats import interval

from .conftest import Run, rows_of

SCRIPT = "<script>alert(1)</script>"
HEADLESS = {"link", "meta", "path", "use", "rect"}


class Reader(HTMLParser):
    """The elements, attributes and text of a page, and whether its elements nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.nests = True
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in HEADLESS | {"option"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in HEADLESS | {"option"}:
            self.nests &= bool(self.open) and self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def fill(run: Run) -> None:
    """Two objectives, one with smoothing as its headline, a dense reference, two densities and two seeds."""
    run.add(rows_of(broken=1), method="dense", density="1")
    for method, density, seed in (("hydra", "1/2", 0), ("hydra", "1/2", 1), ("hydra", "1/4", 0), (SCRIPT, "1/2", 0)):
        name = "evil" if method == SCRIPT else None
        run.add(rows_of(broken=2 + seed), name=name, method=method, density=density, seed=seed)
    run.add(objective="stability", headline="certified.smoothing")


@pytest.fixture
def html(run: Run) -> str:
    fill(run)
    page(run.root, ranked(load(run.root)), run.root / "board.html")
    return (run.root / "board.html").read_text(encoding="utf-8")


def test_the_page_asks_for_nothing_outside_itself(html: str) -> None:
    loads = {"src", "href", "xlink:href", "data", "action", "srcset", "poster", "style"}
    addresses = [value for _, attributes in Reader(html).tags for name, value in attributes.items() if name in loads]
    assert [one for one in addresses if one and re.search(r"//|url\((?!#)", one)] == []
    without_namespaces = re.sub(r'xmlns(:\w+)?="[^"]*"', "", html)
    assert "http://" not in without_namespaces
    assert "https://" not in without_namespaces
    assert "@import" not in html


def test_the_page_is_closed_to_the_network_by_its_own_policy(html: str) -> None:
    policies = [a["content"] or "" for _, a in Reader(html).tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert [one.split(";")[0] for one in policies] == ["default-src 'none'"]


def test_a_name_cannot_become_part_of_the_page(html: str) -> None:
    reader = Reader(html)
    assert [tag for tag, _ in reader.tags].count("script") == 1
    assert SCRIPT not in html
    assert SCRIPT in "".join(reader.words)
    assert reader.nests
    assert reader.open == []


def test_the_page_shows_every_entry_with_its_interval(html: str, run: Run) -> None:
    text = "".join(Reader(html).words)
    low, high = interval(18 / 20 * 20 - 2.5, 20)
    assert f"{100 * 15.5 / 20:.1f} [{100 * low:.1f}, {100 * high:.1f}]" in " ".join(text.split())
    for record in read_all(run.records):
        assert record.id in text
        assert record.digest in text


def test_the_page_can_be_sorted_and_filtered_with_the_keyboard(html: str) -> None:
    tags = Reader(html).tags
    heads = [tag for tag, _ in tags].count("th")
    assert heads == sum(tag == "button" and a.get("type") == "button" for tag, a in tags) > 4
    assert [a["data-filter"] for tag, a in tags if tag == "select"] == ["objective", "method", "density"]


def test_the_plots_are_drawn_in_the_pages_ink(html: str) -> None:
    assert html.count("<svg") == 2
    assert "#010203" not in html
    assert "currentColor" in html


def test_the_same_records_give_the_same_bytes(html: str, run: Run) -> None:
    page(run.root, ranked(load(run.root)), run.root / "again.html")
    assert (run.root / "again.html").read_text(encoding="utf-8") == html


def test_a_page_that_cannot_be_drawn_leaves_the_old_one(run: Run) -> None:
    fill(run)
    board = ranked(load(run.root))
    target = run.root / "board.html"
    target.write_text("old")
    with pytest.raises(KeyError):
        page(run.root, board.drop(columns="ranks"), target)
    assert target.read_text() == "old"
    page(run.root, board, target)
    assert target.read_text().startswith("<!doctype html>")
    assert sorted(path.name for path in run.root.iterdir()) == ["board.html", "checkpoints", "records"]


def test_a_record_that_does_not_hold_up_is_marked_on_the_page(run: Run) -> None:
    record = run.add()
    board = ranked(load(run.root))
    run.edit(record, lambda document: document["metrics"]["clean"].update(hits=20))
    page(run.root, board, run.root / "board.html")
    text = "".join(Reader((run.root / "board.html").read_text()).words)
    assert "1 of 1 records do not hold up" in " ".join(text.split())
    assert "metrics.clean.hits says 20, but the verdict rows give 18" in text


def test_an_empty_run_has_a_page_too(run: Run) -> None:
    page(run.root, ranked(load(run.root)), run.root / "board.html")
    assert "No records yet" in (run.root / "board.html").read_text()


def printed(run: Run, width: int = 200) -> Iterator[str]:
    out = io.StringIO()
    terminal(ranked(load(run.root)), Console(file=out, width=width))
    return iter(out.getvalue().splitlines())


def test_the_terminal_shows_a_table_per_objective(run: Run) -> None:
    fill(run)
    lines = list(printed(run))
    assert sum("toy@1, " in line for line in lines) == 2
    assert any("ranked by certified.smoothing" in line for line in lines)
    low, high = interval(17, 20)
    dense = next(line for line in lines if " dense " in line)
    assert f"{85:.1f} [{100 * low:.1f}, {100 * high:.1f}]" in dense
    assert dense.split()[0] == "–"


def test_a_narrow_terminal_loses_no_number(run: Run) -> None:
    fill(run)
    lines = list(printed(run, width=80))
    low, high = interval(18 / 20 * 20 - 2.5, 20)
    assert max(map(len, lines)) <= 80
    assert any(f"{100 * low:.1f}–{100 * high:.1f}" in line for line in lines)
    assert not any("…" in line for line in lines)
    assert sum(" hydra " in line for line in lines) == 3


def test_names_stay_on_a_terminal_that_is_too_narrow_for_everything_else(run: Run) -> None:
    fill(run)
    assert sum(" hydra " in line for line in printed(run, width=76)) == 3


def test_the_terminal_takes_no_name_for_markup(run: Run) -> None:
    run.add(name="odd", method="[red]mine[/nothing]")
    assert any("[red]mine[/nothing]" in line for line in printed(run))


def test_markdown_keeps_names_in_their_cells(run: Run) -> None:
    fill(run)
    run.add(name="odd", method="a|b\nc")
    text = markdown(ranked(load(run.root)))
    tables = [[line for line in part.splitlines() if line.startswith("|")] for part in text.split("###")[1:]]
    assert len(tables) == 2
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1
    assert "<script>" not in text
    assert "&lt;script&gt;" in text


def test_the_page_carries_each_record_as_it_was_read(html: str, run: Run) -> None:
    text = "".join(Reader(html).words)
    for path in Path(run.records).glob("*.json"):
        assert json.dumps(json.loads(path.read_text()), indent=1, sort_keys=True, ensure_ascii=False) in text
