"""Objectives trained on certified bounds (linf). BatchNorm takes the statistics of the clean batch, in bounds too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import torch.nn.functional as F
from torch import Tensor, nn

from attacks.pgd import PGD
from verifiers.backward import crown_ibp_margins
from verifiers.ball import Interval
from verifiers.bounds import ibp_margins

from ..modes import clean_pass, evaluating, resting, statistics_of
from ..train import Progress

CLIPS = ("unit", "tensor")


def worst_case_loss(margins: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of the worst logits that the margins [N, C] (0 in column y) allow."""
    return F.cross_entropy(-margins, y)


def box_around(x: Tensor, eps: float, clip: str = "unit") -> Interval:
    """The linf ball cut with [0,1], or (clip="tensor", as published code has it) with the range of the images given."""
    low, high = (0.0, 1.0) if clip == "unit" else (float(x.min()), float(x.max()))
    return Interval((x - eps).clamp(low, high), (x + eps).clamp(low, high))


def check_share(**shares: float) -> None:
    """Raises ValueError, naming the field, for a share that is not between 0 and 1."""
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise ValueError(f"{name} is between 0 and 1, got {share}")


def check_eps(eps: Fraction) -> None:
    if eps < 0:
        raise ValueError(f"eps is a radius in [0,1] pixel units, at least 0, got {eps}")


def check_clip(clip: str) -> None:
    if clip not in CLIPS:
        raise ValueError(f"clip is unit or tensor, got {clip!r}")


def mixed_loss(model: nn.Module, x: Tensor, y: Tensor, kappa: float, margins: Callable[[], Tensor]) -> Tensor:
    """kappa * clean cross-entropy + (1 - kappa) * cross-entropy of the worst logits that margins() [N, C] allow."""
    if kappa == 0:
        with resting(model, statistics_of(model, x)):
            return worst_case_loss(margins(), y)
    logits, statistics = clean_pass(model, x)
    with resting(model, statistics):
        return kappa * F.cross_entropy(logits, y) + (1 - kappa) * worst_case_loss(margins(), y)


def along(start: float, end: float, ramp: float) -> float:
    return start + (end - start) * ramp


@dataclass(frozen=True)
class IBPTraining:
    """kappa * clean cross-entropy + (1 - kappa) * cross-entropy of the worst logits by interval bounds (linf).

    Gowal et al. 2018 (arXiv 1810.12715). eps grows from 0 and kappa falls from 1 over the phase's ramp, per step; the box
    is cut with [0,1].
    """

    eps: Fraction = Fraction(8, 255)
    kappa: float = 0.5

    def __post_init__(self) -> None:
        if self.eps < 0 or not 0 <= self.kappa <= 1:
            raise ValueError(f"IBP training needs eps >= 0 and kappa between 0 and 1, got {self.eps} and {self.kappa}")

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, progress: Progress) -> Tensor:
        box = box_around(x, float(self.eps) * progress.ramp)
        return mixed_loss(model, x, y, along(1.0, self.kappa, progress.ramp), lambda: ibp_margins(model, box, y))


@dataclass(frozen=True)
class CrownIBPTraining:
    """kappa * clean cross-entropy + (1 - kappa) * cross-entropy of the worst logits by CROWN-IBP bounds (linf).

    Zhang et al. 2020 (arXiv 1906.06316). Margins are beta * CROWN-IBP + (1 - beta) * IBP. Over the phase's ramp eps grows from 0
    and kappa and beta go from their start to their end, per step; the defaults are HYDRA's: no clean loss, and pure IBP after
    the ramp. With `fused` only each image's worst class by intervals is relaxed, the other classes keep their intervals: one
    backward pass instead of one per class. The box is cut with [0,1], with clip="tensor" with the batch's own range (HYDRA).
    """

    eps: Fraction = Fraction(8, 255)
    kappa_start: float = 0.0
    kappa_end: float = 0.0
    beta_start: float = 1.0
    beta_end: float = 0.0
    fused: bool = False
    clip: str = "unit"

    def __post_init__(self) -> None:
        check_eps(self.eps)
        check_clip(self.clip)
        check_share(
            kappa_start=self.kappa_start, kappa_end=self.kappa_end, beta_start=self.beta_start, beta_end=self.beta_end
        )

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, progress: Progress) -> Tensor:
        box = box_around(x, float(self.eps) * progress.ramp, self.clip)
        kappa = along(self.kappa_start, self.kappa_end, progress.ramp)
        beta = along(self.beta_start, self.beta_end, progress.ramp)
        return mixed_loss(model, x, y, kappa, lambda: crown_ibp_margins(model, box, y, beta, self.fused))


def _attack(eps: Fraction, steps: int, step_size: Fraction | None = None) -> PGD:
    return PGD(norm="linf", eps=eps, steps=steps, step_size=step_size, seed=None, last=True)


@dataclass(frozen=True)
class SABR:
    """Cross-entropy of the worst logits by interval bounds on a small box inside the ball (linf), around a PGD point.

    Mueller et al. 2023 (arXiv 2210.04871). The box has radius share * eps, its centre is found by `steps` of PGD in eval mode,
    each a quarter of the radius (1 - share) * eps of their ball; both are cut with [0,1]. eps grows from 0 over the phase's ramp.
    """

    eps: Fraction = Fraction(8, 255)
    share: Fraction = Fraction(2, 5)
    steps: int = 8

    def __post_init__(self) -> None:
        check_share(share=float(self.share))
        _attack(self.eps, self.steps)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, progress: Progress) -> Tensor:
        eps = self.eps * Fraction(progress.ramp)
        with evaluating(model):
            centre = _attack(eps * (1 - self.share), self.steps)(model, x, y)
        box = box_around(centre, float(eps * self.share))
        return mixed_loss(model, x, y, 0.0, lambda: ibp_margins(model, box, y))


@dataclass(frozen=True)
class MTLIBP:
    """(1 - alpha) * cross-entropy on PGD examples + alpha * cross-entropy of the worst logits by interval bounds (linf).

    De Palma et al. 2024 (arXiv 2305.13991). The attack takes `steps` of step_size (default eps / 4) in eval mode; eps (of attack
    and box alike) grows from 0 over the phase's ramp.
    """

    eps: Fraction = Fraction(8, 255)
    alpha: float = 0.1
    steps: int = 8
    step_size: Fraction | None = None

    def __post_init__(self) -> None:
        check_share(alpha=self.alpha)
        self._attack(Fraction(1))

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, progress: Progress) -> Tensor:
        share = Fraction(progress.ramp)
        with evaluating(model):
            x_adv = self._attack(share)(model, x, y)
        box = box_around(x, float(self.eps * share))
        worst = mixed_loss(model, x, y, 0.0, lambda: ibp_margins(model, box, y))
        return (1 - self.alpha) * F.cross_entropy(model(x_adv), y) + self.alpha * worst

    def _attack(self, share: Fraction) -> PGD:
        return _attack(self.eps * share, self.steps, None if self.step_size is None else self.step_size * share)
