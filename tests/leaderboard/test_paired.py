"""Intervals of means over crossed images and seeds: against simulation, a bootstrap, exact tests and statsmodels."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom
from scipy.stats import t as student

from leaderboard.paired import mean_over, share_over, spread
from leaderboard.stats import interval


def drawn(rng: np.random.Generator, seeds: int, images: int, by_seed: float, by_image: float, effect: float = 0.3) -> np.ndarray:
    """Hits of one method less those of another: latent effects of the image, of the seed, and of both together."""
    shared = rng.normal(0, 1, (images, 1))
    tilt = rng.normal(0, by_seed, (1, seeds)) + rng.normal(0, by_image, (images, 1)) + effect
    left, right = (shared + side * tilt / 2 + rng.normal(0, 0.6, (images, seeds)) > -1 for side in (1, -1))
    return left.astype(int) - right.astype(int)


@pytest.mark.parametrize("seeds, by_seed", [(1, 0.0), (2, 0.3), (3, 0.3), (6, 0.0), (6, 0.3), (6, 1.0)])
def test_the_interval_covers_the_truth_at_least_about_95_times_in_100(seeds: int, by_seed: float) -> None:
    rng = np.random.default_rng(seeds)
    truth = drawn(rng, 4000, 500, by_seed, 0.3).mean()
    covered = 0
    for _ in range(400):
        found = mean_over(pd.DataFrame(drawn(rng, seeds, 300, by_seed, 0.3)))
        covered += found.low <= truth <= found.high
    assert covered >= 369  # a right interval falls below once in 500 times


def test_images_alone_would_be_too_sure_where_seeds_differ() -> None:
    """Why the interval has a part for the seeds: pooling them as if they were more images misses the truth most of the time."""
    rng = np.random.default_rng(0)
    truth = drawn(rng, 4000, 500, 1.0, 0.3).mean()
    pooled = 0
    for _ in range(100):
        values = drawn(rng, 6, 300, 1.0, 0.3).ravel()
        pooled += abs(values.mean() - truth) <= 1.96 * values.std(ddof=1) / len(values) ** 0.5
    assert pooled < 50


def test_the_variance_is_near_that_of_the_pigeonhole_bootstrap() -> None:
    """Owen 2007: images and seeds are drawn again independently; with many of both no quantile matters."""
    rng = np.random.default_rng(1)
    values = drawn(rng, 60, 500, 0.4, 0.4)
    means = [values[np.ix_(rng.integers(0, 500, 500), rng.integers(0, 60, 60))].mean() for _ in range(1500)]
    found = mean_over(pd.DataFrame(values))
    assert (found.high - found.low) / (2 * 1.99) == pytest.approx(np.std(means), rel=0.08)


def test_the_two_parts_are_the_mean_squares_of_the_two_way_analysis_of_variance() -> None:
    from statsmodels.formula.api import ols
    from statsmodels.stats.anova import anova_lm

    values = drawn(np.random.default_rng(2), 4, 30, 0.5, 0.5)
    long = pd.DataFrame(values).melt(var_name="seed", value_name="d", ignore_index=False).reset_index(names="image")
    table = anova_lm(ols("d ~ C(image) + C(seed)", long).fit())
    square = table["sum_sq"] / table["df"] / values.size
    image = square["C(image)"] + 2 / (30 * 29)  # the image won and the one lost
    half = (student.ppf(0.975, 29) ** 2 * image + student.ppf(0.975, 3) ** 2 * square["C(seed)"]) ** 0.5
    found = mean_over(pd.DataFrame(values))
    assert found.high - found.mean == pytest.approx(half)
    assert found.mean - found.low == pytest.approx(half)


def test_with_one_seed_nothing_is_surely_above_zero_that_mcnemars_test_leaves_open() -> None:
    """McNemar's exact test with mid-p is the binomial one on the images that only one side hits."""
    for left in range(26):
        for right in range(left):
            values = [1] * left + [-1] * right + [0] * (200 - left - right)
            if mean_over(pd.DataFrame(values)).low > 0:
                mid_p = 2 * (binom.cdf(right, left + right, 0.5) - binom.pmf(right, left + right, 0.5) / 2)
                assert mid_p < 0.05, (left, right)


def test_agreement_on_every_image_is_no_proof_of_equality() -> None:
    found = mean_over(pd.DataFrame(np.zeros((100, 1), dtype=int)))
    assert found.low < 0 < found.high
    assert found.within(0.05)
    assert not mean_over(pd.DataFrame(np.zeros((20, 1), dtype=int))).within(0.05)


def test_a_share_near_zero_is_never_surer_than_wilson_on_one_seeds_images() -> None:
    hits = pd.DataFrame({0: [1] + [0] * 99, 1: [0] * 100})
    found = share_over(hits)
    assert found.high >= interval(0.5, 100)[1]
    assert found.low == 0
    assert share_over(pd.DataFrame({0: [1] * 50})).high == 1
    far = share_over(pd.DataFrame({0: [1] * 50 + [0] * 50, 1: [0] * 100}))
    assert far.high == 1  # two seeds that differ by 50 points say nothing


@pytest.mark.parametrize("values", [pd.DataFrame({0: [1]}), pd.DataFrame(index=[0, 1]), pd.DataFrame({0: [1.0, float("nan")]})])
def test_too_little_is_refused(values: pd.DataFrame) -> None:
    with pytest.raises(ValueError, match="needs two images and a seed, every value known"):
        mean_over(values)


# ---- two sources of variance -------------------------------------------------------------------------------------------


def test_the_parts_of_the_spread_are_those_of_the_two_way_analysis_of_variance() -> None:
    from statsmodels.formula.api import ols
    from statsmodels.stats.anova import anova_lm

    values = drawn(np.random.default_rng(5), 5, 40, 0.9, 0.5)
    long = pd.DataFrame(values).melt(var_name="seed", value_name="d", ignore_index=False).reset_index(names="image")
    table = anova_lm(ols("d ~ C(image) + C(seed)", long).fit())
    square = table["sum_sq"] / table["df"]
    found = spread(pd.DataFrame(values))
    assert found.rest**2 == pytest.approx(square["Residual"])
    assert found.images**2 == pytest.approx((square["C(image)"] - square["Residual"]) / 5)
    assert found.seeds**2 == pytest.approx((square["C(seed)"] - square["Residual"]) / 40)


def test_the_spread_finds_the_parts_that_a_table_was_made_of() -> None:
    rng = np.random.default_rng(6)
    values = rng.normal(0, 2, (4000, 1)) + rng.normal(0, 0.5, (1, 300)) + rng.normal(0, 1, (4000, 300))
    found = spread(pd.DataFrame(values))
    assert (found.images, found.seeds, found.rest) == pytest.approx((2, 0.5, 1), rel=0.1)


def test_seeds_that_differ_by_no_more_than_chance_have_no_spread_of_their_own() -> None:
    """Coins per image: with equal coins at each seed, what the seeds' means differ by is all due to the images."""
    rng = np.random.default_rng(7)
    found = [spread(pd.DataFrame(rng.random((200, 4)) < 0.5)) for _ in range(40)]
    assert np.mean([one.seeds**2 for one in found]) < 0.001  # against 0.25 / 200 of the seeds' own means
    assert np.mean([one.rest**2 for one in found]) == pytest.approx(0.25, rel=0.02)


def test_one_seed_tells_nothing_about_seeds() -> None:
    found = spread(pd.DataFrame({0: [1, 0, 1, 1]}))
    assert found.images == pytest.approx(0.5)  # sqrt(4/3 * 3/16)
    assert np.isnan([found.seeds, found.rest]).all()
