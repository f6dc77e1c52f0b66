"""How many images the complete verifier decides, and how fast.

    python -m benchmarks.exact CHECKPOINT... [--count 200] [--step 1] [--seconds 10] [--eps 0.1] [--data DIR] [--out FOLDER]

Per network: the first COUNT test images that it classifies correctly, every STEP-th of them. Every image is written down at
once, in FOLDER/NAME.jsonl (default: the current folder), so a killed run goes on where it stopped, in FOLDER/NAME.json the sums.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.question import Case, Question, prepare
from verifiers import IBP, Crown, Exact
from verifiers.proof import BROKEN, PROVED

LOOKED_AT = 2000  # test images among which the first that are classified correctly are sought


def judge(case: Case, i: int, eps: Fraction, seconds: float) -> dict[str, Any]:
    """One image: the answer, what decided it, and the seconds of this wall clock and of this processor."""
    x, y = case.samples.pixels()[i : i + 1], case.samples.labels[i : i + 1]
    wall, cpu = time.perf_counter(), time.process_time()
    proof = Exact(eps=eps, nodes=10**9, seconds=seconds)(case.model, x, y)
    spent = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    return {"image": i, "status": proof.status[0], "by": _by(case, x, y, eps, proof), "margin": float(proof.margin), **spent,
            **{name: int(column) for name, column in proof.details.items()}}


def _by(case: Case, x: torch.Tensor, y: torch.Tensor, eps: Fraction, proof: Any) -> str:
    """The cheapest method that proves the image, the integer programme where the search used it, else what the status says."""
    if proof.status[0] != PROVED:
        return str(proof.status[0])
    for name, tool in (("interval", IBP(eps=eps)), ("crown", Crown(eps=eps))):
        if tool(case.model, x, y).status[0] == PROVED:
            return name
    return "milp" if int(proof.details["programmes"]) else "search"


def summary(rows: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """Counts and times of the rows of one network; lateness is by the wall clock, which a busy machine makes longer."""
    wall, cpu = (np.array([row[clock] for row in rows]) for clock in ("wall", "cpu"))
    decided = sum(row["status"] in (PROVED, BROKEN) for row in rows)
    return {
        "judged": len(rows), "decided": decided, "share": decided / len(rows), "by": dict(Counter(row["by"] for row in rows)),
        "median seconds": float(np.median(wall)), "95 % seconds": float(np.quantile(wall, 0.95)),
        "median cpu": float(np.median(cpu)), "95 % cpu": float(np.quantile(cpu, 0.95)),
        "latest": max(0.0, float(wall.max()) - seconds),
    }


def measure(path: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The summary of one checkpoint."""
    eps = Fraction(args.eps)
    case = prepare(Question(path, "linf", eps, (), (), data_dir=args.data, limit=LOOKED_AT), torch.device("cpu"))
    with torch.no_grad():
        right = case.model(case.samples.pixels()).argmax(1) == case.samples.labels
    asked = right.nonzero().flatten()[: args.count : args.step].tolist()
    kept = args.out / f"{path.stem}.jsonl"
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    known = {row["image"] for row in rows if row["limit"] == args.seconds and row["eps"] == args.eps}
    with kept.open("a") as file:
        for i in asked:
            if i not in known:
                row = {"eps": args.eps, "limit": args.seconds, **judge(case, i, eps, args.seconds)}
                file.write(json.dumps(row) + "\n")
                file.flush()
                rows.append(row)
    here = [row for row in rows if row["image"] in asked and row["limit"] == args.seconds and row["eps"] == args.eps]
    clean = float(right[: max(asked) + 1].double().mean())
    return {"network": path.stem, "eps": args.eps, "limit": args.seconds, "clean": clean, **summary(here, args.seconds)}


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--step", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--eps", default="0.1")
    parser.add_argument("--data", help="data folder; default: the data-folder setting")
    parser.add_argument("--out", type=Path, default=Path())
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for path in args.checkpoints:
        found = measure(path, args)
        (args.out / f"{path.stem}.json").write_text(json.dumps(found, indent=1) + "\n")
        print(json.dumps(found, indent=1), flush=True)


if __name__ == "__main__":
    main()
