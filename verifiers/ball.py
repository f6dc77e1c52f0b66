"""The set of inputs that a certificate speaks about: an lp ball around x, cut with the pixel box [0,1]."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor


class Interval(NamedTuple):
    """All tensors between lower and upper, elementwise."""

    lower: Tensor
    upper: Tensor

    @property
    def centre(self) -> Tensor:
        return (self.lower + self.upper) / 2

    @property
    def radius(self) -> Tensor:
        return (self.upper - self.lower) / 2


class Ellipsoid(NamedTuple):
    """Points middle + spread * d with |d|_2 <= 1 that also lie between lower and upper."""

    lower: Tensor
    upper: Tensor
    middle: Tensor
    spread: Tensor


Region = Interval | Ellipsoid


def float_above(eps: Fraction, dtype: torch.dtype = torch.float32) -> float:
    """A float of the given type that is not below the exact eps; inf where eps is beyond them all."""
    value = torch.tensor(float(eps), dtype=dtype)
    if not math.isinf(value) and Fraction(value.item()) < eps:
        value = torch.nextafter(value, torch.tensor(math.inf, dtype=dtype))
    return float(value.item())


def outward_box(x: Tensor, eps: Fraction) -> Interval:
    """Contains every point of [0,1] within linf distance eps of x, in exact arithmetic: bounds are rounded outwards.

    A sum rounded to nearest is at most half a step off, so that its neighbour is on the safe side.
    """
    infinity = torch.tensor(math.inf, dtype=x.dtype, device=x.device)
    wide = float_above(eps, x.dtype)
    return Interval(
        torch.nextafter(x - wide, -infinity).clamp_(0, 1),
        torch.nextafter(x + wide, infinity).clamp_(0, 1),
    )


def region(x: Tensor, norm: str, eps: Fraction) -> Region:
    """The ball of radius eps around x cut with [0,1]; x has shape [N, ...] and pixel units."""
    box = outward_box(x, eps)
    if norm == "linf":
        return box
    if norm == "l2":
        return Ellipsoid(box.lower, box.upper, x, torch.full_like(x[:1], float_above(eps, x.dtype)))
    raise ValueError(f"bounds know the norms linf and l2, not {norm!r}")
