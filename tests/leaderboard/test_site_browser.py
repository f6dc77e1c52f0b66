"""The site in Chromium, from disk: sorting, filtering, opening a record, the keyboard; nothing leaves the page."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from leaderboard.site.sources import gather
from leaderboard.site.write import write_site

from .conftest import Run, rows_of

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on PATH")
EVIL = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dozen records: two objectives, dense, three methods, two densities, some seeds; one name that wants to be a tag."""
    run = Run(tmp_path_factory.mktemp("run") / "a folder & more")
    for folder in (run.records, run.root / "checkpoints"):
        folder.mkdir(parents=True)
    for objective in ("pgd", "trades"):
        run.add(rows_of(broken=1), method="dense", density="1", objective=objective)
        for place, method in enumerate(("hydra", "lwm")):
            for density in ("1/2", "1/10"):
                run.add(rows_of(broken=2 + 3 * place), method=method, density=density, objective=objective)
    run.add(rows_of(broken=3), method="hydra", seed=1)
    run.add(rows_of(broken=7), name="evil", method=EVIL)
    return write_site(gather([run.root]), run.root / "site").parent


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


class Watched:
    """A page and whatever it asked for or complained about."""

    def __init__(self, browser: Browser, **settings: Any) -> None:
        self.page: Page = browser.new_context(**settings).new_page()
        self.page.set_default_timeout(15_000)
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.complaints.append("a dialog"), dialog.dismiss()))

    def opened(self, path: Path) -> Page:
        self.page.goto(path.as_uri())
        return self.page


@pytest.fixture
def watched(browser: Browser, site: Path) -> Iterator[Watched]:
    """Whatever a test does, no console message, no error, no dialog, and no request but for files of the site."""
    found = Watched(browser)
    yield found
    assert found.complaints == []
    assert found.requests
    assert [one for one in found.requests if not one.startswith((site.as_uri(), "data:"))] == []
    found.page.context.close()


@pytest.fixture
def board(watched: Watched, site: Path) -> Page:
    return watched.opened(site / "index.html")


def column(page: Page, number: int, table: str = "board") -> list[str]:
    """What the shown rows of a table are sorted by in one column."""
    rows = "[...document.getElementById(table).tBodies[0].rows].filter(row => row.offsetParent !== null)"
    found: list[str] = page.evaluate(f"([table, n]) => {rows}.map(row => row.cells[n].dataset.value)", [table, number])
    return found


def head(page: Page, name: str) -> Any:
    return page.locator("#board thead").get_by_role("button", name=name, exact=True)


def test_a_column_is_sorted_both_ways_and_back(board: Page) -> None:
    before = column(board, 5)
    assert before != sorted(before)
    order = {"descending": sorted(map(float, before), reverse=True), "ascending": sorted(map(float, before))}
    for sort, expected in order.items():
        head(board, "robust").click()
        heads = board.locator("#board th[aria-sort]")
        assert heads.evaluate_all("all => all.map(th => [th.innerText, th.ariaSort])") == [["robust", sort]]
        assert [float(one) for one in column(board, 5)] == expected
    head(board, "robust").click()
    assert column(board, 5) == before
    assert board.locator("#board th[aria-sort]").count() == 0


def test_entries_without_a_rank_come_last_whichever_way_ranks_are_sorted(board: Page) -> None:
    head(board, "rank").click()
    up = column(board, 1)
    head(board, "rank").click()
    down = column(board, 1)
    assert up[-2:] == down[-2:] == ["", ""]
    assert [int(one) for one in up[:-2]] == sorted(int(one) for one in down[:-2])


def test_texts_are_sorted_as_texts(board: Page) -> None:
    head(board, "entry").click()
    names = column(board, 0)
    assert names.index("hydra") < names.index("lwm")
    assert names[0] == EVIL


def test_filters_narrow_the_board_together_with_the_pictures_and_the_address(board: Page) -> None:
    assert board.locator("#board tbody tr:visible").count() == 11
    board.get_by_label("objective").select_option("trades")
    board.get_by_label("density").select_option("0.1")
    assert column(board, 0) == ["hydra", "lwm"]
    assert board.locator("output").inner_text() == "2 of 11"
    assert board.locator("figure:visible").count() == board.locator("figure[data-objective=trades]").count() > 0
    assert board.url.endswith("#objective=trades&density=0.1")
    board.get_by_role("button", name="show all").click()
    board.wait_for_function("document.querySelector('output').textContent === '11 of 11'")
    assert "#" not in board.url


def test_a_shared_address_opens_with_its_filters(watched: Watched, site: Path) -> None:
    watched.page.goto((site / "index.html").as_uri() + "#objective=pgd&search=lw")
    assert set(column(watched.page, 0)) == {"lwm"}
    assert watched.page.get_by_label("objective").input_value() == "pgd"


def test_the_search_finds_every_word_anywhere(board: Page) -> None:
    board.get_by_label("find").fill("HYDRA trades")
    assert column(board, 0) == ["hydra", "hydra"]
    board.get_by_label("find").fill("nothing like it")
    assert column(board, 0) == []
    assert board.locator("output").inner_text() == "0 of 11"


def test_a_record_opens_from_the_board_and_leads_back(board: Page) -> None:
    row = board.locator("#board tbody tr", has_text="lwm").first
    row.get_by_role("link", name="0", exact=True).click()
    assert board.get_by_role("heading", level=1).inner_text().startswith("lwm, cnn_small, density 1/2, seed 0")
    board.get_by_role("row", name="hydra, seed 0").get_by_role("link").click()
    assert board.get_by_role("heading", level=1).inner_text().startswith("hydra")
    board.get_by_label("kind").select_option("proved by crown only")
    assert column(board, 0, "samples") == ["6", "7", "8"]
    board.get_by_role("link", name="hydra", exact=True).click()
    assert board.locator("#board tbody tr").count() == 4
    board.get_by_role("link", name="Board").click()
    assert board.locator("#board tbody tr").count() == 11


def test_of_a_long_table_the_first_rows_are_shown_until_all_are_asked_for(watched: Watched, site: Path) -> None:
    page = watched.opened(site / "reported.html")
    every = page.locator("#reported tbody tr").count()
    assert every > 200
    assert len(column(page, 3, "reported")) == 200
    assert page.locator("output").inner_text() == f"{every} of {every}, the first 200 shown"
    page.get_by_label("dataset").select_option("MNIST")
    assert set(column(page, 3, "reported")) == {"MNIST"}
    page.get_by_role("button", name="show all").click()
    page.get_by_role("button", name="show the rest").click()
    assert len(column(page, 3, "reported")) == every
    page.locator("#reported thead").get_by_role("button", name="dataset", exact=True).click()
    names = column(page, 3, "reported")
    assert len(names) == 200
    assert names == page.evaluate("names => [...names].sort((a, b) => a.localeCompare(b))", names)


def test_everything_can_be_done_with_the_keyboard_and_the_focus_is_seen(board: Page) -> None:
    board.get_by_label("objective").focus()
    board.keyboard.press("ArrowDown")
    assert board.locator("output").inner_text() != "11 of 11"
    seen = []
    for _ in range(40):
        board.keyboard.press("Tab")
        seen.append(board.evaluate("document.activeElement.innerText || document.activeElement.tagName"))
        assert board.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none", seen[-1]
        if seen[-1] == "certified":
            break
    assert "show all" in seen
    board.keyboard.press("Enter")
    assert board.locator("#board th[aria-sort]").get_attribute("aria-sort") == "descending"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_no_page_is_wider_than_the_screen_and_text_is_readable(browser: Browser, site: Path, scheme: str) -> None:
    found = Watched(browser, viewport={"width": 390, "height": 844}, color_scheme=scheme)
    for path in [*site.glob("*.html"), *(site / "record").glob("*lwm*d1over2*.html")]:
        page = found.opened(path)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert page.evaluate(CONTRAST) >= 4.5  # WCAG AA
    assert found.complaints == []
    found.page.context.close()


# The least contrast of any text with the page's ground.
CONTRAST = """() => {
  const light = colour => {
    const parts = colour.match(/[\\d.]+/g).slice(0, 3).map(one => one / 255);
    const [r, g, b] = parts.map(one => one <= 0.03928 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = light(getComputedStyle(document.body).backgroundColor);
  return Math.min(...[...document.querySelectorAll("p, td, th, small, a, dd, dt, h1, h2, b, .badge")].map(one => {
    const own = light(getComputedStyle(one).color);
    return (Math.max(own, ground) + 0.05) / (Math.min(own, ground) + 0.05);
  }));
}"""
