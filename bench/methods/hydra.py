"""HYDRA."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from math import sqrt
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ..sparsity import TopKScores, attach, kept_of, mask_layers, prunable
from ..train import Phase, Training

GAIN = sqrt(2.0)  # for ReLU, in every initialisation that takes one


def proposed(weight: Tensor) -> Tensor:
    """sqrt(6 / fan_in) W / max|W|: the one whose first mask is the magnitude mask. An all-zero layer keeps zero scores."""
    return sqrt(6 / weight[0].numel()) * weight / weight.abs().max().clamp_min(torch.finfo(weight.dtype).tiny)


def _drawn(fill: Callable[[Tensor], object]) -> Callable[[Tensor], Tensor]:
    """Scores drawn on the CPU from the global generator, so that every device starts from the same ones."""

    def initialise(weight: Tensor) -> Tensor:
        scores = torch.empty(weight.shape)
        with torch.no_grad():
            fill(scores)
        return scores.to(weight)

    return initialise


def _dirac(scores: Tensor) -> None:
    """1 at the kernel centre of (i, i), else 0; for linear layers 1 on the diagonal of the matrix."""
    scores.zero_()
    centre = tuple(side // 2 for side in scores.shape[2:])
    for i in range(min(scores.shape[:2])):
        scores[(i, i, *centre)] = 1.0


def _dirac_with_jitter(scores: Tensor) -> None:
    """Dirac plus 1e-6 N(0, 1): exact zeros have no gradient through |.|, jittered ones do."""
    _dirac(scores)
    scores.add_(torch.randn(scores.shape), alpha=1e-6)


INITIALISATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "proposed": proposed,
    "kaiming-normal": _drawn(nn.init.kaiming_normal_),
    "kaiming-uniform": _drawn(nn.init.kaiming_uniform_),
    "xavier-normal": _drawn(lambda scores: nn.init.xavier_normal_(scores, gain=GAIN)),
    "xavier-uniform": _drawn(lambda scores: nn.init.xavier_uniform_(scores, gain=GAIN)),
    "orthogonal": _drawn(lambda scores: nn.init.orthogonal_(scores, gain=GAIN)),
    "dirac": _drawn(_dirac),
    "dirac-jitter": _drawn(_dirac_with_jitter),
}


def scores_and_batchnorm(model: nn.Module) -> set[str]:
    """What the prune phase trains: scores, and the scale and shift of BatchNorm of any kind; weights and biases stay frozen."""
    return {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for name, _ in module.named_parameters(recurse=False)
        if isinstance(module, TopKScores | _NormBase)
    }


@dataclass(frozen=True)
class HYDRA:
    """Learns an importance score per weight under the robust objective, keeps each layer's top ones, fine-tunes them.

    Sehwag et al. 2020 (arXiv 2002.10509). `init` is the score initialisation; "proposed" is the paper's, the others are those
    of the author response's Figure 1.
    """

    init: Literal[
        "proposed", "kaiming-normal", "kaiming-uniform", "xavier-normal", "xavier-uniform", "orthogonal", "dirac", "dirac-jitter"
    ] = "proposed"
    scope: ClassVar[str] = "per layer"

    def __call__(self, model: nn.Module, density: Fraction, training: Training) -> Iterator[Phase]:
        yield training.pretrain()
        start, parts = INITIALISATIONS[self.init], {}
        for name, layer in prunable(model).items():
            weight = layer.weight.detach()
            parts[name] = TopKScores(start(weight), kept_of(weight.numel(), density))
            attach(layer, parts[name])
        yield training.prune(trains=scores_and_batchnorm)
        mask_layers(model, {name: part.mask() for name, part in parts.items()})
        yield training.finetune()
