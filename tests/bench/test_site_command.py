"""leaderboard site: the command, and suites that measure one record again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.__main__ import main
from bench.cells import read_suite
from bench.commands.site import about_methods
from bench.methods import METHODS
from leaderboard.paper_claims import RECORDS
from leaderboard.record import read
from leaderboard.site.reproduce import suite_of

# What shipped suites have not: quotes and other letters in names, a fraction that is no decimal.
ODD = """
[suite]
name = 'quo"te \\ back'
version = 2
[data]
name = "digits"
train = 500
[samples]
first = 60
[threat]
norm = "linf"
eps = "1/10"
[budget]
pretrain = 2
prune = 1
finetune = 1
[grid]
arch = ["mlp"]
density = ["1/3"]
seed = [3]
[[method]]
name = "hydra"
[[objective]]
name = "ibp"
budget = { lr = 0.05 }
headline = "certified.exact"
[[attack]]
name = "pgd"
label = "pgd-ü"
steps = 5
[[verifier]]
name = "exact"
nodes = 50
[[verifier]]
name = "smoothing"
norm = "l2"
eps = "0.1"
n = 200
first = 20
"""


def again(cell: dict, tmp_path: Path) -> list[str]:  # type: ignore[type-arg]
    path = tmp_path / "again.toml"
    path.write_text(suite_of(cell), encoding="utf-8")
    cells = read_suite(str(path)).cells
    return [one.id for one in cells if one.method["name"] != "dense" or cell["method"]["name"] == "dense"]


@pytest.mark.parametrize("path", sorted(RECORDS.glob("*/*.json")), ids=lambda path: path.stem)
def test_the_suite_of_a_committed_record_has_exactly_its_cell(path: Path, tmp_path: Path) -> None:
    record = read(path)
    assert again(record.original["cell"], tmp_path) == [record.id]


@pytest.mark.parametrize("name", ["digits@1", "mnist-claims@1", "mnist-objectives@1"])
def test_the_suite_of_any_shipped_cell_has_exactly_that_cell(name: str, tmp_path: Path) -> None:
    for cell in read_suite(name).cells[::7]:
        assert again(cell.as_json(), tmp_path) == [cell.id]


def test_the_suite_of_a_cell_with_odd_text_has_exactly_that_cell(tmp_path: Path) -> None:
    path = tmp_path / "odd.toml"
    path.write_text(ODD, encoding="utf-8")
    cell = next(one for one in read_suite(str(path)).cells if one.method["name"] == "hydra")
    assert again(cell.as_json(), tmp_path) == [cell.id]


def test_the_command_writes_a_site_and_says_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = RECORDS / "mnist-objectives@1"
    assert main(["leaderboard", "site", str(folder), "--out", str(tmp_path / "out"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == {
        "page": str(tmp_path / "out" / "index.html"), "records": len([*folder.glob("mnist*.json")]), "problems": [],
    }
    assert (tmp_path / "out" / "index.html").is_file()


def test_a_folder_without_records_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["leaderboard", "site", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "there are no records in" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_every_method_of_sparsecert_has_something_to_say_on_its_page() -> None:
    about = about_methods()
    assert set(about) == set(METHODS)
    assert all(about.values())
