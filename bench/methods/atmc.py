"""ATMC: low-rank product plus sparse rest under one budget, in 32 bits and with learned code books of 8 bits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..factors import BOOK, PARTS, Stored, StoredWeight
from ..sparsity import attach, budget_of, keep_only_largest_, prunable
from ..train import Phase, Step, Training
from .admm import Anchor
from .al0 import AL0
from .code_books import learned_book


class Factored(nn.Module):
    """The weight as U (V + I) + C where its matrix [m, n] has n <= m, else as (U + I) V + C; at first exactly the weight itself.

    U [m, r], V [r, n], C [m, n] with r = min(m, n), for a convolution [m, r, 1, 1], [r, c, h, w], [m, c, h, w]; they are the
    layer's parameters. I is neither trained nor counted. `anchors`: by factor, what its quantised copy is held by.
    """

    def __init__(self) -> None:
        super().__init__()
        self.anchors = nn.ModuleDict()

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows, columns = weight.flatten(1).shape
        ones, rest = (1,) * (weight.dim() - 2), torch.zeros_like(weight)
        if columns <= rows:
            return weight.reshape(rows, columns, *ones).clone(), weight.new_zeros(columns, *weight.shape[1:]), rest
        return weight.new_zeros(rows, rows, *ones), weight.clone(), rest

    def forward(self, left: Tensor, right: Tensor, rest: Tensor) -> Tensor:
        one, other = left.flatten(1), right.flatten(1)
        if other.shape[1] <= len(one):
            other = other + torch.eye(other.shape[1], device=other.device)
        else:
            one = one + torch.eye(len(one), device=one.device)
        return (one @ other).view(rest.shape) + rest


def factors(layer: Any) -> dict[str, Tensor]:
    """The factors of a layer by name; they are its parameters."""
    own = layer.parametrizations.weight
    return {part: getattr(own, f"original{at}") for at, part in enumerate(PARTS["atmc"])}


def project_factors_(model: nn.Module, keep: int) -> None:
    """Keep the `keep` largest entries of all factors of all layers, jointly."""
    layers = prunable(model).items()
    keep_only_largest_({f"{name}.{part}": one for name, layer in layers for part, one in factors(layer).items()}, keep)


def factorised(model: nn.Module, density: Fraction, training: Training) -> Iterator[Phase]:
    """Al0 for the prune epochs; afterwards the layers are factored, with Al0's weights and non-zeros."""
    yield from AL0()(model, density, replace(training, budget=replace(training.budget, finetune=0)))
    for layer in prunable(model).values():
        attach(layer, Factored())


def factor_budget(model: nn.Module, density: Fraction) -> int:
    """floor(density N) for the N weights of the dense network, not for its two to three times more factor entries."""
    return budget_of(sum(layer.weight.numel() for layer in prunable(model).values()), density)


@dataclass(frozen=True)
class ATMC:
    """Trains W = U V + C per layer; after every step all factors together have floor(density N) non-zeros, N the dense weights.

    Gui et al. 2019 (arXiv 1902.03538): robust pre-training, Al0 for the prune epochs, then the factors for the fine-tune epochs.
    The factors are what is stored and counted; the merged weights of the plain network are denser.
    """

    scope: ClassVar[str] = "global over the factors"

    def __call__(self, model: nn.Module, density: Fraction, training: Training) -> Iterator[Phase]:
        keep = factor_budget(model, density)
        yield from factorised(model, density, training)
        yield compress(training, keep)
        for layer in prunable(model).values():
            form = Stored("atmc", {part: one.detach().cpu() for part, one in factors(layer).items()})
            attach(layer, StoredWeight(form).to(layer.weight.device))


def compress(training: Training, keep: int) -> Phase:
    """Fine-tuning of the factors, with the budget met after every step."""
    return replace(training.finetune(), name="compress", after_step=lambda step: project_factors_(step.model, keep))


# ---- 8 bits ----------------------------------------------------------------------------------------------------------


class BookAnchor(Anchor):
    """A factor's quantised copy z, the scaled dual u and the penalty rho; at first z is the factor and u is zero."""

    def __init__(self, factor: Tensor, rho: float) -> None:
        super().__init__(factor, factor.numel(), float(rho))

    def quantised(self, factor: Tensor) -> Tensor:
        """The factor plus its dual, on the factor's own support, by at most 256 distinct non-zero values."""
        return learned_book((factor + self.u) * (factor != 0))

    @torch.no_grad()
    def update_dual(self, factor: Tensor, growth: float = 1.0) -> None:
        """z <- Q(factor + u), u <- u + factor - z, rho <- growth rho."""
        self.rho.mul_(growth)
        self.z.copy_(self.quantised(factor))
        self.u.add_(factor - self.z)


def book_anchors(model: nn.Module) -> list[tuple[BookAnchor, Tensor]]:
    """Every anchor and its factor."""
    layers = [(layer.parametrizations.weight[0].anchors, factors(layer)) for layer in prunable(model).values()]
    return [(anchors[part], own[part]) for anchors, own in layers for part in anchors]


def book_penalty(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The sum over all factors of rho / 2 |factor - z + u|^2."""
    return torch.stack([anchor.penalty(factor) for anchor, factor in book_anchors(model)]).sum()


@torch.no_grad()
def quantised_form(layer: Any) -> Stored:
    """A layer's quantised copy. Factors of at most 256 non-zeros stay as they are."""
    anchors, own = layer.parametrizations.weight[0].anchors, factors(layer)
    parts = {part: anchors[part].quantised(one).cpu() for part, one in own.items()}
    return Stored("atmc", parts, frozenset(part for part, one in own.items() if int((one != 0).sum()) > BOOK))


@dataclass(frozen=True)
class ATMC8:
    """ATMC whose factors hold at most 256 distinct non-zero values each, learned while training; that copy is the network.

    Gui et al. 2019 (arXiv 1902.03538). As ATMC for half of the fine-tune epochs; in the others ADMM with penalty `rho` pulls the
    factors towards a quantised copy, which is renewed every `every` steps. Entries that are nearest to 0 become 0, so a few
    less than floor(density N) may stay. Biases and BatchNorm are those of the trained network.
    """

    rho: float = 0.1
    every: int = 10
    scope: ClassVar[str] = "global over the factors, at most"

    def __post_init__(self) -> None:
        if self.rho <= 0 or self.every < 1:
            raise ValueError(f"ATMC with 8 bits needs rho > 0 and every >= 1, got {self.rho} and {self.every}")

    def __call__(self, model: nn.Module, density: Fraction, training: Training) -> Iterator[Phase]:
        keep, epochs = factor_budget(model, density), training.budget.finetune

        def project_and_update(step: Step) -> None:
            project_factors_(step.model, keep)
            if step.progress.step and step.progress.step % self.every == 0:
                for anchor, factor in book_anchors(step.model):
                    anchor.update_dual(factor)

        yield from factorised(model, density, training)
        yield replace(compress(training, keep), epochs=epochs // 2)
        for layer in prunable(model).values():
            anchors = {part: BookAnchor(one, self.rho) for part, one in factors(layer).items()}
            layer.parametrizations.weight[0].anchors.update(anchors)
        phase = replace(training.finetune(), name="quantise", epochs=epochs - epochs // 2)
        yield replace(phase, penalty=book_penalty, after_step=project_and_update)
        for layer in prunable(model).values():
            attach(layer, StoredWeight(quantised_form(layer)).to(layer.weight.device))
