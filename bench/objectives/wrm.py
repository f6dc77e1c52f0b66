"""Distributionally robust training."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from attacks.wrm import ascend_penalised

from ..modes import evaluating
from ..train import Progress


@dataclass(frozen=True)
class WRM:
    """Cross-entropy on images that maximise gamma * CE - |x' - x|^2 / 2 over all images. Sinha et al. 2018 (arXiv 1710.10571).

    gamma is ATMC's: the larger, the stronger; in the paper's Lagrangian it is 1 / (2 gamma). There is no eps ball; `clip` keeps
    pixels in [0,1] after each step. ATMC takes 7 steps; the original takes 16 (one of size 1, then 15) without clipping.
    """

    gamma: float = 1.3
    steps: int = 7
    clip: bool = True

    def __post_init__(self) -> None:
        if not (0 <= self.gamma < float("inf")) or self.steps < 1:
            raise ValueError(f"WRM needs gamma >= 0 and steps >= 1, got {self.gamma} and {self.steps}")

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, progress: Progress) -> Tensor:
        with evaluating(model):
            x_adv = ascend_penalised(
                lambda moved: F.cross_entropy(model(moved), y, reduction="sum"), x, self.gamma, self.steps, self.clip
            )
        return F.cross_entropy(model(x_adv), y)
