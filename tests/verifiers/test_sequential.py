"""The sequential test: its numbers against mpmath, its error exactly and by simulation, and wrong tests that are found out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

import mpmath
import numpy as np
import pytest
from scipy import special, stats

from verifiers.binomial import certified_radius, lower_confidence_bound, radius_cap
from verifiers.sequential import (
    Boundary,
    curtailed_boundary,
    decide,
    fewest,
    log_doubt,
    log_wealth,
    look_schedule,
    sequential_boundary,
)

TRIALS, LEVEL = 20_000, 1e-6
GROWTH = Fraction(11, 10)
SHORT, LONG = look_schedule(2_000, 100, GROWTH), look_schedule(100_000, 100, GROWTH)


def boundary(radius: float, alpha: float, looks: Sequence[int] = SHORT, futility: float = 1e-12) -> Boundary:
    """Sigma 1, and by default hardly ever giving up, so that errors are as frequent as they can be."""
    return sequential_boundary(looks, radius, 1.0, alpha, futility)


def paths(p: float, looks: Sequence[int], trials: int = TRIALS, seed: int = 0) -> np.ndarray:
    """Cumulative hits [trials, looks] of draws that hit with probability p."""
    steps = np.diff([0, *looks])
    return np.random.default_rng(seed).binomial(steps[None], p, (trials, len(looks))).cumsum(1)


def too_often(misses: int, alpha: float, trials: int = TRIALS) -> bool:
    """Whether so many misses would be seen less than once in a million times at a rate of alpha."""
    return bool(stats.binomtest(misses, trials, alpha, alternative="greater").pvalue < LEVEL)


# -- the numbers -------------------------------------------------------------------------------------------------------


def mixture_by_quadrature(hits: int, n: int, z: float) -> float:
    """Log of the mean likelihood ratio over q ~ Beta(1, 1/4) given q > p; u = (1 - q)^(1/4) is uniform then."""
    with mpmath.workdps(40):
        p, end = mpmath.ncdf(z), mpmath.ncdf(-z) ** mpmath.mpf("0.25")

        def ratio(u: mpmath.mpf) -> mpmath.mpf:
            return ((1 - u**4) / p) ** hits * (u**4 / (1 - p)) ** (n - hits)

        return float(mpmath.log(mpmath.quad(ratio, mpmath.linspace(0, end, 30 if n < 50_000 else 120)) / end))


@pytest.mark.parametrize("hits, n, z", [
    (60, 100, 0.0), (100, 100, 0.5), (99, 100, 2.0), (80, 100, 2.0), (950, 1000, 1.0), (996, 1000, 3.0), (9_700, 10_000, 2.0),
    (97_880, 100_000, 2.0),
])
def test_the_wealth_is_the_mean_likelihood_ratio_over_the_alternatives(hits: int, n: int, z: float) -> None:
    expected = mixture_by_quadrature(hits, n, z)
    assert float(log_wealth(np.array(hits), np.array(n), z)) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("z", [0.0, 0.5, 2.0, 3.5])
def test_the_wealth_is_a_fair_game_at_the_threshold_and_starts_at_one(z: float) -> None:
    """At p = p_r the expected wealth after any number of draws is 1: summed over the binomial distribution."""
    for n in (1, 7, 100, 2_000):
        hits = np.arange(n + 1)
        weights = stats.binom.logpmf(hits, n, stats.norm.cdf(z))
        assert np.exp(weights + log_wealth(hits, np.full(n + 1, n), z)).sum() == pytest.approx(1, abs=1e-7)
    assert float(log_wealth(np.array(0), np.array(0), z)) == pytest.approx(0, abs=1e-12)


def test_wealth_and_doubt_move_with_the_hits() -> None:
    hits, n = np.arange(501), np.full(501, 500)
    wealth, doubt = log_wealth(hits, n, 1.0), log_doubt(hits, n, 1.0)
    assert (np.diff(wealth[np.isfinite(wealth)]) > 0).all()
    assert (np.diff(doubt[np.isfinite(doubt)]) < 0).all()


def test_the_boundary_is_the_test_asked_about_every_number_of_hits() -> None:
    alpha, radius, looks = 0.01, 0.8, look_schedule(700, 100, GROWTH)
    one = boundary(radius, alpha, looks)
    for n, yes in zip(looks, one.yes, strict=True):
        hits = np.arange(n + 1)
        says_yes = log_wealth(hits, np.full(n + 1, n), radius) >= math.log(2 / alpha) + 1e-6
        if n == looks[-1]:
            says_yes |= certified_radius(hits, n, 1.0, alpha / 2) >= radius
        np.testing.assert_array_equal(says_yes, hits >= yes)


def test_the_fewest_hits_of_a_predicate() -> None:
    looks = np.array([1, 2, 10, 1000])
    np.testing.assert_array_equal(fewest(looks, lambda hits: hits >= 7), [2, 3, 7, 7])
    np.testing.assert_array_equal(fewest(looks, lambda hits: hits >= 0), [0, 0, 0, 0])


def test_looks_are_whole_chunks_that_grow_by_a_tenth_and_end_at_n() -> None:
    assert look_schedule(1_350, 100, GROWTH) == (100, 200, 300, 400, 500, 600, 700, 800, 900, 1000, 1100, 1200, 1300, 1350)
    assert look_schedule(50, 100, GROWTH) == (50,)
    assert look_schedule(100, 100, GROWTH) == (100,)
    for looks in (SHORT, LONG):
        assert all(look % 100 == 0 for look in looks)
        assert all(later <= max(look + 100, 1.1 * look) for look, later in pairwise(looks))
    assert (SHORT[-1], LONG[-1], len(LONG)) == (2_000, 100_000, 64)


# -- nothing is certified by an underflow ------------------------------------------------------------------------------


def test_an_underflow_is_minus_infinity_and_certifies_nothing() -> None:
    """Clamping the vanished mixture upwards, as max(tail, 1e-300) does, would certify these."""
    n, hits, z = 100_000, 10_000, 1.0
    assert np.isneginf(log_wealth(np.array(hits), np.array(n), z))
    p, missed = stats.norm.cdf(z), n - hits
    clamped = special.betaln(1 + hits, 0.25 + missed) + math.log(1e-300) - hits * math.log(p) - missed * math.log(1 - p)
    assert clamped > 1_000


@pytest.mark.parametrize("radius", [0.1, 0.5, 1.0, 2.0, 3.0])
def test_a_probability_far_below_the_threshold_is_never_certified(radius: float) -> None:
    """At n = 100,000, where the mixture underflows; and no look certifies at a share of hits up to p_r."""
    threshold = stats.norm.cdf(radius)
    for futility in (0.01, 1e-12):
        one = boundary(radius, 0.001, LONG, futility)
        level, _ = decide(paths(threshold - 0.04, LONG), [one])
        assert level.max() == 0
        assert (one.yes > threshold * one.looks).all()


def test_a_radius_beyond_all_floats_is_given_up_at_once() -> None:
    for radius in (5.0, 9.0, 40.0, 1e9):
        one = boundary(radius, 0.05, SHORT)
        assert (one.yes > one.looks).all()
        assert decide(np.array([SHORT]), [one])[1].tolist() == [0]


@pytest.mark.parametrize("alpha", [0.05, 0.001])
@pytest.mark.parametrize("looks", [SHORT, LONG, (9,)], ids=["short", "long", "nine"])
def test_no_radius_exceeds_the_cap_of_the_draws_it_took(alpha: float, looks: Sequence[int]) -> None:
    for radius in np.linspace(0.05, 4.5, 25):
        one = boundary(float(radius), alpha, looks)
        for n, yes in zip(looks, one.yes, strict=True):
            assert yes > n or radius <= radius_cap(1.0, n, alpha)


# -- it is wrong no more often than alpha ------------------------------------------------------------------------------


def probability_of_yes(one: Boundary, p: float, give_up: bool = False) -> float:
    """Exactly, over all paths: the distribution of the hits of those that have not been certified, look by look."""
    alive, certified, before = np.ones(1), 0.0, 0
    for n, yes, no in zip(one.looks, one.yes, one.no, strict=True):
        step = int(n - before)
        alive, before = np.convolve(alive, stats.binom.pmf(np.arange(step + 1), step, p)), n
        certified += float(alive[int(yes):].sum())
        alive[int(yes):] = 0
        if give_up:
            alive[: int(no) + 1] = 0
    return certified


@pytest.mark.parametrize("alpha", [0.05, 0.001])
@pytest.mark.parametrize("radius", [1e-9, 0.3, 1.0, 2.0, 2.7])
def test_the_exact_probability_of_a_wrong_certificate_is_at_most_alpha(radius: float, alpha: float) -> None:
    """Summed over all paths, at the threshold where it is largest; and the allowance is used, not wasted."""
    threshold = stats.norm.cdf(radius)
    for looks in (SHORT, look_schedule(700, 10, Fraction(21, 20))):
        one = boundary(radius, alpha, looks)
        at = probability_of_yes(one, threshold)
        assert at <= alpha
        assert probability_of_yes(one, threshold - 0.01) <= at
        if radius <= 2:
            assert at > alpha / 4


def test_giving_up_adds_no_certificate_and_costs_few() -> None:
    for radius in (0.3, 1.0, 2.0):
        eager, patient = boundary(radius, 0.001, futility=0.01), boundary(radius, 0.001)
        np.testing.assert_array_equal(eager.yes, patient.yes)
        assert (eager.no < eager.yes).all()
        p = stats.norm.cdf(radius + 0.1)
        lost = probability_of_yes(patient, p) - probability_of_yes(eager, p, give_up=True)
        assert 0 <= lost <= 0.01


@pytest.mark.parametrize("alpha", [0.05, 0.001])
@pytest.mark.parametrize("radius", [0.5, 2.0])
@pytest.mark.parametrize("gap", [0.0, 0.002, 0.1], ids=["at", "just-below", "far-below"])
def test_a_radius_that_is_not_the_truth_is_certified_no_more_often_than_alpha(gap: float, radius: float, alpha: float) -> None:
    hits = paths(stats.norm.cdf(radius) - gap, SHORT)
    for futility in (0.01, 1e-12):
        level, last = decide(hits, [boundary(radius, alpha, futility=futility)])
        assert not too_often(int(level.sum()), alpha)
        assert (last >= 0).all()


@pytest.mark.parametrize("alpha", [0.05, 0.001])
def test_one_alpha_covers_a_whole_grid(alpha: float) -> None:
    """The true radius lies on the third of five radii, so certifying the third is the first wrong answer."""
    grid = [boundary(radius, alpha) for radius in (0.3, 0.9, 1.2, 1.25, 1.6)]
    level, _ = decide(paths(stats.norm.cdf(1.2), SHORT), grid)
    assert not too_often(int((level >= 3).sum()), alpha)
    assert (level == 2).mean() > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [0.05, 0.001])
@pytest.mark.parametrize("radius", [0.25, 0.5, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("gap", [0.0, 0.0005, 0.05], ids=["at", "just-below", "far-below"])
def test_the_same_at_a_hundred_thousand_draws(gap: float, radius: float, alpha: float) -> None:
    level, _ = decide(paths(stats.norm.cdf(radius) - gap, LONG, 100_000), [boundary(radius, alpha, LONG)])
    assert not too_often(int(level.sum()), alpha, 100_000)


# -- wrong tests are found out by the same check -----------------------------------------------------------------------


def ever(hits: np.ndarray, yes: np.ndarray) -> int:
    return int((hits >= yes).any(axis=1).sum())


@pytest.mark.parametrize("alpha", [0.05, 0.001])
def test_five_times_alpha_and_the_plain_share_of_hits_are_found_out(alpha: float) -> None:
    radius = 0.5
    hits = paths(stats.norm.cdf(radius), SHORT)
    assert not too_often(ever(hits, boundary(radius, alpha).yes), alpha)
    assert too_often(ever(hits, boundary(radius, 5 * alpha).yes), alpha)
    assert too_often(int((hits[:, -1] / SHORT[-1] > stats.norm.cdf(radius)).sum()), alpha)


@pytest.mark.parametrize("alpha", [0.05, 0.001])
def test_clopper_pearson_at_every_look_is_found_out(alpha: float) -> None:
    """A bound for one fixed n, asked again and again until it says yes."""
    radius = 0.5
    again = np.array([int(fewest(np.array([n]), lambda k, n=n: certified_radius(k, n, 1.0, alpha) >= radius)[0]) for n in SHORT])
    assert too_often(ever(paths(stats.norm.cdf(radius), SHORT), again), alpha)


@pytest.mark.parametrize("alpha", [0.05, 0.001])
def test_draws_that_chose_the_class_cannot_be_counted_again(alpha: float) -> None:
    """Twenty equal classes: the one that leads after all draws leads by luck, which fresh draws do not share."""
    looks, share = look_schedule(500, 100, GROWTH), 0.05
    z, at, n = float(stats.norm.ppf(share)), np.array(looks), looks[-1]
    yes = fewest(at, lambda hits: log_wealth(hits, at, z) >= math.log(2 / alpha))
    yes[-1] = min(yes[-1], np.argmax(lower_confidence_bound(np.arange(n + 1), n, alpha / 2) > share))
    rng, steps = np.random.default_rng(3), np.diff([0, *looks])
    classes = np.stack([rng.multinomial(step, [share] * 20, TRIALS) for step in steps], axis=1).cumsum(1)
    leader = classes[:, -1].argmax(1)
    reused = np.take_along_axis(classes, leader[:, None, None], axis=2)[:, :, 0]
    fresh = rng.binomial(steps[None], share, (TRIALS, len(looks))).cumsum(1)
    assert not too_often(ever(fresh, yes), alpha)
    assert too_often(ever(reused, yes), alpha)


# -- stopping ----------------------------------------------------------------------------------------------------------


def hand_made(yes: list[int], no: list[int]) -> Boundary:
    return Boundary(np.array([10, 20, 30]), np.array(yes), np.array(no))


def test_radii_count_in_ascending_order_and_stop_where_the_next_is_given_up() -> None:
    small, large = hand_made([9, 16, 22], [2, 9, 21]), hand_made([10, 19, 28], [3, 12, 27])
    rows = np.array([
        [10, 10, 10],  # both at once: what follows does not count
        [9, 19, 20],   # the small one, then the large one
        [9, 12, 30],   # the small one, then the large one is given up
        [2, 20, 30],   # given up at once
        [5, 15, 22],   # the small one at the last look
        [5, 15, 21],   # none
    ])  # fmt: skip
    level, last = decide(rows, [small, large])
    assert level.tolist() == [2, 2, 1, 0, 1, 0]
    assert last.tolist() == [0, 1, 1, 0, 2, 2]


def test_a_large_radius_does_not_count_before_the_small_one() -> None:
    never, always = hand_made([11, 21, 31], [-1, -1, -1]), hand_made([0, 0, 0], [-1, -1, -1])
    assert [one.tolist() for one in decide(np.array([[5, 9, 9]]), [never, always])] == [[0], [2]]


def test_a_run_that_goes_on_has_no_last_look_and_deciding_later_changes_nothing() -> None:
    one = boundary(1.0, 0.01, futility=0.01)
    hits = paths(0.86, SHORT, 200)
    level, last = decide(hits, [one])
    for count in range(1, len(SHORT) + 1):
        early, at = decide(hits[:, :count], [one])
        settled = last < count
        np.testing.assert_array_equal(at, np.where(settled, last, -1))
        np.testing.assert_array_equal(early[settled], level[settled])
    assert len(np.unique(last)) > 5


# -- curtailment -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("radius", [1e-12, 0.4, 1.5, 2.5, 9.0])
def test_curtailment_answers_as_all_draws_would(radius: float) -> None:
    looks = tuple(range(20, 1_001, 20))
    one = curtailed_boundary(looks, radius, 1.0, 0.001)
    p = min(0.999, float(stats.norm.cdf(radius + 0.1)))
    hits = np.concatenate([paths(chance, looks, 2_000) for chance in (p, p - 0.02, 0.5, 0.999)])
    level, last = decide(hits, [one])
    np.testing.assert_array_equal(level == 1, certified_radius(hits[:, -1], 1_000, 1.0, 0.001) >= radius)
    assert (last < len(looks) - 1).mean() > 0.5


def test_curtailment_stops_at_the_first_look_where_no_remaining_draw_matters() -> None:
    """Brute force: extend every stopped and every running path by the worst and by the best draws."""
    looks, radius, alpha = (10, 20, 30, 40), 0.3, 0.05
    one = curtailed_boundary(looks, radius, 1.0, alpha)
    fixed = certified_radius(np.arange(41), 40, 1.0, alpha) >= radius
    for n, yes, no in zip(looks, one.yes, one.no, strict=True):
        for hits in range(n + 1):
            matters = fixed[hits] != fixed[hits + 40 - n]
            assert (hits >= yes or hits <= no) != matters
            assert (hits >= yes) == fixed[hits]
