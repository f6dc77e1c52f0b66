"""The verifier `ibp`."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor, nn

from .ball import region
from .bounds import ibp_margins, smallest_margin
from .proof import Proof, fixed_radius_proof
from .rounding import Settled, allowance, full_precision, in_float64, settle


def ibp_settled(model: nn.Module, x: Tensor, y: Tensor, norm: str, eps: Fraction) -> Settled:
    """IBP margins and which of them prove robustness, near-zero ones decided in float64."""

    def margins(net: nn.Module, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        ball = region(pixels, norm, eps)
        return smallest_margin(ibp_margins(net, ball, labels), labels), allowance(net, ball)

    margin, allowed = margins(model, x, y)
    return settle(margin, allowed, lambda at: margins(in_float64(model), x[at].double(), y[at]))


@dataclass(frozen=True)
class IBP:
    """Interval bound propagation: a certified sample is robust in the whole ball; cheap and loose.

    Gowal et al. 2018 (arXiv 1810.12715). The ball (linf or l2, radius eps in [0,1] pixel units, cut with [0,1]) is rounded
    outwards. Raises UnsupportedNetworkError for operations without a rule.
    """

    norm: str = "linf"
    eps: Fraction = Fraction(8, 255)
    deterministic: ClassVar[bool] = True

    @torch.no_grad()
    @full_precision()
    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Proof:
        settled = ibp_settled(model, x, y, self.norm, self.eps)
        predicted = model(x).argmax(1)
        return fixed_radius_proof(
            float(self.eps), settled.proved & (predicted == y), settled.margin, predicted, rechecked=int(settled.rechecked.sum())
        )
