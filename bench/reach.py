"""Which kept weights can matter at all: reachability over the network's graph, pixel by pixel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from verifiers.graph import walk
from verifiers.liveness import RULES, Signal, affine, pixels

from .sparsity import prunable


@dataclass(frozen=True)
class Reached:
    """Per layer: the non-zero weights that can matter (bool, its weight's shape), and the output units with a way to a logit."""

    live: dict[str, Tensor]
    heard: dict[str, Tensor]


def reach(model: nn.Module, shape: tuple[int, int, int]) -> Reached:
    """The weights of a plain network in eval mode that can change a logit for some image of `shape`.

    A non-zero weight is left out if what it multiplies is 0 for every input, at every position, or if no path of non-zero
    weights leads from there to a logit. All left-out weights may be changed at once, to any values: no logit moves.
    (The converse is not claimed: paths may cancel.) Raises UnsupportedNetworkError for operations without a rule here.
    """
    layers = prunable(model)
    leaves = {name: (layer.weight.detach().cpu() != 0).double().requires_grad_() for name, layer in layers.items()}
    names = {id(layer): name for name, layer in layers.items()}
    outputs: dict[str, list[Tensor]] = {name: [] for name in layers}

    def traced(layer: Any, x: Signal) -> Signal:
        name = names[id(layer)]
        out = affine(layer, x, leaves[name])
        out.present.retain_grad()
        outputs[name].append(out.present)
        return out

    rules: Mapping[Any, Any] = {**RULES, nn.Linear: traced, nn.Conv2d: traced}
    with torch.enable_grad():
        walk(model, pixels(shape), rules).present.sum().backward()
    live = {name: _positive(leaf) & (leaf.detach() > 0) for name, leaf in leaves.items()}
    return Reached(live, {name: _heard(layers[name], parts) for name, parts in outputs.items()})


def _positive(value: Tensor) -> Tensor:
    return torch.zeros(value.shape, dtype=torch.bool) if value.grad is None else value.grad > 0


def _heard(layer: Any, outputs: Sequence[Tensor]) -> Tensor:
    """Which output units of a layer have a way to a logit from any position, in any of its uses."""
    found = torch.zeros(layer.weight.shape[0], dtype=torch.bool)
    for value in outputs:
        units = _positive(value).movedim(1 if isinstance(layer, nn.Conv2d) else -1, 0)
        found |= units.flatten(1).any(1)
    return found
