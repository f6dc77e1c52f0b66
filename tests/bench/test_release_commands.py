"""sparsecert leaderboard release, show and changes, on the records that come with sparsecert."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from bench.__main__ import main
from bench.witnesses import load_witnesses
from leaderboard.entering import adopt
from leaderboard.paper_claims import RECORDS
from leaderboard.releases import read_board

DOCS = Path(__file__).parents[2] / "docs" / "leaderboard.md"
OLD = Path(__file__).parents[1] / "leaderboard" / "old" / "release-1"
SUITE = "mnist-objectives@1"
BOARD = "mnist-linf@1"


@pytest.fixture
def records(tmp_path: Path) -> Path:
    shutil.copytree(RECORDS / SUITE, tmp_path / "records" / SUITE)
    adopt(tmp_path / "records" / SUITE)
    return tmp_path / "records"


def test_a_board_is_released_shown_and_compared(records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    boards = ["--boards", str(tmp_path / "boards")]
    for name in ("1.0", "1.1"):
        assert main(["leaderboard", "release", BOARD, "--name", name, *boards, "--records", str(records)]) == 0
        out = capsys.readouterr().out
        assert "left out, without records so far: mnist-claims@1" in out
    assert "Nothing changed." in out
    assert main(["leaderboard", "show", f"{BOARD}/1.1", *boards]) == 0
    assert capsys.readouterr().out == (tmp_path / "boards" / BOARD / "1.1" / "board.md").read_text()
    assert main(["leaderboard", "changes", f"{BOARD}/1.0", f"{BOARD}/1.1", *boards, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"before": f"{BOARD}/1.0", "after": f"{BOARD}/1.1", "changes": []}
    assert main(["leaderboard", "changes", str(OLD), f"{BOARD}/1.1", *boards]) == 2
    assert "releases of different boards" in capsys.readouterr().err
    path = next((records / SUITE).glob("*.parquet"))
    path.write_bytes(path.read_bytes() + b" ")
    assert main(["leaderboard", "release", BOARD, "--name", "1.2", *boards, "--records", str(records)]) == 3
    assert f"refused: {SUITE}: {path.name}: not the file that was entered" in capsys.readouterr().err
    assert not (tmp_path / "boards" / BOARD / "1.2").exists()
    ledger = records / SUITE / "ledger.jsonl"
    ledger.write_bytes(b"".join(ledger.read_bytes().splitlines(keepends=True)[:-1]))
    assert main(["leaderboard", "check", str(records / SUITE), *boards]) == 3
    assert "its history was rewritten" in capsys.readouterr().err


def test_what_is_no_release_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["leaderboard", "show", str(tmp_path)]) == 2
    assert "holds no release" in capsys.readouterr().err
    assert main(["leaderboard", "release", "mnist@7", "--name", "1"]) == 2
    assert "unknown board 'mnist@7'; known: mnist-linf@1" in capsys.readouterr().err


# ---- what the page shows ---------------------------------------------------------------------------------------------


def block(language: str) -> str:
    (text,) = re.findall(rf"```{language}\n(.*?)```", DOCS.read_text(), re.S)
    return str(text)


def test_the_board_of_the_page_is_one(tmp_path: Path) -> None:
    (tmp_path / BOARD).mkdir()
    (tmp_path / BOARD / "board.toml").write_text(block("toml"))
    assert read_board(BOARD, tmp_path).suites == [SUITE, "mnist-claims@1"]


def test_the_witnesses_of_the_page_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(block("python"), {})
    assert sorted(load_witnesses(tmp_path / "mine.safetensors", (1, 28, 28))) == [30, 70]


@pytest.mark.parametrize("line", block("bash").splitlines())
def test_the_commands_of_the_page_exist_with_their_options(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = line.removeprefix("sparsecert ").split()
    assert main([*words[: 2 if words[0] == "leaderboard" else 1], "--help"]) == 0
    shown = capsys.readouterr().out
    assert [word for word in words if word.startswith("--") and word not in shown] == []
