"""HARP."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from math import floor, log
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..sparsity import TopKScores, attach, budget_of, mask_layers, prunable, top_k
from ..train import Phase, Step, Training
from .allocation import Counts, proportional, whole
from .hydra import proposed, scores_and_batchnorm

SATISFIED = 1e-4  # a penalty up to this grows no further


def kept_at(size: int, rate: float) -> int:
    """A layer's count at a learned rate: size - floor((1 - rate) size), at least 1."""
    return min(size, max(1, size - floor((1 - rate) * size)))


class _StraightThroughRate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, importance: Tensor, rate: Tensor) -> Tensor:
        return top_k(importance, kept_at(importance.numel(), rate.item()))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor]:
        return gradients[0], gradients[0].sum()


class RatedScores(TopKScores):
    """HYDRA's scores beside the layer's own kept share, both learned: the share's gradient is the sum over the mask's.

    share = least + (1 - least) sigmoid(r); gamma is the penalty's weight, which a killed run keeps.
    """

    gamma: Tensor

    def __init__(self, scores: Tensor, start: float, least: float, gamma: float) -> None:
        super().__init__(scores, scores.numel())
        self.least = least
        open_share = max((start - least) / (1 - least), 0.01)
        self.r = nn.Parameter(torch.tensor(log(open_share / (1 - open_share))).to(scores))
        self.register_buffer("gamma", torch.tensor(gamma).to(scores))

    @property
    def rate(self) -> Tensor:
        return self.least + (1 - self.least) * self.r.sigmoid()

    def forward(self, weight: Tensor) -> Tensor:
        return weight * _StraightThroughRate.apply(self.scores.abs(), self.rate)


def rated(model: nn.Module) -> dict[str, RatedScores]:
    return {name: layer.parametrizations.weight[0] for name, layer in prunable(model).items()}


def excess(model: nn.Module, density: float) -> Tensor:
    """max(R / density - 1, 0), where R is the network's kept share at the learned rates."""
    parts = rated(model).values()
    kept = torch.stack([part.rate * part.scores.numel() for part in parts]).sum()
    return (kept / (density * sum(part.scores.numel() for part in parts)) - 1).relu()


def final_counts(parts: dict[str, RatedScores], keep: int) -> Counts:
    """Counts in proportion to the learned rates, `keep` in all."""
    sizes = {name: part.scores.numel() for name, part in parts.items()}
    rates = {name: Fraction(part.rate.item()) for name, part in parts.items()}
    return whole(proportional(rates, sizes, keep), sizes, keep)


@dataclass(frozen=True)
class HARP:
    """Learns HYDRA's scores and every layer's kept share together, then fine-tunes what is kept.

    Zhao & Wressnegger 2023 (ICLR). gamma max(R / density - 1, 0) is added to the objective, where R is the network's kept share
    and gamma grows by `gamma` each epoch until R is small enough. All layers start at the kept share `start` (at least the
    density), and none goes below the part `least` of the density. The final shares are scaled to floor(density N) weights.
    """

    gamma: float = 0.01
    start: float = 0.1
    least: float = 0.1
    scope: ClassVar[str] = "global, one learned share per layer"

    def __post_init__(self) -> None:
        if not (self.gamma >= 0 and 0 < self.start <= 1 and 0 < self.least < 1):
            raise ValueError(
                f"HARP needs gamma >= 0, 0 < start <= 1 and 0 < least < 1, got {self.gamma}, {self.start} and {self.least}"
            )

    def __call__(self, model: nn.Module, density: Fraction, training: Training) -> Iterator[Phase]:
        share = float(density)
        yield training.pretrain()
        for layer in prunable(model).values():
            scores = proposed(layer.weight.detach())
            start = min(max(self.start, share), 0.999)
            attach(layer, RatedScores(scores, start, self.least * share, self.gamma))

        def penalty(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            return next(iter(rated(model).values())).gamma * excess(model, share)

        @torch.no_grad()
        def grow(step: Step) -> None:
            for part in rated(step.model).values():
                part.gamma.add_(self.gamma * (part.gamma * excess(step.model, share) > SATISFIED))

        yield replace(training.prune(trains=scores_and_batchnorm), penalty=penalty, after_epoch=grow)
        parts = rated(model)
        keep = budget_of(sum(part.scores.numel() for part in parts.values()), density)
        found = final_counts(parts, keep)
        mask_layers(model, {name: top_k(part.scores.abs(), found[name]) for name, part in parts.items()})
        yield training.finetune()
