"""TwinRep."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from math import sqrt
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..sparsity import Mask, attach, budget_of, keep_largest_of_all, prunable, weights
from ..train import Phase, Step, Training


class Twin(Mask):
    """weight * a * mask: plain decay of both factors acts like an l1 penalty on their product.

    With `rescale` the product starts with the norm of the weight, without which networks without BatchNorm start dead.
    """

    def __init__(self, weight: Tensor, rescale: bool) -> None:
        super().__init__(torch.ones_like(weight))
        start = torch.empty(weight.shape)  # drawn on the CPU, so that every device starts from the same ones
        nn.init.kaiming_uniform_(start, a=sqrt(5))
        a = start.to(weight)
        self.a = nn.Parameter(a * (weight.norm() / (weight * a).norm()).detach() if rescale else a)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.a * self.mask


@torch.no_grad()
def mask_products(model: nn.Module, keep: int) -> None:
    """Mask all but the `keep` largest |w * a| of the whole network."""
    layers = prunable(model)
    masks = keep_largest_of_all({name: weight.abs() for name, weight in weights(model).items()}, keep)
    for name, mask in masks.items():
        layers[name].parametrizations.weight[0].mask.copy_(mask)


@dataclass(frozen=True)
class TwinRep:
    """Trains every weight as a product of two factors, masks the smallest products early, and folds the rest at the end.

    Li et al. 2023 (AAAI). `at` is the share of the training after which floor(density N) products are kept.
    """

    at: float = 0.1
    rescale: bool = True
    scope: ClassVar[str] = "global"

    def __post_init__(self) -> None:
        if not 0 <= self.at <= 1:
            raise ValueError(f"TwinRep prunes at a share of the training between 0 and 1, got {self.at}")

    def __call__(self, model: nn.Module, density: Fraction, training: Training) -> Iterator[Phase]:
        layers = prunable(model).values()
        keep = budget_of(sum(layer.weight.numel() for layer in layers), density)
        for layer in layers:
            attach(layer, Twin(layer.weight, self.rescale))

        def prune(step: Step) -> None:
            if step.progress.epoch == max(1, round(self.at * step.progress.epochs)):
                mask_products(step.model, keep)

        yield replace(training.train(), after_epoch=prune)
        mask_products(model, keep)  # changes nothing unless there was no epoch
