"""RigL, and the rewiring it shares with other methods that train sparse from start to end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from math import cos, floor, pi
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ..sparsity import OpenMask, attach, budget_of, prunable, rescale_, top_k
from ..train import Phase, Progress, Step, Training
from .allocation import Counts, allocate


def open_masks(model: nn.Module, counts: Counts) -> None:
    """Attach a random mask of so many weights to every layer, drawn on the CPU; what is masked becomes zero underneath, too."""
    for name, layer in prunable(model).items():
        mask = top_k(torch.rand(layer.weight.shape), counts[name]).to(layer.weight)
        attach(layer, OpenMask(mask))
        layer.parametrizations.weight.original.data.mul_(mask)


def sparse_start(model: nn.Module, density: Fraction, rule: str, rescale: bool) -> None:
    """Random open masks of floor(density N) weights, shared out among the layers by a rule of `allocation`."""
    shapes = {name: layer.weight.shape for name, layer in prunable(model).items()}
    keep = budget_of(sum(shape.numel() for shape in shapes.values()), density)
    open_masks(model, allocate(rule, shapes, keep))
    if rescale:
        rescale_(model)


def opened(model: nn.Module) -> list[tuple[OpenMask, nn.Parameter]]:
    """Every open mask and the weight under it, which is zero where the mask is."""
    parts = (layer.parametrizations.weight for layer in prunable(model).values())
    return [(part[0], part.original) for part in parts]


@torch.no_grad()
def survivors(part: OpenMask, weight: nn.Parameter, drop: int) -> Tensor:
    """Where the active weights are but for the `drop` smallest of them."""
    active = part.mask != 0
    return top_k(weight.abs().where(active, -torch.ones_like(weight)), int(active.sum()) - drop) != 0


@torch.no_grad()
def drop_and_grow_(part: OpenMask, weight: nn.Parameter, drop: int, grow: int, growth: Tensor) -> Tensor:
    """Drop the `drop` smallest active weights, then activate the `grow` inactive ones of the largest `growth` score >= 0.

    The just dropped count as inactive; one that grows back at once keeps its value, other new ones are 0. Returns what is new.
    """
    active = part.mask != 0
    kept = survivors(part, weight, drop)
    grown = top_k(growth.where(~kept, -torch.ones_like(weight)), grow) != 0
    part.mask.copy_(kept | grown)
    weight.mul_(part.mask)
    return grown & ~active


@torch.no_grad()
def forget_(optimizer: torch.optim.Optimizer, weight: nn.Parameter, where: Tensor) -> None:
    """Reset the optimizer's momenta of these entries."""
    for value in optimizer.state[weight].values():
        if isinstance(value, Tensor) and value.shape == weight.shape:
            value.masked_fill_(where, 0.0)


def due(progress: Progress, every: int) -> bool:
    """Whether to rewire: every so many steps, but not in the last epoch, so that what has grown meets every image."""
    return progress.step > 0 and progress.step % every == 0 and progress.epoch < progress.epochs - 1


def evenly(step: Step, part: OpenMask, share: float) -> tuple[int, int]:
    """(how many weights a layer drops, how many it grows): its share of both."""
    moved = floor(share * int(part.mask.sum()))
    return moved, moved


def rewiring(
    share: Callable[[Progress], float], moves: Callable[[Step, OpenMask, float], tuple[int, int]] = evenly
) -> Callable[[Step], None]:
    """A hook after the backward pass: masked weights get no gradient, and share(progress) of each layer is rewired.

    New connections are those of the largest dense gradient. Where the share is above 0, rewiring takes the place of the step.
    """

    def rewire(step: Step) -> None:
        fraction = share(step.progress)
        for part, weight in opened(step.model):
            if weight.grad is None:
                continue
            if fraction > 0:
                new = drop_and_grow_(part, weight, *moves(step, part, fraction), weight.grad.abs())
                forget_(step.optimizer, weight, new | (part.mask == 0))
            weight.grad.mul_(part.mask)
        if fraction > 0:
            step.optimizer.zero_grad(set_to_none=True)

    return rewire


@dataclass(frozen=True)
class RigL:
    """Trains sparse from start to end; every so often the smallest weights make room for those of the largest dense gradient.

    Evci et al. 2020 (arXiv 1911.11134). `allocation` shares the budget floor(density N) among the layers: erk, or uniform with a
    dense first layer. Every `every` steps up to the share `until` of the training, alpha/2 (1 + cos(pi t / until)) of each layer
    moves, but nothing in the last epoch. `rescale` multiplies the first weights by the layer's kept share^-1/2.
    """

    allocation: Literal["erk", "uniform"] = "erk"
    alpha: float = 0.3
    every: int = 100
    until: float = 0.75
    rescale: bool = True
    scope: ClassVar[str] = "global, shared out by a rule"

    def __post_init__(self) -> None:
        if not (0 <= self.alpha <= 1 and self.every >= 1 and 0 <= self.until <= 1):
            raise ValueError(
                f"RigL needs alpha and until from 0 to 1 and every >= 1, got {self.alpha}, {self.until} and {self.every}"
            )

    def share(self, progress: Progress) -> float:
        """The fraction of each layer that moves at this step; 0 where none does."""
        end = self.until * progress.steps
        if not due(progress, self.every) or progress.step >= end:
            return 0.0
        return self.alpha / 2 * (1 + cos(pi * progress.step / end))

    def __call__(self, model: nn.Module, density: Fraction, training: Training) -> Iterator[Phase]:
        sparse_start(model, density, self.allocation, self.rescale)
        yield replace(training.train(), after_backward=rewiring(self.share))
