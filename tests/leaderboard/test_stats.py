from __future__ import annotations

import math

import pandas as pd
import pytest
from scipy.stats import binom, binomtest, norm

from leaderboard.stats import high_probability_accuracy, interval, metrics_of, outcome

from .conftest import ALPHA, DRAWS, SIGMA, cell_of, rows_of


@pytest.mark.parametrize("hits, n", [(0, 10), (1, 10), (5, 10), (10, 10), (299, 360), (81, 263)])
def test_the_interval_is_wilsons(hits: int, n: int) -> None:
    theirs = binomtest(hits, n).proportion_ci(0.95, method="wilson")
    assert interval(hits, n) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_the_interval_is_the_one_worked_out_by_hand() -> None:
    # (p + z^2/2n -+ z sqrt(pq/n + z^2/4n^2)) / (1 + z^2/n) with p = 1/2, n = 10: 1/2 -+ z / (2 sqrt(n + z^2))
    z = norm.ppf(0.975)
    assert interval(5, 10) == pytest.approx((0.5 - z / (2 * math.sqrt(10 + z * z)), 0.5 + z / (2 * math.sqrt(10 + z * z))))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.83, 0.95])
def test_the_interval_covers_the_truth_nineteen_times_in_twenty(p: float) -> None:
    n = 360
    covered = sum(binom.pmf(k, n, p) for k in range(n + 1) if interval(k, n)[0] <= p <= interval(k, n)[1])
    assert covered == pytest.approx(0.95, abs=0.015)


@pytest.mark.parametrize("hits, n", [(7, 20), (18, 20), (300, 360)])
def test_the_interval_lies_within_the_exact_one(hits: int, n: int) -> None:
    exact = binomtest(hits, n).proportion_ci(0.95, method="exact")
    low, high = interval(hits, n)
    assert exact.low < low < hits / n < high < exact.high


def test_of_no_samples_nothing_is_known() -> None:
    assert interval(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize("hits, n", [(-1, 10), (11, 10), (float("nan"), 10)])
def test_what_is_no_share_has_no_interval(hits: float, n: int) -> None:
    with pytest.raises(ValueError, match="no share"):
        interval(hits, n)


def test_high_probability_accuracy_is_cohens_formula() -> None:
    # 0.8 - 0.001 - sqrt(0.001 * 0.999 * ln(1000) / 500) - ln(1000) / 1500
    assert high_probability_accuracy(0.8, 500, 0.001, rho=0.001) == pytest.approx(0.7906798, abs=1e-6)
    assert high_probability_accuracy(0.001, 500, 0.001) == 0.0


@pytest.mark.parametrize("n", [100, 500, 1000, 10_000])
@pytest.mark.parametrize("alpha, rho", [(0.001, 0.001), (0.01, 0.001), (0.05, 0.01)])
def test_high_probability_accuracy_holds_with_its_probability(n: int, alpha: float, rho: float) -> None:
    """More certificates fail than it takes off with probability rho at most; Cohen's formula alone breaks that at 10,000."""
    taken = 1 - high_probability_accuracy(1.0, n, alpha, rho)
    assert binom.sf(math.floor(n * taken + 1e-9), n, alpha) <= rho


def test_high_probability_accuracy_is_no_more_than_the_exact_binomial_one() -> None:
    # of 10,000 certificates at alpha 0.001 up to 21 may fail but once in 1,000 times; the formula would take off 20.6
    assert high_probability_accuracy(0.8, 10_000, 0.001) == pytest.approx(0.8 - 0.0021)


def test_metrics_are_the_shares_counted_by_hand() -> None:
    metrics = metrics_of(cell_of(), rows_of())
    # 20 samples: 2 misclassified; of 18 right, apgd breaks 4, pgd-50 two of those; ibp proves 6, crown those and 3 more
    assert metrics["clean"] == {"hits": 18, "n": 20}
    assert metrics["robust"] == {
        "pgd-50": {"hits": 16, "n": 20}, "apgd": {"hits": 14, "n": 20}, "worst": {"hits": 14, "n": 20},
    }
    assert metrics["certified"]["ibp"] == {"hits": 6, "n": 20}
    assert metrics["certified"]["crown"] == metrics["certified"]["union"] == {"hits": 9, "n": 20}


def test_smoothing_counts_only_the_samples_it_was_asked_about() -> None:
    smoothing = metrics_of(cell_of(), rows_of())["certified"]["smoothing"]
    # of 10 asked, two abstain (500 of 1000), five have all hits; 900 of 1000 prove a radius above 1/4 as well
    sure = SIGMA * norm.ppf(ALPHA ** (1 / DRAWS))
    low = SIGMA * norm.ppf(binomtest(900, DRAWS, alternative="greater").proportion_ci(1 - ALPHA, method="exact").low)
    assert low > 0.25
    assert (smoothing["hits"], smoothing["n"], smoothing["abstained"]) == (8, 10, 2)
    assert smoothing["average_radius"] == pytest.approx((4 * sure + 4 * low) / 10, abs=1e-12)


def test_metrics_are_plain_numbers() -> None:
    def leaves(value: object) -> list[object]:
        return [x for one in value.values() for x in leaves(one)] if isinstance(value, dict) else [value]

    assert {type(leaf) for leaf in leaves(metrics_of(cell_of(), rows_of()))} == {int, float}


def test_the_union_takes_a_sample_that_any_deterministic_verifier_certifies() -> None:
    rows = rows_of()
    rows["radius:ibp"] = [0.1, 0.0] * 10
    rows["radius:crown"] = [0.0] * 12 + [0.1] * 8
    rows["radius:smoothing"] = 9.0
    assert metrics_of(cell_of(), rows)["certified"]["union"] == {"hits": 14, "n": 20}


def test_a_radius_just_below_eps_does_not_certify() -> None:
    rows = rows_of()
    rows["radius:ibp"] = math.nextafter(0.1, 0)
    assert metrics_of(cell_of(), rows)["certified"]["ibp"]["hits"] == 0


def test_a_cell_without_attacks_and_verifiers_has_only_its_clean_accuracy() -> None:
    metrics = metrics_of(cell_of(attacks=[], verifiers=[], headline="clean"), rows_of())
    assert metrics == {"clean": {"hits": 18, "n": 20}, "robust": {}, "certified": {}}


@pytest.mark.parametrize("changes", [{"attacks": [{"label": "worst"}]}, {"attacks": [{"label": "a"}, {"label": "a"}]}])
def test_labels_that_would_hide_a_metric_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="label"):
        metrics_of(cell_of(**changes), rows_of())


def test_outcomes_are_told_by_the_images_numbers() -> None:
    rows = rows_of().assign(index=range(100, 120))
    hits = outcome(cell_of(), rows, "certified.smoothing")
    assert list(hits.index) == list(range(100, 110))
    assert isinstance(hits, pd.Series)
    assert hits[102]
    assert not hits[104]


def test_the_worst_case_counts_what_stays_within_the_threat_and_the_counterexamples_of_verifiers() -> None:
    cell, rows = cell_of(), rows_of()
    wider = {"name": "pgd", "label": "wide", "norm": "linf", "eps": "76/255"}
    other = {"name": "pgd", "label": "l2", "norm": "l2", "eps": "1/10"}
    for label in ("wide", "l2"):
        rows[f"survived:{label}"], rows[f"distance:{label}"] = False, 0.2
    outside = metrics_of({**cell, "attacks": [*cell["attacks"], wider, other]}, rows)["robust"]
    assert outside["worst"] == {"hits": 14, "n": 20}
    assert outside["wide"] == {"hits": 0, "n": 20}
    assert "worst" not in metrics_of({**cell, "attacks": [wider, other]}, rows)["robust"]
    rows["survived:crown"] = rows["index"] >= 3  # as `exact` does: its own counterexamples
    assert metrics_of(cell, rows)["robust"]["worst"] == {"hits": 11, "n": 20}
