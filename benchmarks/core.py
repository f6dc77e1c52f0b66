"""Ratios of the core: own interval bounds and PGD against the libraries', cached masks, shared pre-training.

    python -m benchmarks.core [--json]

Every row alternates both sides in this process, on one thread, and reports the ratio of median CPU times.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from attacks import attack_class
from attacks.pgd import PGD
from bench.models import build_model
from bench.objectives import CrownIBPTraining, IBPTraining, PGDTraining
from bench.sparsity import TopKScores, attach, kept_of, prunable
from bench.train import Objective, Progress
from verifiers.ball import region
from verifiers.bounds import difference_rows, ibp_margins
from verifiers.interval import IBP
from verifiers.lirpa_compat import BoundedModule, BoundedTensor, PerturbationLpNorm

EPS = Fraction(2, 255)


def ratio(ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int = 9) -> float:
    """Median CPU time of `theirs` over that of `ours`, alternated."""
    spent: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(rounds + 1):
        for name, run in (("ours", ours), ("theirs", theirs)):
            start = time.process_time()
            run()
            spent[name].append(time.process_time() - start)
    return statistics.median(spent["theirs"][1:]) / statistics.median(spent["ours"][1:])


def interval_bounds() -> dict[str, float]:
    model = build_model("cnn_large", (3, 32, 32), 10).eval()
    x, y = torch.rand(64, 3, 32, 32), torch.randint(10, (64,))
    ball, rows = region(x, "linf", EPS), difference_rows(y, 10, x.dtype)
    bounded = BoundedModule(model, x[:2], verbose=False)
    bounded.eval()
    perturbed = BoundedTensor(x, PerturbationLpNorm(norm=float("inf"), x_L=ball.lower, x_U=ball.upper))

    def ours() -> None:
        with torch.no_grad():
            ibp_margins(model, ball, y)

    def theirs() -> None:
        with torch.no_grad():
            bounded.compute_bounds(x=(perturbed,), C=rows, method="IBP", bound_upper=False)

    return {"auto-LiRPA's IBP / own IBP (cnn_large)": ratio(ours, theirs)}


def certificates() -> dict[str, float]:
    """What the verifier `ibp` costs beyond the arithmetic that no certificate can do without: bounds and predictions.

    No margin is near zero here; those that are cost more, being computed again in float64.
    """
    found = {}
    for arch in ("cnn_small", "cnn_large"):
        model, x = build_model(arch, (1, 28, 28), 10).eval(), torch.rand(250, 1, 28, 28)
        y, verifier = model(x).argmax(1), IBP("linf", Fraction(1, 10))

        def bare(model: nn.Module = model, x: torch.Tensor = x, y: torch.Tensor = y) -> None:
            with torch.no_grad():
                ibp_margins(model, region(x, "linf", Fraction(1, 10)), y)
                model(x).argmax(1)

        whole = partial(verifier, model, x, y)
        found[f"verifier `ibp` / bare bounds and predictions ({arch})"] = ratio(bare, whole, rounds=25)
    return found


def crown_ibp_training() -> dict[str, float]:
    """A training step of CROWN-IBP with one relaxed class per image against all classes, and against interval bounds."""
    model, x, y = build_model("cnn_large", (1, 28, 28), 10), torch.rand(32, 1, 28, 28), torch.randint(10, (32,))
    steps = {
        "ibp": IBPTraining(Fraction(1, 10)),
        "all": CrownIBPTraining(Fraction(1, 10)),
        "fused": CrownIBPTraining(Fraction(1, 10), fused=True),
    }
    run = {name: partial(_training_step, model, one, x, y) for name, one in steps.items()}
    return {
        "CROWN-IBP step, all classes / fused (cnn_large, 10 classes)": ratio(run["fused"], run["all"], rounds=3),
        "CROWN-IBP step, fused / IBP step": ratio(run["ibp"], run["fused"], rounds=3),
    }


def _training_step(model: nn.Module, objective: Objective, x: torch.Tensor, y: torch.Tensor) -> None:
    objective(model, x, y, Progress(1, 10, 5)).backward()


def attacks() -> dict[str, float]:
    model = build_model("cnn_small", (3, 32, 32), 10).eval().requires_grad_(False)
    x = torch.rand(64, 3, 32, 32)
    y = model(x).argmax(1)
    own = PGD(norm="linf", eps=Fraction(1, 1000), steps=10)  # too small to break anything: all samples stay in the batch
    library = attack_class("pgd") if attack_class("pgd") is not PGD else attack_class("torchattacks")
    theirs = library(norm="linf", eps=Fraction(1, 1000), attack="pgd", params=(("steps", 10),))
    return {"torchattacks' PGD-10 / own PGD-10 (cnn_small)": ratio(lambda: own(model, x, y), lambda: theirs(model, x, y))}


def cached_masks() -> dict[str, float]:
    model: nn.Module = build_model("cnn_large", (1, 28, 28), 10)
    for layer in prunable(model).values():
        attach(layer, TopKScores(layer.weight.detach(), kept_of(layer.weight.numel(), Fraction(1, 10))))
    x, y = torch.rand(16, 1, 28, 28), torch.randint(10, (16,))
    objective = PGDTraining(steps=10)

    def ours() -> None:
        with parametrize.cached():
            objective(model, x, y, Progress(1, 1)).backward()

    def theirs() -> None:
        objective(model, x, y, Progress(1, 1)).backward()

    return {"top-k mask per forward pass / once per step (HYDRA, PGD-10)": ratio(ours, theirs, rounds=3)}


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = {**interval_bounds(), **certificates(), **crown_ibp_training(), **attacks(), **cached_masks()}
    if "--json" in sys.argv[1:]:
        print(json.dumps(found, indent=1))
        return
    for name, value in found.items():
        print(f"{value:7.2f}  {name}")


if __name__ == "__main__":
    main()
