"""Channel pruning."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from torch import Tensor, nn

from ..sparsity import keep_largest, kept_of, mask_layers, top_k, weights
from ..train import Phase, Training


def whole_filters(weight: Tensor, density: Fraction) -> Tensor:
    """A mask of the rows of the largest l2 norm: C - floor((1 - density) C) of C filters, each whole."""
    rows = top_k(weight.flatten(1).norm(dim=1), kept_of(len(weight), density))
    return rows.view(-1, *[1] * (weight.dim() - 1)).expand_as(weight).clone()


@dataclass(frozen=True)
class ChannelPruning:
    """Keeps each layer's filters of the largest l2 norm, whole, of the robustly pre-trained network, then fine-tunes robustly.

    Li et al. 2017 (arXiv 1608.08710), with the same kept share in every layer, so in each of a residual group. `density` is
    the share of filters. The last layer's rows are the classes: there single weights are kept by magnitude.
    """

    scope: ClassVar[str] = "whole filters per layer"

    def __call__(self, model: nn.Module, density: Fraction, training: Training) -> Iterator[Phase]:
        yield training.pretrain()
        found = weights(model)
        last = list(found)[-1]
        masks = {name: whole_filters(weight, density) for name, weight in found.items() if name != last}
        mask_layers(model, {**masks, **keep_largest({last: found[last].abs()}, density)})
        yield training.finetune()
