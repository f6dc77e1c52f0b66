"""Projected gradient descent with restarts, for evaluation (keeps the best point) and for training (last iterate)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks import lp


def margin_loss(logits: Tensor, y: Tensor) -> Tensor:
    """max over j != y of z_j - z_y, per image [N]: positive exactly when the image is misclassified."""
    others = logits.scatter(1, y.unsqueeze(1), -torch.inf).max(dim=1).values
    return others - logits.gather(1, y.unsqueeze(1)).squeeze(1)


def _cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits, y, reduction="none")


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"ce": _cross_entropy, "margin": margin_loss}


class _Look(NamedTuple):
    """What the model says about one iterate: loss [N], whether misclassified [N], gradient (shape of x) or None."""

    loss: Tensor
    wrong: Tensor
    gradient: Tensor | None


@dataclass(frozen=True, kw_only=True)
class PGD:
    """Every returned image lies inside the exact ball and [0,1] and was, for the search, the best iterate met.

    Best is the first misclassified one, else the one of highest loss, never lower than at x itself; so neither more
    steps nor more restarts can raise accuracy. With an int `seed` the start noise of an image depends on that image
    alone and broken images leave the batch at once, so a verdict does not depend on the batch (beyond the rounding of
    the network's own kernels). With `seed=None` the noise comes from torch's global generator and nothing leaves the
    batch. `last=True` returns the last iterate without looking at it: for training, no wait for the device.

    x is float32 [N,C,H,W] in [0,1], y int64 [N], eps and step_size in pixel units (step_size None: eps/4), loss `ce`
    or `margin`. The model is used as it stands (give it in eval mode); its modes, parameters and gradients are not
    touched.
    Raises ValueError or TypeError on construction. Madry et al. 2018, arXiv 1706.06083.
    """

    norm: str = "linf"
    eps: Fraction
    steps: int = 50
    step_size: Fraction | None = None
    restarts: int = 1
    loss: str = "ce"
    seed: int | None = 0
    random_start: bool = True
    last: bool = False

    def __post_init__(self) -> None:
        lp.check_ball(self.norm, self.eps)
        if self.loss not in LOSSES:
            raise ValueError(f"unknown loss {self.loss!r}: choose one of {', '.join(LOSSES)}")
        if self.steps < 1 or self.restarts < 1:
            raise ValueError(f"steps and restarts must be at least 1, got {self.steps} and {self.restarts}")
        if self.restarts > 1 and (self.last or not self.random_start):
            raise ValueError(f"{self.restarts} restarts would repeat one path: set random_start=True and last=False")

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        x = x.detach()
        if len(x) == 0:
            return x.clone()
        return self._last_iterate(model, x, y) if self.last else self._search(model, x, y)

    def _last_iterate(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        x_adv = self._start(x, restart=0)
        for _ in range(self.steps):
            gradient = self._look(model, x_adv, y).gradient
            assert gradient is not None
            x_adv = lp.clip_to_ball(lp.ascend(x_adv, gradient, self.norm, self._step), x, self.norm, self.eps)
        return lp.project(x_adv, x, self.norm, self.eps)

    def _search(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        best = _Best(x, self._look(model, x, y, gradient=False))
        for restart in range(self.restarts):
            rows = torch.arange(len(x), device=x.device)
            if self.seed is not None:
                rows = rows[~best.broken]
            if len(rows) == 0:
                break
            self._run(model, x, y, rows, restart, best)
        return best.x_adv

    def _run(self, model: nn.Module, x: Tensor, y: Tensor, rows: Tensor, restart: int, best: _Best) -> None:
        # exact projection at every step: the iterate judged is, bit for bit, the one returned
        ball = lp.Ball(x, self.norm, self.eps)
        x_adv = ball.project(self._start(x[rows], restart), rows)
        for step in range(self.steps + 1):
            look = self._look(model, x_adv, y[rows], gradient=step < self.steps)
            best.update(rows, x_adv, look)
            if look.gradient is None:
                return
            gradient = look.gradient
            if self.seed is not None:
                still = ~look.wrong
                rows, x_adv, gradient = rows[still], x_adv[still], gradient[still]
                if len(rows) == 0:
                    return
            x_adv = ball.project(lp.ascend(x_adv, gradient, self.norm, self._step), rows)

    @property
    def _step(self) -> float:
        return float(self.eps / 4 if self.step_size is None else self.step_size)

    def _start(self, x: Tensor, restart: int) -> Tensor:
        return lp.random_start(x, self.norm, self.eps, self.seed, restart) if self.random_start else x

    def _look(self, model: nn.Module, x_adv: Tensor, y: Tensor, gradient: bool = True) -> _Look:
        with torch.set_grad_enabled(gradient):
            x_adv = x_adv.detach().requires_grad_(gradient)
            logits = model(x_adv)
            loss = LOSSES[self.loss](logits, y)
            # the gradient of x only: parameters must not accumulate any
            slope = torch.autograd.grad(loss.sum(), x_adv)[0] if gradient else None
        return _Look(loss.detach(), logits.detach().argmax(dim=1) != y, slope)


class _Best:
    """Per image the earliest misclassified point seen, else the one of highest loss."""

    def __init__(self, x: Tensor, look: _Look) -> None:
        self.x_adv, self.loss, self.broken = x.clone(), look.loss.clone(), look.wrong.clone()

    def update(self, rows: Tensor, x_adv: Tensor, look: _Look) -> None:
        better = ~self.broken[rows] & (look.wrong | (look.loss > self.loss[rows]))
        won = rows[better]
        self.x_adv[won], self.loss[won], self.broken[won] = x_adv[better], look.loss[better], look.wrong[better]


@dataclass(frozen=True, kw_only=True)
class FGSM:
    """Every returned image is x after one step of size eps along the gradient of the cross entropy, in the exact ball.

    Shapes and units as in `PGD`. Nothing is random here: `seed` is there so that every attack can be given one.
    Raises ValueError or TypeError on construction. Goodfellow et al. 2015, arXiv 1412.6572.
    """

    norm: str = "linf"
    eps: Fraction
    seed: int | None = 0

    def __post_init__(self) -> None:
        lp.check_ball(self.norm, self.eps)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        step = PGD(norm=self.norm, eps=self.eps, steps=1, step_size=self.eps, random_start=False, last=True)
        return step(model, x, y)
