"""The threat model: one object that attacks and verifiers are built from and that decides whether a witness counts."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from attacks.lp import distance


@dataclass(frozen=True)
class Threat:
    """All images of [0,1] within lp distance eps of x; eps is exact (8/255 is not 0.031)."""

    norm: Literal["linf", "l2"] = "linf"
    eps: Fraction = Fraction(8, 255)

    def __post_init__(self) -> None:
        if self.eps < 0:
            raise ValueError(f"eps must not be negative, got {self.eps}")
        if self.norm == "linf" and self.eps > 1:
            raise ValueError(f"eps is in [0,1] pixel units and {self.eps} covers every image; did you mean {self.eps}/255?")


def within(witness: Tensor, x: Tensor, norm: str, eps: Fraction) -> Tensor:
    """Whether each witness lies in the exact ball and in [0,1]: bool [N].

    Its distance is measured here in float64, never read from an attack's name or eps.
    """
    limit = float(eps)
    if Fraction(limit) > eps:  # the largest float64 that is not above eps
        limit = float(torch.nextafter(torch.tensor(limit, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)))
    legal = ((witness >= 0) & (witness <= 1)).flatten(1).all(1)
    return legal & (distance(witness, x, norm) <= limit)
