"""The static site as text: what its pages show, that they ask for nothing outside, and how they are written."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pandas as pd
import pytest

from leaderboard import ledger
from leaderboard.board import UNRANKED
from leaderboard.errors import BoardError
from leaderboard.plot import Curve, front
from leaderboard.record import read_all
from leaderboard.site import write
from leaderboard.site.downloads import downloads
from leaderboard.site.plots import figures, file_name, tasks
from leaderboard.site.record_pages import neighbours
from leaderboard.site.samples import curves, disagreements
from leaderboard.site.sources import gather
from leaderboard.site.write import write_site
from leaderboard.stats import interval

from .conftest import Run, cell_of, rows_of

SCRIPT = "<script>alert(1)</script>"
VOID = {"link", "meta", "path", "img", "line", "input", "option"}


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
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            self.nests &= bool(self.open) and self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, name: str) -> list[str]:
        return [value or "" for _, attributes in self.tags for key, value in attributes.items() if key == name]


def fill(run: Run) -> None:
    """Two objectives, one with smoothing as its headline, a dense reference, two densities and two seeds."""
    run.add(rows_of(broken=1), method="dense", density="1")
    for method, density, seed in (("hydra", "1/2", 0), ("hydra", "1/2", 1), ("hydra", "1/4", 0), (SCRIPT, "1/2", 0)):
        name = "evil #1? & %41 'é'" if method == SCRIPT else None
        run.add(rows_of(broken=2 + seed), name=name, method=method, density=density, seed=seed)
    run.add(objective="stability", headline="certified.smoothing")


def site_of(run: Run, name: str = "site") -> Path:
    return write_site(gather([run.root]), run.root / name, {"hydra": "Learns which weights to keep."}).parent


def reader(site: Path, name: str | Path = "index.html") -> Reader:
    return Reader((site / name).read_text(encoding="utf-8"))


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that write a site several times: pictures and the papers' table take most of the time."""
    monkeypatch.setattr(write, "figures", lambda task: [])
    monkeypatch.setattr(write.pages, "reported", lambda: "")


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(tmp_path_factory.mktemp("run"))
    for folder in (run.records, run.root / "checkpoints"):
        folder.mkdir()
    fill(run)
    return run


@pytest.fixture(scope="module")
def site(filled: Run) -> Path:
    return site_of(filled)


# ---- what may not happen ---------------------------------------------------------------------------------------------


def test_no_page_asks_for_anything_outside_the_site_and_every_address_leads_to_a_file_of_it(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) == 1 + 2 + 3 + 6  # board; methods, reported; a page per method; a page per record
    for path in pages:
        html = path.read_text(encoding="utf-8")
        found = Reader(html)
        for address in [*found.all("href"), *found.all("src")]:
            assert address == "data:," or (path.parent / unquote(address)).resolve().is_file(), address
        assert "//" not in " ".join([*found.all("href"), *found.all("src"), *found.all("style")])
        assert not {"srcset", "action", "poster", "onclick"} & {name for _, one in found.tags for name in one}
        assert re.findall(r"https?://|@import|url\(", html) == []
    for path in [*site.rglob("*.svg"), *site.rglob("*.css"), *site.rglob("*.js")]:
        text = re.sub(r'xmlns(:\w+)?="[^"]*"', "", path.read_text(encoding="utf-8"))
        assert re.findall(r"https?://|@import|url\((?!#)", text) == []


def test_every_page_is_closed_to_the_network_by_its_own_policy(site: Path) -> None:
    for path in site.rglob("*.html"):
        tags = reader(site, path).tags
        policies = [one["content"] or "" for _, one in tags if one.get("http-equiv") == "Content-Security-Policy"]
        assert [one.split(";")[0] for one in policies] == ["default-src 'none'"]
        assert "script-src 'self';" in policies[0]


def test_a_name_cannot_become_part_of_a_page(site: Path) -> None:
    seen = 0
    for path in site.rglob("*.html"):
        found = reader(site, path)
        assert [tag for tag, _ in found.tags].count("script") == 1
        assert SCRIPT not in path.read_text(encoding="utf-8")
        assert found.nests, path
        assert found.open == [], path
        seen += SCRIPT in "".join(found.words)
    assert seen >= 4  # the board, the method, the list of methods, the record
    for path in site.rglob("*.svg"):
        assert "<script" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("words", ["../../x", "a/b", "", ".hidden", "é" * 300, "a" * 300, "CON"])
def test_the_files_of_a_method_stay_in_their_folder_whatever_its_name(words: str) -> None:
    name = file_name(words, "html")
    assert "/" not in name
    assert not name.startswith((".", "-."))
    assert len(name.encode()) < 120


def test_different_names_have_different_files() -> None:
    names = ["a b", "a-b", "a/b", "A b", "a*b"]
    assert len({file_name(one, "html") for one in names}) == len(names)


# ---- what is shown ---------------------------------------------------------------------------------------------------


def test_the_board_shows_every_entry_with_its_interval_and_leads_to_its_records(site: Path, filled: Run) -> None:
    found = reader(site)
    low, high = interval(18 / 20 * 20 - 2.5, 20)
    assert f"{100 * 15.5 / 20:.1f} [{100 * low:.1f}, {100 * high:.1f}]" in found.text
    links = {unquote(one) for one in found.all("href")}
    for record in read_all(filled.records):
        assert f"record/{record.id}.html" in links
    assert found.all("data-status").count("measured") == 5


def test_a_bar_of_ranks_spans_what_the_tests_leave_possible(site: Path) -> None:
    html = (site / "index.html").read_text(encoding="utf-8")
    assert '1 (1–2)<i class="bar" style="--low:0.0%;--high:100.0%;--at:25.0%">' in html


def test_tables_are_sorted_by_real_buttons_and_filters_are_named(site: Path) -> None:
    tags = reader(site).tags
    places = [i for i, (tag, one) in enumerate(tags) if tag == "th" and one.get("scope") == "col"]
    buttons = [tags[i + 1][0] == "button" and tags[i + 1][1].get("type") == "button" for i in places]
    assert sum(buttons) >= 9
    assert [one["name"] for tag, one in tags if tag == "select"] == ["objective", "method", "density"]


def test_a_record_page_shows_counts_provenance_layers_and_the_record_itself(site: Path, filled: Run) -> None:
    record = next(one for one in read_all(filled.records) if one.cell.objective.name == "stability")
    text = reader(site, f"record/{record.id}.html").text
    assert "18 of 20" in text
    assert record.digest in text
    assert "12 of 24 weights (50.00%)" in text
    assert "conv1 4 16 25.00 %" in text
    assert "ibp: 2 close margins decided again in float64" in text
    assert " ".join(json.dumps(record.original, indent=1, sort_keys=True, ensure_ascii=False).split()) in text
    assert (site / "record" / f"{record.id}.toml").read_text(encoding="utf-8").startswith("[suite]")


def test_a_method_page_shows_what_the_caller_says_of_it_and_its_entries_only(site: Path) -> None:
    text = reader(site, f"method/{file_name('hydra', 'html')}").text
    assert "Learns which weights to keep." in text
    assert "stability" in text
    assert "alert" not in text


def test_reported_numbers_stand_on_a_page_of_their_own(site: Path) -> None:
    assert "Adv-ADMM" in reader(site, "reported.html").text
    assert "Adv-ADMM" not in reader(site).text


@pytest.mark.usefixtures("no_pictures")
def test_a_record_that_does_not_hold_up_is_marked(run: Run) -> None:
    record = run.add()
    run.edit(record, lambda document: document["metrics"]["clean"].update(hits=20))
    site = site_of(run)
    assert "1 of 1 records do not hold up" in reader(site).text
    assert "metrics.clean.hits says 20, but the verdict rows give 18" in reader(site, f"record/{record.id}.html").text


@pytest.mark.usefixtures("no_pictures")
def test_a_changed_ledger_is_named_and_a_sound_one_is_shown(run: Run) -> None:
    record = run.add()
    files = {path.name: write.hashlib.sha256(path.read_bytes()).hexdigest() for path in run.records.iterdir()}
    entry = ledger.append(run.records, "entered", record.id, record.digest, files)
    assert f"0 entered {entry.at} {record.digest[:16]}" in reader(site_of(run), f"record/{record.id}.html").text
    (run.records / record.evidence.verdicts).rename(run.records / "gone")
    with pytest.raises(Exception, match="missing"):
        site_of(run)


def test_records_of_two_folders_share_a_site_and_equal_ones_are_taken_once(run: Run, tmp_path: Path) -> None:
    run.add()
    other = Run(tmp_path / "other")
    for folder in (other.records, other.root / "checkpoints"):
        folder.mkdir(parents=True)
    other.add()
    other.add(name="tale", suite="tale", version=3)
    contents = gather([run.root, other.records])
    assert sorted(one.record.suite for one in contents.kept.values()) == ["tale", "toy"]
    assert contents.title == "tale@3, toy@1"
    later = {"created": "2026-11-22T09:00:00Z"}
    other.edit(other.read("toy@1-cnn_small-hydra-pgd-d1over2-s0"), lambda document: document["timing"].update(later))
    assert len(gather([run.root, other.root]).kept) == 2  # timing is outside the digest
    other.edit(other.read("toy@1-cnn_small-hydra-pgd-d1over2-s0"), lambda document: document["provenance"].update(threads=2))
    with pytest.raises(BoardError, match="name only one of them"):
        gather([run.root, other.root])


# ---- files -----------------------------------------------------------------------------------------------------------


def bytes_of(site: Path) -> dict[str, bytes]:
    return {str(path.relative_to(site)): path.read_bytes() for path in sorted(site.rglob("*")) if path.is_file()}


def test_the_same_records_give_the_same_bytes(site: Path, filled: Run) -> None:
    again = bytes_of(site_of(filled, "again"))
    assert again == bytes_of(site)
    assert len(again) > 20


def test_downloads_hold_the_board_in_three_forms(filled: Run) -> None:
    contents = gather([filled.root])
    files = downloads(contents)
    entries = json.loads(files["board.json"])
    tables = [pd.read_csv(write_to(filled, files["board.csv"])), pd.read_parquet(write_to(filled, files["board.parquet"]))]
    assert [one["method"] for one in entries] == contents.board["method"].tolist()
    for table in tables:
        assert table["value"].tolist() == contents.board["value"].tolist()
    assert entries[1]["clean:seeds"] == contents.board["clean:seeds"][1]
    assert [one["record"] for one in json.loads(files["records.json"])] == contents.frame["record"].tolist()
    assert {one["rank"] for one in entries} >= {UNRANKED, "1"}


def write_to(run: Run, data: bytes) -> Path:
    path = run.root / "download"
    path.write_bytes(data)
    return path


@pytest.mark.usefixtures("no_pictures")
def test_pages_of_records_that_are_gone_are_removed(run: Run) -> None:
    fill(run)
    site = site_of(run)
    before = bytes_of(site)
    for path in run.records.glob("evil*"):
        path.unlink()
    gone = before.keys() - bytes_of(site_of(run)).keys()
    assert {name.partition("/")[0] for name in gone} == {"record", "method"}
    assert len([name for name in gone if name.startswith("record/evil")]) == 2


def test_a_folder_with_other_files_is_left_alone(run: Run) -> None:
    run.add()
    (run.root / "mine").mkdir()
    (run.root / "mine" / "thesis.tex").write_text("all")
    with pytest.raises(BoardError, match="holds other files than a site"):
        site_of(run, "mine")
    assert bytes_of(run.root / "mine") == {"thesis.tex": b"all"}


@pytest.mark.usefixtures("no_pictures")
def test_a_killed_writer_leaves_whole_files_and_the_next_one_mends_the_rest(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(run)
    whole = bytes_of(site_of(run, "whole"))

    class Killed(BaseException):
        pass

    for last in (0, 12):
        calls = iter(range(last))

        def move(old: Path, new: Path, rest: object = calls) -> None:
            if next(rest, None) is None:  # type: ignore[call-overload]
                raise Killed
            Path(old).replace(new)

        with monkeypatch.context() as patch:
            patch.setattr(write.os, "replace", move)
            with pytest.raises(Killed):
                site_of(run, "killed")
        assert bytes_of(run.root / "killed").items() <= whole.items()
    site_of(run, "killed")
    assert bytes_of(run.root / "killed") == whole


# ---- samples ---------------------------------------------------------------------------------------------------------


def test_disagreements_are_counted_as_by_hand() -> None:
    # 20 samples: 0-5 proved by ibp and crown, 6-8 by crown only, 9-13 open, 14-15 broken by apgd only, 16-17 by both, 2 wrong
    found = {one.title: one.samples for one in disagreements(cell_of(), rows_of())}
    assert found["survives every attack, and no verifier proves it"] == [9, 10, 11, 12, 13]
    assert found["broken by apgd only"] == [14, 15]
    assert found["proved by crown only"] == [6, 7, 8]
    assert set(found) - {"smoothing: the smoothed classifier gives another class"} == {
        "survives every attack, and no verifier proves it", "broken by apgd only", "proved by crown only",
    }


def test_a_sample_that_a_later_attack_never_saw_is_not_broken_by_one_attack_only() -> None:
    rows = rows_of()
    rows.loc[16:17, ["survived:apgd", "distance:apgd"]] = [False, np.nan]  # broken by pgd-50 already
    assert "broken by pgd-50 only" not in {one.title for one in disagreements(cell_of(), rows)}


def test_a_timeout_and_an_error_are_disagreements_of_their_own() -> None:
    rows = rows_of()
    rows.loc[9, "status:crown"], rows.loc[10, "status:crown"] = "timeout", "error"
    found = {one.title: one.samples for one in disagreements(cell_of(), rows)}
    assert found["crown: not settled in time"] == [9]
    assert found["crown: could not be asked"] == [10]


def brute(rows: pd.DataFrame, radius: float) -> float:
    """The share that is right with no witness within the radius, sample by sample."""
    samples = zip(rows["label"], rows["predicted"], rows["survived:ddn"], rows["distance:ddn"])
    return sum(label == seen and not (not survived and far <= radius) for label, seen, survived, far in samples) / len(rows)


def minimal(n: int = 300) -> tuple[dict, pd.DataFrame]:  # type: ignore[type-arg]
    """Rows with the minimal distances of one attack and the radii of one verifier, none above the other."""
    rng = np.random.default_rng(0)
    distance = rng.uniform(0.01, 0.3, n)
    cell = cell_of(
        attacks=[{"name": "ddn", "label": "ddn", "norm": "linf", "eps": "1/2"}],
        verifiers=[{"name": "exact", "label": "exact", "norm": "linf", "eps": "1/10"}],
    )
    rows = pd.DataFrame({
        "index": np.arange(n), "label": 0, "predicted": np.where(np.arange(n) % 10 == 9, 1, 0), "verdict": "open", "by": "",
        "survived:ddn": False, "distance:ddn": distance, "status:exact": "proved",
        "radius:exact": np.where(np.arange(n) % 10 == 9, 0.0, distance * rng.uniform(0.3, 1, n)), "margin:exact": 1.0,
    })  # fmt: skip
    rows.loc[rows["predicted"] == 1, "distance:ddn"] = np.nan
    return cell, rows


def at(line: Curve, radius: float) -> float:
    """The step that the page draws, read by hand."""
    if line.proven:
        return next((share for known, share in zip(line.radii, line.shares) if known >= radius), 0.0)
    return next(share for known, share in zip(reversed(line.radii), reversed(line.shares)) if known <= radius)


def test_curves_enclose_robust_accuracy_at_every_radius() -> None:
    cell, rows = minimal()
    attacked, proven = curves(cell, rows)["linf"]
    assert (attacked.proven, proven.proven, len(attacked.radii)) == (False, True, 101)
    for radius in np.linspace(0, 0.35, 71):
        assert brute(rows, radius) <= at(attacked, radius) <= brute(rows, radius - 0.01)
        assert at(proven, radius) <= (rows["radius:exact"] >= radius).mean()
        assert at(proven, radius) <= at(attacked, radius)


def test_an_attack_at_one_eps_alone_is_no_curve() -> None:
    assert "linf" not in curves(cell_of(), rows_of())
    assert [one.name for one in curves(cell_of(), rows_of())["l2, smoothed classifier"]] == ["smoothing"]


def test_neighbours_differ_on_as_many_images_as_counted_one_by_one(filled: Run) -> None:
    contents = gather([filled.root])
    hits = dict(zip(contents.frame["record"], contents.frame["outcome"]))
    found = neighbours(contents.frame)
    compared = 0
    for record, others in found.items():
        for other in others:
            pairs = list(zip(hits[record].tolist(), hits[other.record].tolist()))
            assert other.only_this == sum(a and not b for a, b in pairs)
            assert other.only_other == sum(b and not a for a, b in pairs)
            compared += other.only_this + other.only_other
    assert compared > 0


# ---- pictures --------------------------------------------------------------------------------------------------------


def test_the_front_is_what_no_other_entry_beats() -> None:
    one, other = pd.Series([1, 2, 3, 3, 2]), pd.Series([5, 4, 1, 2, 4])
    assert front(one, other) == [True, True, False, True, True]


def test_pictures_take_the_readers_ink_and_have_a_density_plot_trades_and_curves(site: Path) -> None:
    drawn = {path.name.partition("-")[0]: path.read_text(encoding="utf-8") for path in (site / "plots").iterdir()}
    assert sorted(drawn) == ["curves", "density", "pareto"]
    for svg in drawn.values():
        assert "#010203" not in svg
        assert "currentColor" in svg
        assert "prefers-color-scheme:dark" in svg
    shown = reader(site).text
    assert "robust accuracy, % against clean accuracy, %" in shown
    assert "against stored weights, kB" in shown


def test_mean_curves_of_seeds_are_drawn_per_density(filled: Run) -> None:
    contents = gather([filled.root])
    one = contents.board[contents.board["seeds"].map(len) == 2]
    lines = [Curve("smoothing", [0.0, 0.1, 0.2], [share, share, 0.4], proven=True) for share in (0.9, 0.7)]
    known = {record: {"l2": [line]} for record, line in zip(one["records"].iloc[0], lines)}
    ((drawn,),) = map(figures, tasks(replace(contents, board=one), known))
    assert drawn.file.startswith("curves-l2")
    assert "density 0.5" in drawn.svg
    assert "hydra, smoothing, proven" in drawn.svg
