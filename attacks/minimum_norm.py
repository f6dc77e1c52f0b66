"""Minimum-norm attacks: the nearest adversarial point that they find, so that its distance breaks every larger eps too."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn

from attacks import lp
from attacks.pgd import classes_of, margin_loss

# Near the boundary rounding decides the class: a point counts from this share of the largest logit on.
SURE = 1e-5


class _Nearest:
    """Per image the adversarial point nearest to x that was seen, its distance, and what to hand out."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, norm: str) -> None:
        with torch.no_grad():
            wrong = classes_of(model(x)) != y
        self.x, self.y, self.norm, self.x_adv = x, y, norm, x.clone()
        self.far = torch.where(wrong, 0.0, torch.inf).double()

    def look(self, x_adv: Tensor, logits: Tensor) -> Tensor:
        """Whether each point is surely misclassified, the nearest of these being kept."""
        finite = torch.isfinite(logits).all(1)
        sure = ~finite | (margin_loss(logits, self.y) > SURE * logits.abs().amax(1))
        far = lp.distance(x_adv, self.x, self.norm)
        nearer = sure & (far < self.far)
        self.x_adv = torch.where(_per_image(nearer, x_adv), x_adv, self.x_adv)
        self.far = torch.where(nearer, far, self.far)
        return sure

    def inside(self, eps: Fraction) -> Tensor:
        return lp.project(self.x_adv, self.x, self.norm, eps)


@dataclass(frozen=True, kw_only=True)
class FMN:
    """Every returned image is the nearest misclassified point found, or, where that is further than eps, one of the exact ball.

    The radius of a ball around x shrinks while the point is misclassified and grows while it is not, both by a share that
    decays from gamma to gamma / 50; the point ascends the margin in l2 steps that decay from 1 to 1/100 and is projected
    into that ball and [0,1]. Until a first one is found, the radius is a little beyond where the margin would vanish were it
    linear. Pixels at 0 or 1 are pushed no further.

    x is float32 [N,C,H,W] in [0,1], y int64 [N], eps in pixel units, norm linf or l2. An image that is misclassified already
    comes back as it is. Nothing is random: an answer depends on its image only, and `seed` is there so that every attack
    can be given one. Raises ValueError or TypeError on construction. Pintor et al. 2021, arXiv 2102.12827.
    """

    norm: str = "linf"
    eps: Fraction
    steps: int = 100
    gamma: float = 0.05
    seed: int | None = 0

    def __post_init__(self) -> None:
        _check(self.norm, self.eps, self.steps, self.gamma)

    @property
    def cost(self) -> float:
        """About how many forward passes an image costs."""
        return 3 * self.steps + 1

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        x = x.detach()
        if len(x) == 0:
            return x.clone()
        nearest, x_adv = _Nearest(model, x, y, self.norm), x
        radius = torch.full_like(nearest.far, torch.inf)
        for step in range(self.steps):
            margin, logits, gradient = _slope(model, x_adv, y)
            sure = nearest.look(x_adv, logits)
            decay = _cosine(step, self.steps)
            gamma = self.gamma * (1 / 50 + 49 / 50 * decay)
            linear = lp.distance(x_adv, x, self.norm) + margin.abs() / _dual_length(gradient, self.norm)
            outwards = torch.where(nearest.far < torch.inf, radius, linear) * (1 + gamma)
            radius = torch.where(sure, torch.minimum(radius * (1 - gamma), nearest.far), outwards)
            radius = radius.clamp(max=_furthest(x, self.norm))
            x_adv = _into(lp.ascend(x_adv, gradient, "l2", 1 / 100 + 99 / 100 * decay), x, self.norm, radius)
        nearest.look(x_adv, _logits(model, x_adv))
        return nearest.inside(self.eps)


@dataclass(frozen=True, kw_only=True)
class DDN:
    """Every returned image is the nearest misclassified point found in l2, or, where that is further than eps, one of the ball.

    The direction ascends the margin (the paper's cross entropy has no slope where the network is sure) in steps that decay from
    1 to 1/100; the length of the perturbation shrinks by the share gamma while the point is misclassified and grows by it while
    it is not, from `start` on. Pixels at 0 or 1 are pushed no further.

    Shapes, units and what is not random as in `FMN`; norm is l2 only. Raises ValueError or TypeError on construction.
    Rony et al. 2019, arXiv 1811.09600.
    """

    norm: str = "l2"
    eps: Fraction
    steps: int = 100
    gamma: float = 0.05
    start: Fraction = Fraction(1)
    seed: int | None = 0

    def __post_init__(self) -> None:
        if self.norm != "l2":
            raise ValueError(f"attack 'ddn' works in l2, not in {self.norm!r}: ask for l2, or use fmn")
        _check(self.norm, self.eps, self.steps, self.gamma)
        if self.start <= 0:
            raise ValueError(f"ddn starts with a perturbation of length `start` > 0, got {self.start}")

    @property
    def cost(self) -> float:
        """About how many forward passes an image costs."""
        return 3 * self.steps + 1

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        x = x.detach()
        if len(x) == 0:
            return x.clone()
        nearest, x_adv = _Nearest(model, x, y, "l2"), x
        radius = torch.full_like(nearest.far, float(self.start))
        for step in range(self.steps):
            _, logits, gradient = _slope(model, x_adv, y)
            sure = nearest.look(x_adv, logits)
            if step > 0:
                radius = torch.where(sure, radius * (1 - self.gamma), radius * (1 + self.gamma))
            radius = radius.clamp(max=_furthest(x, "l2"))
            moved = lp.ascend(x_adv, gradient, "l2", 1 / 100 + 99 / 100 * _cosine(step, self.steps)) - x
            length = moved.flatten(1).double().norm(dim=1).clamp_min(1e-30)
            x_adv = _clean(x + moved * _per_image(radius / length, x).to(x.dtype), x)
        nearest.look(x_adv, _logits(model, x_adv))
        return nearest.inside(self.eps)


def _check(norm: str, eps: Fraction, steps: int, gamma: float) -> None:
    lp.check_ball(norm, eps)
    if steps < 1 or not 0 < gamma < 1:
        raise ValueError(f"a minimum-norm attack needs steps >= 1 and 0 < gamma < 1, got {steps} and {gamma}")


def _cosine(step: int, steps: int) -> float:
    """1 at the first step, falling to 0 at the last."""
    return (1 + math.cos(math.pi * step / max(1, steps - 1))) / 2


def _logits(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(x)
    return out


def _slope(model: nn.Module, x_adv: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(margin [N], logits, gradient of the margin at x_adv but for pixels that it pushes out of [0,1])."""
    with torch.enable_grad():
        x_adv = x_adv.detach().requires_grad_()
        logits = model(x_adv)
        margin = margin_loss(logits, y)
        (gradient,) = torch.autograd.grad(margin.sum(), x_adv)
    stuck = ((x_adv <= 0) & (gradient < 0)) | ((x_adv >= 1) & (gradient > 0))
    return margin.detach(), logits.detach(), gradient.masked_fill(stuck, 0)


def _dual_length(gradient: Tensor, norm: str) -> Tensor:
    order = 1 if norm == "linf" else 2
    return gradient.flatten(1).double().norm(p=order, dim=1).clamp_min(1e-30)


def _furthest(x: Tensor, norm: str) -> Tensor:
    """The distance of the furthest point of [0,1] from each image."""
    return lp.distance((x < 0.5).to(x.dtype), x, norm)


def _into(x_adv: Tensor, x: Tensor, norm: str, radius: Tensor) -> Tensor:
    """The nearest point of each image's own ball, clamped to [0,1], up to float32 rounding."""
    delta, room = x_adv - x, _per_image(radius, x).to(x.dtype)
    if norm == "linf":
        return _clean(x + torch.minimum(torch.maximum(delta, -room), room), x)
    length = _per_image(delta.flatten(1).norm(dim=1), x).clamp_min(torch.finfo(x.dtype).tiny)
    return _clean(x + delta * (room / length).clamp(max=1.0), x)


def _clean(x_adv: Tensor, x: Tensor) -> Tensor:
    return torch.where(torch.isfinite(x_adv), x_adv, x).clamp(0.0, 1.0)


def _per_image(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.dim() - 1))
