"""How many noise samples early stopping saves, against the fixed n = 100,000, and what it costs in certificates.

    python -m benchmarks.smoothing [--json]

The class probabilities are those of class_probabilities.csv (see class_probabilities.py). A net's draws are simulated: hits
are binomial at each probability p = (hits + 1/2) / (draws + 1), the same for both rules, counting the n0 = 100 selection draws on
either side. Everything depends on r / sigma only, so sigma is 1 here. Then curtailment, which never changes an answer.
"""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from scipy import special

from benchmarks.class_probabilities import FILE
from verifiers.binomial import certified_radius
from verifiers.sequential import curtailed_boundary, decide, look_schedule, sequential_boundary
from verifiers.smoothing import CHUNK, Smoothing

N0, N, ALPHA = 100, 100_000, 0.001
QUESTIONS = (0.5, 1.0, 2.0, 3.0)
GRIDS = (QUESTIONS, (1.0, 2.0, 3.0), (0.5, 1.0, 1.5, 2.0, 2.5, 3.0), (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5))
SHIPPED = Smoothing(rule="sequential", n=N, alpha=ALPHA)


def probabilities() -> np.ndarray:
    """The list, never exactly 1: 20,000 hits of 20,000 draws count as 0.999975."""
    with FILE.open(newline="", encoding="utf-8") as table:
        return np.array([(int(row["hits"]) + 0.5) / (int(row["draws"]) + 1) for row in csv.DictReader(table)])


def draws(p: np.ndarray, looks: Sequence[int], seed: int) -> np.ndarray:
    """Cumulative hits [images, looks]."""
    return np.random.default_rng(seed).binomial(np.diff([0, *looks])[None], p[:, None]).cumsum(1)


def fewer(looks: Sequence[int], last: np.ndarray) -> float:
    """All draws of the fixed rule over all draws up to the last look."""
    return (N0 + N) / float((N0 + np.array(looks)[last]).mean())


def sequential(p: np.ndarray, radii: Sequence[float], seed: int) -> dict[str, float]:
    """The saving on one list of radii, and the largest change of a certified fraction among them."""
    looks = look_schedule(N, CHUNK, Fraction(SHIPPED.growth))
    hits = draws(p, looks, seed)
    level, last = decide(hits, [sequential_boundary(looks, r, 1.0, ALPHA, SHIPPED.futility) for r in radii])
    fixed = certified_radius(hits[:, -1], N, 1.0, ALPHA)
    changes = [float((level > i).mean() - (fixed >= r).mean()) for i, r in enumerate(radii)]
    return {"fewer": fewer(looks, last), "certified": float((fixed >= radii[0]).mean()), "change": max(changes, key=abs)}


def curtailed(p: np.ndarray, radius: float, seed: int) -> dict[str, float]:
    looks = tuple(Smoothing(n=N, alpha=ALPHA, curtail=True).looks)
    hits = draws(p, looks, seed)
    level, last = decide(hits, [curtailed_boundary(looks, radius, 1.0, ALPHA)])
    same = (level == 1) == (certified_radius(hits[:, -1], N, 1.0, ALPHA) >= radius)
    return {"fewer": fewer(looks, last), "different answers": float((~same).sum())}


def mean_over_seeds(one: dict[str, float], *others: dict[str, float]) -> dict[str, float]:
    return {name: float(np.mean([value, *(other[name] for other in others)])) for name, value in one.items()}


def measured() -> dict[str, dict[str, float]]:
    """Means over five simulations of the whole list."""
    p, seeds, found = probabilities(), range(5), {}
    for r in QUESTIONS:
        found[f"sequential, r/sigma = {r}"] = mean_over_seeds(*(sequential(p, [r], seed) for seed in seeds))
    ratios = [one["fewer"] for one in found.values()]
    found["sequential, geometric mean of these"] = {"fewer": math.exp(float(np.mean(np.log(ratios))))}
    for grid in GRIDS:
        most = -math.log(ALPHA) / -float(special.log_ndtr(grid[-1]))  # fewer draws than this certify the last radius never
        one = mean_over_seeds(*(sequential(p, grid, seed) for seed in seeds))
        found[f"sequential, whole grid r/sigma = {', '.join(map(str, grid))}"] = {**one, "all-hit limit": N / most}
    for r in QUESTIONS:
        found[f"curtailed, r/sigma = {r}"] = mean_over_seeds(*(curtailed(p, r, seed) for seed in seeds))
    return found


def verdicts(found: dict[str, dict[str, float]]) -> list[str]:
    """Each figure that was set, and whether it is reached."""
    single = [found[f"sequential, r/sigma = {r}"] for r in QUESTIONS]
    whole = found[f"sequential, whole grid r/sigma = {', '.join(map(str, QUESTIONS))}"]
    changes = [abs(one["change"]) for one in (*single, whole)]
    figures = (
        ("at least 7x fewer draws at each r/sigma", min(one["fewer"] for one in single) >= 7),
        ("at least 15x in the geometric mean", found["sequential, geometric mean of these"]["fewer"] >= 15),
        ("at least 5x fewer on the whole grid of these radii", whole["fewer"] >= 5),
        ("certified fractions within half a point", max(changes) <= 0.005),
        ("curtailment changes no answer", not any(one.get("different answers", 0) for one in found.values())),
    )
    return [f"{'reached' if holds else 'NOT reached'}: {name}" for name, holds in figures]


def main() -> None:
    found = measured()
    if "--json" in sys.argv[1:]:
        print(json.dumps({"probabilities": len(probabilities()), "figures": found, "verdicts": verdicts(found)}, indent=1))
        return
    print(f"{len(probabilities())} class probabilities, n0 = {N0}, n = {N}, alpha = {ALPHA}; means of five simulations")
    for name, values in found.items():
        more = ", ".join(f"{key} {value:.4f}" if abs(value) < 1 else f"{key} {value:.1f}x" for key, value in values.items()
                         if key != "fewer")
        print(f"{values['fewer']:7.1f}x fewer  {name}" + (f"  ({more})" if more else ""))
    print("\n".join(verdicts(found)))


if __name__ == "__main__":
    main()
