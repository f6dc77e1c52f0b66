"""NAP and AP: one-shot pruning over all layers jointly, without and with the objective."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from torch import nn

from ..sparsity import budget_of, keep_largest_of_all, mask_layers, weights
from ..train import Phase, Training


def mask_largest_of_all(model: nn.Module, density: Fraction) -> None:
    """Mask all but the floor(density N) largest magnitudes of the whole network."""
    magnitude = {name: weight.abs() for name, weight in weights(model).items()}
    mask_layers(model, keep_largest_of_all(magnitude, budget_of(sum(one.numel() for one in magnitude.values()), density)))


@dataclass(frozen=True)
class AP:
    """Keeps the largest weights of the whole robustly pre-trained network, then fine-tunes them robustly.

    The two-step baseline of Gui et al. 2019 (ATMC, arXiv 1902.03538).
    """

    scope: ClassVar[str] = "global"

    def __call__(self, model: nn.Module, density: Fraction, training: Training) -> Iterator[Phase]:
        yield training.pretrain()
        mask_largest_of_all(model, density)
        yield training.finetune()


@dataclass(frozen=True)
class NAP:
    """Pre-trains, prunes and fine-tunes on clean images, whatever the objective: what pruning alone is worth under attack.

    Han et al. 2015 (arXiv 1506.02626); the baseline of Gui et al. 2019 (ATMC, arXiv 1902.03538). One entry per suite is enough.
    """

    scope: ClassVar[str] = "global"
    fixes_loss: ClassVar[str] = "benign"

    def __call__(self, model: nn.Module, density: Fraction, training: Training) -> Iterator[Phase]:
        yield from AP()(model, density, training.benign)
