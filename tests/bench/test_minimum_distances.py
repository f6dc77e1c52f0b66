"""Distances of minimum-norm attacks against brackets that the exact verifier proves."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from attacks import FMN, PGD
from bench.cells import Assignment
from bench.contracts.cases import toy_split, trained_net
from bench.evaluate import Evaluation, evaluate
from bench.radii import MinimalDistance
from bench.threat import Threat
from leaderboard.security import security_curve
from verifiers.exact import Exact

EPS = Fraction(3, 10)
pytestmark = pytest.mark.slow  # the exact verifier takes its time


@pytest.fixture(scope="module")
def measured() -> Evaluation:
    """The narrow network's first images: exact brackets of their distances, and what fmn and pgd find within eps."""
    split = toy_split(seed=1, n=2)
    tools = [Assignment("fmn", {"name": "fmn"}, FMN(eps=EPS)), Assignment("pgd", {"name": "pgd"}, PGD(eps=EPS, steps=20))]
    bracket = Assignment("minimal", {"name": "exact"}, MinimalDistance(Exact(eps=EPS), Fraction(1, 25)))
    return evaluate(trained_net(narrow=True), split.pixels(), split.labels, range(2), Threat("linf", EPS), tools, [bracket])


def test_no_witness_is_nearer_than_what_is_proven_and_fmn_comes_close_to_the_nearest_one(measured: Evaluation) -> None:
    rows = measured.rows
    broken = ~rows["survived:fmn"].to_numpy() & (rows["predicted"] == rows["label"]).to_numpy()
    assert broken.sum() >= 2
    far = rows["distance:fmn"].to_numpy()
    lower, upper = (rows[f"distance_{end}:minimal"].to_numpy() for end in ("lower", "upper"))
    assert (far[broken] >= lower[broken]).all(), "a proven bound is never undercut"
    assert (far[broken] <= 1.1 * upper[broken] + 1e-6).all()
    assert (upper[broken] - lower[broken] < 0.05).all(), "so that the comparison says something"


def test_its_security_curve_lies_between_what_is_proven_and_what_pgd_shows(measured: Evaluation) -> None:
    attacks = [{"name": name, "label": name, "norm": "linf", "eps": str(EPS)} for name in ("fmn", "pgd")]
    cell = {"attacks": attacks, "verifiers": [], "threat": {"norm": "linf", "eps": str(EPS)}}
    grid = np.linspace(0, float(EPS), 30).tolist()
    both, pgd = (security_curve(measured.rows, cell, labels, grid) for labels in (["fmn", "pgd"], ["pgd"]))
    right = (measured.rows["predicted"] == measured.rows["label"]).to_numpy()
    proven = [(right & (measured.rows["distance_lower:minimal"].to_numpy() >= eps)).sum() for eps in grid]
    assert (both["hits"] >= proven).all()
    assert (both["hits"] <= pgd["hits"]).all()
    assert both["hits"].sum() < pgd["hits"].sum(), "the nearest witness breaks earlier than one at eps"
