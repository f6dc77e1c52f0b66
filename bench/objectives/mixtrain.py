"""MixTrain: symbolic intervals on a few images of some batches."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from verifiers.symbolic import symbolic_margins

from ..modes import clean_pass, resting
from ..train import Progress
from .bounded import box_around, check_clip, check_eps, check_share, worst_case_loss


@dataclass(frozen=True)
class MixTrain:
    """Clean cross-entropy, in a share of the batches plus that of the worst logits of k images by symbolic intervals (linf).

    Wang et al. 2018 (arXiv 1811.02625), as in HYDRA: a coin decides per batch, the k images are drawn with replacement. With L
    epochs of ramp, eps is e / L of its full size in epoch e < L, and the bound's weight is `weight` until epoch L + 5, then
    `growth` times larger every 5 epochs, at most `largest`. Memory grows with pixels times width, so only small networks are
    allowed (k = 1 for cnn_large). The box is cut with [0,1], with clip="tensor" with the range of the k images (HYDRA).
    """

    eps: Fraction = Fraction(8, 255)
    k: int = 5
    share: float = 0.8
    weight: float = 0.1
    growth: float = 2.5
    largest: float = 50.0
    clip: str = "unit"
    networks: ClassVar[tuple[str, ...]] = ("mlp", "cnn_*", "lenet")
    EPOCHS_TO_GROW: ClassVar[int] = 5

    def __post_init__(self) -> None:
        check_eps(self.eps)
        check_clip(self.clip)
        check_share(share=self.share)
        if self.k < 1 or min(self.weight, self.growth, self.largest) < 0:
            raise ValueError(
                f"MixTrain needs k >= 1 and weight, growth and largest >= 0, got {self.k}, {self.weight}, {self.growth}, "
                f"{self.largest}"
            )

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, progress: Progress) -> Tensor:
        robust = bool(torch.rand(()) < self.share)
        logits, statistics = clean_pass(model, x)
        loss = F.cross_entropy(logits, y)
        if not robust:
            return loss
        at = torch.randint(len(x), (self.k,)).to(x.device)
        box = box_around(x[at], self.radius(progress), self.clip)
        with resting(model, statistics):
            return loss + self.bound_weight(progress) * worst_case_loss(symbolic_margins(model, box, y[at]), y[at])

    def radius(self, progress: Progress) -> float:
        """eps of the epoch: in proportion to the epoch during the ramp, then full."""
        return float(self.eps) * min(1.0, progress.ramp_epoch / progress.ramp_epochs if progress.ramp_epochs else progress.ramp)

    def bound_weight(self, progress: Progress) -> float:
        """iw(e) = min(weight * growth^floor(max(e - L, 0) / 5), largest)."""
        grown = max(progress.ramp_epoch - progress.ramp_epochs, 0) // self.EPOCHS_TO_GROW
        return float(min(self.weight * self.growth**grown, self.largest))
