"""Counterexamples: images inside the exact linf ball and [0,1] that the float64 network misclassifies."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor, nn

from .ball import Interval


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


class Hunt:
    """The search around one image x [1, ...] of class y; `lowest` is the smallest float64 margin met so far."""

    def __init__(self, model: nn.Module, x: Tensor, y: int, eps: Fraction, seed: int) -> None:
        self.model, self.x, self.y = model, x, y
        self.box = inward_box(x, eps)
        self.lowest = float("inf")
        self.generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def check(self, points: Tensor) -> Tensor | None:
        """The first witness among the points [N, ...], put into the ball and rounded to x's type; None if there is none."""
        points = torch.where(torch.isfinite(points), points, self.x.to(points))
        legal = points.to(self.x.dtype).clamp(self.box.lower, self.box.upper)
        logits = self.model(legal.double())
        others = logits.clone()
        others[:, self.y] = -torch.inf
        self.lowest = min(self.lowest, float((logits[:, self.y] - others.amax(1)).amin()))
        wrong = (logits.argmax(1) != self.y).nonzero().flatten()
        return legal[wrong[:1]] if len(wrong) else None

    @torch.no_grad()
    def by_margin(self) -> list[int]:
        """The other classes, the nearest at the image first."""
        order = self.model(self.x.double())[0].argsort(descending=True, stable=True).tolist()
        return [j for j in order if j != self.y]

    def descend(
        self, starts: Tensor, targets: Tensor, steps: int, pause: Callable[[], None], first: float = 0.5
    ) -> Tensor | None:
        """Signed gradient descent on f_y - f_target from each start [N, ...], one target [N] each, steps shrinking from
        `first` of the ball's width; every point on the way is checked."""
        lower, upper = self.box.lower.double(), self.box.upper.double()
        points, width = starts.double().clamp(lower, upper), (upper - lower) / 2
        for turn in range(steps):
            pause()
            witness = self.check(points)
            if witness is not None:
                return witness
            with torch.enable_grad():
                at = points.detach().requires_grad_()
                logits = self.model(at)
                loss = logits[:, self.y] - logits.gather(1, targets[:, None]).squeeze(1)
                (gradient,) = torch.autograd.grad(loss.sum(), at)
            size = first * (0.02 + 0.98 * (1 - turn / steps))
            points = (points.detach() - size * width * gradient.sign()).clamp(lower, upper)
        return self.check(points)

    def sweep(self, targets: list[int], restarts: int, steps: int, pause: Callable[[], None]) -> Tensor | None:
        """`descend` for every target from the image itself and from random points of the ball."""
        lower, upper = self.box.lower.double(), self.box.upper.double()
        count = len(targets) * restarts
        share = torch.rand(count, *self.x.shape[1:], generator=self.generator, dtype=torch.float64).to(lower)
        starts = lower + share * (upper - lower)
        starts[:: restarts] = self.x.double()
        wanted = torch.tensor(targets, device=self.x.device).repeat_interleave(restarts)
        return self.descend(starts, wanted, steps, pause)
