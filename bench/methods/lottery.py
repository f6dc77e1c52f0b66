"""Robust lottery tickets by iterative magnitude pruning."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from math import ceil, floor, log
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ..sparsity import budget_of, effective_state, keep_largest_of_all, mask_layers, weights
from ..train import Phase, Training

SCORES = {
    "magnitude": lambda weight: weight.abs(),
    "layer-normalised": lambda weight: weight.abs() / weight.abs().mean().clamp_min(torch.finfo(weight.dtype).tiny),
}


@torch.no_grad()
def rewind_(model: nn.Module, start: dict[str, Tensor]) -> None:
    """Give every parameter and buffer its value in the plain state `start`; masks stay."""
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        plain = name.replace("parametrizations.weight.original", "weight")
        if plain in start:
            value.copy_(start[plain])


@dataclass(frozen=True)
class IMP:
    """Trains, drops the smallest weights of the whole network, rewinds the rest to their start, until few enough are left.

    Frankle & Carbin 2019 (arXiv 1803.03635) under a robust objective; Cosentino et al. 2019. Each round drops `rate` of what is
    left, the last one down to floor(density N); with one_shot there is one round, and with score "layer-normalised" that is the
    boosting ticket of Li et al. 2020. The rounds share the suite's pre-train and prune epochs, or with `full` each takes the
    pre-train epochs, as in the papers. Where there are fewer epochs to share than rounds, there is a round per epoch, and each
    drops more. `rewind` epochs are trained before the values that are rewound to.
    """

    rate: Fraction = Fraction(1, 5)
    one_shot: bool = False
    score: Literal["magnitude", "layer-normalised"] = "magnitude"
    rewind: int = 0
    full: bool = False
    scope: ClassVar[str] = "global"

    def __post_init__(self) -> None:
        if not 0 < self.rate < 1 or self.rewind < 0:
            raise ValueError(f"IMP needs a rate between 0 and 1 and rewind >= 0, got {self.rate} and {self.rewind}")

    def kept(self, total: int, density: Fraction, most: int | None = None) -> list[int]:
        """How many weights are left after each round; at most `most` rounds (at least one), of a larger rate where needed."""
        last, left = budget_of(total, density), 1 - self.rate
        rounds = 1 if self.one_shot else max(1, ceil(log(last / total) / log(left)))
        if most is not None and rounds > most:
            rounds = max(1, most)
            left = Fraction((last / total) ** (1 / rounds)).limit_denominator(10**6)
        return [*(max(last, total - floor((1 - left**at) * total)) for at in range(1, rounds)), last]

    def __call__(self, model: nn.Module, density: Fraction, training: Training) -> Iterator[Phase]:
        budget, whole = training.budget, training.train()
        if self.rewind:
            yield replace(whole, name="warm-up", epochs=self.rewind)
        start = effective_state(model)
        search = budget.pretrain + budget.prune
        total = sum(weight.numel() for weight in weights(model).values())
        plan = self.kept(total, density, None if self.full else search)
        for at, keep in enumerate(plan):
            epochs = budget.pretrain if self.full else search * (at + 1) // len(plan) - search * at // len(plan)
            yield replace(whole, name=f"round-{at + 1}", epochs=epochs)
            masks = keep_largest_of_all({name: SCORES[self.score](weight) for name, weight in weights(model).items()}, keep)
            mask_layers(model, masks)
            rewind_(model, start)
        yield replace(whole, epochs=whole.epochs if self.full else budget.finetune)
