"""Relaxations raised by gradient ascent on slopes and split multipliers, and what to split next.

Xu et al. 2020 (arXiv 2011.13824, alpha), Wang et al. 2021 (arXiv 2103.06624, beta), Bunel et al. 2020 (branching scores).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .relax import Bound, Bounded, Box, Choice, Rows, crown_choice, lower_bounds, nothing

MEAN, SQUARE, SLOWER = 0.8, 0.9, 0.95  # of Adam: its two averages, and how its steps shrink
INNER_ROUNDS, ELSEWHERE = 10, 0.01


class Optimised(NamedTuple):
    """The best bounds found, the choice behind them, and `slack` [R]: by how much they exceed what they must."""

    bounded: Bounded
    choice: Choice
    slack: Tensor


def optimise(
    box: Box, rows: Rows, choice: Choice, above: Tensor | float, rounds: int, pause: Callable[[], None] = nothing
) -> Optimised:
    """Raises the lower bounds of the rows by gradient ascent on alpha and beta; a row counts as proved where slack > 0.

    A row must exceed `above` plus what its multipliers add to the rounding error: sum of beta times the error of the
    constrained value. Rows that are proved are left as they are.
    """
    choice = Choice(*(one.clone() for one in choice))
    above = torch.as_tensor(above, dtype=torch.float64).expand(len(choice.alpha))
    climbs, rounds = [_Climb(choice.alpha, 0.3)], rounds if choice.alpha.numel() else 0
    if bool((choice.sign != 0).any()):
        climbs.append(_Climb(choice.beta, 0.2 * (float(rows.matrix.abs().amax()) or 1.0)))
    best: Optimised | None = None
    at = torch.arange(len(above))
    for turn in range(rounds + 1):
        pause()
        now = Choice(*(one[at] for one in choice))
        with torch.enable_grad():
            wanted = [one.requires_grad_(turn < rounds) for one in now[: len(climbs)]]
            bounded = lower_bounds(box, rows.at(at), now)
            grads = torch.autograd.grad(bounded.value.sum(), wanted, allow_unused=True) if turn < rounds else ()
        value = bounded.value.detach()
        found = Optimised(bounded._replace(value=value), now, value - now.beta.detach() @ box.error - above[at])
        best = _detached(found) if best is None else _improved(best, found, at)
        still = ~(best.slack[at] > 0)
        if turn == rounds or not bool(still.any()):
            return best
        at = at[still]
        for climb, gradient in zip(climbs, grads):
            climb.step(at, gradient[still], turn)
        choice.alpha.clamp_(0, 1)
        choice.beta.clamp_(min=0).mul_(choice.sign != 0)
    raise AssertionError("the last turn returns")


class _Climb:
    """Adam's ascent on some rows of a tensor in place (torch.optim loads a compiler: seconds that a time limit may not have)."""

    def __init__(self, value: Tensor, lr: float) -> None:
        self.value, self.lr = value, lr
        self.mean, self.square = torch.zeros_like(value), torch.zeros_like(value)

    def step(self, at: Tensor, gradient: Tensor, turn: int) -> None:
        self.mean[at] = MEAN * self.mean[at] + (1 - MEAN) * gradient
        self.square[at] = SQUARE * self.square[at] + (1 - SQUARE) * gradient.square()
        mean, square = self.mean[at] / (1 - MEAN ** (turn + 1)), self.square[at] / (1 - SQUARE ** (turn + 1))
        self.value[at] += self.lr * SLOWER**turn * mean / (square.sqrt() + 1e-8)


def sharpened(pause: Callable[[], None], enough: Callable[[], bool]) -> Bound:
    """Bounds of inner rows by optimised slopes, for `relax`; by CROWN's once enough() is true."""

    def bound(box: Box, rows: Rows, above: Tensor) -> Tensor:
        rounds = 0 if enough() else INNER_ROUNDS
        return optimise(box, rows, crown_choice(box, len(rows.constant)), above, rounds, pause).bounded.value

    return bound


def _detached(found: Optimised) -> Optimised:
    return Optimised(found.bounded, Choice(*(one.detach().clone() for one in found.choice)), found.slack)


def _improved(best: Optimised, new: Optimised, at: Tensor) -> Optimised:
    """Row by row of `at`, whichever has more slack; `best` is changed in place."""
    up = (~(new.slack <= best.slack[at]) & torch.isfinite(new.slack)).nonzero().flatten()
    for old, one in zip((*best.bounded, *best.choice, best.slack), (*new.bounded, *new.choice, new.slack)):
        old[at[up]] = one.detach()[up]
    return best


def relaxation_loss(box: Box, bounded: Bounded, choice: Choice) -> Tensor:
    """How much each unstable, unsplit neuron's lines cost the bound: [R, K]; -1 where there is nothing to split.

    Measured at the corner where the bound is least: there these costs add up to what the network is above its bound. A small
    part of what the lines may cost elsewhere decides between equals.
    """
    low, high, a = box.low, box.high, bounded.coefficients
    slope, z = high / (high - low), box.inputs(box.corners(bounded.downhill))
    here = torch.where(a < 0, -a * (slope * (z - low) - z.clamp(min=0)), a * (z.clamp(min=0) - choice.alpha * z))
    most = torch.where(a < 0, a * slope * low, a * torch.maximum(choice.alpha * -low, (1 - choice.alpha) * high))
    return torch.where(choice.sign == 0, here + ELSEWHERE * most, -torch.ones_like(here))


def stacked(choices: Sequence[Choice]) -> Choice:
    return Choice(*(torch.cat(parts) for parts in zip(*choices)))
