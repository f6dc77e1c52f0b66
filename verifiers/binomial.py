"""What hits out of n independent draws prove about a probability, and what that proves about a smoothed classifier."""

from __future__ import annotations

import numpy as np
from scipy import special


def lower_confidence_bound(hits: np.ndarray, n: int, alpha: float) -> np.ndarray:
    """One-sided Clopper-Pearson: P(bound > p) <= alpha for hits ~ Binomial(n, p). float64, same shape as hits."""
    hits = np.asarray(hits, dtype=np.float64)
    inner = special.betaincinv(np.maximum(hits, 1), n - np.minimum(hits, n - 1) + 1, alpha)
    return np.where(hits <= 0, 0.0, np.where(hits >= n, alpha ** (1 / n), inner))


def radius_cap(sigma: float, n: int, alpha: float) -> float:
    """The largest radius that n draws can certify: sigma * Phi^-1(alpha^(1/n))."""
    return max(0.0, sigma * float(special.ndtri(alpha ** (1 / n))))


def certified_radius(hits: np.ndarray, n: int, sigma: float, alpha: float) -> np.ndarray:
    """l2 radius sigma * Phi^-1(p_A) where p_A > 1/2, else 0, never above the cap. Cohen et al. 2019, theorem 1."""
    bound = lower_confidence_bound(hits, n, alpha)
    radius = np.where(bound > 0.5, sigma * special.ndtri(np.maximum(bound, 0.5)), 0.0)
    return np.minimum(radius, radius_cap(sigma, n, alpha))
