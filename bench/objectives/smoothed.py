"""Objectives for classifiers that will be smoothed with Gaussian noise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..train import Progress


def noisy(x: Tensor, sigma: float, clip: bool) -> Tensor:
    """x + sigma xi with fresh xi ~ N(0, I)."""
    moved = x + sigma * torch.randn_like(x)
    return moved.clamp(0, 1) if clip else moved


@dataclass(frozen=True)
class NoiseTraining:
    """Cross-entropy on x + sigma xi, xi ~ N(0, I), fresh in every step. Cohen et al. 2019 (arXiv 1902.02918).

    Noisy images are not clipped unless `clip` asks for it.
    """

    sigma: float = 0.25
    clip: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.sigma < float("inf"):
            raise ValueError(f"noise training needs sigma >= 0, got {self.sigma}")

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, progress: Progress) -> Tensor:
        return F.cross_entropy(model(noisy(x, self.sigma, self.clip)), y)


@dataclass(frozen=True)
class StabilityTraining:
    """Clean cross-entropy plus beta times KL(p(x) || p(x + sigma xi)), both differentiated, xi ~ N(0, I).

    Carmon et al. 2019 (arXiv 1905.13736), as HYDRA trains for randomized smoothing. Noisy images are not clipped unless
    `clip` asks for it (Carmon's code clips).
    """

    sigma: float = 0.25
    beta: float = 6.0
    clip: bool = False

    def __post_init__(self) -> None:
        if not (0 <= self.sigma < float("inf") and self.beta >= 0):
            raise ValueError(f"stability training needs sigma >= 0 and beta >= 0, got {self.sigma} and {self.beta}")

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, progress: Progress) -> Tensor:
        moved = noisy(x, self.sigma, self.clip)
        logits = model(x)
        stable = F.kl_div(model(moved).log_softmax(1), logits.log_softmax(1), reduction="batchmean", log_target=True)
        return F.cross_entropy(logits, y) + self.beta * stable
