"""What the pages show works as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench.build import build
from bench.cells import read_suite
from bench.contracts import findings, kind_of

DOCS = Path(__file__).resolve().parents[2] / "docs"


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(), re.S)


def test_the_suite_of_the_suites_page_is_one(tmp_path: Path) -> None:
    (text,) = blocks("suites.md", "toml")
    path = tmp_path / "mine.toml"
    path.write_text(text.replace("every = 10                   # or: first = 500", "every = 10"))
    assert len(read_suite(str(path)).cells) == 8 + 4  # and dense, per objective and seed


def test_the_attacks_of_the_attacks_page_make_a_suite(tmp_path: Path) -> None:
    (suite,) = blocks("suites.md", "toml")
    path = tmp_path / "mine.toml"
    before, after = suite.split("[[attack]]")[0], suite[suite.index("[[verifier]]") :]
    path.write_text("\n".join([before, *blocks("attacks.md", "toml"), after]))
    attacks = read_suite(str(path)).cells[0].attacks
    assert {one.label: one.rest for one in attacks} == {"pgd": False, "autoattack": True, "square": True, "fmn": False}


@pytest.mark.parametrize("kind, name", [("objective", "LabelSmoothing"), ("attack", "Darken"), ("verifier", "Timid")])
def test_the_plug_ins_of_the_page_are_built_and_keep_their_contracts(tmp_path: Path, kind: str, name: str) -> None:
    (text,) = blocks("add_a_plugin.md", "python")
    path = tmp_path / "plugin.py"
    path.write_text(text)
    assert type(build(kind, {"name": f"{path}:{name}"})).__name__ == name
    assert kind_of(f"{path}:{name}") == kind
    assert [one for one in findings(kind, f"{path}:{name}") if one.why] == []


def test_the_method_of_the_page_keeps_its_contracts(tmp_path: Path) -> None:
    _, text = blocks("add_a_method.md", "python")
    path = tmp_path / "method.py"
    path.write_text(text)
    assert [one for one in findings("method", f"{path}:FanInMagnitude") if one.why] == []
