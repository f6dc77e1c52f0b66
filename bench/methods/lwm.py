"""Least weight magnitude."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from torch import nn

from ..sparsity import keep_largest, mask_layers, weights
from ..train import Phase, Training


@dataclass(frozen=True)
class LWM:
    """Keeps each layer's largest weights of the robustly pre-trained network, then fine-tunes them robustly.

    Han et al. 2015 (arXiv 1506.02626); HYDRA's baseline Adv-LWM (arXiv 2002.10509).
    """

    scope: ClassVar[str] = "per layer"

    def __call__(self, model: nn.Module, density: Fraction, training: Training) -> Iterator[Phase]:
        yield training.pretrain()
        magnitude = {name: weight.abs() for name, weight in weights(model).items()}
        mask_layers(model, keep_largest(magnitude, density))
        yield training.finetune()
