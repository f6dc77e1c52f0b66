"""Objectives trained on certified bounds."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch.nn.functional as F
from torch import Tensor, nn

from verifiers.ball import Interval
from verifiers.bounds import ibp_margins

from ..train import Progress


def worst_case_loss(margins: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of the worst logits that the margins [N, C] (0 in column y) allow."""
    return F.cross_entropy(-margins, y)


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
        eps = float(self.eps) * progress.ramp
        kappa = 1 - (1 - self.kappa) * progress.ramp
        clean = F.cross_entropy(model(x), y)
        box = Interval((x - eps).clamp(0, 1), (x + eps).clamp(0, 1))
        return kappa * clean + (1 - kappa) * worst_case_loss(ibp_margins(model, box, y), y)
