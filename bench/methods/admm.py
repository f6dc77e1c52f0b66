"""Adv-ADMM."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..sparsity import attach, keep_largest, kept_of, mask_layers, prunable, top_k, weights
from ..train import Phase, Step, Training


class Anchor(nn.Module):
    """The weight itself, beside its sparse duplicate z, the scaled dual u and the penalty rho, which a killed run keeps."""

    z: Tensor
    u: Tensor
    rho: Tensor

    def __init__(self, weight: Tensor, keep: int, rho: float) -> None:
        super().__init__()
        self.keep = keep
        self.register_buffer("z", self.sparse(weight.detach()))
        self.register_buffer("u", torch.zeros_like(weight))
        self.register_buffer("rho", torch.tensor(float(rho), device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        return weight

    def sparse(self, weight: Tensor) -> Tensor:
        """The closest weight with `keep` non-zeros."""
        return weight * top_k(weight.abs(), self.keep)

    def penalty(self, weight: Tensor) -> Tensor:
        return self.rho / 2 * (weight - self.z + self.u).square().sum()

    @torch.no_grad()
    def update_dual(self, weight: Tensor, growth: float) -> None:
        """rho <- growth rho, z <- the projection of w + u, u <- u + w - z; no history of the graph is kept."""
        self.rho.mul_(growth)
        self.z.copy_(self.sparse(weight + self.u))
        self.u.add_(weight - self.z)


def anchored(model: nn.Module) -> list[tuple[Anchor, Tensor]]:
    """Every anchor and its layer's weight."""
    layers = prunable(model).values()
    return [(layer.parametrizations.weight[0], layer.weight) for layer in layers]


def anchor_penalty(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The sum over layers of rho / 2 |w - z + u|^2."""
    return torch.stack([anchor.penalty(weight) for anchor, weight in anchored(model)]).sum()


@dataclass(frozen=True)
class ADMM:
    """Pulls the weights towards their closest sparse ones by ADMM under the robust objective, masks the rest, fine-tunes.

    Ye et al. 2019 (arXiv 1903.12561). The dual is updated `updates` times in the prune phase, evenly (at most once an epoch), and
    rho is multiplied by `growth` each time. The dual is detached from the graph, which the authors' code forgets.
    """

    rho: float = 1e-3
    growth: float = 1.3
    updates: int = 9
    scope: ClassVar[str] = "per layer"

    def __post_init__(self) -> None:
        if self.rho <= 0 or self.growth < 1 or self.updates < 0:
            raise ValueError(f"ADMM needs rho > 0, growth >= 1 and updates >= 0, got {self.rho}, {self.growth}, {self.updates}")

    def __call__(self, model: nn.Module, density: Fraction, training: Training) -> Iterator[Phase]:
        yield training.pretrain()
        for layer in prunable(model).values():
            attach(layer, Anchor(layer.weight, kept_of(layer.weight.numel(), density), self.rho))
        yield replace(training.prune(), name="admm", penalty=anchor_penalty, after_epoch=self._update)
        mask_layers(model, keep_largest({name: weight.abs() for name, weight in weights(model).items()}, density))
        yield training.finetune()

    def _update(self, step: Step) -> None:
        epoch, epochs = step.progress.epoch, step.progress.epochs
        parts = min(self.updates, epochs - 1) + 1
        if epoch < epochs and epoch * parts // epochs > (epoch - 1) * parts // epochs:
            for anchor, weight in anchored(step.model):
                anchor.update_dual(weight, self.growth)
