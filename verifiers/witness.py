"""Counterexamples: points of a box at which the float64 network breaks a property, and the box inside an exact linf ball."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor, nn

from .ball import Interval
from .relax import Box, Rows
from .unrolled import Unrolled

SHOWN = 8  # points that the judge sees at once
Broken = Callable[[Tensor, Tensor], Tensor]  # logits [N, outputs] and values of the rows [N, T] -> [N]


def float_below(eps: Fraction) -> float:
    """The largest float64 not above the exact eps, or the next smaller one."""
    value = torch.tensor(float(eps), dtype=torch.float64)
    if Fraction(value.item()) > eps:
        value = torch.nextafter(value, torch.tensor(0.0, dtype=torch.float64))
    return float(value.item())


def inward_box(x: Tensor, eps: Fraction) -> Interval:
    """Pixels of x's own type, every one of them inside the exact ball and [0,1]; x in [0,1] is one of them."""
    infinity = torch.tensor(torch.inf, dtype=x.dtype, device=x.device)
    narrow = float_below(eps)
    lower = torch.nextafter((x.double() - narrow).to(x.dtype), infinity).clamp(0, 1)
    upper = torch.nextafter((x.double() + narrow).to(x.dtype), -infinity).clamp(0, 1)
    return Interval(torch.minimum(lower, x), torch.maximum(upper, x))


class Judge:
    """Says whether points of the `legal` box [1, ...] break the property: `broken` (logits, values of the rows) of the model.

    rows: [T, outputs], offsets: [T]. Points are rounded to the box's own type and judged by the model in float64, wherever
    it is; `lowest` is the smallest row met so far. `start` is a legal point.
    """

    def __init__(
        self, model: nn.Module, legal: Interval, start: Tensor, rows: Tensor, offsets: Tensor, broken: Broken
    ) -> None:
        self.model, self.legal, self.start, self.rows, self.offsets, self.broken = model, legal, start, rows, offsets, broken
        self.lowest = float("inf")

    @torch.no_grad()
    def check(self, points: Tensor) -> Tensor | None:
        """The first witness among the points [N, ...], put into the box and rounded to its type; None if there is none."""
        points = torch.where(torch.isfinite(points), points, self.start.to(points))
        legal = points.to(self.legal.lower.dtype).clamp(self.legal.lower, self.legal.upper)
        logits = self.model(legal.double())
        values = logits @ self.rows.mT + self.offsets
        self.lowest = min(self.lowest, float(values.amin()))
        wrong = self.broken(logits, values).nonzero().flatten()
        return legal[wrong[:1]] if len(wrong) else None


class Hunt:
    """The search for a point of a relaxed box that breaks a property: on the box's own form of the network, which is fast;
    what looks broken there is shown to the judge. margins: the rows, allowed [T]: what rounding may add to each."""

    def __init__(self, judge: Judge, network: Unrolled, box: Box, margins: Rows, allowed: Tensor, seed: int) -> None:
        self.judge, self.network, self.box, self.margins, self.allowed = judge, network, box, margins, allowed
        self.generator = torch.Generator().manual_seed(seed)
        self.lowest = float("inf")

    def _values(self, points: Tensor) -> Tensor:
        return self.box.neurons(points) @ self.margins.matrix.mT + self.margins.constant

    @torch.no_grad()
    def check(self, points: Tensor) -> Tensor | None:
        """A witness [1, ...] among pixels [N, d] of the box: the judge sees those that look broken, and the lowest so far."""
        slack = (self._values(points) - self.allowed).amin(1)
        order = slack.argsort(stable=True)[:SHOWN]
        shown = order[(slack[order] <= 0) | (slack[order] < self.lowest)]
        self.lowest = min(self.lowest, float(slack.amin()))
        return self.judge.check(self.network.images(points[shown])) if len(shown) else None

    def descend(
        self, starts: Tensor, targets: Tensor, steps: int, pause: Callable[[], None], first: float = 0.5
    ) -> Tensor | None:
        """Signed gradient descent on one row each, targets [N], from each start [N, d], steps shrinking from `first` of
        the box's width; the lowest points on the way are checked."""
        lower, upper = self.box.lower, self.box.upper
        points, width = starts.clamp(lower, upper), (upper - lower) / 2
        best, lowest = points, torch.full((len(points),), torch.inf, dtype=points.dtype)
        for turn in range(steps + 1):
            pause()
            with torch.enable_grad():
                at = points.requires_grad_()
                values = self._values(at)
                loss = values.gather(1, targets[:, None]).squeeze(1)
                (gradient,) = torch.autograd.grad(loss.sum(), at)
            least = (values.detach() - self.allowed).amin(1)
            best = torch.where((least < lowest)[:, None], points.detach(), best.detach())
            lowest = torch.minimum(lowest, least)
            if bool((least <= 0).any()) or turn == steps:
                witness = self.check(best)
                if witness is not None or turn == steps:
                    return witness
            size = first * (0.02 + 0.98 * (1 - turn / steps))
            points = (points.detach() - size * width * gradient.sign()).clamp(lower, upper)
        raise AssertionError("the last turn returns")

    def sweep(self, targets: Tensor, restarts: int, steps: int, pause: Callable[[], None]) -> Tensor | None:
        """`descend` for every target from the box's middle and from random points of it."""
        lower, upper = self.box.lower, self.box.upper
        share = torch.rand(len(targets) * restarts, len(lower), generator=self.generator, dtype=torch.float64)
        share[::restarts] = 0.5
        return self.descend(lower + share * (upper - lower), targets.repeat_interleave(restarts), steps, pause)
