"""STR, soft threshold reparameterisation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from math import log
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..sparsity import attach, budget_of, keep_largest_of_all, mask_layers, prunable
from ..train import Phase, Step, Training


class SoftThreshold(nn.Module):
    """sign(w) max(|w| - sigmoid(s), 0), with one learned s per layer."""

    def __init__(self, threshold: float, like: Tensor) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.tensor(log(threshold / (1 - threshold))).to(like))

    def forward(self, weight: Tensor) -> Tensor:
        return weight.sign() * (weight.abs() - self.s.sigmoid()).relu()


def _thresholds(model: nn.Module) -> dict[str, tuple[Tensor, SoftThreshold]]:
    """Per layer, the weight before the threshold and the part that thresholds it."""
    return {name: (one.parametrizations.weight.original, one.parametrizations.weight[0]) for name, one in prunable(model).items()}


@torch.no_grad()
def trim_(model: nn.Module, keep: int) -> None:
    """Multiply all layers' thresholds by the one factor at which `keep` weights of the network survive, and fix that support."""
    parts = _thresholds(model)
    ratios = {name: weight.abs() / part.s.sigmoid() for name, (weight, part) in parts.items()}
    masks = keep_largest_of_all(ratios, keep)
    factor = torch.stack([(ratios[name] * (1 - mask)).max() for name, mask in masks.items()]).max()  # the largest that goes
    shrunk = {name: weight.sign() * (weight.abs() - factor * part.s.sigmoid()).relu() for name, (weight, part) in parts.items()}
    mask_layers(model, masks)
    for name, layer in prunable(model).items():
        layer.parametrizations.weight.original.copy_(shrunk[name])


@dataclass(frozen=True)
class STR:
    """Learns one magnitude threshold per layer together with the weights, then fine-tunes the survivors.

    Kusupati et al. 2020 (arXiv 2002.03231), whose density comes out of the weight decay of the thresholds' s, found by
    bisecting over whole trainings. Here one training does it: s decays by pace / steps in every step whose density is above
    density^(share of the phase done), then one factor on all thresholds meets floor(density N). `start` is the first threshold.
    """

    start: float = 1e-4
    pace: float = 8.0
    scope: ClassVar[str] = "global, one learned threshold per layer"

    def __post_init__(self) -> None:
        if not 0 < self.start < 0.5 or self.pace <= 0:
            raise ValueError(f"STR needs a start between 0 and 1/2 and a pace > 0, got {self.start} and {self.pace}")

    def __call__(self, model: nn.Module, density: Fraction, training: Training) -> Iterator[Phase]:
        layers = prunable(model)
        keep = budget_of(sum(layer.weight.numel() for layer in layers.values()), density)
        for layer in layers.values():
            attach(layer, SoftThreshold(self.start, layer.weight))

        @torch.no_grad()
        def decay(step: Step) -> None:
            parts = _thresholds(step.model).values()
            alive = torch.stack([(weight.abs() > part.s.sigmoid()).sum() for weight, part in parts]).sum()
            total = sum(weight.numel() for weight, _ in parts)
            due = alive > total * float(density) ** (step.progress.fraction)
            for _, part in parts:
                part.s.mul_(1 - self.pace / step.progress.steps * due)

        budget, whole = training.budget, training.train()
        yield replace(whole, epochs=budget.pretrain + budget.prune, after_step=decay)
        trim_(model, keep)
        yield training.finetune()
