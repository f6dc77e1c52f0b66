"""How many weights each layer keeps when the whole network may keep so many."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fractions import Fraction
from math import floor, prod

import torch
from scipy.optimize import brentq

Shapes = Mapping[str, torch.Size]
Counts = dict[str, int]


def proportional(ratios: Mapping[str, Fraction], sizes: Mapping[str, int], keep: int) -> dict[str, Fraction]:
    """Densities in proportion to `ratios` with sum of density * size = keep, in exact arithmetic.

    Where a density would exceed 1, the layers of the largest ratio become dense and the rest is scaled again.
    """
    free, left = dict(ratios), Fraction(keep)
    while free:
        scale = left / sum(ratio * sizes[name] for name, ratio in free.items())
        largest = max(free.values())
        if scale * largest <= 1:
            break
        for name in [name for name, ratio in free.items() if ratio == largest]:
            left -= sizes[name]
            del free[name]
    return {name: scale * free[name] if name in free else Fraction(1) for name in ratios}


def whole(densities: Mapping[str, Fraction], sizes: Mapping[str, int], keep: int, least: int = 1) -> Counts:
    """Whole counts nearest to density * size, at least `least` and at most its size in each layer, that sum up to `keep`.

    Raises ValueError where `keep` is too small for that.
    """
    if keep < least * len(sizes):
        raise ValueError(f"{keep} weights cannot be shared by {len(sizes)} layers; ask for a larger density")
    quotas = {name: densities[name] * size for name, size in sizes.items()}
    counts = {name: min(size, max(least, floor(quotas[name]))) for name, size in sizes.items()}
    while missing := keep - sum(counts.values()):
        step = 1 if missing > 0 else -1
        able = [name for name, count in counts.items() if least <= count + step <= sizes[name]]
        counts[max(able, key=lambda name: step * (quotas[name] - counts[name]))] += step
    return counts


def erk_densities(shapes: Shapes, keep: int) -> dict[str, Fraction]:
    """Erdos-Renyi-Kernel: a layer's density in proportion to the sum over the product of its sides. Evci et al. 2020."""
    ratios = {name: Fraction(sum(shape), prod(shape)) for name, shape in shapes.items()}
    return proportional(ratios, _sizes(shapes), keep)


def uniform_densities(shapes: Shapes, keep: int) -> dict[str, Fraction]:
    """The first layer dense and all others equally dense, as in RigL; where that is too much, all equally dense."""
    sizes = _sizes(shapes)
    first, *others = shapes
    left = Fraction(keep - sizes[first])
    if left < len(others):
        return dict.fromkeys(shapes, Fraction(keep, sum(sizes.values())))
    share = left / max(1, sum(sizes[name] for name in others))
    return {first: Fraction(1), **dict.fromkeys(others, min(share, Fraction(1)))}


def igq_densities(shapes: Shapes, keep: int) -> dict[str, Fraction]:
    """Ideal gas quotas: density 1 / (1 + F size), with the F that meets the budget. Vysogorets & Kempe (arXiv 2107.02306)."""
    sizes = _sizes(shapes)

    def excess(force: float) -> float:
        return sum(size / (1 + force * size) for size in sizes.values()) - keep

    force = 0.0 if excess(0.0) <= 0 else brentq(excess, 0.0, len(sizes) / keep)
    return {name: Fraction(1 / (1 + force * size)) for name, size in sizes.items()}


def _sizes(shapes: Shapes) -> dict[str, int]:
    return {name: prod(shape) for name, shape in shapes.items()}


ALLOCATIONS: dict[str, Callable[[Shapes, int], dict[str, Fraction]]] = {
    "erk": erk_densities, "uniform": uniform_densities, "igq": igq_densities
}  # fmt: skip


def allocate(rule: str, shapes: Shapes, keep: int) -> Counts:
    """How many weights each layer keeps under a rule of ALLOCATIONS; `keep` in all. Raises ValueError as `whole`."""
    return whole(ALLOCATIONS[rule](shapes, keep), _sizes(shapes), keep)
