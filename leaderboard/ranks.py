"""Which ranks are possible: paired tests between entries, so that a board does not order what it cannot tell apart."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

LEVEL = 0.05


def ranges(entries: Sequence[dict[int, pd.Series]], level: float = LEVEL) -> list[tuple[int, int]]:
    """(best, worst) possible rank of each entry; an entry is its headline's hit or miss per image, by seed.

    1 + the number of entries that are surely better, up to the number of entries less those surely worse. "Surely" is
    McNemar's exact test on the same images for every seed that both have, all in the same direction (the largest p counts,
    so that more seeds never make a difference easier to find), with Holm's correction over all pairs of the group. Images
    are thereby the sample, one training run per seed: a new training run may still fall out otherwise.
    """
    pairs = list(combinations(range(len(entries)), 2))
    better = dict.fromkeys(pairs, 0)
    if pairs:
        from statsmodels.stats.multitest import multipletests

        tested = [compare(entries[one], entries[other]) for one, other in pairs]
        sure = multipletests([p for _, p in tested], alpha=level, method="holm")[0]
        better = {pair: sign if yes else 0 for pair, (sign, _), yes in zip(pairs, tested, sure)}
    above = [0] * len(entries)
    below = [0] * len(entries)
    for (one, other), sign in better.items():
        if sign:
            winner, loser = (one, other) if sign > 0 else (other, one)
            above[loser] += 1
            below[winner] += 1
    return [(1 + above[i], len(entries) - below[i]) for i in range(len(entries))]


def compare(one: dict[int, pd.Series], other: dict[int, pd.Series]) -> tuple[int, float]:
    """(sign, p): sign 1 where `one` hits more images on every common seed, -1 the other way round, else 0 with p = 1."""
    results = [_mcnemar(one[seed], other[seed]) for seed in sorted(one.keys() & other.keys())]
    signs = {sign for sign, _ in results}
    if len(signs) != 1 or signs == {0}:
        return 0, 1.0
    return signs.pop(), max(p for _, p in results)


def _mcnemar(one: pd.Series, other: pd.Series) -> tuple[int, float]:
    from statsmodels.stats.contingency_tables import mcnemar

    images = one.index.intersection(other.index)
    a, b = one.loc[images].to_numpy(), other.loc[images].to_numpy()
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    table = [[int((a & b).sum()), only_a], [only_b, int((~a & ~b).sum())]]
    p = float(mcnemar(table, exact=True).pvalue) if only_a + only_b else 1.0
    return (only_a > only_b) - (only_a < only_b), p
