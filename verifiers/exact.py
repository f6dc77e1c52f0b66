"""The complete verifier `exact` and brackets of the smallest adversarial distance."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor, nn

from .ball import float_above, outward_box
from .bounds import difference_rows
from .branching import Budget, OutOfBudgetError, Verdict
from .interval import ibp_settled
from .proof import BROKEN, OPEN, PROVED, Proof, UnsupportedNetworkError
from .properties import limits, require_limits, settled
from .rounding import full_precision, in_float64
from .unrolled import Unrolled
from .witness import Judge, float_below, inward_box

Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Exact:
    """Complete: a certified sample is robust in the whole linf ball, a broken one has a witness in it; else open or timeout.

    Branch and bound over ReLUs with optimised linear relaxations in float64 (beta-CROWN, Wang et al. 2021, arXiv 2103.06624),
    gradient descent on margins for counterexamples, and a mixed-integer programme (Tjeng et al. 2019, arXiv 1711.07356) once
    no more than `milp_below` ReLUs of a subproblem are undecided. eps is in [0,1] pixel units, the ball is cut with [0,1].

    nodes: subproblems per sample (reproducible). seconds: wall time per sample, or None; it ends with status `timeout`.
    falsifier: any attack `(model, x, y) -> x_adv`, asked first. A witness lies in the exact ball and in [0,1] and the float64
    network misclassifies it. A margin counts above its float64 rounding allowance; one that the programme's solver found
    positive counts above milp.TOLERANCE of its row's absolute sum. Near those tolerances a sample may stay open.
    Max pooling counts as ReLUs. Raises UnsupportedNetworkError for networks other than affine steps, ReLUs and max pooling,
    ValueError for another norm than linf and for senseless limits.
    """

    norm: str = "linf"
    eps: Fraction = Fraction(8, 255)
    nodes: int = 2000
    seconds: float | None = None
    milp_below: int = 50
    falsifier: Attack | None = None
    seed: int = 0
    deterministic: ClassVar[bool] = True
    costly: ClassVar[bool] = True
    falsifies: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.norm != "linf":
            raise ValueError(f"exact verifies the norm linf only, not {self.norm!r}; ibp and crown know l2")
        require_limits(self.nodes, self.seconds, self.milp_below)

    @torch.no_grad()
    @full_precision()
    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Proof:
        begun, predicted = time.perf_counter(), model(x).argmax(1)
        if len(x) == 0:
            return _proof(self, x, predicted, [])
        cheap = ibp_settled(model, x, y, "linf", self.eps)
        double = in_float64(model).cpu().requires_grad_(False)
        if double(x[:1].cpu().double()).shape[1] < 2:
            raise UnsupportedNetworkError("the network has one output, and so no margin between classes")
        try:
            network = Unrolled(double, x.cpu().double(), limits(self.nodes, self.seconds and self.seconds * len(x)).pause)
        except OutOfBudgetError as limit:
            return _proof(self, x, predicted, [Verdict(limit.status, math.nan, 0)] * len(x))
        proposals = None if self.falsifier is None else self._proposals(model, x, y)
        answers = []
        shared = (time.perf_counter() - begun) / len(x)  # of what was done for all samples, each bears its part
        for i in range(len(x)):
            if predicted[i] != y[i]:
                answers.append(Verdict(OPEN, float(cheap.margin[i]), 0))
            elif cheap.proved[i]:
                answers.append(Verdict(PROVED, float(cheap.margin[i]), 0))
            else:
                proposal = None if proposals is None else proposals[i : i + 1]
                budget = limits(self.nodes, self.seconds, shared)
                found = self._decide(double, network, x[i : i + 1].cpu(), int(y[i]), proposal, budget)
                bounds = [bound for bound in (float(cheap.margin[i]), found.margin) if not math.isnan(bound)]
                answers.append(found._replace(margin=max(bounds, default=math.nan)))
        asked = int(((predicted == y) & ~cheap.proved).sum())
        return _proof(self, x, predicted, answers, network.lowered.steps, asked)

    def _proposals(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        assert self.falsifier is not None
        with torch.enable_grad():
            return self.falsifier(model, x.clone(), y.clone()).detach().cpu()

    def _decide(
        self, model: nn.Module, network: Unrolled, x: Tensor, y: int, proposal: Tensor | None, budget: Budget
    ) -> Verdict:
        """One image that the network classifies correctly and interval bounds do not settle."""
        rows = difference_rows(torch.tensor([y]), network.outputs, torch.float64)[0]

        def misclassified(logits: Tensor, values: Tensor) -> Tensor:
            return logits.argmax(1) != y

        judge = Judge(model, inward_box(x, self.eps), x, rows, rows.new_zeros(len(rows)), misclassified)
        return settled(network, outward_box(x.double(), self.eps), judge, budget, self.milp_below, self.seed, proposal)


def _proof(
    exact: Exact, x: Tensor, predicted: Tensor, answers: list[Verdict], notes: tuple[str, ...] = (), rechecked: int = 0
) -> Proof:
    witness = torch.full_like(x, torch.nan, device="cpu")
    for i, answer in enumerate(answers):
        if answer.witness is not None:
            witness[i] = answer.witness[0].cpu()
    proved = torch.tensor([answer.status == PROVED for answer in answers], dtype=torch.float64)
    return Proof(
        radius=proved * float(exact.eps),
        margin=torch.tensor([answer.margin for answer in answers], dtype=torch.float64),
        predicted=predicted.cpu(),
        status=tuple(answer.status for answer in answers),
        witness=witness,
        details={
            "nodes": torch.tensor([answer.nodes for answer in answers], dtype=torch.int64),
            "programmes": torch.tensor([answer.programmes for answer in answers], dtype=torch.int64),
        },
        notes=notes,
        rechecked=rechecked,
    )


def exact_radius(
    model: nn.Module, x: Tensor, y: Tensor, upper: Fraction, tolerance: Fraction, verifier: Exact | None = None
) -> tuple[Tensor, Tensor]:
    """Brackets [N], [N] (float64, rounded outwards) of the smallest linf distance at which each answer changes.

    At the first distance `verifier` (default Exact()) proved the sample; at the second there is a witness, inf where none was
    found up to `upper`. Bisection stops at a bracket of `tolerance`, or of neighbouring floats, or when only open questions are
    left; both are in [0,1] pixel units. A misclassified image has distance 0. Raises as Exact does, and ValueError for a
    tolerance that is not positive.
    """
    if tolerance <= 0 or upper <= 0:
        raise ValueError(f"exact_radius needs a positive tolerance and upper distance, got {tolerance} and {upper}")
    tool = verifier or Exact()
    with torch.no_grad():
        right = (model(x).argmax(1) == y).tolist()
    ones = [(x[i : i + 1], y[i : i + 1]) for i in range(len(x))]
    ends = [_bracket(model, *one, upper, tolerance, tool) if yes else (0.0, 0.0) for one, yes in zip(ones, right)]
    lower, higher = zip(*ends) if ends else ((), ())
    return torch.tensor(lower, dtype=torch.float64), torch.tensor(higher, dtype=torch.float64)


def _bracket(model: nn.Module, x: Tensor, y: Tensor, upper: Fraction, tolerance: Fraction, tool: Exact) -> tuple[float, float]:
    proved, unproved, found = Fraction(0), upper, math.inf
    ask = upper
    while True:
        proof = replace(tool, eps=ask)(model, x, y)
        if proof.status[0] == PROVED:
            proved = ask
        else:
            unproved = ask
        if proof.witness is not None and proof.status[0] == BROKEN:
            distance = _distance(proof.witness, x.cpu())
            unproved, found = min(unproved, distance), min(found, float_above(distance, torch.float64))
        ask = Fraction(float(proved + unproved) / 2)
        if unproved - proved <= tolerance or proved == upper or not proved < ask < unproved:  # no float lies between
            return float_below(proved), found


def _distance(witness: Tensor, x: Tensor) -> Fraction:
    pairs = zip(witness.flatten().tolist(), x.flatten().tolist())
    return max(abs(Fraction(a) - Fraction(b)) for a, b in pairs)
