"""How sure a mean over test images and training seeds is, where every seed is judged on the same images."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING

from leaderboard.stats import interval

if TYPE_CHECKING:
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
    from scipy.stats import t

    table = values.to_numpy(dtype=float)
    n, seeds = table.shape
    if n < 2 or not seeds or (table != table).any():
        raise ValueError(f"a mean with an interval needs two images and a seed, every value known; got {n} images, {seeds} seeds")
    mean, by_image, by_seed = table.mean(), table.mean(axis=1), table.mean(axis=0)
    half2 = _quantile(t, level, n) ** 2 * (((by_image - mean) ** 2).sum() + 2) / (n * (n - 1))
    if seeds > 1:
        half2 += _quantile(t, level, seeds) ** 2 * by_seed.var(ddof=1) / seeds
    each = dict(zip(map(int, values.columns), map(float, by_seed)))
    return Mean(float(mean), float(mean - sqrt(half2)), float(mean + sqrt(half2)), each, n)


def _quantile(t: object, level: float, count: int) -> float:
    return float(t.ppf((1 + level) / 2, count - 1))  # type: ignore[attr-defined]


def share_over(hits: pd.DataFrame, level: float = LEVEL) -> Mean:
    """The share of hits, as `mean_over`, joined with Wilson's interval of one seed's images, which near 0 and 1 is the wider."""
    found = mean_over(hits, level)
    low, high = interval(min(found.mean, 1.0) * found.images, found.images, level)
    return Mean(found.mean, max(0.0, min(low, found.low)), min(1.0, max(high, found.high)), found.by_seed, found.images)
