"""Sequential and curtailed smoothing rows: radii are derived again from the stored looks, and forged ones are named."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm

from leaderboard.checks import check
from leaderboard.row_checks import parsed, retested, schedule
from verifiers.sequential import curtailed_boundary, decide, look_schedule, sequential_boundary

from .conftest import ALPHA, SIGMA, Run, cell_of, rows_of

N, GRID = 2_000, (0.125, 0.25, 0.5)
LOOKS = look_schedule(N, 100, Fraction(11, 10))
Forgery = Callable[[pd.DataFrame], None]


def paths(radius: float, looks: tuple[int, ...], rows: int, seed: int = 0) -> np.ndarray:
    p = norm.cdf(radius / SIGMA)
    return np.random.default_rng(seed).binomial(np.diff([0, *looks])[None], p, (rows, len(looks))).cumsum(1)


def verifier(**fields: Any) -> dict[str, Any]:
    return cell_of()["verifiers"][2] | {"n": N} | fields


def answered(
    hits: np.ndarray, looks: tuple[int, ...], level: np.ndarray, last: np.ndarray, radii: tuple[float, ...]
) -> pd.DataFrame:
    """`rows_of` with the answers of a test, as the bench stores them; the second half was not asked."""
    rows, half = rows_of(), len(hits)
    radius = np.array([0.0, *radii])[level]
    predicted = np.arange(half) % 3  # the labels
    rows["status:smoothing"] = np.where(radius >= 0.25, "proved", "open").tolist() + ["skipped"] * (20 - half)
    for name, column, otherwise in (
        ("radius", radius, 0.0), ("predicted", predicted, -1),
        ("n", np.array(looks)[last], 0), ("hits", hits[np.arange(half), last], 0),
    ):
        rows[f"{name}:smoothing"] = np.concatenate([column, np.full(20 - half, otherwise)])
    seen = [zip(looks[: end + 1], row[: end + 1], strict=True) for row, end in zip(hits, last, strict=True)]
    rows["looks:smoothing"] = [" ".join(f"{n}:{k}" for n, k in one) for one in seen] + [""] * (20 - half)
    return rows


def sequential_rows() -> pd.DataFrame:
    hits = np.concatenate([paths(r, LOOKS, 2, seed) for seed, r in enumerate((-0.1, 0.2, 0.4, 0.45, 0.9))])
    boundaries = [sequential_boundary(LOOKS, r, SIGMA, ALPHA, 0.01) for r in GRID]
    return answered(hits, LOOKS, *decide(hits, boundaries), GRID)


def sequential(run: Run, rows: pd.DataFrame | None = None, **fields: Any) -> list[str]:
    asked = verifier(rule="sequential", grid=["1/8", "1/2"], growth="11/10", **fields)
    record = run.add(sequential_rows() if rows is None else rows, verifiers=[*cell_of()["verifiers"][:2], asked])
    return check(record, run.records)


def test_honest_sequential_rows_have_no_problems_and_every_answer_occurs(run: Run) -> None:
    rows = sequential_rows()
    assert set(rows["radius:smoothing"]) == {0.0, *GRID}
    assert rows["n:smoothing"][:10].nunique() > 4
    assert sequential(run, rows) == []


@pytest.mark.parametrize("sigma, alpha", [(0.25, 0.001), (0.5, 0.05), (1.0, 0.01)])
def test_the_second_implementation_agrees_with_the_verifier_on_every_path(sigma: float, alpha: float) -> None:
    grid = [0.1, 0.3, 0.5, 0.9, 1.4]
    boundaries = [sequential_boundary(LOOKS, r, sigma, alpha, 1e-12) for r in grid]
    hits = np.concatenate([paths(r * SIGMA / sigma, LOOKS, 60, seed) for seed, r in enumerate((-0.2, 0.1, 0.3, 0.6, 1.0, 1.6))])
    for count in (1, 5, len(LOOKS)):
        level, _ = decide(hits[:, :count], boundaries)
        for row in range(len(hits)):
            looks = list(zip(LOOKS[:count], hits[row, :count].tolist(), strict=True))
            found = retested(looks, grid, N, alpha, sigma)
            said = [bool((hits[row, :count] >= one.yes[:count]).any()) for one in boundaries]
            assert found == [0.0, *grid][[*said, False].index(False)]
            assert found >= [0.0, *grid][level[row]]


def test_the_schedule_is_the_verifiers() -> None:
    for n in (1, 99, 100, 101, 1_350, 100_000):
        for growth in (Fraction(11, 10), Fraction(2), Fraction(101, 100)):
            assert schedule(n, growth) == look_schedule(n, 100, growth)


def test_looks_are_read_strictly() -> None:
    assert parsed("100:98 200:195") == [(100, 98), (200, 195)]
    for text in ("", "nan", "100:98 ", "100:98,200:195", "100:-1", "100", "1e2:5", "9" * 13 + ":1"):
        assert parsed(text) == []


def put(row: int, **values: Any) -> Forgery:
    def forge(rows: pd.DataFrame) -> None:
        for name, value in values.items():
            rows.loc[row, f"{name}:smoothing"] = value

    return forge


RUN_ON = " ".join(f"{n}:{n}" for n in (100, 200, 400))


@pytest.mark.parametrize("forgery, sentence", [
    (put(0, radius=0.125), "radius:smoothing is not the one that looks:smoothing prove: sample 0"),
    (put(8, radius=0.25), "radius:smoothing is not the one that looks:smoothing prove: sample 8"),
    (put(8, radius=0.3), "radius:smoothing is not the one that looks:smoothing prove: sample 8"),
    (put(8, predicted=1), "radius:smoothing is not the one that looks:smoothing prove: sample 8"),
    (put(8, looks="100:100", n=100, hits=100), "radius:smoothing is not the one that looks:smoothing prove: sample 8"),
    (put(8, hits=1), "looks:smoothing is no run of the schedule that ends with hits:smoothing out of n:smoothing: sample 8"),
    (put(8, looks=RUN_ON, n=400, hits=400), "looks:smoothing is no run of the schedule"),
    (put(8, looks="100:100 200:201", n=200, hits=201), "hits:smoothing is no count out of n:smoothing: sample 8"),
    (put(8, looks="100:50 200:151", n=200, hits=151), "looks:smoothing is no run of the schedule"),
    (put(8, looks="100:50 200:49", n=200, hits=49), "looks:smoothing is no run of the schedule"),
    (put(8, looks=""), "looks:smoothing is no run of the schedule"),
    (lambda rows: rows.drop(columns="looks:smoothing", inplace=True), "column 'looks:smoothing' is missing"),
])
def test_forged_sequential_rows_are_named(run: Run, forgery: Forgery, sentence: str) -> None:
    rows = sequential_rows()
    forgery(rows)
    problems = sequential(run, rows)
    assert any(sentence in one for one in problems), problems


@pytest.mark.parametrize("fields, sentence", [
    ({"alpha": 0.00001}, "is not the one that looks:smoothing prove"),
    ({"n": 150}, "is no run of the schedule"),
    ({"n": None}, "records no number of draws n"),
    ({"n": 10**12, "growth": "1"}, "or a growth of looks below 101/100"),
    ({"rule": "lenient"}, "follows the rule 'lenient', which is none of fixed, sequential"),
    ({"rule": "fixed"}, "n:smoothing is not the 2000 draws that the rule fixed was to take"),
])
def test_a_cell_that_does_not_fit_the_rows_is_named(run: Run, fields: dict[str, Any], sentence: str) -> None:
    asked = verifier(rule="sequential", grid=["1/8", "1/2"]) | fields
    record = run.add(sequential_rows(), verifiers=[*cell_of()["verifiers"][:2], asked])
    problems = check(record, run.records)
    assert any(sentence in one for one in problems), problems


def curtailed(run: Run, forgery: Forgery) -> list[str]:
    looks = tuple(range(100, N + 1, 100))
    hits = np.concatenate([paths(r, looks, 2, seed) for seed, r in enumerate((-0.1, 0.1, 0.24, 0.4, 0.9))])
    level, last = decide(hits, [curtailed_boundary(looks, 0.25, SIGMA, ALPHA)])
    rows = answered(hits, looks, level, last, (0.25,)).drop(columns="looks:smoothing")
    forgery(rows)
    asked = verifier(rule="fixed", curtail=True)
    return check(run.add(rows, verifiers=[*cell_of()["verifiers"][:2], asked]), run.records)


@pytest.mark.parametrize("forgery, sentence", [
    (put(0, radius=0.25), "radius:smoothing is not the one that hits:smoothing decide: sample 0"),
    (put(9, radius=0.5), "radius:smoothing is not the one that hits:smoothing decide: sample 9"),
    (put(9, predicted=1), "radius:smoothing is not the one that hits:smoothing decide: sample 9"),
    (put(9, n=100, hits=100), "n:smoothing stopped while the remaining draws could matter: sample 9"),
    (put(9, n=3_000, hits=3_000), "n:smoothing stopped while the remaining draws could matter: sample 9"),
])
def test_forged_curtailed_rows_are_named_and_honest_ones_are_not(run: Run, forgery: Forgery, sentence: str) -> None:
    problems = curtailed(run, forgery)
    assert any(sentence in one for one in problems), problems


def test_honest_curtailed_rows_have_no_problems(run: Run) -> None:
    assert curtailed(run, lambda rows: None) == []
