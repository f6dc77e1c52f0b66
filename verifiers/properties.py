"""Properties of a network on a box: are all rows of its outputs positive there? The core of `exact`, for any box and rows."""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

from .ascent import sharpened
from .ball import Interval
from .branching import Budget, OutOfBudgetError, Search, Verdict
from .proof import BROKEN, OPEN, SelfRefutedError
from .relax import Box, Rows, relax
from .rounding import SHARE, allowance, full_precision, in_float64
from .unrolled import Unrolled
from .witness import Hunt, Judge


@torch.no_grad()
@full_precision()
def decide(
    model: nn.Module, lower: Tensor, upper: Tensor, rows: Tensor, offsets: Tensor, *, nodes: int = 2000,
    seconds: float | None = None, milp_below: int = 50, seed: int = 0,
) -> Verdict:
    """PROVED: every row of rows · f(x) + offsets is positive for every x of the box; BROKEN: the witness is a point of it
    where some row is <= 0 in the float64 network; else OPEN or TIMEOUT. Complete but for its limits.

    model: a plain ReLU network. lower, upper: float64 [1, ...], any finite box in the model's input units, taken as it is.
    rows: [T, outputs], offsets: [T]. The witness is float64 [1, ...]. Proofs allow for rounding and the solver's tolerance as
    `Exact` says; its fields explain the limits. Raises ValueError for other shapes, empty boxes and values that are not
    finite, UnsupportedNetworkError as Exact does.
    """
    require_limits(nodes, seconds, milp_below)
    budget = limits(nodes, seconds)
    lower, upper, rows, offsets = (one.double().cpu() for one in (lower, upper, rows, offsets))
    _require_a_question(lower, upper, rows, offsets)
    double = in_float64(model).cpu().requires_grad_(False)
    box = Interval(lower, upper)
    network = Unrolled(double, box.centre)
    if rows.shape[1] != network.outputs:
        raise ValueError(f"the rows have {rows.shape[1]} columns, but the network has {network.outputs} outputs")
    judge = Judge(double, box, box.centre, rows, offsets, lambda logits, values: (values <= 0).any(1))
    return settled(network, box, judge, budget, milp_below, seed)


def _require_a_question(lower: Tensor, upper: Tensor, rows: Tensor, offsets: Tensor) -> None:
    if lower.shape != upper.shape or lower.dim() < 2 or len(lower) != 1:
        raise ValueError(f"the box must be one lower and one upper input [1, ...], got {[*lower.shape]} and {[*upper.shape]}")
    if rows.dim() != 2 or len(rows) == 0 or offsets.shape != rows.shape[:1]:
        raise ValueError(f"rows must be [T, outputs] with offsets [T], T >= 1, got {[*rows.shape]} and {[*offsets.shape]}")
    if not all(bool(torch.isfinite(one).all()) for one in (lower, upper, rows, offsets)):
        raise ValueError("the box, the rows and the offsets must be finite")
    if bool((lower > upper).any()):
        raise ValueError("the box is empty: some lower end lies above the upper one")


def require_limits(nodes: int, seconds: float | None, milp_below: int) -> None:
    """Raises ValueError for senseless ones."""
    if nodes < 1 or milp_below < 0:
        raise ValueError(f"exact needs nodes >= 1 and milp_below >= 0, got {nodes} and {milp_below}")
    if seconds is not None and not seconds > 0:
        raise ValueError(f"seconds of exact must be positive, got {seconds}")


def limits(nodes: int, seconds: float | None, gone: float = 0.0) -> Budget:
    """From now on, when `gone` seconds are spent already; the root may take half of the time."""
    if seconds is None:
        return Budget(nodes, None, None)
    now = time.perf_counter()
    return Budget(nodes, now + seconds - gone, now + (seconds - gone) / 2)


def settled(
    network: Unrolled, box: Interval, judge: Judge, budget: Budget, milp_below: int, seed: int, proposals: Tensor | None = None
) -> Verdict:
    """The judge's rows on the whole `box`, which holds the legal one; everything on the CPU, `network` is the judge's model.

    Points `proposals` [N, ...] are tried first. Raises UnsupportedNetworkError where a bound contradicts a point.
    """
    found = _searched(network, box, judge, budget, milp_below, seed, proposals)
    if found.margin > judge.lowest + 1e-6 * max(1.0, abs(judge.lowest)):
        raise SelfRefutedError(
            f"the bound {found.margin:.9g} lies above the reached margin {judge.lowest:.9g}; please report this network"
        )
    return found


def _searched(
    network: Unrolled, box: Interval, judge: Judge, budget: Budget, milp_below: int, seed: int, proposals: Tensor | None
) -> Verdict:
    witness = judge.check(judge.start if proposals is None else torch.cat([judge.start.to(proposals), proposals]))
    if witness is not None:
        return Verdict(BROKEN, float("nan"), 0, witness)
    over, found = budget.root_is_over, Verdict(OPEN, float("nan"), 0)
    try:
        search = _search(relax(network, box, budget.pause, enough=over), network, box, judge, budget, milp_below, seed)
        found = search.root()
        if found.status != OPEN or not len(search.box.low):
            return found
        if not over():
            sharp = relax(network, box, budget.pause, bound=sharpened(budget.pause, over))
            search = _search(sharp, network, box, judge, budget, milp_below, seed + 1)
    except OutOfBudgetError as limit:
        return found._replace(status=limit.status)
    last = search.run()
    return last._replace(margin=max((bound for bound in (last.margin, found.margin) if bound == bound), default=last.margin))


def _search(
    relaxed: Box, network: Unrolled, box: Interval, judge: Judge, budget: Budget, milp_below: int, seed: int
) -> Search:
    matrix, constant = relaxed.outputs
    margins = Rows(judge.rows @ matrix, judge.rows @ constant + judge.offsets)
    return Search(Hunt(judge, network, relaxed, margins, _allowed(judge, box, relaxed), seed), budget, milp_below)


def _allowed(judge: Judge, box: Interval, relaxed: Box) -> Tensor:
    """Per row what rounding may add to it: in the unrolled network, or in the model itself, whichever is more.

    A model's allowance covers twice a logit's error, so a row takes half its absolute sum of them, and the offset's own share.
    """
    size = judge.rows.abs()
    most = torch.maximum(size.sum(1) / 2 * allowance(judge.model, box), size @ relaxed.allowed)
    return most + SHARE[torch.float64] * judge.offsets.abs()
