"""Flying Bird."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from math import cos, pi
from typing import ClassVar, Literal

from torch import nn

from ..train import Phase, Progress, Training
from .rigl import rewiring, sparse_start


@dataclass(frozen=True)
class FlyingBird:
    """Trains sparse from start to end; to the end a falling share of each layer's smallest weights makes room for new ones.

    Chen et al. 2022 (ICLR). As RigL, with the budget floor(density N) shared out by ideal gas quotas, and a moving share that
    falls from `first` to `last` as a cosine over the whole training, every `every` steps.
    """

    allocation: Literal["igq", "erk", "uniform"] = "igq"
    first: float = 0.5
    last: float = 0.005
    every: int = 900
    rescale: bool = True
    scope: ClassVar[str] = "global, shared out by a rule"

    def __post_init__(self) -> None:
        if not (0 <= self.last <= self.first <= 1 and self.every >= 1):
            raise ValueError(
                f"Flying Bird needs 0 <= last <= first <= 1 and every >= 1, got {self.last}, {self.first} and {self.every}"
            )

    def share(self, progress: Progress) -> float:
        """The fraction of each layer that moves at this step; 0 where none does."""
        if progress.step == 0 or progress.step % self.every:
            return 0.0
        return self.last + (self.first - self.last) / 2 * (1 + cos(pi * progress.fraction))

    def __call__(self, model: nn.Module, density: Fraction, training: Training) -> Iterator[Phase]:
        sparse_start(model, density, self.allocation, self.rescale)
        yield replace(training.train(), after_backward=rewiring(self.share))
