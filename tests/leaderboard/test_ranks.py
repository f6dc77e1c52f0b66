"""What a board could have told apart: against enumeration, other routines of scipy and statsmodels, and simulation."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest, multinomial
from statsmodels.stats.multitest import multipletests

from leaderboard.ranks import LEVEL, POWER, Discordance, compare, detectable, difference, holm, paired_tests, power_of


@pytest.mark.parametrize("ps", [[], [0.04], [0.01, 0.04, 0.03, 0.005], [0.2, 0.2, 0.001, 1.0, 0.0007], [0.05] * 3])
def test_holms_adjusted_p_values_are_those_of_statsmodels(ps: list[float]) -> None:
    theirs = multipletests(ps, method="holm")[1] if ps else []
    assert holm(ps) == pytest.approx(list(theirs))


def test_a_pairs_p_is_the_binomial_tests_on_the_images_that_only_one_side_hits() -> None:
    for won, lost in product(range(9), range(9)):
        expected = binomtest(won, won + lost).pvalue if won + lost else 1.0
        assert Discordance(won, lost, 50).p() == pytest.approx(expected)


def enumerated(difference: float, images: int, discordance: float, level: float) -> float:
    """The power, by every possible number of images won and lost."""
    chances = [(discordance + difference) / 2, (discordance - difference) / 2, 1 - discordance]
    found = 0.0
    for won in range(images + 1):
        for lost in range(min(won, images - won + 1)):
            if binomtest(won, won + lost).pvalue <= level:
                found += multinomial.pmf([won, lost, images - won - lost], images, chances)
    return found


@pytest.mark.parametrize(
    "difference, discordance, level", [(0.3, 0.5, 0.05), (0.2, 0.2, 0.05), (0.35, 0.4, 0.05 / 6), (0.1, 0.9, 0.1)]
)
def test_the_power_is_that_of_every_outcome_enumerated(difference: float, discordance: float, level: float) -> None:
    assert power_of(difference, 24, discordance, level) == pytest.approx(enumerated(difference, 24, discordance, level), abs=1e-9)


def test_a_difference_larger_than_the_discordance_brings_its_own() -> None:
    assert power_of(0.4, 24, 0.1, 0.05) == power_of(0.4, 24, 0.4, 0.05)


@pytest.mark.parametrize(
    "images, discordance, pairs, seeds", [(40, 0.3, 1, 1), (200, 0.1, 10, 1), (200, 0.0, 3, 2), (60, 0.6, 45, 6)]
)
def test_the_smallest_detectable_difference_has_just_the_power(images: int, discordance: float, pairs: int, seeds: int) -> None:
    least = detectable(images, discordance, pairs, seeds)
    wanted = 1 - (1 - POWER) / seeds
    assert power_of(least * 1.001, images, discordance, LEVEL / pairs) >= wanted
    assert power_of(least * 0.999, images, discordance, LEVEL / pairs) < wanted


def test_more_pairs_and_seeds_ask_for_more_and_more_images_for_less() -> None:
    usual = detectable(200, 0.1, pairs=3)
    assert detectable(800, 0.1, pairs=3) < usual < detectable(200, 0.1, pairs=45)
    assert usual < detectable(200, 0.1, pairs=3, seeds=2)


def test_with_too_few_images_nothing_can_be_found() -> None:
    # five images all won have p = 2/32
    assert math.isnan(detectable(5, 0.2))
    assert detectable(6, 0.2) > 0.9


def drawn(rng: np.random.Generator, images: int, discordance: float, difference: float) -> tuple[pd.Series, pd.Series]:
    """Hits of a better and a worse entry."""
    place, both = rng.random(images), rng.random(images) < 0.7
    won, lost = (discordance + difference) / 2, (discordance - difference) / 2
    better = np.where(place < won, True, np.where(place < won + lost, False, both))
    worse = np.where(place < won, False, np.where(place < won + lost, True, both))
    return pd.Series(better), pd.Series(worse)


def test_a_difference_of_the_detectable_size_is_found_about_four_times_in_five() -> None:
    """Simulated with the board's own test of a group of three: the third entry equals the second, so Holm's step helps no one."""
    rng, trials, images = np.random.default_rng(8), 250, 150
    least = detectable(images, 0.2, pairs=3)
    found = 0
    for _ in range(trials):
        better, worse = drawn(rng, images, 0.2, least)
        pair = paired_tests([{0: better}, {0: worse}, {0: worse}])[0]
        found += pair.sure == 1
    assert 0.73 <= found / trials <= 0.89  # two entries are surely worse at once, so Holm's second step is a little easier


def test_with_more_seeds_all_of_them_have_the_power_together() -> None:
    rng, trials, images = np.random.default_rng(9), 150, 150
    least = detectable(images, 0.2, seeds=3)
    found = 0
    for _ in range(trials):
        seeds = {seed: drawn(rng, images, 0.2, least) for seed in range(3)}
        sign, p = compare({seed: one for seed, (one, _) in seeds.items()}, {seed: other for seed, (_, other) in seeds.items()})
        found += sign == 1 and p <= LEVEL
    assert found / trials >= 0.72  # independent seeds: 0.933^3 = 0.81


def test_a_difference_is_taken_on_the_images_and_seeds_that_both_have() -> None:
    one = {0: pd.Series([1, 1, 1, 0], index=[1, 2, 3, 4], dtype=bool), 1: pd.Series([1], dtype=bool)}
    other = {0: pd.Series([0, 1, 1, 1], index=[4, 3, 2, 9], dtype=bool)}
    mean, low, high = difference(one, other)  # images 2, 3 and 4 alike
    assert mean == 0
    assert -1 <= low < 0 < high <= 1
    assert math.isnan(difference({1: one[1]}, other)[0])
    assert math.isnan(difference({1: one[1]}, {1: one[1]})[0])  # one image has no spread
