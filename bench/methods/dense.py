"""No pruning: the reference that every board shows first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from torch import nn

from ..train import Phase, Training


@dataclass(frozen=True)
class Dense:
    """Keeps every weight: the pre-training that pruning methods start from, and the reference they are held against."""

    prunes: ClassVar[bool] = False

    def __call__(self, model: nn.Module, density: Fraction, training: Training) -> Iterator[Phase]:
        yield training.pretrain()
