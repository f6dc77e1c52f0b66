"""How sure a mean over test images and training seeds is, where every seed is judged on the same images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import sqrt
from typing import TYPE_CHECKING

from leaderboard.stats import interval

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

LEVEL = 0.95


@dataclass(frozen=True)
class Mean:
    """A mean with its interval; `by_seed` are the seeds' own means. With one seed the interval is about images alone."""

    mean: float
    low: float
    high: float
    by_seed: dict[int, float]
    images: int

    def within(self, margin: float) -> bool:
        """Whether the interval lies within -margin to margin."""
        return -margin <= self.low and self.high <= margin


def mean_over(values: pd.DataFrame, level: float = LEVEL) -> Mean:
    """The mean of `values` (a row per image, a column per seed, entries -1 to 1) over new images and new training seeds alike.

    Images and seeds are crossed samples: the variance of the mean is at most that of the image means over n plus that of the
    seed means over S (what both count twice, the interaction, is not taken off). Each part gets Student's quantile of its own
    degrees of freedom, n - 1 and S - 1: half^2 = t^2 V_images + t^2 V_seeds. One image won and one lost are added to the images'
    spread, as Bonett & Price (2012) do for paired proportions, so that agreement on all images is no proof of equality.
    Raises ValueError for less than two images or a missing value.
    """
    return mean_of(values.to_numpy(dtype=float), list(values.columns), level)


def mean_of(table: np.ndarray, names: Sequence[int], level: float = LEVEL) -> Mean:
    """`mean_over` of a plain table, whose columns are the seeds `names`."""
    n, seeds = _known(table)
    mean, by_image, by_seed = table.mean(), table.mean(axis=1), table.mean(axis=0)
    half2 = _quantile(level, n) ** 2 * (((by_image - mean) ** 2).sum() + 2) / (n * (n - 1))
    if seeds > 1:
        half2 += _quantile(level, seeds) ** 2 * by_seed.var(ddof=1) / seeds
    each = dict(zip(map(int, names), map(float, by_seed)))
    return Mean(float(mean), float(mean - sqrt(half2)), float(mean + sqrt(half2)), each, n)


def aligned(series: Sequence[pd.Series]) -> np.ndarray:
    """A row per image (the index) that all the series have, in the first one's order, and a column per series, as floats."""
    import numpy as np

    images = series[0].index
    if not all(one.index.equals(images) for one in series):
        images = images[[all(image in one.index for one in series) for image in images]]
        series = [one.loc[images] for one in series]
    return np.column_stack([one.to_numpy(dtype=float) for one in series])


def _known(table: np.ndarray) -> tuple[int, int]:
    n, seeds = table.shape
    if n < 2 or not seeds or (table != table).any():
        raise ValueError(f"a mean with an interval needs two images and a seed, every value known; got {n} images, {seeds} seeds")
    return n, seeds


@cache
def _quantile(level: float, count: int) -> float:
    from scipy.stats import t

    return float(t.ppf((1 + level) / 2, count - 1))


def share_over(hits: pd.DataFrame, level: float = LEVEL) -> Mean:
    """The share of hits, as `mean_over`, joined with Wilson's interval of one seed's images, which near 0 and 1 is the wider."""
    found = mean_over(hits, level)
    low, high = interval(min(found.mean, 1.0) * found.images, found.images, level)
    return Mean(found.mean, max(0.0, min(low, found.low)), min(1.0, max(high, found.high)), found.by_seed, found.images)


@dataclass(frozen=True)
class Spread:
    """The standard deviations of value = mean + image + seed + rest; of one seed `images` holds the rest, the others are NaN."""

    images: float
    seeds: float
    rest: float


def spread(values: pd.DataFrame) -> Spread:
    """How much of a hit depends on the test image, on the training seed, and on both together, in a table as for `mean_over`.

    The estimates of the two-way analysis of variance with one value per cell: (mean square of images - that of the rest) / S,
    (mean square of seeds - that of the rest) / n, and that of the rest; 0 where negative. The mean's variance over new images
    and seeds is then images^2 / n + seeds^2 / S + rest^2 / (n S). Raises ValueError as `mean_over` does.
    """
    table = values.to_numpy(dtype=float)
    n, seeds = _known(table)
    if seeds == 1:
        return Spread(float(table.std(ddof=1)), float("nan"), float("nan"))
    by_image, by_seed = table.mean(axis=1, keepdims=True), table.mean(axis=0, keepdims=True)
    rest = ((table - by_image - by_seed + table.mean()) ** 2).sum() / ((n - 1) * (seeds - 1))
    images, training = by_image.var(ddof=1) - rest / seeds, by_seed.var(ddof=1) - rest / n
    return Spread(*(sqrt(max(0.0, float(part))) for part in (images, training, rest)))
