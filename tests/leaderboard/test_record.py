from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from leaderboard.canonical import digest
from leaderboard.checks import check
from leaderboard.errors import RecordError
from leaderboard.migrations import SCHEMA, STEPS
from leaderboard.record import columns_of, parse, read, read_all

from .conftest import Run, cell_of

OLD = Path(__file__).parent / "old"


def test_a_record_comes_back_as_it_was_written(run: Run) -> None:
    record = run.add()
    assert record.document == json.loads((run.records / f"{record.id}.json").read_text())
    assert record.metrics.clean.hits == 18
    assert record.metrics.get("robust.worst") == record.metrics.robust["worst"]
    assert record.metrics.get("certified.nobody") is None


@pytest.mark.parametrize("path", sorted(OLD.glob("*.json")), ids=lambda path: f"schema {path.stem}")
def test_a_record_of_every_older_schema_is_read_and_its_digest_is_that_of_what_was_written(path: Path) -> None:
    written = json.loads(path.read_text())
    record = parse(written, path.name)
    assert record.schema_ == SCHEMA > written["schema"] == int(path.stem)
    assert record.original == written == json.loads(path.read_text())
    assert record.digest == digest(record.original) != digest(record.document)
    assert record.provenance.machine is None
    assert record.document["metrics"] == written["metrics"]


def test_there_is_an_old_record_for_every_migration() -> None:
    assert sorted(STEPS) == [int(path.stem) for path in sorted(OLD.glob("*.json"))] == list(range(1, SCHEMA))


def test_an_edited_record_of_an_older_schema_is_named(run: Run) -> None:
    written = json.loads((OLD / "1.json").read_text())
    written["metrics"]["clean"]["hits"] += 1
    (problem, *_) = check(parse(written, "1.json"), run.records)
    assert problem.startswith("digest is 7e4c949e84fd..., but the record's content gives")


def test_the_verdict_table_comes_back_with_the_columns_the_cell_calls_for(run: Run) -> None:
    record = run.add()
    rows = record.verdicts(run.records)
    assert len(rows) == 20
    assert set(columns_of(cell_of())) == set(rows.columns)


def test_all_records_come_back_in_the_order_of_their_ids(run: Run) -> None:
    for seed in (2, 0, 1):
        run.add(seed=seed)
    assert [record.cell.seed for record in read_all(run.records)] == [0, 1, 2]


def test_a_folder_that_is_not_there_is_named(run: Run) -> None:
    with pytest.raises(RecordError, match="elsewhere: no such folder of records"):
        read_all(run.root / "elsewhere")


def change(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def do(document: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for name in parents:
            document = document[name]
        document[last] = value

    return do


@pytest.mark.parametrize(
    "path, value, sentence",
    [
        ("schema", 3, "schema 3 is newer than 2, the newest read here; upgrade sparsecert"),
        ("schema", 0, "there never was a schema 0; restore the file"),
        ("schema", "2", "schema is '2', expected the number 2"),
        ("metrics.clean.hits", "18", "metrics.clean.hits: input should be a valid integer"),
        ("metrics.clean.hits", 21, "21 hits of 20 samples"),
        ("metrics.clean.hits", True, "metrics.clean.hits: input should be a valid integer"),
        ("cell.threat.eps", "1/0", "cell.threat.eps: '1/0' is no fraction"),
        ("cell.threat.eps", "1e999999999", "cell.threat.eps"),
        ("cell.headline", "certified.nobody", "the headline 'certified.nobody' is none of the metrics"),
        ("cell.suite", "other", "suite toy@1 is not the cell's"),
        ("evidence.verdicts", "../other/x.parquet", "evidence.verdicts: '../other/x.parquet' is no plain file name"),
        ("evidence.extra", 1, "evidence.extra: extra inputs are not permitted"),
        ("sparsity.layers", {"fc": [1]}, "sparsity.layers.fc"),
        ("status", "claimed", "status"),
        ("timing.created", "banana", "timing.created: 'banana' is no date and time with its zone"),
        ("timing.created", "2026-11-21T09:00:00", "is no date and time with its zone"),
        ("timing.created", "0001-01-01T00:00:00+14:00", "is no date and time with its zone"),
    ],
)
def test_what_is_not_a_record_of_this_schema_is_refused_with_the_place(run: Run, path: str, value: Any, sentence: str) -> None:
    record = run.add()
    with pytest.raises(RecordError) as refused:
        run.edit(record, change(path, value))
    assert str(refused.value).startswith(f"{record.id}.json: ")
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("{", "not JSON"),
        ("[]", "a record is a JSON object, this is a list"),
        ('{"schema": NaN}', "NaN is not allowed in JSON"),
        ('{"schema": 1, "schema": 1}', "a key stands twice in one object"),
        ("[" * 100_000, "not JSON"),
        ("{}", "schema is None"),
    ],
)
def test_files_that_hold_no_record_are_refused_in_one_sentence(run: Run, text: str, sentence: str) -> None:
    (run.records / "x.json").write_text(text)
    with pytest.raises(RecordError, match=r"^x\.json: ") as refused:
        read(run.records / "x.json")
    assert sentence in str(refused.value)


def test_bytes_that_are_no_text_are_refused(run: Run) -> None:
    (run.records / "x.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(RecordError, match="not JSON"):
        read(run.records / "x.json")


def test_a_record_under_another_ones_name_is_refused(run: Run) -> None:
    record = run.add()
    (run.records / "other.json").write_text(json.dumps(record.document))
    with pytest.raises(RecordError, match="name the file"):
        read(run.records / "other.json")


def test_a_missing_verdict_table_is_named(run: Run) -> None:
    record = run.add()
    (run.records / record.evidence.verdicts).unlink()
    with pytest.raises(RecordError, match="the verdict table is missing"):
        record.verdicts(run.records)


def test_a_damaged_verdict_table_is_named(run: Run) -> None:
    record = run.add()
    (run.records / record.evidence.verdicts).write_bytes(b"PAR1 and no more")
    with pytest.raises(RecordError, match="cannot be read as Parquet"):
        record.verdicts(run.records)


@pytest.mark.parametrize(
    "spoil, sentence",
    [
        (lambda rows: rows.drop(columns="survived:apgd"), "column 'survived:apgd' is missing"),
        (lambda rows: rows.assign(**{"survived:apgd": 1}), "column 'survived:apgd' holds int64, expected truth"),
        (lambda rows: rows.assign(label=0.0), "column 'label' holds double, expected integer"),
        (lambda rows: rows.assign(verdict=None), "column 'verdict'"),
    ],
)
def test_a_verdict_table_without_its_columns_is_refused(
    run: Run, spoil: Callable[[pd.DataFrame], pd.DataFrame], sentence: str
) -> None:
    record = run.add()
    path = run.records / record.evidence.verdicts
    spoil(pd.read_parquet(path)).to_parquet(path, index=False)
    with pytest.raises(RecordError) as refused:
        record.verdicts(run.records)
    assert sentence in str(refused.value)


def test_only_the_columns_of_the_cell_are_read(run: Run) -> None:
    record = run.add()
    path = run.records / record.evidence.verdicts
    pd.read_parquet(path).assign(extra="x" * 1000).to_parquet(path, index=False)
    assert set(record.verdicts(run.records).columns) == set(columns_of(cell_of()))


def test_a_long_text_that_every_row_names_is_not_unfolded(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    record = run.add()
    path = run.records / record.evidence.verdicts
    pd.read_parquet(path).assign(by="x" * 10_000).to_parquet(path, index=False)
    assert path.stat().st_size < 20_000
    monkeypatch.setattr("leaderboard.record.LARGEST_TEXT", 100_000)
    with pytest.raises(RecordError, match=r"\d{6} bytes of text are too many for a verdict table, at most 100000"):
        record.verdicts(run.records)


def test_a_nested_column_is_not_read(run: Run) -> None:
    record = run.add()
    path = run.records / record.evidence.verdicts
    rows = pd.read_parquet(path)
    rows["label"] = [[0] * 100] * len(rows)
    rows.to_parquet(path, index=False)
    with pytest.raises(RecordError, match=r"column 'label' holds list<.*>, expected integer"):
        record.verdicts(run.records)
