"""Security curves against counts by hand: every witness breaks from its own distance on, and no curve ever rises."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from bench.__main__ import main
from leaderboard.errors import BoardError
from leaderboard.security import draw, even_grid, labels_of, security_curve
from leaderboard.stats import metrics_of

NAN = np.nan


def attack(label: str, eps: str, norm: str = "linf", name: str = "", rest: bool = False) -> dict[str, Any]:
    return {"name": name or label, "label": label, "norm": norm, "eps": eps, **({"rest": True} if rest else {})}


def cell_of(*attacks: dict[str, Any]) -> dict[str, Any]:
    return {"attacks": list(attacks), "verifiers": [], "threat": {"norm": "linf", "eps": "3/10"}}


def rows_of(**columns: list[float]) -> pd.DataFrame:
    """Ten samples, the last one misclassified; a column per attack of the distances of its witnesses, inf where it found none."""
    right = np.arange(10) < 9
    rows = pd.DataFrame({"index": range(10), "label": 0, "predicted": np.where(right, 0, 1)})
    for label, far in columns.items():
        rows[f"survived:{label}"] = right & np.isinf(far)
        rows[f"distance:{label}"] = np.where(right, np.where(np.isinf(far), 0.0, far), NAN)
    return rows


INF = float("inf")
FMN = [0.05, 0.1, 0.1, 0.15, 0.2, 0.25, INF, INF, INF, INF]


def hits(curve: pd.DataFrame) -> list[int]:
    found: list[int] = curve["hits"].tolist()
    return found


def test_a_minimum_norm_attack_breaks_each_sample_from_its_distance_on() -> None:
    cell = cell_of(attack("fmn", "3/10"))
    curve = security_curve(rows_of(fmn=FMN), cell, ["fmn"], ["0", "1/20", "1/10", "19/100", "1/5", "3/10", "1/2"])  # type: ignore[list-item]
    assert hits(curve) == [9, 8, 6, 5, 4, 3, 3]
    assert curve["n"].eq(10).all()
    assert curve["share"].tolist() == [one / 10 for one in hits(curve)]
    assert (curve["low"] < curve["share"]).all()
    assert (curve["high"] > curve["share"]).all()
    assert curve["searched"].tolist() == [True] * 6 + [False]


def test_attacks_at_several_eps_make_one_curve_in_which_a_witness_breaks_every_larger_eps() -> None:
    """The attack at 0.3 loses sample 0, which the one at 0.1 has broken: its witness lies in the larger ball, too."""
    small, large = [0.1, 0.1, *[INF] * 8], [INF, 0.3, 0.3, 0.3, *[INF] * 6]
    cell = cell_of(attack("small", "1/10", name="pgd"), attack("large", "3/10", name="pgd"))
    rows = rows_of(small=small, large=large)
    grid = [Fraction(0), Fraction(1, 20), Fraction(1, 10), Fraction(1, 5), Fraction(3, 10)]
    assert hits(security_curve(rows, cell, ["small", "large"], grid)) == [9, 9, 7, 7, 5]
    assert hits(security_curve(rows, cell, ["large"], grid)) == [9, 9, 9, 9, 6]
    assert labels_of(cell, ["pgd"]) == labels_of(cell) == ["small", "large"]


def test_at_the_eps_of_the_threat_the_curve_is_the_worst_case_of_the_record_and_at_0_clean_accuracy() -> None:
    cell = cell_of(attack("fmn", "3/10"), attack("pgd", "1/10"))
    rows = rows_of(fmn=FMN, pgd=[INF, 0.1, 0.1, *[INF] * 3, 0.1, *[INF] * 3])
    metrics = metrics_of(cell, rows)
    curve = security_curve(rows, cell, labels_of(cell), [Fraction(3, 10), Fraction(0)])
    assert hits(curve) == [metrics["clean"]["hits"], metrics["robust"]["worst"]["hits"]] == [9, 2]


def test_no_curve_of_random_rows_ever_rises() -> None:
    random = np.random.default_rng(0)
    cell = cell_of(attack("a", "1/10"), attack("b", "3/10"))
    for _ in range(20):
        far = np.where(random.random((2, 10)) < 0.5, np.inf, random.random((2, 10)) * [[0.1], [0.3]])
        curve = security_curve(rows_of(a=far[0].tolist(), b=far[1].tolist()), cell, ["a", "b"], random.random(50))
        assert curve["eps"].is_monotonic_increasing
        assert curve["share"].is_monotonic_decreasing


def test_a_rest_attack_takes_the_distance_of_whoever_broke_the_sample_before_it() -> None:
    cell = cell_of(attack("pgd", "3/10"), attack("autoattack", "3/10", rest=True))
    rows = rows_of(pgd=[0.3, 0.2, *[INF] * 8], autoattack=[NAN, NAN, 0.25, *[INF] * 7])
    assert rows["survived:autoattack"].tolist()[:3] == [False] * 3
    curve = security_curve(rows, cell, ["autoattack"], [Fraction(1, 5), Fraction(1, 4), Fraction(3, 10)])
    assert hits(curve) == [8, 7, 6]


def test_the_even_grid_reaches_the_largest_eps_and_holds_each_one_that_was_asked_for() -> None:
    cell = cell_of(attack("a", "1/7"), attack("b", "3/10"))
    grid = even_grid(cell, ["a", "b"], points=4)
    assert grid == [0, Fraction(3, 40), Fraction(1, 7), Fraction(3, 20), Fraction(9, 40), Fraction(3, 10)]


@pytest.mark.parametrize("labels, message", [
    (["fmm"], "the cell has no attack 'fmm'; its attacks: fmn, ddn"),
    (["fmn", "ddn"], "needs attacks of one norm, but the attacks fmn, ddn measure in l2 and linf"),
    ([], "needs attacks of one norm, but no attack was named"),
])  # fmt: skip
def test_attacks_that_make_no_curve_are_refused(labels: list[str], message: str) -> None:
    cell = cell_of(attack("fmn", "3/10"), attack("ddn", "1", norm="l2"))
    with pytest.raises(BoardError, match=message):
        security_curve(rows_of(fmn=FMN, ddn=FMN), cell, labels, [Fraction(1, 10)])


def test_names_that_no_attack_has_are_refused() -> None:
    with pytest.raises(BoardError, match="the cell has no attack called fab; its attacks: fmn"):
        labels_of(cell_of(attack("fmn", "3/10")), ["fab"])
    with pytest.raises(BoardError, match="the cell has no attack in linf; its attacks: none"):
        labels_of(cell_of())


@pytest.mark.parametrize("ending", [".svg", ".png"])
def test_the_picture_is_the_same_for_the_same_curve_and_ends_where_the_search_ended(tmp_path: Path, ending: str) -> None:
    cell = cell_of(attack("fmn", "3/10"))
    curve = security_curve(rows_of(fmn=FMN), cell, ["fmn"], [Fraction(k, 20) for k in range(20)])
    one, other = (draw({"_mine": curve}, "linf", tmp_path / f"{name}{ending}").read_bytes() for name in "ab")
    assert one == other
    assert len(one) > 1000
    shorter = draw({"_mine": curve[curve["searched"]]}, "linf", tmp_path / f"c{ending}").read_bytes()
    assert shorter == one
    with pytest.raises(BoardError, match=r"drawn as \.svg or \.png, got 'c\.pdf'"):
        draw({"mine": curve}, "linf", tmp_path / "c.pdf")


def test_the_command_draws_committed_records_and_writes_their_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(__file__).resolve().parents[2] / "leaderboard" / "records" / "mnist-objectives@1"
    records = sorted(folder.glob("*-dense-ibp-*.json"))[:1] + sorted(folder.glob("*-dense-pgd-*.json"))[:1]
    out = tmp_path / "curves.svg"
    assert main(["leaderboard", "security", *map(str, records), "--out", str(out), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    table = pd.read_csv(shown["csv"])
    for path in records:
        metrics = json.loads(path.read_text())["metrics"]
        own = table[table["record"] == path.stem]
        assert own["hits"].iloc[0] == metrics["clean"]["hits"]
        assert own["hits"].iloc[-1] == metrics["robust"]["worst"]["hits"]
    assert out.read_text().count("dense, ") == 2
    assert main(["leaderboard", "security", str(records[0]), "--out", str(out), "--attack", "fab"]) == 2
    assert "no attack called fab" in capsys.readouterr().err
