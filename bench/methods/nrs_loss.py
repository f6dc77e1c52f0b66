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


def instability(model: nn.Module, box: Interval) -> Tensor:
    """The mean `nrs` over all neurons before a ReLU and all images of the box; 0 for a network without ReLU.

    The scale is that of the BatchNorm right before the ReLU, detached, else 1. BatchNorm takes its running statistics.
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
    training = model.training
    model.eval()
    try:
        walk(model, box, rules)
    finally:
        model.train(training)
    return torch.cat(found).mean() if found else box.lower.new_zeros(())


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
        radius = float(self.eps)
        return self.weight * instability(model, Interval((x - radius).clamp(0, 1), (x + radius).clamp(0, 1)))
