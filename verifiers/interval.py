"""The verifier `ibp`."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor, nn

from .ball import Interval, region
from .bounds import ibp_logits, ibp_margins, smallest_margin
from .proof import Proof, UnsupportedNetworkError, fixed_radius_proof
from .rounding import Settled, allowance, allowance_for, full_precision, in_float64, settle


def ibp_settled(model: nn.Module, x: Tensor, y: Tensor, norm: str, eps: Fraction) -> Settled:
    """IBP margins and which of them prove robustness, near-zero ones decided in float64."""
    _require_same_function(model, x[:4])

    def margins(net: nn.Module, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        ball = region(pixels, norm, eps)
        margin = smallest_margin(ibp_margins(net, ball, labels), labels)
        return margin, allowance_for(net, ball, margin)

    margin, allowed = margins(model, x, y)
    return settle(margin, allowed, lambda at: margins(in_float64(model), x[at].double(), y[at]))


def _require_same_function(model: nn.Module, x: Tensor) -> None:
    """The traced graph must compute what the network computes: a flag may have flipped, a forward been replaced."""
    if len(x) == 0:
        return
    point = Interval(x, x)
    bounds = ibp_logits(model, point)
    off = (bounds.upper - model(x)).abs().amax(1)
    if not bool((off <= allowance(model, point)).all()):
        raise UnsupportedNetworkError("the network's forward computes something else than its traced graph; build it anew")


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
