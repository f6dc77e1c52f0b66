"""Submissions: what was sent is what enters, whole or not at all, and no file of a stranger's is believed."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from bench.__main__ import main
from leaderboard import ledger
from leaderboard.adding import add
from leaderboard.canonical import canonical, sha256_file
from leaderboard.checks import check_records, folder_problems
from leaderboard.entering import adopt, enter, retire
from leaderboard.errors import RecordError, RefusedError
from leaderboard.record import Record
from leaderboard.submission import MANIFEST, pack, unpack

from .conftest import MACHINE, Run, cell_of, rows_of

ROOT = Path(__file__).resolve().parents[2]
OTHER = {**MACHINE, "processor": "Intel(R) Xeon(R) Platinum 8370C"}


def measured(run: Run, rows: pd.DataFrame | None = None, machine: dict[str, Any] | None = None, **changes: Any) -> Record:
    """A record named as the bench names it."""
    cell = cell_of(**changes)
    words = [cell["arch"], cell["method"]["name"], cell["objective"]["name"], "d0.5", f"s{cell['seed']}"]
    name = "-".join(["toy@1", *words, hashlib.sha256(canonical(cell)).hexdigest()[:8]])
    record = run.add(rows, name, **changes)
    return run.edit(record, lambda one: one["provenance"].update(machine=machine or MACHINE))


def another_run(folder: Path) -> Run:
    for name in ("records", "checkpoints"):
        (folder / name).mkdir(parents=True)
    return Run(folder)


@pytest.fixture
def board(tmp_path: Path) -> Path:
    return tmp_path / "board" / "toy@1"


def sent(run: Run, tmp_path: Path, **options: Any) -> Path:
    adopt(run.records)
    out = tmp_path / "sent.zip"
    out.unlink(missing_ok=True)
    pack(run.records, out, by="A. Name", **options)
    return out


def files(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256_file(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def test_records_arrive_byte_by_byte_and_are_entered_with_whom_they_are_from(run: Run, tmp_path: Path, board: Path) -> None:
    one, other = measured(run), measured(run, seed=1)
    assert [step.kind for step in add(sent(run, tmp_path), board)] == ["entered", "entered"]
    assert {name: digest for name, digest in files(run.records).items() if name != ledger.NAME} == {
        name: digest for name, digest in files(board).items() if name != ledger.NAME
    }  # fmt: skip
    assert [(entry.event, entry.record, entry.note["by"]) for entry in ledger.entries(board)] == [
        ("entered", record.id, "A. Name") for record in sorted((one, other), key=lambda record: record.id)
    ]  # fmt: skip
    assert folder_problems(board) == []
    assert not (board.parent / "checkpoints").exists()


def test_weights_are_kept_where_they_are_asked_for(run: Run, tmp_path: Path, board: Path) -> None:
    record = measured(run)
    add(sent(run, tmp_path), board / "records", weights=True)
    assert files(board / "checkpoints") == files(run.root / "checkpoints")
    assert check_records(board / "records") == {record.id: []}


def test_what_stands_already_is_not_entered_twice(run: Run, tmp_path: Path, board: Path) -> None:
    measured(run)
    add(sent(run, tmp_path), board)
    before = files(board)
    assert [step.kind for step in add(sent(run, tmp_path), board)] == ["known"]
    assert files(board) == before


def test_an_addition_that_was_killed_is_finished_by_the_same_command(
    run: Run, tmp_path: Path, board: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = {measured(run, seed=seed).id for seed in range(2)}
    submission, entered = sent(run, tmp_path), list[str]()

    def dies(folder: Path, document: dict[str, Any], note: dict[str, Any]) -> None:
        entered.append(document["id"])
        if len(entered) == 2:
            raise KeyboardInterrupt
        enter(folder, document, note)

    with monkeypatch.context() as patch:
        patch.setattr("leaderboard.adding.enter", dies)
        with pytest.raises(KeyboardInterrupt):
            add(submission, board)
    (board / ".adding-left").mkdir()
    assert {name for name, found in check_records(board).items() if found == []} == set(entered)
    assert sorted(step.kind for step in add(submission, board)) == ["known", "known"]
    assert folder_problems(board) == []
    assert check_records(board) == {name: [] for name in records}
    assert not (board / ".adding-left").exists()


def test_equal_verdicts_of_another_kind_of_machine_are_a_rerun_once(run: Run, tmp_path: Path, board: Path) -> None:
    first = measured(run)
    add(sent(run, tmp_path), board)
    again = another_run(tmp_path / "again")
    nearly = rows_of()
    nearly["margin:ibp"] += 1e-6
    second = measured(again, nearly, OTHER)
    assert second.id == first.id
    submission = sent(again, tmp_path)
    assert [step.kind for step in add(submission, board)] == ["rerun"]
    entry = ledger.entries(board)[-1]
    assert (entry.event, entry.record, entry.digest, entry.note["rerun"]) == ("rerun", first.id, first.digest, second.digest)
    (name,) = entry.files
    assert json.loads((board / name).read_text()) == second.original
    assert folder_problems(board) == []
    assert [step.kind for step in add(submission, board)] == ["known"]
    (board / name).write_text((board / name).read_text() + " ")
    assert any(Path(name).name in one for one in folder_problems(board))


@pytest.mark.parametrize("first, second", [(None, OTHER), (MACHINE, MACHINE)])
def test_equal_verdicts_of_what_may_be_the_same_machine_are_no_rerun(
    run: Run, tmp_path: Path, board: Path, first: dict[str, Any] | None, second: dict[str, Any] | None
) -> None:
    again = another_run(tmp_path / "again")
    for place, machine in ((run, first), (again, second)):
        record = place.edit(measured(place), lambda one: one["timing"].update(created="2026-11-22T09:00:00Z"))
        place.edit(record, lambda one, machine=machine: one["provenance"].update(machine=machine))
    again.edit(again.read(record.id), lambda one: one["provenance"].update(threads=2))
    add(sent(run, tmp_path), board)
    assert [step.kind for step in add(sent(again, tmp_path), board)] == ["known"]


def test_a_disagreement_refuses_the_whole_submission_with_the_number_of_samples(run: Run, tmp_path: Path, board: Path) -> None:
    measured(run)
    add(sent(run, tmp_path), board)
    before = files(board)
    again = another_run(tmp_path / "again")
    measured(again, rows_of(broken=3), OTHER)  # sample 14 is open now, sample 16 is broken by the other attack
    measured(again, seed=1)
    with pytest.raises(RefusedError, match="disagrees with the record of this cell that stands here about 2 of 20 samples"):
        add(sent(again, tmp_path), board)
    assert files(board) == before


def test_a_correction_takes_the_place_of_what_it_names_only_where_that_is_allowed(
    run: Run, tmp_path: Path, board: Path
) -> None:
    first = measured(run)
    add(sent(run, tmp_path), board)
    assert retire(run.records, first.id) == first.digest
    second = run.edit(measured(run, rows_of(broken=3)), lambda one: one.update(supersedes=first.digest))
    submission = sent(run, tmp_path)
    with pytest.raises(RefusedError, match="--correct lets it"):
        add(submission, board)
    assert [step.kind for step in add(submission, board, correct=True)] == ["corrected"]
    assert [(one.event, one.digest) for one in ledger.entries(board)] == [
        ("entered", first.digest), ("superseded", first.digest), ("entered", second.digest)
    ]  # fmt: skip
    assert folder_problems(board) == []
    assert json.loads((board / "superseded" / f"{first.id}-{first.digest[:8]}.json").read_text()) == first.original
    assert [path.name for path in board.parent.iterdir()] == [board.name]
    older = another_run(tmp_path / "older")
    measured(older)
    with pytest.raises(RefusedError, match="it stood here before and was superseded"):
        add(sent(older, tmp_path), board)


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda one: one.update(id="toy@1-mine"), "its id is not the 'toy@1-cnn_small-hydra-pgd-d0.5-s0-"),
        (lambda one: one["evidence"].update(weights="../checkpoints/other.safetensors"), "'../checkpoints/other.safetensors' is"),
    ],
)
def test_a_record_that_could_take_anothers_place_is_refused(
    run: Run, tmp_path: Path, board: Path, change: Callable[[dict[str, Any]], None], sentence: str
) -> None:
    record = measured(run)
    (run.records / f"{record.id}.json").unlink()
    document = json.loads(json.dumps(record.original))
    change(document)
    run.write(document)
    with pytest.raises(RefusedError, match=sentence):
        add(sent(run, tmp_path), board)
    assert not board.exists()


def test_nobody_makes_the_record_of_another_cell_disappear(run: Run, tmp_path: Path, board: Path) -> None:
    honest = measured(run)
    add(sent(run, tmp_path), board)
    other = another_run(tmp_path / "other")
    other.edit(measured(other, seed=1), lambda one: one.update(supersedes=honest.digest))
    submission = sent(other, tmp_path)
    for correct in (False, True):
        with pytest.raises(RefusedError, match=f"it says that it supersedes {honest.id}, a record of another cell"):
            add(submission, board, correct=correct)


def test_nobody_makes_a_record_disappear_before_it_comes(run: Run, tmp_path: Path, board: Path) -> None:
    honest, other = measured(run), another_run(tmp_path / "other")
    squatter = other.edit(measured(other, seed=1), lambda one: one.update(supersedes=honest.digest))
    add(sent(other, tmp_path), board)
    with pytest.raises(RefusedError, match=f"{squatter.id}, a record of another cell that stands here, says that it supersedes"):
        add(sent(run, tmp_path), board)


def test_a_record_of_another_cell_with_an_equal_id_is_refused(
    run: Run, tmp_path: Path, board: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = measured(run)
    add(sent(run, tmp_path), board)
    before, other = files(board), another_run(tmp_path / "other")
    other.add(None, honest.id, budget={"pretrain": 2})
    submission = sent(other, tmp_path)
    with pytest.raises(RefusedError, match=r"its id is not the 'toy@1-cnn_small-hydra-pgd-d0\.5-s0-"):
        add(submission, board)
    monkeypatch.setattr("leaderboard.adding.proper_id", lambda record: honest.id)  # as after 2**32 tries
    with pytest.raises(RefusedError, match="a record of another cell stands here under its id"):
        add(submission, board)
    assert files(board) == before


def test_an_id_tells_what_its_cell_is(run: Run, tmp_path: Path, board: Path) -> None:
    record = measured(run)
    run.add(None, record.id.replace("-hydra-", "-dense-"))
    for path in run.records.glob(f"{record.id}.*"):
        path.unlink()
    with pytest.raises(RefusedError, match=f"its id is not the '{record.id}' of its cell"):
        add(sent(run, tmp_path), board)


@pytest.mark.parametrize("settings", [True, False])
def test_what_may_not_share_a_board_never_enters(run: Run, tmp_path: Path, board: Path, settings: bool) -> None:
    measured(run)
    add(sent(run, tmp_path), board)
    before, other = files(board), another_run(tmp_path / "other")
    record = measured(other, seed=1, **({"budget": {"pretrain": 2}} if settings else {}))
    if not settings:
        other.edit(record, lambda one: one["samples"].update(digest="b" * 64))
    differs = "settings" if settings else "test samples"
    with pytest.raises(RefusedError, match=f"have different {differs} and may not share a board"):
        add(sent(other, tmp_path), board)
    assert files(board) == before


def test_a_record_that_keeps_more_than_its_density_asks_for_enters_no_board(run: Run, tmp_path: Path, board: Path) -> None:
    def plug_in(document: dict[str, Any]) -> None:
        document["sparsity"]["scope"] = "whole network"
        document["checks"]["warnings"] = ["the method kept 12 of 24 weights, more than density 1/4 allows"]

    cell = cell_of(density="1/4")
    name = f"toy@1-cnn_small-hydra-pgd-d0.25-s0-{hashlib.sha256(canonical(cell)).hexdigest()[:8]}"
    run.edit(run.add(None, name, density="1/4"), plug_in)
    with pytest.raises(RefusedError, match="more than density 1/4 allows, and a board ranks by density"):
        add(sent(run, tmp_path), board)


def test_whoever_sent_a_record_is_named_though_its_addition_was_killed(
    run: Run, tmp_path: Path, board: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured(run)
    submission = sent(run, tmp_path)

    def dies(*words: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("leaderboard.adding.enter", dies)
        with pytest.raises(KeyboardInterrupt):
            add(submission, board)
    add(submission, board)
    (entry,) = ledger.entries(board)
    assert entry.note == {"by": "A. Name", "submission": sha256_file(submission)}


def test_versions_of_a_suite_never_mix(run: Run, tmp_path: Path) -> None:
    measured(run)
    with pytest.raises(RefusedError, match=r"it is of toy@1, the folder is of toy@2; versions never mix"):
        add(sent(run, tmp_path), tmp_path / "toy@2" / "records")


def test_a_board_that_does_not_hold_takes_nothing(run: Run, tmp_path: Path, board: Path) -> None:
    record = measured(run)
    submission = sent(run, tmp_path)
    add(submission, board)
    (board / record.evidence.verdicts).write_bytes(b"")
    with pytest.raises(RefusedError, match="not the file that was entered"):
        add(submission, board)


def test_a_run_that_does_not_hold_or_was_challenged_is_not_packed(run: Run, tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="there are no records to submit"):
        pack(run.records, tmp_path / "none.zip")
    record = measured(run)
    with pytest.raises(RefusedError, match="the ledger does not list it"):
        pack(run.records, tmp_path / "unlisted.zip")
    adopt(run.records)
    ledger.append(run.records, "challenged", record.id, record.digest, {})
    with pytest.raises(RefusedError, match="it was challenged"):
        pack(run.records, tmp_path / "challenged.zip")


def test_a_forger_who_packs_by_hand_is_refused_when_the_rows_contradict_themselves(
    run: Run, tmp_path: Path, board: Path
) -> None:
    record = run.forge(measured(run), lambda rows: rows.__setitem__("survived:apgd", rows["survived:pgd-50"]))
    path, folder = tmp_path / "forged.zip", run.records
    names = [f"{record.id}.json", record.evidence.verdicts]
    ledger.append(folder, "entered", record.id, record.digest, {name: sha256_file(folder / name) for name in names})
    by_hand(path, {f"records/{name}": (folder / name).read_bytes() for name in [*names, ledger.NAME]})
    with pytest.raises(RefusedError, match="verdict broken, but not by the attack named"):
        add(path, board)
    assert not board.exists()


# ---- files that no submission is --------------------------------------------------------------------------------------


def by_hand(path: Path, members: dict[str, bytes], **claims: Any) -> None:
    listed = {name: hashlib.sha256(content).hexdigest() for name, content in members.items()}
    manifest = {"format": "sparsecert submission 1", "by": "", "created": "now", "head": "0" * 64, "files": listed, **claims}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(MANIFEST, json.dumps(manifest))
        for name, content in members.items():
            archive.writestr(name, content)


@pytest.mark.parametrize(
    "name", [
        "../out.json", "records/../../out.json", "/tmp/out.json", "records\\..\\out.json", "records/.hidden.json", "out.json",
        "records/a/b.json", "records/evil.pkl", "records/evil.pt", "checkpoints/evil.bin", "records/", "records/a\x01.json",
        "records/c:x.json", "records/reruns/../../../out.json",
    ],
)  # fmt: skip
def test_no_file_lands_anywhere_but_in_its_place(tmp_path: Path, name: str) -> None:
    by_hand(tmp_path / "evil.zip", {name: b"{}"})
    (tmp_path / "deep" / "into").mkdir(parents=True)
    with pytest.raises(RecordError, match="is no file of a submission"):
        unpack(tmp_path / "evil.zip", tmp_path / "deep" / "into")
    assert files(tmp_path / "deep") == {}
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFDIR, stat.S_IFIFO, stat.S_IFCHR])
def test_a_link_or_device_is_refused(tmp_path: Path, kind: int) -> None:
    member = zipfile.ZipInfo("records/a.json")
    member.external_attr = (kind | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        archive.writestr(member, "/etc/passwd")
    with pytest.raises(RecordError, match="is a link, a device or encrypted"):
        unpack(tmp_path / "evil.zip", tmp_path / "into")


def test_a_file_that_grows_beyond_its_limit_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leaderboard.submission.LIMITS", {"json": 10_000})
    by_hand(tmp_path / "bomb.zip", {"records/a.json": b"0" * 1_000_000})
    assert os.path.getsize(tmp_path / "bomb.zip") < 3_000
    with pytest.raises(RecordError, match=r"'records/a\.json' has 1000000 bytes once unpacked, at most 10000 are read"):
        unpack(tmp_path / "bomb.zip", tmp_path / "into")
    assert not (tmp_path / "into").exists()


def test_a_file_that_lies_about_its_size_is_not_unpacked(tmp_path: Path) -> None:
    by_hand(tmp_path / "bomb.zip", {"records/a.json": b"0" * 1_000_000})
    content = (tmp_path / "bomb.zip").read_bytes()
    small, large = (size.to_bytes(4, "little") for size in (100, 1_000_000))
    assert content.count(large) == 2  # in the local header and in the directory
    (tmp_path / "bomb.zip").write_bytes(content.replace(large, small))
    with pytest.raises(RecordError, match="cannot be read as a submission"):
        unpack(tmp_path / "bomb.zip", tmp_path / "into")
    assert sum(path.stat().st_size for path in (tmp_path / "into").rglob("*.json")) <= 100


@pytest.mark.parametrize(
    "claims, sentence",
    [
        ({"files": {}}, "is in the file or in its manifest, but not in both"),
        ({"files": {"records/a.json": "0" * 64, "records/b.json": "0" * 64}}, "in its manifest, but not in both"),
        ({"files": {"records/a.json": "0" * 64}}, "not the file that the manifest names"),
        ({"format": "sparsecert submission 2"}, "missing or not one of a submission"),
        ({"by": "two\nlines"}, "missing or not one of a submission"),
        ({"extra": 1}, "missing or not one of a submission"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(tmp_path: Path, claims: dict[str, Any], sentence: str) -> None:
    by_hand(tmp_path / "other.zip", {"records/a.json": b"{}"}, **claims)
    with pytest.raises(RecordError, match=sentence):
        unpack(tmp_path / "other.zip", tmp_path / "into")


def test_names_that_differ_in_case_only_are_refused(tmp_path: Path) -> None:
    by_hand(tmp_path / "twice.zip", {"records/a.json": b"{}", "records/A.json": b"{}"})
    with pytest.raises(RecordError, match="a name stands twice"):
        unpack(tmp_path / "twice.zip", tmp_path / "into")


@pytest.mark.parametrize("content", [b"", b"PK", b"no archive"])
def test_what_is_no_zip_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.zip").write_bytes(content)
    with pytest.raises(RecordError, match=r"^x\.zip: cannot be read as a submission"):
        unpack(tmp_path / "x.zip", tmp_path / "into")


def test_a_submission_with_any_byte_changed_enters_nothing_that_was_not_sent(run: Run, tmp_path: Path, board: Path) -> None:
    measured(run)
    path = sent(run, tmp_path)
    content, size = path.read_bytes(), path.stat().st_size
    expected = {name: digest for name, digest in files(run.records).items() if name != ledger.NAME}
    for at in range(0, size, size // 12):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        try:
            add(path, board)
        except (RecordError, RefusedError):
            assert not board.exists()
        else:  # a byte that says nothing, such as a date
            assert {name: digest for name, digest in files(board).items() if name != ledger.NAME} == expected
            shutil.rmtree(board)


# ---- the command line ------------------------------------------------------------------------------------------------


def test_a_run_is_checked_packed_and_entered_from_the_command_line(
    run: Run, tmp_path: Path, board: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record, out = measured(run), tmp_path / "mine.zip"
    assert main(["leaderboard", "check", str(run.root)]) == 3
    assert "the ledger does not list it" in capsys.readouterr().err
    assert main(["leaderboard", "enter", str(run.root)]) == 0
    assert "1 records entered" in capsys.readouterr().out
    assert main(["leaderboard", "check", str(run.root)]) == 0
    assert main(["submit", str(run.root), "--out", str(out), "--by", "A. Name"]) == 0
    assert "1 records, 1 checkpoints" in capsys.readouterr().out
    assert main(["submit", str(run.root), "--out", str(out)]) == 2
    assert "is left as it is" in capsys.readouterr().err
    assert main(["leaderboard", "add", str(out), "--to", str(board)]) == 0
    assert f"entered: {record.id}" in capsys.readouterr().out
    assert main(["leaderboard", "add", str(out), "--to", str(board), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["records"] == {record.id: "known"}
    assert main(["leaderboard", "check", str(board), str(run.root), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["holds"] is True
    assert [(one["title"], one["records"]) for one in found["folders"]] == [("toy@1", 1), (run.root.name, 1)]


def test_the_commands_of_the_page_work_one_after_the_other(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (text,) = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "records.md").read_text(encoding="utf-8"), re.S)
    measured(run)
    for name in ("records", "checkpoints"):
        shutil.copytree(run.root / name, tmp_path / "runs" / "toy@1" / name)
    monkeypatch.chdir(tmp_path)
    commands = [shlex.split(line) for line in text.replace("digits@1", "toy@1").splitlines()]
    for program, *words in commands:
        assert program == "sparsecert"
        assert main(words) == 0, capsys.readouterr().err
    assert len(commands) == 5


def test_what_does_not_hold_is_refused_with_every_reason_and_exit_code_3(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = measured(run)
    adopt(run.records)
    run.edit(record, lambda one: one["metrics"]["clean"].update(hits=19))
    out = tmp_path / "mine.zip"
    assert main(["submit", str(run.root), "--out", str(out)]) == 3
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 2
    assert all(line.startswith("refused: ") for line in lines)
    assert not out.exists()
    assert main(["leaderboard", "check", str(run.root), "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["holds"] is False
    assert main(["leaderboard", "check", str(tmp_path / "nowhere")]) == 2


def test_a_run_with_a_contradicted_certificate_does_not_hold_and_is_not_submitted(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured(run)
    adopt(run.records)
    (run.root / "contradictions").mkdir()
    (run.root / "contradictions" / "cell.json").write_text("{}")
    assert main(["leaderboard", "check", str(run.root)]) == 3
    assert "cell: its certificate was contradicted" in capsys.readouterr().err
    assert main(["submit", str(run.root), "--out", str(tmp_path / "mine.zip")]) == 3


def test_a_folder_of_several_is_all_of_them_and_one_whose_records_are_gone_does_not_hold(
    run: Run, tmp_path: Path, board: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = measured(run)
    add(sent(run, tmp_path), board)
    shutil.copytree(board, board.with_name("copy@1"))
    assert main(["leaderboard", "check", str(board.parent), "--json"]) == 0
    assert [one["title"] for one in json.loads(capsys.readouterr().out)["folders"]] == ["copy@1", "toy@1"]
    for name in (f"{record.id}.json", f"{record.id}.parquet"):
        (board / name).unlink()
    assert main(["leaderboard", "check", str(board)]) == 3
    assert f"{record.id}.json: the ledger lists it (entered), but it is missing" in capsys.readouterr().err
    (board / ledger.NAME).unlink()
    assert main(["leaderboard", "check", str(board)]) == 2
    assert "there are no records in" in capsys.readouterr().err


def test_the_records_that_come_with_sparsecert_hold(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["leaderboard", "check", "--json"]) == 0, capsys.readouterr().err
    assert json.loads(capsys.readouterr().out)["folders"]
