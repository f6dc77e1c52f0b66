"""Sparsity as parametrizations: while training, `layer.weight` is the sparse weight; afterwards it is plain zeros.

Whatever a pruning method must remember across steps is a parameter or a buffer of such a part: that rule makes every method
durable through `model.state_dict()`.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from math import floor, sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

Masks = dict[str, Tensor]


def prunable(model: nn.Module) -> dict[str, Any]:
    """Every convolution and linear layer by name, first layer and classifier included; biases and BatchNorm never count."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The effective weight of every prunable layer, detached."""
    return {name: layer.weight.detach() for name, layer in prunable(model).items()}


def kept_of(size: int, density: Fraction) -> int:
    """How many of a layer's `size` weights survive: size - floor((1 - density) size), in exact arithmetic, so at least one."""
    return size - floor((1 - density) * size)


def top_k(scores: Tensor, keep: int) -> Tensor:
    """A 0/1 mask of the `keep` largest entries; of equal ones, those with the lower flat index go first.

    No synchronisation with the device. scores: any shape, finite.
    """
    flat = scores.detach().flatten()
    if keep == 0:
        return torch.zeros_like(flat).view_as(scores)
    threshold = flat.kthvalue(flat.numel() - keep + 1).values
    above, equal = flat > threshold, flat == threshold
    pruned_equals = equal.sum() - (keep - above.sum())
    chosen = above | (equal & (equal.cumsum(0) > pruned_equals))
    return chosen.to(flat.dtype).view_as(scores)


def keep_largest(scores: Mapping[str, Tensor], density: Fraction) -> Masks:
    """Per layer, a mask of its K_l = n_l - floor((1 - density) n_l) largest scores."""
    return {name: top_k(score, kept_of(score.numel(), density)) for name, score in scores.items()}


def budget_of(size: int, density: Fraction) -> int:
    """How many of a whole network's `size` weights survive: floor(density size), in exact arithmetic.

    Raises ValueError where that is none.
    """
    keep = floor(density * size)
    if keep == 0:
        raise ValueError(f"density {density} keeps none of the network's {size} weights; ask for at least 1/{size}")
    return keep


def keep_largest_of_all(scores: Mapping[str, Tensor], keep: int) -> Masks:
    """Over all layers jointly, a mask of the `keep` largest scores; of equal ones the earlier go first."""
    flat = top_k(torch.cat([score.detach().flatten() for score in scores.values()]), keep)
    parts = flat.split([score.numel() for score in scores.values()])
    return {name: part.view_as(score) for (name, score), part in zip(scores.items(), parts, strict=True)}


@torch.no_grad()
def keep_only_largest_(tensors: Mapping[str, Tensor], keep: int) -> None:
    """Make the tensors the closest ones (in l2) of which, all together, `keep` entries are non-zero."""
    for name, mask in keep_largest_of_all({name: tensor.abs() for name, tensor in tensors.items()}, keep).items():
        tensors[name].mul_(mask)


class Mask(nn.Module):
    """weight * mask: a masked weight is zero and gets no gradient."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


class _DenseGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor) -> Tensor:
        return weight * mask

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        return gradients[0], None


class OpenMask(Mask):
    """weight * mask, yet masked weights get the dense gradient too: methods that grow weights back rank by it."""

    def forward(self, weight: Tensor) -> Tensor:
        return _DenseGradient.apply(weight, self.mask)


class _StraightThroughTopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, importance: Tensor, keep: int) -> Tensor:
        return top_k(importance, keep)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        return gradients[0], None


class TopKScores(nn.Module):
    """weight * (its score is among the layer's `keep` largest in magnitude); the gradient reaches every score (HYDRA)."""

    def __init__(self, scores: Tensor, keep: int) -> None:
        super().__init__()
        self.scores = nn.Parameter(scores.clone())
        self.keep = keep

    def forward(self, weight: Tensor) -> Tensor:
        return weight * _StraightThroughTopK.apply(self.scores.abs(), self.keep)

    def mask(self) -> Tensor:
        return top_k(self.scores.abs(), self.keep)


def attach(layer: nn.Module, part: nn.Module) -> nn.Module:
    """Make `part` compute the layer's weight; a part attached before is removed, the underlying dense weight stays.

    Where that part made the weight from factors, the weight they made stays.
    """
    if parametrize.is_parametrized(layer, "weight"):
        factors = not layer.parametrizations.weight.is_tensor  # type: ignore[union-attr]
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=factors)
    parametrize.register_parametrization(layer, "weight", part)
    return part


def mask_layers(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Attach a fixed mask to each named layer."""
    layers = prunable(model)
    for name, mask in masks.items():
        attach(layers[name], Mask(mask))


@torch.no_grad()
def rescale_(model: nn.Module, density: Fraction | None = None) -> None:
    """Multiply the dense weights under the masks by density^-1/2, so that a sparse layer starts with a dense one's variance.

    Without it sparse networks without BatchNorm are dead at initialisation. Without a density, by each layer's own kept share.
    """
    for layer in prunable(model).values():
        own = layer.parametrizations.weight
        kept = max(own[0].mask.mean().item(), 1 / own.original.numel()) if density is None else density
        own.original.mul_(1 / sqrt(kept))


def is_attached(model: nn.Module) -> bool:
    return any(parametrize.is_parametrized(layer) for layer in model.modules())


def effective_state(model: nn.Module) -> dict[str, Tensor]:
    """A plain state dict: effective weights under their plain names, no trace of parametrizations.

    Not by `remove_parametrizations` on a copy: the copy shares its injected class with the original and would break it.
    """
    state = {}
    for path, module in model.named_modules():
        if ".parametrizations" in f".{path}":
            continue
        prefix = f"{path}." if path else ""
        persistent = {k: v for k, v in module.named_buffers(recurse=False) if k not in module._non_persistent_buffers_set}
        for name, value in [*module.named_parameters(recurse=False), *persistent.items()]:
            state[prefix + name] = value.detach().clone()
        if parametrize.is_parametrized(module, "weight"):
            state[f"{prefix}weight"] = module.weight.detach().clone()
    return state


def layer_counts(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(kept, total) weights of every prunable layer, by counting exact zeros."""
    return {name: (int((w != 0).sum()), w.numel()) for name, w in weights(model).items()}


def density_of(model: nn.Module) -> Fraction:
    """The kept fraction of all prunable weights, exactly."""
    counts = layer_counts(model).values()
    return Fraction(sum(kept for kept, _ in counts), sum(total for _, total in counts))
