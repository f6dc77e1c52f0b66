"""A release says what the records said on that day, for ever; what changed since stands in its changelog, with the reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import save_file

import leaderboard.releases
from leaderboard import ledger
from leaderboard.board import load, ranked
from leaderboard.canonical import sha256_file
from leaderboard.changes import Change, between, changelog
from leaderboard.entering import adopt, retire
from leaderboard.errors import BoardError, LeaderboardError, RefusedError
from leaderboard.record import Record
from leaderboard.releases import BOARDS, UNFINISHED, Release, freeze, page, read_board, read_release, releases, rewritten

from .conftest import Run, rows_of

OLD = Path(__file__).parent / "old" / "release-1"  # schema 1: written once, never again
MADE_BY = {"version": "0.1.0", "revision": "f" * 40, "dirty": False}
DEFINITION = 'title = "Toys"\ndescription = "For *tests*."\nsuites = ["toy@1", "toy@2"]\n'
EMPTY = {"conv1.weight": np.zeros(1, np.float32)}


class Board:
    """A board of toy records, of which releases are made."""

    def __init__(self, root: Path) -> None:
        self.run, self.boards, self.records = Run(root), root / "boards", root / "all"
        for folder in (self.run.records, root / "checkpoints", self.boards / "toy@1", self.records):
            folder.mkdir(parents=True)
        (self.boards / "toy@1" / "board.toml").write_text(DEFINITION)
        (self.records / "toy@1").symlink_to(root)

    def release(self, name: str) -> Release:
        adopt(self.run.records)
        return freeze("toy@1", name, self.boards, self.records, MADE_BY)

    def folder(self, name: str) -> Path:
        return self.boards / "toy@1" / name

    def challenge(self, record: Record, samples: Sequence[int], refutes: list[str], was: str = "robust") -> None:
        """As bench.challenge keeps one."""
        place = self.run.records / "challenges"
        place.mkdir(exist_ok=True)
        path = place / f"{record.id}.1.json"
        save_file(EMPTY, path.with_suffix(".safetensors"))
        made = [{"index": one, "was": was, "refutes": refutes, "distance": 0.1, "predicted": 1} for one in samples]
        path.write_text(json.dumps({
            "schema": 1, "record": record.id, "digest": record.digest, "by": "A. Name", "when": "2026-11-22T00:00:00+00:00",
            "witnesses": f"{record.id}.1.safetensors", "samples": made,
        }))  # fmt: skip
        files = {f"challenges/{one.name}": sha256_file(one) for one in (path, path.with_suffix(".safetensors"))}
        event = "contradicted" if was == "certified" else "challenged"
        ledger.append(self.run.records, event, record.id, record.digest, files)


@pytest.fixture
def board(tmp_path: Path) -> Board:
    return Board(tmp_path)


# ---- what a release says ---------------------------------------------------------------------------------------------


def test_a_release_of_schema_1_is_drawn_for_ever_as_it_was(tmp_path: Path) -> None:
    shutil.copytree(OLD, tmp_path / "old")
    assert page(read_release(tmp_path / "old")) == (OLD / "board.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted(BOARDS.glob("*/*/release.json")), ids=lambda path: path.parent.name)
def test_a_committed_release_is_whole_and_is_drawn_as_it_was(path: Path) -> None:
    assert page(read_release(path.parent)) == path.with_name("board.md").read_text(encoding="utf-8")
    assert read_release(path.parent) in releases(path.parent.parent)


@pytest.mark.parametrize("path", sorted(BOARDS.glob("*/board.toml")), ids=lambda path: path.parent.name)
def test_the_boards_that_come_with_sparsecert_can_be_read(path: Path) -> None:
    assert read_board(path.parent.name, BOARDS).board == path.parent.name


def test_a_release_says_what_the_records_say(board: Board) -> None:
    board.run.add(rows_of(broken=2), method="a")
    board.run.add(rows_of(broken=6), method="b")
    last = board.run.add(method="dense", density="1")
    board.run.edit(last, lambda document: document["timing"].update(created="2026-12-01T10:00:00+01:00"))
    made = board.release("1.0")
    entries = ranked(load(board.run.root))
    frozen = pd.DataFrame(made.entries)
    for name in ("method", "value", "robust.worst:low", "robust.worst:high", "certified.union", "rank", "ranks", "records"):
        assert frozen[name].tolist() == entries[name].tolist()
    assert made.date == "2026-12-01T10:00:00+01:00"
    assert made.ledgers == {"toy@1": ledger.head(board.run.records)}
    assert made.without_records == ["toy@2"]
    assert {one.id: one.digest for one in made.records} == {one.stem: board.run.read(one.stem).digest
                                                            for one in board.run.records.glob("*.json")}  # fmt: skip
    table = pd.read_parquet(board.folder("1.0") / "board.parquet")
    assert table["value"].tolist() == entries["value"].tolist()
    assert [one.tolist() for one in table["records"]] == entries["records"].tolist()
    assert pd.read_csv(board.folder("1.0") / "board.csv")["robust.worst"].tolist() == entries["robust.worst"].tolist()
    drawn = page(made)
    assert "# Toys: 1.0" in drawn
    assert "For \\*tests\\*." in drawn
    assert "left out: toy@2" in drawn
    assert made.table.strip() in drawn


def test_the_same_records_give_the_same_release_whatever_the_clock_says(board: Board, tmp_path: Path) -> None:
    board.run.add()
    one = board.release("1.0")
    other = freeze("toy@1", "1.0", shutil.copytree(board.boards, tmp_path / "other", ignore=shutil.ignore_patterns("1.0")),
                   board.records, MADE_BY)  # fmt: skip
    assert one == other


def test_every_changed_byte_of_a_release_is_noticed(board: Board) -> None:
    board.run.add()
    board.release("1.0")
    random = np.random.default_rng(0)
    for path in board.folder("1.0").iterdir():
        whole = path.read_bytes()
        for at in random.integers(len(whole), size=40 if path.suffix == ".json" else 4):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 + int(random.integers(255)))]) + whole[at + 1 :])
            with pytest.raises(BoardError):
                read_release(board.folder("1.0"))
        path.write_bytes(whole)
    read_release(board.folder("1.0"))


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_a_name_is_given_once_and_never_again(board: Board) -> None:
    board.run.add()
    board.release("1.0")
    with pytest.raises(BoardError, match=r"toy@1/1\.0 is there already and never changes"):
        board.release("1.0")
    with pytest.raises(BoardError, match="a release is called like"):
        board.release("../1.1")


def test_a_record_with_a_problem_stops_the_release(board: Board) -> None:
    record = board.run.add()
    adopt(board.run.records)
    board.run.edit(record, lambda document: document["metrics"]["clean"].update(hits=20), sign=False)
    with pytest.raises(RefusedError, match="edited after writing"):
        board.release("1.0")
    assert not board.folder("1.0").exists()


def test_records_of_other_protocols_or_other_suites_do_not_mix(board: Board) -> None:
    board.run.add(method="a")
    board.run.add(method="b", budget={"pretrain": 2})
    with pytest.raises(BoardError, match="different settings"):
        board.release("1.0")
    shutil.rmtree(board.run.records)
    board.run.records.mkdir()
    board.run.add(version=2)
    with pytest.raises(RefusedError, match="lies in the folder of toy@1, but is of another suite"):
        board.release("1.0")


def test_a_board_that_is_none_is_named(board: Board) -> None:
    with pytest.raises(BoardError, match=r"unknown board 'toys@1'; known: .*toy@1"):
        read_board("toys@1", board.boards)
    (board.boards / "toy@1" / "board.toml").write_text('title = "x"\ncolour = 3\n')
    with pytest.raises(BoardError, match="no definition of a board"):
        read_board("toy@1", board.boards)


def test_a_board_without_any_record_is_not_released(board: Board) -> None:
    with pytest.raises(BoardError, match="there are no records of toy@1, toy@2"):
        board.release("1.0")


def cut(board: Board, lines: int) -> None:
    """Takes so many lines off the end of the ledger."""
    path = board.run.records / ledger.NAME
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-lines]))


def test_a_ledger_whose_tail_was_cut_off_is_not_released_again(board: Board) -> None:
    record = board.run.add()
    adopt(board.run.records)
    board.challenge(record, [10], ["pgd-50", "apgd"])
    board.release("1.0")
    head = ledger.head(board.run.records)
    assert rewritten(board.run.records, "toy@1", board.boards) == []
    cut(board, 1)
    shutil.rmtree(board.run.records / "challenges")
    with pytest.raises(RefusedError, match=f"toy@1: the line {head[:12]}.* at release toy@1/1.0 .* its history was rewritten"):
        board.release("1.1")
    assert [head[:12] in one for one in rewritten(board.run.records, "toy@1", board.boards)] == [True]
    assert rewritten(board.run.records, "toy@2", board.boards) == []
    board.challenge(record, [10], ["pgd-50"])  # another line in its place
    with pytest.raises(RefusedError, match="its history was rewritten"):
        board.release("1.1")


def test_what_a_killed_release_left_is_no_release_and_is_swept_away(board: Board) -> None:
    board.run.add()
    first = board.release("1.0")
    for name in (f"{UNFINISHED}abc", ".kept"):
        shutil.copytree(board.folder("1.0"), board.folder(name))
    (board.folder(f"{UNFINISHED}abc") / "release.json").write_text("{")
    assert releases(board.folder("")) == [first]
    second = board.release("1.1")
    assert second.before is not None
    assert second.before.digest == first.digest
    assert {path.name for path in board.folder("").iterdir()} == {"board.toml", "1.0", "1.1", ".kept"}


def test_releases_at_once_stand_in_one_chain(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one is being written, another waits, so that it names that one as the one before."""
    board.run.add()
    adopt(board.run.records)
    write, waiting = leaderboard.releases._write, list[Future[Release]]()
    with ThreadPoolExecutor(1) as pool:

        def interrupted(*args: Any) -> Release:
            if not waiting:
                waiting.append(pool.submit(board.release, "1.1"))
                assert wait(waiting, timeout=1.5).not_done, "the other one did not wait"
            return write(*args)

        monkeypatch.setattr(leaderboard.releases, "_write", interrupted)
        board.release("1.0")
        waiting[0].result(timeout=60)
    assert [one.release for one in releases(board.folder(""))] == ["1.0", "1.1"]


@pytest.mark.parametrize("value", ["1e999", '"\\ud800"', "NaN"])
def test_what_no_release_can_hold_is_one_sentence(board: Board, value: str) -> None:
    board.run.add()
    board.release("1.0")
    path = board.folder("1.0") / "release.json"
    path.write_text(path.read_text().replace('"arch": "cnn_small"', f'"arch": {value}', 1))
    with pytest.raises(BoardError, match=r"release\.json"):
        read_release(board.folder("1.0"))


# ---- from one release to the next ------------------------------------------------------------------------------------


def words(change: Change) -> tuple[str, str, str, str]:
    method = change.entry.split(": ")[1].split(",")[0]
    return change.kind, method, change.what, "; ".join(change.why)


def changed(board: Board, do: Callable[[], object]) -> list[tuple[str, str, str, str]]:
    before = board.release("1.0")
    do()
    after = board.release("1.1")
    assert after.before is not None
    assert (after.before.release, after.before.digest) == ("1.0", before.digest)
    return [words(one) for one in between(before, after)]


def again(board: Board, record: Record, rows: pd.DataFrame, code: str = "c" * 64) -> None:
    """A correction: the cell measured again, its old record moved away."""
    before = retire(board.run.records, record.id)
    document = board.run.add(rows, name=record.id, method=record.cell.method.name).document
    document["supersedes"], document["provenance"]["code"] = before, code
    board.run.write(document)


def test_nothing_changed_is_said(board: Board) -> None:
    board.run.add()
    assert changed(board, lambda: None) == []
    assert "Nothing changed." in (board.folder("1.1") / "CHANGELOG.md").read_text()


def test_who_enters_moves_the_others(board: Board) -> None:
    board.run.add(rows_of(n=60, broken=20), method="a")
    found = changed(board, lambda: board.run.add(rows_of(n=60, broken=0), method="b"))
    assert found == [
        ("entered", "b", "rank 1, robust.worst 96.67", "new record"),
        ("moved", "a", "rank 1 → 2", "others of its group changed"),
    ]
    text = (board.folder("1.1") / "CHANGELOG.md").read_text()
    assert text == changelog(*releases(board.folder("")))
    assert "### Entered\n\n- **toy@1, pgd: b, cnn\\_small, density 0.5**: rank 1, robust.worst 96.67. Why: new record." in text


def test_more_seeds_of_an_entry_are_a_reason(board: Board) -> None:
    board.run.add(rows_of(broken=4), seed=0)
    found = changed(board, lambda: [board.run.add(rows_of(broken=6), seed=seed) for seed in (1, 2)])
    ((kind, _, what, why),) = found
    assert (kind, why) == ("moved", "more seeds: 1, 2")
    assert "robust.worst 70.00 → 63.33" in what


def test_a_correction_is_a_reason_and_the_other_code_too(board: Board) -> None:
    record = board.run.add(rows_of(broken=4))
    ((kind, _, what, why),) = changed(board, lambda: again(board, record, rows_of(broken=2), "e" * 64))
    assert kind == "moved"
    assert "robust.worst 70.00 → 80.00" in what
    assert why == f"{record.id} superseded by another code revision, {'e' * 12} instead of {'c' * 12}"


def test_a_correction_keeps_the_old_record_readable_in_its_place_and_in_the_ledger(board: Board) -> None:
    record = board.run.add(rows_of(broken=4))
    board.release("1.0")
    again(board, record, rows_of(broken=2))
    board.release("1.1")
    kept = board.run.root / "superseded" / f"{record.id}-{record.digest[:8]}.json"
    assert json.loads(kept.read_text()) == record.original
    events = [(one.event, one.digest) for one in ledger.entries(board.run.records)]
    assert events == [
        ("entered", record.digest), ("superseded", record.digest), ("entered", board.run.read(record.id).digest),
    ]
    assert ledger.problems(board.run.records) == []
    assert load(board.run.root)["robust.worst"].tolist() == [16 / 20]


def test_a_challenge_is_a_reason_and_lowers_the_number(board: Board) -> None:
    record = board.run.add(rows_of(broken=4))
    ((kind, _, what, why),) = changed(board, lambda: board.challenge(record, [10, 11], ["pgd-50", "apgd"]))
    assert kind == "moved"
    assert "robust.worst 70.00 → 60.00" in what
    assert "robust.pgd-50 80.00 → 70.00" in what
    assert "measured → challenged" in what
    assert "clean" not in what
    assert why == f"challenge: A. Name refuted 2 samples of {record.id}"
    assert "2 samples refuted by A. Name" in page(read_release(board.folder("1.1")))


@pytest.mark.parametrize(
    "was, why", [("robust", "a challenge has vanished: A. Name had refuted 1 sample"), ("certified", "the contradiction of")]
)
def test_a_challenge_that_vanished_is_a_reason_of_its_own(board: Board, was: str, why: str) -> None:
    record = board.run.add(rows_of(broken=0))
    adopt(board.run.records)
    board.challenge(record, [0], ["ibp", "crown"] if was == "certified" else ["pgd-50"], was)
    before = board.release("1.0")
    cut(board, 1)
    shutil.rmtree(board.run.records / "challenges")
    shutil.rmtree(board.folder("1.0"))
    (found,) = between(before, board.release("1.1"))
    assert len(found.why) == 1
    assert found.why[0].startswith(why)


def test_a_contradiction_takes_the_rank_and_the_certificate(board: Board) -> None:
    record = board.run.add(rows_of(n=60, broken=0), method="a")
    board.run.add(rows_of(n=60, broken=20), method="b")
    found = changed(board, lambda: board.challenge(record, [0], ["ibp", "crown"], "certified"))
    assert {method: why for _, method, _, why in found} == {
        "a": f"contradiction: A. Name found a witness inside a certificate of {record.id}",
        "b": "others of its group changed",
    }
    (own,) = [what for _, method, what, _ in found if method == "a"]
    assert "rank 1 → –" in own
    assert "measured → contradicted" in own
    assert "certified.ibp 10.00 → 8.33" in own


def test_a_challenge_of_a_superseded_record_no_longer_lowers_its_successor(board: Board) -> None:
    record = board.run.add(rows_of(broken=4))
    adopt(board.run.records)
    board.challenge(record, [10, 11], ["pgd-50", "apgd"])
    assert load(board.run.root)["robust.worst"].tolist() == [12 / 20]
    again(board, record, rows_of(broken=4))
    adopt(board.run.records)
    assert load(board.run.root)[["robust.worst", "status"]].to_numpy().tolist() == [[14 / 20, "measured"]]
    assert ledger.problems(board.run.records) == []


def test_a_second_machine_is_a_reason(board: Board) -> None:
    record = board.run.add()
    found = changed(board, lambda: ledger.append(board.run.records, "rerun", record.id, record.digest, {}))
    assert found == [("moved", "hydra", "measured → rerun", f"a second machine got the verdicts of {record.id} again")]


def test_who_leaves_is_named(board: Board) -> None:
    board.run.add(method="a")
    gone = board.run.add(method="b")
    found = changed(board, lambda: retire(board.run.records, gone.id))
    assert ("left", "b", "was rank 1 (1–2), robust.worst 70.00", "its records stand no longer in their folders") in found


def test_an_entry_that_a_second_setting_gave_a_longer_name_is_the_same(board: Board) -> None:
    def with_scope(name: str, scope: str) -> None:
        method = {"name": "lwm", "scope": scope}
        board.run.edit(board.run.add(name=name), lambda document: document["cell"].update(method=method))

    with_scope("one", "layer")
    found = changed(board, lambda: with_scope("two", "net"))
    assert [(kind, method) for kind, method, _, _ in found] == [("entered", "lwm (scope=net)"), ("moved", "lwm (scope=layer)")]
    assert "was called lwm" in found[1][2]


def test_releases_stand_in_the_order_in_which_they_were_made_and_a_missing_one_is_noticed(board: Board) -> None:
    board.run.add()
    for name in ("b", "c", "a"):
        board.release(name)
    assert [one.release for one in releases(board.folder(""))] == ["b", "c", "a"]
    shutil.rmtree(board.folder("c"))
    with pytest.raises(LeaderboardError, match="a follow no release that is here"):
        releases(board.folder(""))
