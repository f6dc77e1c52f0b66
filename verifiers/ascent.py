"""Relaxations raised by gradient ascent on slopes and split multipliers, and what to split next.

Xu et al. 2020 (arXiv 2011.13824, alpha), Wang et al. 2021 (arXiv 2103.06624, beta), Bunel et al. 2020 (branching scores).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .relax import Bounded, Box, Choice, ReluNetwork, nothing


class Optimised(NamedTuple):
    """The best bounds found, the choice behind them, and `slack` [R]: by how much they exceed their rounding allowance."""

    bounded: Bounded
    choice: Choice
    slack: Tensor


def optimise(
    network: ReluNetwork, box: Box, rows: Tensor, choice: Choice, allowed: float, rounds: int, pause: Callable[[], None] = nothing
) -> Optimised:
    """Raises the bounds of rows [R, classes] by gradient ascent on alpha and beta; a row counts as proved where slack > 0.

    The allowance of a row is `allowed` plus what its multipliers add: sum of beta times the error of the constrained value.
    """
    alpha, beta = choice.alpha.clone().requires_grad_(), choice.beta.clone().requires_grad_()
    split, rounds = bool((choice.sign != 0).any()), rounds if alpha.numel() else 0
    scale = float(rows.abs().amax()) or 1.0
    speeds = [{"params": [alpha], "lr": 0.3}, {"params": [beta], "lr": 0.1 * scale}]
    ascent = torch.optim.Adam(speeds, maximize=True, betas=(0.8, 0.9))
    best: Optimised | None = None
    for turn in range(rounds + 1):
        pause()
        with torch.enable_grad():
            now = network.lower_bounds(box, rows, Choice(alpha, beta, choice.sign))
            slack = (now.value - beta.abs() @ box.error - allowed).detach()
            found = Optimised(
                now._replace(value=now.value.detach()), Choice(alpha.detach().clone(), beta.detach().clone(), choice.sign), slack
            )
            best = found if best is None else _better(best, found)
            if turn == rounds or bool((best.slack > 0).all()):
                return best
            wanted = [alpha, beta] if split else [alpha]
            grads = torch.autograd.grad(now.value[best.slack <= 0].sum(), wanted, allow_unused=True)
        for parameter, gradient in zip(wanted, grads):
            parameter.grad = gradient
        ascent.step()
        with torch.no_grad():
            alpha.clamp_(0, 1)
            beta.clamp_(min=0).mul_(choice.sign != 0)
        for group in ascent.param_groups:
            group["lr"] *= 0.95
    raise AssertionError("the last turn returns")


def _better(old: Optimised, new: Optimised) -> Optimised:
    """Row by row, whichever has more slack."""
    up = ~(new.slack <= old.slack) & torch.isfinite(new.slack)

    def pick(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(up.view(-1, *[1] * (a.dim() - 1)), b, a)

    bounded = Bounded(*(pick(a, b) for a, b in zip(old.bounded, new.bounded)))
    return Optimised(bounded, Choice(*(pick(a, b) for a, b in zip(old.choice, new.choice))), pick(old.slack, new.slack))


def relaxation_loss(box: Box, bounded: Bounded, choice: Choice) -> Tensor:
    """How much each unstable, unsplit neuron's lines may cost the bound: [R, K]; -1 where there is nothing to split."""
    low, high, a = box.lowers, box.uppers, bounded.coefficients
    above = -low * high / (high - low)
    below = torch.maximum(choice.alpha * -low, (1 - choice.alpha) * high)
    loss = torch.where(a < 0, -a * above, a * below)
    return torch.where(choice.sign == 0, loss, -torch.ones_like(loss))


def stacked(choices: Sequence[Choice]) -> Choice:
    return Choice(*(torch.cat(parts) for parts in zip(*choices)))
