"""The share of randomized smoothing's time that is spent in the network's forward passes.

    python -m benchmarks.smoothing_share [--json]

One thread, one process: the forward passes are timed inside the very call that is timed as a whole; the rest is noise, counting
and the confidence bound. Dense networks with random weights: the time does not depend on their values.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import Any

import torch
from torch import Tensor, nn

from bench.models import build_model
from verifiers.smoothing import Smoothing

CASES = (("cnn_large", (1, 28, 28)), ("cnn_large", (3, 32, 32)), ("cnn_small", (1, 28, 28)))
N0, N, IMAGES = 100, 2000, 3


class Timed(nn.Module):
    """The network, and the seconds spent in it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.seconds = network, 0.0

    def forward(self, x: Tensor) -> Tensor:
        start = time.perf_counter()
        out: Tensor = self.network(x)
        self.seconds += time.perf_counter() - start
        return out


def share(arch: str, shape: tuple[int, int, int]) -> float:
    model = Timed(build_model(arch, shape, 10).eval())
    x, y = torch.rand(IMAGES, *shape), torch.zeros(IMAGES, dtype=torch.int64)
    found = []
    for _ in range(4):
        model.seconds, start = 0.0, time.perf_counter()
        Smoothing(n0=N0, n=N)(model, x, y)
        found.append(model.seconds / (time.perf_counter() - start))
    return statistics.median(found[1:])


def measured() -> dict[str, Any]:
    return {f"{arch} on {'x'.join(map(str, shape))}": share(arch, shape) for arch, shape in CASES}


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = measured()
    if "--json" in sys.argv[1:]:
        print(json.dumps(found, indent=1))
        return
    for name, value in found.items():
        print(f"{100 * value:6.1f} % of the time in forward passes: {name}")


if __name__ == "__main__":
    main()
