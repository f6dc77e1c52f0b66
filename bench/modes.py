"""In which state a network stands while something is crafted, bounded or looked at, and what BatchNorm learns from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from verifiers.proof import UnsupportedNetworkError

Statistics = Mapping[nn.Module, tuple[Tensor, Tensor]]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """The model in eval mode: adversarial inputs are crafted with BatchNorm statistics and dropout at rest."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield model
    finally:
        for module, training in modes:
            module.training = training


def clean_pass(model: nn.Module, x: Tensor) -> tuple[Tensor, Statistics]:
    """The logits, and mean and variance of what every BatchNorm in training mode was given, both with their gradients.

    Raises UnsupportedNetworkError where a BatchNorm is used twice: its two inputs have different statistics.
    """
    found: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def record(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if layer in found:
            raise UnsupportedNetworkError("bounds cannot be trained through a BatchNorm that the network uses more than once")
        (value,) = inputs
        wide = value.to(torch.promote_types(value.dtype, torch.float32))
        variance, mean = torch.var_mean(wide, [dim for dim in range(value.dim()) if dim != 1], correction=0)
        found[layer] = mean, variance

    layers = _learning(model)
    if not layers:
        return model(x), found
    handles = [layer.register_forward_pre_hook(record) for layer in layers]
    try:
        return model.forward(x), found  # not model(x): where that is compiled, it does not see new hooks
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def not_learning(model: nn.Module) -> Iterator[nn.Module]:
    """The model as it stands, but that its BatchNorm layers keep their running statistics whatever they are given."""
    kept = [(layer, layer.track_running_stats) for layer in _learning(model)]
    try:
        for layer, _ in kept:
            layer.track_running_stats = False
        yield model
    finally:
        for layer, tracked in kept:
            layer.track_running_stats = tracked


def statistics_of(model: nn.Module, x: Tensor) -> Statistics:
    """Those of `clean_pass`, without a pass where nothing depends on the batch."""
    return clean_pass(model, x)[1] if _learning(model) else {}


def _learning(model: nn.Module) -> list[Any]:
    return [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d) and layer.training]


@contextmanager
def resting(model: nn.Module, statistics: Statistics) -> Iterator[nn.Module]:
    """The model in eval mode but for its BatchNorm layers, which normalise by `statistics`: what bounds are trained on."""
    kept = {layer: (layer.running_mean, layer.running_var) for layer in statistics}
    with evaluating(model):
        try:
            _place(statistics)
            yield model
        finally:
            _place(kept)


def _place(statistics: Mapping[nn.Module, tuple[Any, Any]]) -> None:
    for layer, (mean, variance) in statistics.items():
        layer.running_mean, layer.running_var = mean, variance
