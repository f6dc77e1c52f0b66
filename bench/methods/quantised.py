"""Uniform 8-bit quantisation after the training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, Literal

from torch import nn

from ..factors import Stored, StoredWeight, form_of
from ..sparsity import attach, prunable
from ..train import Phase, Training
from .al0 import AL0
from .atmc import ATMC
from .code_books import even_levels

BASES: dict[str, Any] = {"al0": AL0, "atmc": ATMC}


def rounded(form: Stored, symmetric: bool) -> Stored:
    """The same form with the non-zeros of every part rounded to evenly spaced levels."""
    parts = {part: even_levels(one, symmetric) for part, one in form.parts.items()}
    return Stored(form.kind, parts, frozenset(part for part, one in parts.items() if bool(one.any())))


@dataclass(frozen=True)
class Uniform8Bit:
    """Al0 or ATMC whose stored non-zeros are rounded to evenly spaced 8-bit levels after the training; zeros stay zeros.

    The baselines of Gui et al. 2019 (ATMC, arXiv 1902.03538): per tensor 256 levels from the smallest to the largest non-zero, or
    with `symmetric` 255 around zero, where the smallest weights become zero. Biases and BatchNorm stay in 32 bits.
    """

    base: Literal["al0", "atmc"] = "al0"
    symmetric: bool = False
    scope: ClassVar[str] = "global, at most"

    def __call__(self, model: nn.Module, density: Fraction, training: Training) -> Iterator[Phase]:
        yield from BASES[self.base]()(model, density, training)
        for layer in prunable(model).values():
            attach(layer, StoredWeight(rounded(form_of(layer), self.symmetric)).to(layer.weight.device))
