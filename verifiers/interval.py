"""The verifier `ibp`."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor, nn

from .ball import Interval, Region, region
from .bounds import ibp_margins, smallest_margin
from .proof import Proof, UnsupportedNetworkError, fixed_radius_proof, require_finite
from .rounding import Settled, allowance_for, bounds_and_allowance, box_around, full_precision, in_float64, settle


def ibp_settled(model: nn.Module, x: Tensor, y: Tensor, norm: str, eps: Fraction) -> Settled:
    """IBP margins and which of them prove robustness, near-zero ones decided in float64."""
    if len(x) == 0:
        return settle(x.new_zeros(0), x.new_zeros(0), lambda at: (x.new_zeros(0), x.new_zeros(0)))
    ball = region(x, norm, eps)
    around = _allowance_around(model, ball, x[:4], model(x[:4]))
    margin = smallest_margin(ibp_margins(model, ball, y), y)

    def exactly(at: Tensor) -> tuple[Tensor, Tensor]:
        net, near = in_float64(model), region(x[at].double(), norm, eps)
        finer = smallest_margin(ibp_margins(net, near, y[at]), y[at])
        return finer, allowance_for(net, near, finer)

    return settle(margin, around.expand(len(margin)), exactly)  # one allowance for all: what it leaves open is few


def _allowance_around(model: nn.Module, ball: Region, x: Tensor, logits: Tensor) -> Tensor:
    """The allowance [1] of all samples together, after a look at a few points x, where the network says `logits`.

    The traced graph must compute what the network computes: a flag may have flipped, a forward been replaced.
    """
    around = box_around(ball)
    boxes = Interval(torch.cat([around.lower, x]), torch.cat([around.upper, x]))
    bounds, allowed = bounds_and_allowance(model, boxes)
    require_finite(x, logits)
    if not bool(((bounds.upper[1:] - logits).abs().amax(1) <= allowed[1:]).all()):
        raise UnsupportedNetworkError("the network's forward computes something else than its traced graph; build it anew")
    return allowed[:1]


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
        settled, predicted = ibp_settled(model, x, y, self.norm, self.eps), y.clone()
        inside = (x.clamp(0, 1) == x).flatten(1).all(1)
        left = (~(settled.proved & inside)).nonzero().flatten()  # elsewhere x lies in its box, where y was proven
        if len(left):
            predicted[left] = model(x[left]).argmax(1)
        return fixed_radius_proof(
            float(self.eps), settled.proved & (predicted == y), settled.margin, predicted, rechecked=int(settled.rechecked.sum())
        )
