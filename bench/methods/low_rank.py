"""ALR."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..factors import Stored, StoredWeight
from ..sparsity import attach, budget_of, prunable
from ..train import Phase, Training


class LowRank(nn.Module):
    """The weight as U V of the given rank, at first its truncated SVD with the singular values shared evenly between the two.

    U [m, rank], V [rank, n], for a convolution [m, rank, 1, 1] and [rank, c, h, w]; they are the layer's parameters.
    """

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        left, values, right = torch.linalg.svd(weight.flatten(1).double(), full_matrices=False)
        root, ones = values[: self.rank].sqrt(), (1,) * (weight.dim() - 2)
        one, other = left[:, : self.rank] * root, root[:, None] * right[: self.rank]
        return one.to(weight.dtype).view(*one.shape, *ones), other.to(weight.dtype).reshape(self.rank, *weight.shape[1:])

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return (left.flatten(1) @ right.flatten(1)).view(len(left), *right.shape[1:])


def global_ranks(values: Mapping[str, Tensor], costs: Mapping[str, int], keep: int) -> dict[str, int]:
    """Ranks by one threshold on the singular values of all layers, the lowest with which the factors have at most `keep` entries.

    values: each layer's singular values, largest first; at least one of each layer stays. costs: entries that a rank takes.
    """
    left, ranks = keep - sum(costs.values()), dict.fromkeys(values, 1)
    rest = [(value, name) for name, own in values.items() for value in own[1:].tolist()]
    for _, name in sorted(rest, key=lambda one: -one[0]):
        if costs[name] > left:
            break
        left -= costs[name]
        ranks[name] += 1
    return ranks


@dataclass(frozen=True)
class ALR:
    """Factorises each robustly pre-trained weight by a truncated SVD, then fine-tunes the factors robustly; nothing is sparse.

    The low-rank baseline of Gui et al. 2019 (ATMC, arXiv 1902.03538). One threshold on the singular values of all layers gives
    the ranks: the largest for which the factors have at most floor(density N) entries, N the dense weights (the paper scans it).
    Raises ValueError for a density below rank one in every layer.
    """

    scope: ClassVar[str] = "global over the factors, at most"

    def __call__(self, model: nn.Module, density: Fraction, training: Training) -> Iterator[Phase]:
        layers = prunable(model)
        costs = {name: sum(layer.weight.flatten(1).shape) for name, layer in layers.items()}
        total = sum(layer.weight.numel() for layer in layers.values())
        keep, least = budget_of(total, density), sum(costs.values())
        if keep < least:
            raise ValueError(f"density {density} keeps {keep} weights, factors of rank one take {least}; ask for {least}/{total}")
        yield training.pretrain()
        values = {name: torch.linalg.svdvals(layer.weight.detach().flatten(1).double()) for name, layer in layers.items()}
        for name, rank in global_ranks(values, costs, keep).items():
            attach(layers[name], LowRank(rank))
        yield training.finetune()
        for layer in layers.values():
            own = layer.parametrizations.weight
            form = Stored("lowrank", {"U": own.original0.detach().cpu(), "V": own.original1.detach().cpu()})
            attach(layer, StoredWeight(form).to(layer.weight.device))
