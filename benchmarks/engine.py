"""The sparse engine against dense torch: logits, and logits with input gradients, of a pruned ResNet-18 on 32x32 images.

    python -m benchmarks.engine [--rounds 9] [--write FILE.json]

One process, one thread, both sides alternated, medians of CPU time; other work on the machine raises both. Masks are random,
the same share in every layer. The limit is the larger of two times: the multiplications that remain at the rate of torch's
matrix product, and every value moved once between the cores and memory at the rate of torch's copy; a cache can beat the latter.
For avx2, set ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2, so that both sides have the same instructions.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.engine import accelerated, kernel
from bench.engine.layers import read
from bench.engine.plan import plan
from bench.models import build_model
from bench.provenance import machine

DENSITIES = (0.01, 0.05, 0.1)
SHAPE, IMAGES = (3, 32, 32), 32
# at least this many times as fast as dense: logits, and logits with input gradients (None: no figure was set)
FIGURES: dict[str, dict[float, tuple[float, float | None]]] = {
    "avx512": {0.01: (15, 10), 0.05: (5, 5), 0.1: (3, 3)},
    "avx2": {0.01: (10, None), 0.05: (3.5, None), 0.1: (2, None)},
}


@torch.no_grad()
def pruned(name: str, density: float) -> nn.Module:
    """The network with random masks, kept weights scaled so that values neither vanish nor grow."""
    net, generator = build_model(name, SHAPE, 10), torch.Generator().manual_seed(0)
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.weight.mul_((torch.rand(layer.weight.shape, generator=generator) < density) / density**0.5)
    return net.eval().requires_grad_(False)


def logits(net: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        net(x)


def gradients(net: nn.Module, x: Tensor) -> None:
    x = x.clone().requires_grad_()
    torch.autograd.grad(net(x).sum(), x)


def alternated(sides: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median CPU seconds of each side; the first round warms up."""
    spent: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds + 1):
        for name, run in sides.items():
            start = time.process_time()
            run()
            spent[name].append(time.process_time() - start)
    return {name: statistics.median(seconds[1:]) for name, seconds in spent.items()}


def rates() -> dict[str, float]:
    """What this core does in this run: multiply-adds (as 2 FLOP) per second, and bytes moved per second (read and written)."""
    a, long = torch.rand(768, 768), torch.rand(16_000_000)
    other = torch.empty_like(long)
    seconds = alternated({"product": lambda: a @ a, "copy": lambda: other.copy_(long)}, 9)
    return {"flops": 2 * 768**3 / seconds["product"], "bytes": 8 * len(long) / seconds["copy"]}


def work(net: nn.Module, x: Tensor) -> dict[str, float]:
    """Per image: FLOP that remain, and bytes when every step reads and writes its values once; forwards and backwards."""
    network = read(net, x)
    made = plan(network)
    moved = {}
    for way, groups in (("forward", made.forward), ("backward", made.backward)):
        views = [view for steps in groups for view in (steps[0].source, steps[0].out, steps[0].addend) if view is not None]
        moved[way] = 4.0 * sum(channels * height * width for channels, height, width in (view.shape for view in views))
    return {"flops": 2.0 * network.multiplications, "forward": moved["forward"], "backward": moved["backward"]}


def measured(density: float, rounds: int, rate: dict[str, float]) -> dict[str, Any]:
    net, x = pruned("resnet18", density), torch.rand(IMAGES, *SHAPE, generator=torch.Generator().manual_seed(0))
    engine = accelerated(net, x, path="engine")
    if engine.program is None:
        raise SystemExit(f"no engine on this machine: {engine.reason}")
    todo, found = work(net, x), {"density": density, "path": engine.path}
    parts = {"logits": (logits, 1, todo["forward"]), "gradients": (gradients, 2, todo["forward"] + todo["backward"])}
    for name, (run, passes, moved) in parts.items():
        seconds = alternated({"dense": lambda run=run: run(net, x), "engine": lambda run=run: run(engine, x)}, rounds)
        found[name] = {
            "dense_ms": 1e3 * seconds["dense"] / IMAGES,
            "engine_ms": 1e3 * seconds["engine"] / IMAGES,
            "times": seconds["dense"] / seconds["engine"],
            "limit_ms": 1e3 * max(passes * todo["flops"] / rate["flops"], moved / rate["bytes"]),
            "mflop": passes * todo["flops"] / 1e6,
            "mbyte": moved / 1e6,
        }
    return found


def verdict(row: dict[str, Any], name: str, at: int) -> str:
    variant = row["path"].removeprefix("engine-")
    figure = FIGURES.get(variant, {}).get(row["density"], (None, None))[at]
    if figure is None:
        return ""
    return f"{'reached' if row[name]['times'] >= figure else 'NOT reached'}: at least {figure:g}x"


def table(result: dict[str, Any]) -> str:
    lines = [
        f"{result['date']}, {result['machine']['processor']}, {result['path']}, load {result['load']}, "
        f"{result['rates']['flops'] / 1e9:.0f} GFLOP/s, {result['rates']['bytes'] / 1e9:.1f} GB/s",
        "ms per image            dense   engine    times    limit    MFLOP  MB moved",
    ]
    for row in result["rows"]:
        for at, name in enumerate(("logits", "gradients")):
            one = row[name]
            numbers = f"{one['dense_ms']:8.2f} {one['engine_ms']:8.2f} {one['times']:7.1f}x {one['limit_ms']:8.2f}"
            work_done = f"{one['mflop']:8.1f} {one['mbyte']:8.1f}"
            lines.append(f"{row['density']:<6g}{name:>12} {numbers} {work_done}  {verdict(row, name, at)}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--write", type=Path, help="keep the result as JSON in this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rate = rates()
    rows = [measured(density, options.rounds, rate) for density in DENSITIES]
    result = {
        "date": datetime.now(UTC).date().isoformat(), "machine": machine(), "torch": torch.__version__,
        "path": rows[0]["path"], "capability": torch.backends.cpu.get_cpu_capability(), "compiler": kernel.compiler()[0],
        "load": round(os.getloadavg()[0], 1), "threads": 1, "rounds": options.rounds, "rates": rate, "rows": rows,
    }  # fmt: skip
    if options.write:
        options.write.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(result))


if __name__ == "__main__":
    main()
