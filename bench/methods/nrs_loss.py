"""NRSLoss: tickets trained with a pull on neurons that interval bounds leave unstable."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from verifiers.ball import Interval
from verifiers.bounds import INTERVAL_RULES
from verifiers.graph import walk

from ..modes import not_learning, resting, statistics_of
from ..train import Phase, Training
from .lottery import IMP

RELUS: tuple[Any, ...] = (nn.ReLU, F.relu, torch.relu, "relu")


class Scaled(Interval):
    """What a BatchNorm returned, which remembers that layer's scale per channel."""

    scale: Tensor | None = None


def nrs(lower: Tensor, upper: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """-tanh(1 + l u / scale^2) of each neuron: near -1 where its sign is sure, near 1 where it is far from sure."""
    square = torch.as_tensor(scale, dtype=lower.dtype, device=lower.device).square()
    return -torch.tanh(1 + lower * upper / square.clamp_min(torch.finfo(lower.dtype).tiny))


def instability(model: nn.Module, x: Tensor, eps: float) -> Tensor:
    """The mean `nrs` over all neurons before a ReLU on the linf balls around x, cut with [0,1]; 0 for a network without ReLU.

    The scale is that of the BatchNorm right before the ReLU, detached, else 1. A BatchNorm in training mode takes the
    statistics of x, as other bounds in training do, but does not learn them. x is [N, C, H, W] in [0,1].
    Raises UnsupportedNetworkError as interval bounds do.
    """
    found: list[Tensor] = []

    def normalised(layer: Any, x: Any) -> Interval:
        out = Scaled(*INTERVAL_RULES[type(layer)](layer, x))
        if layer.affine:
            out.scale = layer.weight.detach().view(1, -1, *[1] * (out.lower.dim() - 2))
        return out

    def watched(rule: Any) -> Any:
        def relu(*args: Any, **kwargs: Any) -> Any:
            x = next(one for one in args if isinstance(one, Interval))
            scale = getattr(x, "scale", None)
            found.append(nrs(x.lower, x.upper, 1.0 if scale is None else scale).flatten())
            return rule(*args, **kwargs)

        return relu

    rules = {**INTERVAL_RULES, nn.BatchNorm1d: normalised, nn.BatchNorm2d: normalised}
    rules |= {kind: watched(INTERVAL_RULES[kind]) for kind in RELUS}
    with not_learning(model):
        statistics = statistics_of(model, x)
    with resting(model, statistics):
        walk(model, Interval((x - eps).clamp(0, 1), (x + eps).clamp(0, 1)), rules)
    return torch.cat(found).mean() if found else x.new_zeros(())


@dataclass(frozen=True)
class NRSLoss(IMP):
    """As `imp`, with the mean -tanh(1 + l u / scale^2) over all neurons added to the objective in every round.

    Li et al. (TMLR, certified pruning). l and u are interval bounds of a neuron's value before its ReLU on the linf ball of
    radius `eps` cut with [0,1], `scale` is that of the BatchNorm before it, and `weight` is the term's weight.
    """

    weight: float = 0.01
    eps: Fraction = Fraction(2, 255)
    fixes_loss: ClassVar[str] = "the objective plus a term on interval bounds"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weight < 0 or self.eps < 0:
            raise ValueError(f"NRSLoss needs weight and eps >= 0, got {self.weight} and {self.eps}")

    def __call__(self, model: nn.Module, density: Fraction, training: Training) -> Iterator[Phase]:
        for phase in super().__call__(model, density, training):
            yield replace(phase, penalty=self._penalty)

    def _penalty(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return self.weight * instability(model, x, float(self.eps))
