"""Objectives trained on clean or attacked images."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks import lp
from attacks.pgd import PGD

from ..modes import evaluating
from ..train import Benign, Progress

__all__ = ["Benign", "FastTraining", "FreeTraining", "PGDTraining", "Trades"]


@dataclass(frozen=True)
class PGDTraining:
    """Cross-entropy on PGD examples of the ball of radius eps. Madry et al. 2018 (arXiv 1706.06083).

    step_size defaults to eps/4 (HYDRA's 2/255 at 8/255); the attack sees the masked weights, in eval mode. With `warmup`,
    eps and step_size grow from 0 over the phase's ramp, without which very sparse networks trained from scratch stay weak.
    clean_share is the weight of the clean cross-entropy beside the adversarial one (ATMC: 1/2).
    """

    norm: str = "linf"
    eps: Fraction = Fraction(8, 255)
    steps: int = 10
    step_size: Fraction | None = None
    warmup: bool = False
    clean_share: float = 0.0

    def __post_init__(self) -> None:
        self._attack(Fraction(1))
        if not 0 <= self.clean_share <= 1:
            raise ValueError(f"clean_share is between 0 and 1, got {self.clean_share}")

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, progress: Progress) -> Tensor:
        share = Fraction(progress.ramp) if self.warmup else Fraction(1)
        with evaluating(model):
            x_adv = self._attack(share)(model, x, y)
        robust = F.cross_entropy(model(x_adv), y)
        if self.clean_share == 0:
            return robust
        return self.clean_share * F.cross_entropy(model(x), y) + (1 - self.clean_share) * robust

    def _attack(self, share: Fraction) -> PGD:
        step_size = None if self.step_size is None else self.step_size * share
        return PGD(norm=self.norm, eps=self.eps * share, steps=self.steps, step_size=step_size, seed=None, last=True)


@dataclass(frozen=True)
class FastTraining:
    """Cross-entropy after one gradient step from a uniform random start, projected. Wong et al. 2020 (arXiv 2001.03994).

    The step has `stretch` times eps. Watch PGD accuracy: training can overfit to its own step ("catastrophic overfitting").
    """

    norm: str = "linf"
    eps: Fraction = Fraction(8, 255)
    stretch: Fraction = Fraction(5, 4)

    def __post_init__(self) -> None:
        self._training()
        if self.stretch < 0:
            raise ValueError(f"stretch is at least 0, got {self.stretch}")

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, progress: Progress) -> Tensor:
        return self._training()(model, x, y, progress)

    def _training(self) -> PGDTraining:
        return PGDTraining(self.norm, self.eps, steps=1, step_size=self.stretch * self.eps)


@dataclass(frozen=True)
class FreeTraining:
    """Cross-entropy on images plus a perturbation that every optimizer step moves on. Shafahi et al. 2019 (arXiv 1904.12843).

    The loop repeats each batch `replays` times, in as many fewer epochs, and one backward pass gives both gradients: the
    perturbation goes a step of step_size (default eps) along the sign of its own, stays within eps (linf) and is carried on to
    the next batch. With `renewed` it is zero again in every epoch (HYDRA's code). Called by itself, this is the loss at x.
    """

    eps: Fraction = Fraction(8, 255)
    replays: int = 4
    step_size: Fraction | None = None
    renewed: bool = False

    def __post_init__(self) -> None:
        lp.check_ball("linf", self.eps)
        if self.replays < 1:
            raise ValueError(f"free training needs replays >= 1, got {self.replays}")

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, progress: Progress) -> Tensor:
        return F.cross_entropy(model(x), y)

    def moved(self, perturbation: Tensor, gradient: Tensor) -> Tensor:
        """The next perturbation, from the gradient of the step's loss with respect to the last one."""
        eps, step = float(self.eps), self.eps if self.step_size is None else self.step_size
        return lp.ascend(perturbation, gradient, "linf", step).clamp(-eps, eps)


@dataclass(frozen=True)
class Trades:
    """Clean cross-entropy plus beta times KL(p(x) || p(x_adv)), both differentiated. Zhang et al. 2019 (arXiv 1901.08573).

    This is HYDRA's "adv". x_adv ascends the KL from x + 0.001 N(0, I) in steps of step_size (default eps/4, in l2 2 eps/steps);
    the KL is a batch mean (total / N).
    """

    norm: str = "linf"
    eps: Fraction = Fraction(8, 255)
    steps: int = 10
    step_size: Fraction | None = None
    beta: float = 6.0

    def __post_init__(self) -> None:
        lp.check_ball(self.norm, self.eps)
        if self.steps < 1 or self.beta < 0:
            raise ValueError(f"TRADES needs steps >= 1 and beta >= 0, got {self.steps} and {self.beta}")

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, progress: Progress) -> Tensor:
        with evaluating(model):
            x_adv = self._attack(model, x)
        logits = model(x)
        robust = F.kl_div(model(x_adv).log_softmax(1), logits.log_softmax(1), reduction="batchmean", log_target=True)
        return F.cross_entropy(logits, y) + self.beta * robust

    def _attack(self, model: nn.Module, x: Tensor) -> Tensor:
        eps = float(self.eps)
        default = 2 * eps / self.steps if self.norm == "l2" else eps / 4
        step = default if self.step_size is None else float(self.step_size)
        with torch.no_grad():
            target = model(x).log_softmax(1)
        x_adv = lp.clip_to_ball(x + 0.001 * torch.randn_like(x), x, self.norm, eps)
        for _ in range(self.steps):
            x_adv = x_adv.detach().requires_grad_()
            with torch.enable_grad():
                kl = F.kl_div(model(x_adv).log_softmax(1), target, reduction="sum", log_target=True)
                (gradient,) = torch.autograd.grad(kl, x_adv)
            x_adv = lp.clip_to_ball(lp.ascend(x_adv, gradient, self.norm, step), x, self.norm, eps)
        return x_adv.detach()
