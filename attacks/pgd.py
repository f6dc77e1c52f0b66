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

TOGETHER = 64  # images of one batch up to which restarts share it, whatever the caller's own batch is


class TooFewClassesError(ValueError):
    """A loss that compares more classes than the network has."""


def classes_of(logits: Tensor) -> Tensor:
    """Predicted classes [N]; -1, which is nobody's label, where a logit is NaN or infinite."""
    return torch.where(torch.isfinite(logits).all(1), logits.argmax(1), -1)


def margin_loss(logits: Tensor, y: Tensor) -> Tensor:
    """max over j != y of z_j - z_y, per image [N]: positive exactly when the image is misclassified."""
    others = logits.scatter(1, y.unsqueeze(1), -torch.inf).max(dim=1).values
    return others - logits.gather(1, y.unsqueeze(1)).squeeze(1)


def dlr_loss(logits: Tensor, y: Tensor) -> Tensor:
    """The margin over the gap between the largest and the third largest logit [N]: no scale of the logits changes it.

    Raises TooFewClassesError for fewer than 3 classes. Croce and Hein 2020, arXiv 2003.01690, equation 3.
    """
    if logits.shape[1] < 3:
        raise TooFewClassesError(f"the loss dlr needs at least 3 classes, the network has {logits.shape[1]}: use loss = margin")
    first, _, third = logits.topk(3, dim=1).values.unbind(1)
    return margin_loss(logits, y) / (first - third + 1e-12)


def _cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits, y, reduction="none")


def _kl(logits: Tensor, clean: Tensor) -> Tensor:
    """KL(clean || prediction) per image, as TRADES ascends it; clean: log-probabilities [N, C]."""
    return F.kl_div(logits.log_softmax(1), clean, reduction="none", log_target=True).sum(1)


# of the logits and the goal: the labels, for kl the clean log-probabilities
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ce": _cross_entropy, "margin": margin_loss, "dlr": dlr_loss, "kl": _kl,
}  # fmt: skip


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
    the network's own kernels); once few images stand, several restarts share a batch, with the answer that they give
    one after the other. With `seed=None` the noise comes from torch's global generator and nothing leaves the
    batch. `last=True` returns the last iterate without looking at it: for training, no wait for the device.

    x is float32 [N,C,H,W] in [0,1], y int64 [N], eps and step_size in pixel units (step_size None: eps/4), loss `ce`,
    `margin`, `dlr` (of 3 classes or more) or `kl` (to the clean prediction). Logits that are NaN or infinite count as
    misclassified. The model is used as it stands (give it in eval mode); its modes, parameters and gradients are not
    touched.
    Raises ValueError or TypeError on construction, TooFewClassesError when called. Madry et al. 2018, arXiv 1706.06083.
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
        if self.loss == "kl" and not self.random_start:
            raise ValueError("the loss kl has no gradient at the clean image itself: set random_start=True")

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        x = x.detach()
        if len(x) == 0:
            return x.clone()
        return self._last_iterate(model, x, y) if self.last else self._search(model, x, y)

    def _last_iterate(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        x_adv, goal = self._start(x, restart=0), self._goal(model, x, y)
        for _ in range(self.steps):
            gradient = self._look(model, x_adv, y, goal).gradient
            assert gradient is not None
            x_adv = lp.clip_to_ball(lp.ascend(x_adv, gradient, self.norm, self._step), x, self.norm, self.eps)
        return lp.project(x_adv, x, self.norm, self.eps)

    def _search(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        goal = self._goal(model, x, y)
        look = self._look(model, x, y, goal, gradient=False)
        best = _Best(x.clone(), look.loss.clone(), look.wrong.clone())
        restart = 0
        while restart < self.restarts:
            rows = torch.arange(len(x), device=x.device)
            if self.seed is not None:
                rows = rows[~best.broken]
            if len(rows) == 0:
                break
            together = range(restart, min(self.restarts, restart + self._at_once(restart, len(rows), len(x))))
            self._run(model, x, y, goal, rows, together, best)
            restart = together.stop
        return best.x_adv

    def _at_once(self, restart: int, standing: int, batch: int) -> int:
        """How many restarts share a batch: the first one, which breaks most images, has its own."""
        return 1 if restart == 0 or self.seed is None else max(1, max(batch, TOGETHER) // standing)

    def _run(self, model: nn.Module, x: Tensor, y: Tensor, goal: Tensor, rows: Tensor, restarts: range, best: _Best) -> None:
        # exact projection at every step: the iterate judged is, bit for bit, the one returned
        ball, image = lp.Ball(x, self.norm, self.eps), rows.repeat(len(restarts))
        x_adv = ball.project(torch.cat([self._start(x[rows], restart) for restart in restarts]), image)
        found = _Best(x_adv.clone(), best.loss.new_full((len(image),), -torch.inf), image < 0)
        path = torch.arange(len(image), device=x.device)
        for step in range(self.steps + 1):
            at = image[path]
            look = self._look(model, x_adv, y[at], goal[at], gradient=step < self.steps)
            found.update(path, x_adv, look)
            if look.gradient is None:
                break
            gradient = look.gradient
            if self.seed is not None:
                # what a later restart finds no longer counts once an earlier one has broken the image
                still = ~found.broken.view(len(restarts), -1).int().cumsum(0).bool().flatten()[path]
                path, x_adv, gradient = path[still], x_adv[still], gradient[still]
                if len(path) == 0:
                    break
            x_adv = ball.project(lp.ascend(x_adv, gradient, self.norm, self._step), image[path])
        for one in torch.arange(len(image), device=x.device).view(len(restarts), -1):
            best.update(rows, found.x_adv[one], _Look(found.loss[one], found.broken[one], None))

    @property
    def cost(self) -> float:
        """About how many forward passes an image costs."""
        return self.restarts * (3 * self.steps + 1)

    @property
    def _step(self) -> float:
        return float(self.eps / 4 if self.step_size is None else self.step_size)

    def _start(self, x: Tensor, restart: int) -> Tensor:
        return lp.random_start(x, self.norm, self.eps, self.seed, restart) if self.random_start else x

    def _goal(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if self.loss != "kl":
            return y
        with torch.no_grad():
            clean: Tensor = model(x).log_softmax(1)
        return clean

    def _look(self, model: nn.Module, x_adv: Tensor, y: Tensor, goal: Tensor, gradient: bool = True) -> _Look:
        with torch.set_grad_enabled(gradient):
            x_adv = x_adv.detach().requires_grad_(gradient)
            logits = model(x_adv)
            loss = LOSSES[self.loss](logits, goal)
            # the gradient of x only: parameters must not accumulate any
            slope = torch.autograd.grad(loss.sum(), x_adv)[0] if gradient else None
        return _Look(loss.detach(), classes_of(logits.detach()) != y, slope)


@dataclass
class _Best:
    """Per image the earliest misclassified point seen, else the one of highest loss."""

    x_adv: Tensor
    loss: Tensor
    broken: Tensor

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

    @property
    def cost(self) -> float:
        """About how many forward passes an image costs."""
        return 3

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        step = PGD(norm=self.norm, eps=self.eps, steps=1, step_size=self.eps, random_start=False, last=True)
        return step(model, x, y)
