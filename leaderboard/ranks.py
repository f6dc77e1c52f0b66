"""Which ranks are possible: paired tests between entries, so that a board does not order what it cannot tell apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, combinations
from statistics import fmean
from typing import TYPE_CHECKING, Any

from leaderboard.paired import aligned, mean_of

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

LEVEL = 0.05
POWER = 0.8
# By seed, whether the headline holds for each image; the index is the image's number.
Hits = dict[int, "pd.Series"]


@dataclass(frozen=True)
class Discordance:
    """On how many of the `images` that two entries share at one seed only the one, or only the other, is a hit."""

    only_one: int
    only_other: int
    images: int

    @property
    def sign(self) -> int:
        return (self.only_one > self.only_other) - (self.only_one < self.only_other)

    @property
    def share(self) -> float:
        return (self.only_one + self.only_other) / self.images if self.images else float("nan")

    def p(self) -> float:
        """McNemar's exact two-sided p, 1 where they agree on every image."""
        return _mcnemar(*sorted((self.only_one, self.only_other)))


@dataclass(frozen=True)
class PairedTest:
    """The test of entry `one` against entry `other`, both as their places in the group.

    p: the largest of McNemar's exact p over the common seeds where all point the same way, else 1. adjusted: Holm's, over all
    pairs of the group. sure: 1 where `one` is surely better, -1 where `other` is, 0 where they cannot be told apart.
    """

    one: int
    other: int
    by_seed: dict[int, Discordance]
    p: float
    adjusted: float
    sure: int

    @property
    def images(self) -> int:
        """How many both were judged on, at the seed with fewest."""
        return min((found.images for found in self.by_seed.values()), default=0)

    @property
    def discordance(self) -> float:
        """The share of images that exactly one hits, mean over seeds; NaN where they have no image in common."""
        return fmean(found.share for found in self.by_seed.values()) if self.by_seed else float("nan")


def paired_tests(entries: Sequence[Hits], level: float = LEVEL) -> list[PairedTest]:
    """Every pair of a group's entries, tested; see `ranges` for what "surely" means."""
    pairs = list(combinations(range(len(entries)), 2))
    counted = [_by_seed(entries[one], entries[other]) for one, other in pairs]
    judged = [_judged(found) for found in counted]
    return [
        PairedTest(one, other, found, p, adjusted, sign if adjusted <= level else 0)
        for (one, other), found, (sign, p), adjusted in zip(pairs, counted, judged, holm([p for _, p in judged]))
    ]


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order of `ps`: the k-th smallest of m times m + 1 - k, or the one before if larger, or 1.

    As `multipletests` of statsmodels, which runs the garbage collector at every call: a tenth of a second for every group.
    """
    order = sorted(range(len(ps)), key=lambda place: ps[place])
    stepped = accumulate(((len(ps) - step) * ps[place] for step, place in enumerate(order)), max)
    adjusted = dict(zip(order, stepped))
    return [min(1.0, adjusted[place]) for place in range(len(ps))]


def ranges(entries: Sequence[Hits], level: float = LEVEL) -> list[tuple[int, int]]:
    """(best, worst) possible rank of each entry; an entry is its headline's hit or miss per image, by seed.

    1 + the number of entries that are surely better, up to the number of entries less those surely worse. "Surely" is
    McNemar's exact test on the same images for every seed that both have, all in the same direction (the largest p counts,
    so that more seeds never make a difference easier to find), with Holm's correction over all pairs of the group. Images
    are thereby the sample, one training run per seed: a new training run may still fall out otherwise.
    """
    above = [0] * len(entries)
    below = [0] * len(entries)
    for pair in paired_tests(entries, level):
        if pair.sure:
            winner, loser = (pair.one, pair.other) if pair.sure > 0 else (pair.other, pair.one)
            above[loser] += 1
            below[winner] += 1
    return [(1 + above[i], len(entries) - below[i]) for i in range(len(entries))]


def pairwise(entries: Sequence[Hits], level: float = LEVEL) -> list[dict[str, Any]]:
    """A row per pair of a group's entries: `paired_tests`, with the size of the difference.

    Keys: one, other (places in the group), seeds (those both have), images (that both were judged on, at the seed with
    fewest), difference (share of `one` less share of `other`, mean over these seeds), low and high (its 95 % interval over new
    images and new training seeds, `leaderboard.paired.mean_over`), only_one and only_other (numbers of images that only one of
    them hits, by seed), discordance (the share of images that exactly one hits, mean over seeds), p, adjusted, sure. NaN where
    there are no common seeds, or fewer than two common images.
    """
    rows = []
    for pair in paired_tests(entries, level):
        found = list(pair.by_seed.values())
        mean, low, high = difference(entries[pair.one], entries[pair.other])
        rows.append({
            "one": pair.one, "other": pair.other, "seeds": list(pair.by_seed),
            "images": pair.images, "difference": mean, "low": low, "high": high,
            "only_one": [one.only_one for one in found], "only_other": [one.only_other for one in found],
            "discordance": pair.discordance, "p": pair.p, "adjusted": pair.adjusted, "sure": pair.sure,
        })  # fmt: skip
    return rows


def difference(one: Hits, other: Hits) -> tuple[float, float, float]:
    """(mean, low, high) of hits less hits on the common images and seeds, as `mean_over`; NaN where there are too few."""
    both = sorted(one.keys() & other.keys())
    if not both:
        return float("nan"), float("nan"), float("nan")
    hits = aligned([entry[seed] for entry in (one, other) for seed in both])
    if len(hits) < 2:
        return float("nan"), float("nan"), float("nan")
    found = mean_of(hits[:, : len(both)] - hits[:, len(both) :], both)
    return found.mean, max(-1.0, found.low), min(1.0, found.high)


def compare(one: Hits, other: Hits) -> tuple[int, float]:
    """(sign, p): sign 1 where `one` hits more images on every common seed, -1 the other way round, else 0 with p = 1."""
    return _judged(_by_seed(one, other))


def _judged(by_seed: dict[int, Discordance]) -> tuple[int, float]:
    signs = {found.sign for found in by_seed.values()}
    if len(signs) != 1 or signs == {0}:
        return 0, 1.0
    return signs.pop(), max(found.p() for found in by_seed.values())


@cache
def _mcnemar(fewer: int, more: int) -> float:
    from statsmodels.stats.contingency_tables import mcnemar

    # the images that both hit, or neither, do not count
    return float(mcnemar([[0, fewer], [more, 0]], exact=True).pvalue) if more else 1.0


def _by_seed(one: Hits, other: Hits) -> dict[int, Discordance]:
    return {seed: _discordance(one[seed], other[seed]) for seed in sorted(one.keys() & other.keys())}


def _discordance(one: pd.Series, other: pd.Series) -> Discordance:
    hits = aligned([one, other])
    left = hits[:, 0] - hits[:, 1]
    return Discordance(int((left > 0).sum()), int((left < 0).sum()), len(hits))


# ---- what a board could have found -----------------------------------------------------------------------------------


def detectable(
    images: int, discordance: float, pairs: int = 1, seeds: int = 1, level: float = LEVEL, power: float = POWER
) -> float:
    """The smallest true difference of two shares that `ranges` would call sure with probability `power` at least.

    images: how many both are judged on. discordance: the share of images that exactly one of them hits; a larger difference
    needs, and gets, as much discordance as itself. pairs: of the group; Holm's first and hardest step asks for p <= level /
    pairs, so the other pairs need not help. seeds: common ones, of which each must be sure by itself; each gets probability
    1 - (1 - power) / seeds, so that all together have `power` however they depend on each other. By the exact binomial
    distributions (`power_of`), solved for the difference. NaN where even a difference of 1 would not be found.
    """
    from scipy.optimize import brentq

    wanted, asked = 1 - (1 - power) / seeds, level / pairs
    if power_of(1.0, images, discordance, asked) < wanted:
        return float("nan")
    return float(brentq(lambda d: power_of(d, images, discordance, asked) - wanted, 1e-9, 1.0, xtol=1e-7))


def power_of(difference: float, images: int, discordance: float, level: float) -> float:
    """The probability that McNemar's exact test has p <= level in favour of the better of two that differ by `difference`.

    Each of the `images` is discordant with probability max(discordance, difference), and then the better one's hit with
    probability (1 + difference / discordance) / 2. Summed over the number D of discordant images, D ~ Binomial(images,
    discordance), of the probability that at least as many of D are the better one's as the test asks for. difference in (0, 1].
    """
    import numpy as np
    from scipy.stats import binom

    discordance = max(discordance, difference)
    least, most = binom.interval(1 - 1e-12, images, discordance)
    counts = np.arange(int(least), int(most) + 1)
    needed = _needed(images, level)[counts]
    reached = binom.sf(needed - 1, counts, (1 + difference / discordance) / 2)
    return float(binom.pmf(counts, images, discordance) @ reached)


@cache
def _needed(images: int, level: float) -> np.ndarray:
    """For each number D of discordant images, how many of them the better one must have for p <= level; D + 1 if none will do."""
    import numpy as np
    from scipy.stats import binom

    counts = np.arange(images + 1)
    lost = binom.ppf(level / 2, counts, 0.5)
    lost = np.where(2 * binom.cdf(lost, counts, 0.5) <= level, lost, lost - 1)
    return counts - lost.astype(int)
