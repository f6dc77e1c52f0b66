"""What compaction saves: verifiers on a pruned network, on the same network compacted, and on its dense parent.

    python -m benchmarks.compaction CHECKPOINT [PARENT] [--count 16] [--exact 8] [--seconds 10] [--eps 0.1] [--data DIR]

CHECKPOINT: of the suite; PARENT: a safetensors file of the same layers' dense weights. CPU seconds of the first COUNT (EXACT)
test images that all of them classify correctly, the networks alternated: of bare CROWN bounds without any compaction, and of
the verifiers as they are (`crown` compacts by itself, `ibp` and `exact` do not); of `exact` also per image.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from bench.question import Case, Question, prepare
from verifiers import IBP, Crown, Exact
from verifiers.compaction import compact
from verifiers.lirpa import Relaxation

LOOKED_AT = 500
IBP_ROUNDS = 9


def slots(model: nn.Module) -> int:
    """Places for weights, zeros included."""
    return sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear))


def spent(run: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds, and what came of it."""
    start = time.process_time()
    found = run()
    return time.process_time() - start, found


def bare_crown(net: nn.Module, x: torch.Tensor, y: torch.Tensor, eps: Fraction) -> torch.Tensor:
    with torch.no_grad():
        return Relaxation(net, x, "linf", eps).margins(x, y, "CROWN")


def compared(runs: Mapping[str, Callable[[], Any]], rounds: int = 1) -> tuple[dict[str, Any], dict[str, Any]]:
    """(median CPU seconds and ratios to the pruned network's, last results) of alternated runs."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    found = {}
    for _ in range(rounds):
        for name, run in runs.items():
            seconds, found[name] = spent(run)
            times[name].append(seconds)
    cpu = {name: median(one) for name, one in times.items()}
    return {"cpu seconds": cpu, "ratio to pruned": {name: cpu[name] / cpu["pruned"] for name in cpu if name != "pruned"}}, found


def networks(case: Case, parent: Path | None) -> dict[str, nn.Module]:
    found = {"pruned": case.model, "compacted": compact(case.model, case.samples.pixels()[:2]).network}
    if parent is not None:
        dense = copy.deepcopy(case.model)
        dense.load_state_dict(load_file(parent))
        found["dense"] = dense
    return found


def measure(args: argparse.Namespace) -> dict[str, Any]:
    eps = Fraction(args.eps)
    case = prepare(Question(args.checkpoint, "linf", eps, (), (), data_dir=args.data, limit=LOOKED_AT), torch.device("cpu"))
    nets = networks(case, args.parent)
    x, y = case.samples.pixels(), case.samples.labels
    with torch.no_grad():
        right = {name: net(x).argmax(1) == y for name, net in nets.items()}
    asked = torch.stack(list(right.values())).all(0).nonzero().flatten()[: max(args.count, args.exact)]
    seconds, small = spent(lambda: compact(case.model, x[:2]))
    out: dict[str, Any] = {
        "network": args.checkpoint.stem, "eps": args.eps,
        "clean": {name: float(one.double().mean()) for name, one in right.items()},
        "units": small.units, "slots": {name: slots(net) for name, net in nets.items()},
        "seconds of compaction": seconds,
    }  # fmt: skip
    few = asked[: args.count]
    out["bare CROWN"], margins = compared({name: partial(bare_crown, net, x[few], y[few], eps) for name, net in nets.items()})
    out["bare CROWN"]["largest difference"] = float((margins["pruned"] - margins["compacted"]).abs().max())
    for name, tool, rounds in (("ibp", IBP(eps=eps), IBP_ROUNDS), ("crown", Crown(eps=eps), 1)):
        out[name], proofs = compared({one: partial(tool, net, x[few], y[few]) for one, net in nets.items()}, rounds)
        out[name] |= _verdicts({one: list(proof.status) for one, proof in proofs.items()})
    tool = Exact(eps=eps, nodes=10**9, seconds=args.seconds)
    at = asked[: args.exact].tolist()
    singles = {one: [spent(partial(tool, net, x[[i]], y[[i]])) for i in at] for one, net in nets.items()}
    out["exact"] = {"median cpu seconds": {one: median(seconds for seconds, _ in found) for one, found in singles.items()}}
    out["exact"] |= _verdicts({one: [proof.status[0] for _, proof in found] for one, found in singles.items()})
    return out


def _verdicts(statuses: dict[str, list[str]]) -> dict[str, Any]:
    return {
        "equal verdicts": statuses["pruned"] == statuses["compacted"],
        "statuses": {one: dict(Counter(found)) for one, found in statuses.items()},
    }


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("parent", nargs="?", type=Path)
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--exact", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--eps", default="0.1")
    parser.add_argument("--data", help="data folder; default: the data-folder setting")
    print(json.dumps(measure(parser.parse_args()), indent=1))


if __name__ == "__main__":
    main()
