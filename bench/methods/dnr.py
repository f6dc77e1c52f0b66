"""DNR, dynamic network rewiring."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from math import cos, floor, pi
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..train import Phase, Step, Training
from .allocation import Counts, proportional, whole
from .rigl import drop_and_grow_, forget_, opened, sparse_start, survivors


def momentum(optimizer: torch.optim.Optimizer, weight: nn.Parameter) -> Tensor:
    """The optimizer's running mean of this weight's gradient; zeros before the first step."""
    state = optimizer.state[weight]
    found = state.get("momentum_buffer", state.get("exp_avg"))
    return torch.zeros_like(weight) if found is None else found


def regrowth(sizes: list[int], means: list[float], total: int) -> Counts:
    """Shares `total` new weights among layers with so many places for them, in proportion to their mean momenta."""
    free = {str(at): size for at, size in enumerate(sizes) if size and means[at] > 0}
    ratios = {name: Fraction(means[int(name)]) / size for name, size in free.items()}
    return whole(proportional(ratios, free, total), free, total, least=0)


@dataclass(frozen=True)
class DNR:
    """Trains sparse from start to end, on clean images too; each epoch the layers of large momentum take weights from others.

    Kundu et al. 2021 (ASP-DAC), whose training code is not public: the rule is that of sparse momentum (Dettmers & Zettlemoyer
    2019), and the l2 distance to a thresholded copy is left out. `clean` times the clean cross-entropy is added to the objective.
    `rate` of each layer is dropped after the first epoch, and less later, as a cosine.
    """

    rate: float = 0.2
    clean: float = 1.0
    rescale: bool = True
    scope: ClassVar[str] = "global, shared out by momentum"
    fixes_loss: ClassVar[str] = "the objective plus clean cross-entropy"

    def __post_init__(self) -> None:
        if not (0 <= self.rate < 1 and self.clean >= 0):
            raise ValueError(f"DNR needs 0 <= rate < 1 and clean >= 0, got {self.rate} and {self.clean}")

    def __call__(self, model: nn.Module, density: Fraction, training: Training) -> Iterator[Phase]:
        if training.budget.optimizer == "sgd" and not training.budget.momentum:
            raise ValueError("DNR ranks by momentum, and the budget's is 0; set it above 0 or use adam")
        sparse_start(model, density, "erk", self.rescale)
        yield replace(training.train(), penalty=self._clean, after_step=self._mask, after_epoch=self._rewire)

    def _clean(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return self.clean * F.cross_entropy(model(x), y)

    @torch.no_grad()
    def _mask(self, step: Step) -> None:
        """Momenta stay dense: they say where to grow."""
        for part, weight in opened(step.model):
            weight.mul_(part.mask)

    def _rewire(self, step: Step) -> None:
        rate = self.rate / 2 * (1 + cos(pi * step.progress.fraction))
        parts = [(part, weight, momentum(step.optimizer, weight).abs()) for part, weight in opened(step.model)]
        active = [int(part.mask.sum()) for part, _, _ in parts]
        drops = [floor(rate * count) for count in active]
        left = [survivors(part, weight, drop) for (part, weight, _), drop in zip(parts, drops, strict=True)]
        # a place without any momentum is dead: a weight that grew there would stay 0
        places = [int((~kept & (size > 0)).sum()) for kept, (_, _, size) in zip(left, parts, strict=True)]
        means = [float((size * part.mask).sum()) / count for (part, _, size), count in zip(parts, active, strict=True)]
        if sum(drops) > sum(place for place, mean in zip(places, means, strict=True) if mean > 0):
            return
        grown = regrowth(places, means, sum(drops))
        for at, (part, weight, size) in enumerate(parts):
            new = drop_and_grow_(part, weight, drops[at], grown.get(str(at), 0), size)
            forget_(step.optimizer, weight, new)
