"""Which kept weights can matter at all: reachability over the network's graph, pixel by pixel."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from verifiers import UnsupportedNetworkError
from verifiers.graph import walk
from verifiers.normalise import Normalize

from .sparsity import prunable

SLACK = 1e-5  # share of its terms by which a BatchNorm's constant must be below 0 to count as cut off by ReLU


@dataclass(frozen=True)
class Reached:
    """Per layer: the non-zero weights that can matter (bool, its weight's shape), and the output units with a way to a logit."""

    live: dict[str, Tensor]
    heard: dict[str, Tensor]


class _Signal(NamedTuple):
    """Per element of an activation: 0 where it is zero for every input, else 1; and an upper bound of it where one is known.

    The gradient of `present` is positive where a path of non-zero weights leads on to a logit.
    """

    present: Tensor
    high: Tensor


class _Presence(torch.autograd.Function):
    """Forward: what is known to be present. Backward: whether any path leads on, not how many."""

    @staticmethod
    def forward(ctx: Any, paths: Tensor, present: Tensor) -> Tensor:
        return present.to(paths.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        return (gradients[0] > 0).to(gradients[0].dtype), None


def _signal(paths: Tensor, present: Tensor, high: Tensor | None = None) -> _Signal:
    if high is None:
        high = torch.full_like(paths, math.inf, requires_grad=False)
    return _Signal(_Presence.apply(paths, present), torch.where(present, high, torch.zeros_like(high)).detach())


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

    def affine(layer: Any, x: _Signal) -> _Signal:
        name = names[id(layer)]
        out = _affine(layer, x, leaves[name])
        out.present.retain_grad()
        outputs[name].append(out.present)
        return out

    start = torch.ones(1, *shape, dtype=torch.float64, requires_grad=True)
    signal = _Signal(start, torch.full_like(start, math.inf, requires_grad=False))
    rules: Mapping[Any, Any] = {**RULES, nn.Linear: affine, nn.Conv2d: affine}
    with torch.enable_grad():
        walk(model, signal, rules).present.sum().backward()
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


# ---- rules -----------------------------------------------------------------------------------------------------------


def _affine(layer: Any, x: _Signal, weight: Tensor) -> _Signal:
    bias = torch.zeros(len(weight), dtype=torch.float64) if layer.bias is None else layer.bias.detach().cpu().double()
    if isinstance(layer, nn.Linear):
        paths = F.linear(x.present, weight)
    elif layer.padding_mode == "zeros":
        paths = F.conv2d(x.present, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)
        bias = bias[:, None, None]
    else:
        raise UnsupportedNetworkError(f"no rule for a convolution with padding_mode={layer.padding_mode!r}")
    fed = paths > 0
    return _signal(paths, fed | (bias != 0), torch.where(fed, math.inf, bias))


def _batchnorm(layer: nn.BatchNorm2d, x: _Signal) -> _Signal:
    if layer.training or layer.running_mean is None or layer.running_var is None:
        raise UnsupportedNetworkError("BatchNorm2d is followed in eval mode with running statistics only")
    mean, spread = layer.running_mean.cpu().double(), (layer.running_var.cpu().double() + layer.eps).sqrt()
    scale = torch.ones_like(mean) if layer.weight is None else layer.weight.detach().cpu().double()
    shift = torch.zeros_like(mean) if layer.bias is None else layer.bias.detach().cpu().double()
    offset = mean * scale / spread
    scale, constant, slack, nothing = (
        value[:, None, None]
        for value in (scale, shift - offset, SLACK * (shift.abs() + offset.abs()), (shift == 0) & ((mean == 0) | (scale == 0)))
    )
    paths = x.present * (scale != 0)
    fed = paths > 0
    return _signal(paths, fed | ~nothing, torch.where(fed, math.inf, constant + slack))


def _relu(x: _Signal, *_: Any, **__: Any) -> _Signal:
    return _signal(x.present, (x.present > 0) & ~(x.high <= 0), x.high)  # NaN is present


def _hardtanh(layer: nn.Hardtanh, x: _Signal) -> _Signal:
    if layer.min_val == 0 and layer.max_val > 0:
        return _relu(x)
    if layer.min_val < 0 < layer.max_val:
        return _keeps_zero(x)
    return _signal(x.present, torch.ones_like(x.high, dtype=torch.bool))


def _keeps_zero(x: _Signal, *_: Any, **__: Any) -> _Signal:
    return _signal(x.present, x.present > 0)


def _pooled(pool: Callable[..., Tensor], x: _Signal) -> _Signal:
    paths = pool(x.present)
    if bool((paths < 0).any()):
        raise UnsupportedNetworkError("no rule for average pooling with a negative divisor")
    return _signal(paths, paths > 0)


def _max_pool(
    x: _Signal, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False,
    return_indices: bool = False,
) -> _Signal:  # fmt: skip
    if dilation not in (1, (1, 1)) or return_indices:
        raise UnsupportedNetworkError(f"no rule for max pooling with dilation={dilation} or indices")
    return _pooled(lambda value: F.avg_pool2d(value, kernel_size, stride, padding, ceil_mode), x)


def _max_pool_layer(layer: nn.MaxPool2d, x: _Signal) -> _Signal:
    return _max_pool(
        x, layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.ceil_mode, layer.return_indices
    )  # fmt: skip


def _shaped(change: Callable[..., Tensor]) -> Callable[..., _Signal]:
    return lambda x, *args, **kwargs: _Signal(change(x.present, *args, **kwargs), change(x.high, *args, **kwargs))


def _add(a: Any, b: Any) -> _Signal:
    if not isinstance(a, _Signal) or not isinstance(b, _Signal):
        raise UnsupportedNetworkError("no rule for adding a constant inside the network's forward")
    paths = a.present + b.present
    both = (a.present > 0) & (b.present > 0)
    return _signal(paths, paths > 0, torch.where(both, math.inf, a.high + b.high))


def _cat(parts: Sequence[_Signal], dim: int = 0) -> _Signal:
    return _Signal(torch.cat([x.present for x in parts], dim), torch.cat([x.high for x in parts], dim))


def _function(call: Callable[..., Tensor]) -> Callable[..., _Signal]:
    return lambda x, *args, **kwargs: _pooled(lambda value: call(value, *args, **kwargs), x)


_FLATTEN = _shaped(torch.flatten)
RULES: Mapping[Any, Any] = {
    nn.BatchNorm2d: _batchnorm,
    Normalize: lambda _, x: _signal(x.present, torch.ones_like(x.high, dtype=torch.bool)),
    **dict.fromkeys((nn.Identity, nn.Dropout, nn.Dropout2d), lambda _, x: x),
    nn.Flatten: lambda layer, x: _FLATTEN(x, layer.start_dim, layer.end_dim),
    **dict.fromkeys((nn.ReLU, nn.ReLU6), lambda _, x: _relu(x)),
    nn.Hardtanh: _hardtanh,
    **dict.fromkeys((nn.Tanh, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU), lambda _, x: _keeps_zero(x)),
    nn.Sigmoid: lambda _, x: _signal(x.present, torch.ones_like(x.high, dtype=torch.bool)),
    nn.MaxPool2d: _max_pool_layer,
    **dict.fromkeys((nn.AvgPool2d, nn.AdaptiveAvgPool2d), _pooled),
    **dict.fromkeys((operator.add, operator.iadd, torch.add), _add),
    torch.cat: _cat,
    **dict.fromkeys((torch.flatten, "flatten"), _FLATTEN),
    **dict.fromkeys((F.relu, torch.relu, "relu"), _relu),
    F.max_pool2d: _max_pool,
    **{call: _function(call) for call in (F.avg_pool2d, F.adaptive_avg_pool2d)},
}
