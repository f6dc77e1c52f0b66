"""What the verifier `ibp` costs beyond the bound arithmetic itself, on a network of one's own.

    python -m benchmarks.certificate_cost CHECKPOINT [--count 1000] [--eps 0.1] [--data DIR]

All in one process on one thread, alternated, medians of CPU seconds. `bounds` are interval bounds in float32, `float64` those of
the images whose margin float32 cannot decide, `allowance` the rounding error bounds of both; `verifier / arithmetic` holds the
whole verifier against these three, `verifier / float32 bounds` against the first alone, which proves nothing by itself.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from bench.question import Question, prepare
from verifiers import IBP
from verifiers.ball import region
from verifiers.bounds import ibp_margins, smallest_margin
from verifiers.rounding import allowance, allowance_for, box_around, in_float64


def medians(parts: dict[str, Callable[[], Any]], rounds: int = 15) -> dict[str, float]:
    """Median CPU milliseconds of each part, all run once per round."""
    spent: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(rounds + 1):
        for name, run in parts.items():
            start = time.process_time()
            run()
            spent[name].append(1000 * (time.process_time() - start))
    return {name: statistics.median(times[1:]) for name, times in spent.items()}


@torch.no_grad()
def measure(path: Path, count: int, eps: Fraction, data: str | None) -> dict[str, Any]:
    case = prepare(Question(path, "linf", eps, (), (), data_dir=data, limit=count), torch.device("cpu"))
    model, x = case.model, case.samples.pixels()
    y, ball, double = model(x).argmax(1), region(x, "linf", eps), in_float64(model)
    margin = smallest_margin(ibp_margins(model, ball, y), y)
    near = (margin.abs() <= allowance(model, box_around(ball))).nonzero().flatten()
    fine, labels = region(x[near].double(), "linf", eps), y[near]
    finer = smallest_margin(ibp_margins(double, fine, labels), labels)

    def allowances() -> None:
        allowance(model, box_around(ball))
        allowance_for(double, fine, finer)

    cost = medians({
        "verifier": lambda: IBP("linf", eps)(model, x, y), "bounds": lambda: ibp_margins(model, ball, y),
        "float64": lambda: ibp_margins(double, fine, labels), "allowance": allowances, "ball": lambda: region(x, "linf", eps),
    })  # fmt: skip
    arithmetic = cost["bounds"] + cost["float64"] + cost["allowance"]
    return {
        "network": path.stem, "images": len(x), "near zero": len(near), "milliseconds": cost,
        "verifier / arithmetic": cost["verifier"] / arithmetic, "verifier / float32 bounds": cost["verifier"] / cost["bounds"],
    }


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--eps", type=Fraction, default=Fraction(1, 10))
    parser.add_argument("--data", help="data folder; default: the data-folder setting")
    args = parser.parse_args()
    print(json.dumps(measure(args.checkpoint, args.count, args.eps, args.data), indent=1))


if __name__ == "__main__":
    main()
