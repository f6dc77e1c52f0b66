"""When noise may stop: tests of "is the l2 radius at least r?" that look at the counts while they grow.

A *boundary* is such a test as whole numbers, fixed before the first draw: at each look, how many hits say yes and how few give
up. Everything here is a function of counts; no network is run.

`sequential_boundary` holds at whatever look one stops. H: p <= p_r = Phi(r / sigma), p being the probability of the chosen
class. Half of alpha goes to a betting martingale: with q ~ Beta(1, 1/4) cut to (p_r, 1), the mixture of the likelihood ratios of
q against p_r is a non-negative supermartingale under every p <= p_r, because every alternative lies above p_r; by Ville's
inequality it ever reaches 2 / alpha with probability at most alpha / 2. The other half goes to one Clopper-Pearson bound at the
last look. Radii are tested in ascending order, each at the full alpha, and r counts only if all smaller ones were rejected: a
wrong answer needs the first false one to be rejected, so one alpha covers the whole grid (fixed-sequence testing).

Sources: Ville 1939; Waudby-Smith & Ramdas 2024 (arXiv 2010.09686), section 4; Robbins 1970 (mixtures); Cohen et al. 2019
(arXiv 1902.02918) for p_r.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from scipy import special

from .binomial import certified_radius, radius_cap

MIXTURE = 0.25  # the alternatives are Beta(1, MIXTURE): most weight near 1, where the probabilities of trained nets are
ROUNDING = 1e-6  # log wealth must exceed its threshold by this: far above the rounding error of the special functions


def look_schedule(n: int, chunk: int, growth: Fraction) -> tuple[int, ...]:
    """The draws after which one may look: whole chunks, each look `growth` times the one before (at least one chunk), last n."""
    looks = [min(n, chunk)]
    while looks[-1] < n:
        further = max(looks[-1] + chunk, int(looks[-1] * growth) // chunk * chunk)
        looks.append(min(n, further))
    return tuple(looks)


def log_wealth(hits: np.ndarray, n: np.ndarray, z: float) -> np.ndarray:
    """Log of the martingale against p <= Phi(z) after `hits` of n draws, float64; -inf or NaN where it underflows.

    Neither value ever exceeds a threshold, so an underflow proves nothing.
    """
    missed, q = n - hits, special.ndtr(-z)
    with np.errstate(divide="ignore", invalid="ignore"):
        prior = -math.log(MIXTURE) + MIXTURE * np.log(q)
        mixture = special.betaln(1 + hits, MIXTURE + missed) + np.log(special.betainc(MIXTURE + missed, 1 + hits, q))
        return mixture - prior - hits * special.log_ndtr(z) - special.xlogy(missed, q)


def log_doubt(hits: np.ndarray, n: np.ndarray, z: float) -> np.ndarray:
    """The same against p >= Phi(z), with the alternatives uniform below; it only says when going on is hardly worth it."""
    missed, p, q = n - hits, special.ndtr(z), special.ndtr(-z)
    with np.errstate(divide="ignore", invalid="ignore"):
        mixture = special.betaln(1 + hits, 1 + missed) + np.log(special.betainc(1 + hits, 1 + missed, p))
        return mixture - np.log(p) - special.xlogy(hits, p) - special.xlogy(missed, q)


@dataclass(frozen=True)
class Boundary:
    """At look i, at least yes[i] hits certify the radius (n + 1 where none do), and at most no[i] give it up (-1: none)."""

    looks: np.ndarray
    yes: np.ndarray
    no: np.ndarray


def fewest(looks: np.ndarray, holds: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """For each look n the fewest hits 0..n of which the increasing predicate `holds`, n + 1 where it does not even of n."""
    low, high = np.full(len(looks), -1), looks + 1
    while (high - low > 1).any():
        middle = np.clip((low + high) // 2, 0, looks)
        found, open_ = holds(middle), high - low > 1
        high, low = np.where(open_ & found, middle, high), np.where(open_ & ~found, middle, low)
    return high


def sequential_boundary(looks: Sequence[int], radius: float, sigma: float, alpha: float, futility: float) -> Boundary:
    """Says yes to a radius that is not below the true one with probability at most alpha, whenever one stops.

    radius > 0 and sigma in [0,1] pixel units. It gives up where no further hits could help, and where the hits speak against
    every p of which n draws would sooner say yes than not: of such a p with probability at most `futility` (a martingale
    against p >= yes[-1] / n). Giving up never adds a yes.
    """
    at, n, z = np.asarray(looks), looks[-1], radius / sigma
    yes = fewest(at, lambda hits: log_wealth(hits, at, z) >= math.log(2 / alpha) + ROUNDING)
    yes[-1] = min(yes[-1], _fewest_fixed(n, radius, sigma, alpha / 2))
    reachable = np.array([radius <= radius_cap(sigma, int(one), alpha) for one in at])
    yes = np.where(reachable, yes, at + 1)
    hurdle = float(special.ndtri(min(1.0, yes[-1] / n)))
    no = fewest(at, lambda hits: ~(log_doubt(hits, at, hurdle) >= math.log(1 / futility))) - 1
    return Boundary(at, yes, np.maximum(no, yes[-1] - 1 - (n - at)))


def curtailed_boundary(looks: Sequence[int], radius: float, sigma: float, alpha: float) -> Boundary:
    """Answers "is the radius of all n draws at least `radius`?" exactly as the n draws would, as soon as they cannot differ."""
    at, n = np.asarray(looks), looks[-1]
    needed = _fewest_fixed(n, radius, sigma, alpha)
    return Boundary(at, np.full(len(at), needed), needed - 1 - (n - at))


def _fewest_fixed(n: int, radius: float, sigma: float, alpha: float) -> int:
    """The fewest hits of n whose Clopper-Pearson radius reaches `radius`, n + 1 where even n hits do not."""
    return int(fewest(np.array([n]), lambda hits: certified_radius(hits, n, sigma, alpha) >= radius)[0])


def decide(hits: np.ndarray, boundaries: Sequence[Boundary]) -> tuple[np.ndarray, np.ndarray]:
    """(level, last) per row of hits [rows, looks so far], cumulative: how many of the ascending radii are certified, and the
    look at which the row stops: the first where all are certified or the next one is given up, -1 while it goes on.

    What comes after `last` does not count. The last look of a boundary always stops.
    """
    count = hits.shape[1]
    said = np.stack([np.logical_or.accumulate(hits >= one.yes[:count], axis=1) for one in boundaries])
    level = np.logical_and.accumulate(said, axis=0).sum(axis=0)
    given_up = np.stack([hits <= one.no[:count] for one in boundaries] + [np.ones(hits.shape, dtype=bool)])
    stop = np.take_along_axis(given_up, level[None], axis=0)[0]
    if count == len(boundaries[0].looks):
        stop[:, -1] = True
    last = np.where(stop.any(axis=1), stop.argmax(axis=1), -1)
    return np.take_along_axis(level, last[:, None], axis=1)[:, 0], last
