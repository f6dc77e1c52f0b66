"""Random pruning, also called scratch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from torch import nn

from ..sparsity import keep_largest, mask_layers, rescale_, weights
from ..train import Phase, Training


@dataclass(frozen=True)
class RandomPruning:
    """Draws a random mask per layer before training and trains the sparse network from scratch, for the whole budget.

    HYDRA's "scratch" baseline (arXiv 2002.10509). `rescale` multiplies the kept weights by density^-1/2, without which
    sparse networks without BatchNorm start dead.
    """

    rescale: bool = True
    scope: ClassVar[str] = "per layer"

    def __call__(self, model: nn.Module, density: Fraction, training: Training) -> Iterator[Phase]:
        # drawn on the CPU, so that every device prunes the same weights
        scores = {name: torch.rand(weight.shape).to(weight.device) for name, weight in weights(model).items()}
        mask_layers(model, keep_largest(scores, density))
        if self.rescale:
            rescale_(model, density)
        yield training.train()
