"""SNIP."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from typing import Literal

import torch
from torch import Tensor, nn

from ..sparsity import budget_of, keep_largest, keep_largest_of_all, mask_layers, prunable, rescale_
from ..train import Phase, Progress, Training


def sensitivity(model: nn.Module, training: Training, batches: int) -> dict[str, Tensor]:
    """|w * gradient of the loss| of every prunable weight, summed over the first batches; the model is left as it was.

    The loss is the training's objective with its ramp at the end, in train mode. Where there is no gradient at all, zeros.
    """
    probe = copy.deepcopy(model).train()  # BatchNorm's running statistics move in the copy only
    order = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
    for x, y in islice(training.batches(order), batches):
        training.objective(probe, x, y, Progress(0, 1)).backward()
    found = {name: layer.weight for name, layer in prunable(probe).items()}
    return {name: torch.zeros_like(w) if w.grad is None else (w * w.grad).detach().abs() for name, w in found.items()}


@dataclass(frozen=True)
class SNIP:
    """Keeps the weights whose removal would change the loss most before any training, then trains them for the whole budget.

    Lee et al. 2019 (arXiv 1810.02340). `scope` "per layer" with the benign loss is HYDRA's baseline, "global" the paper's; a
    global ranking can empty whole layers. `score_loss` is the loss of the scores, `objective` the suite's. `rescale` multiplies
    the kept weights by the layer's kept share^-1/2.
    """

    scope: Literal["per layer", "global"] = "per layer"
    score_loss: Literal["benign", "objective"] = "benign"
    batches: int = 1
    rescale: bool = True

    def __post_init__(self) -> None:
        if self.batches < 1:
            raise ValueError(f"SNIP scores on at least 1 batch, got {self.batches}")

    def __call__(self, model: nn.Module, density: Fraction, training: Training) -> Iterator[Phase]:
        scores = sensitivity(model, training.benign if self.score_loss == "benign" else training, self.batches)
        if self.scope == "global":
            total = sum(score.numel() for score in scores.values())
            mask_layers(model, keep_largest_of_all(scores, budget_of(total, density)))
        else:
            mask_layers(model, keep_largest(scores, density))
        if self.rescale:
            rescale_(model)
        yield training.train()
