"""Which values of a network depend on the image, what the others are, and which of them can reach a logit, pixel by pixel."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .normalise import Normalize
from .proof import UnsupportedNetworkError

SLACK = 1e-5  # share of its terms by which a constant must be below 0 to count as cut off by ReLU


class Signal(NamedTuple):
    """Per element of an activation, [1, ...]: `present` is 0 where it is zero for every input, else 1; `fed` says whether it
    may depend on the image; where it does not, `value` is what it always is and `bulk` bounds the absolute sum behind it.

    The gradient of `present` is positive where a path of non-zero weights leads on to a logit.
    """

    present: Tensor
    fed: Tensor
    value: Tensor
    bulk: Tensor


class _Presence(torch.autograd.Function):
    """Forward: what is known to be present. Backward: whether any path leads on, not how many."""

    @staticmethod
    def forward(ctx: Any, paths: Tensor, present: Tensor) -> Tensor:
        return present.to(paths.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        return (gradients[0] > 0).to(gradients[0].dtype), None


def pixels(shape: tuple[int, ...]) -> Signal:
    """The signal of one image of `shape`, which anything may follow."""
    start = torch.ones(1, *shape, dtype=torch.float64)
    nothing = torch.zeros_like(start)
    return Signal(start.clone().requires_grad_(), start.bool(), nothing, nothing)


def _signal(paths: Tensor, fed: Tensor, value: Tensor, bulk: Tensor) -> Signal:
    value, bulk = torch.where(fed, 0.0, value), torch.where(fed, 0.0, bulk)
    return Signal(_Presence.apply(paths, fed | ~(bulk == 0)), fed, value, bulk)  # NaN is present


# ---- rules -----------------------------------------------------------------------------------------------------------


def affine(layer: Any, x: Signal, flags: Tensor | None = None) -> Signal:
    """A convolution or linear layer; `flags` are 1 where its weights are not zero, and may collect gradients."""
    weight = layer.weight.detach().cpu().double()
    flags = (weight != 0).double() if flags is None else flags
    bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach().cpu().double()
    if isinstance(layer, nn.Conv2d):
        if layer.padding_mode != "zeros":
            raise UnsupportedNetworkError(f"no rule for a convolution with padding_mode={layer.padding_mode!r}")
        bias = bias[:, None, None]

    def through(value: Tensor, by: Tensor) -> Tensor:
        if isinstance(layer, nn.Linear):
            return F.linear(value, by)
        return F.conv2d(value, by, None, layer.stride, layer.padding, layer.dilation, layer.groups)

    paths = through(x.present, flags)
    fed = through(x.fed.double(), flags.detach()) > 0
    return _signal(paths, fed, through(x.value, weight) + bias, through(x.bulk, weight.abs()) + bias.abs())


def _batchnorm(layer: nn.BatchNorm2d, x: Signal) -> Signal:
    if layer.training or layer.running_mean is None or layer.running_var is None:
        raise UnsupportedNetworkError("BatchNorm2d is followed in eval mode with running statistics only")
    mean, spread = layer.running_mean.cpu().double(), (layer.running_var.cpu().double() + layer.eps).sqrt()
    gamma = torch.ones_like(mean) if layer.weight is None else layer.weight.detach().cpu().double()
    beta = torch.zeros_like(mean) if layer.bias is None else layer.bias.detach().cpu().double()
    scale, shift, offset = (value[:, None, None] for value in (gamma / spread, beta, mean * gamma / spread))
    bulk = x.bulk * scale.abs() + shift.abs() + offset.abs()
    return _signal(x.present * (scale != 0), x.fed & (scale != 0), x.value * scale + shift - offset, bulk)


def _normalise(layer: Normalize, x: Signal) -> Signal:
    mean, std = layer.mean.cpu().double(), layer.std.cpu().double()
    return _signal(x.present, x.fed, (x.value - mean) / std, (x.bulk + mean.abs()) / std)


def _elementwise(function: Callable[[Tensor], Tensor], x: Signal) -> Signal:
    """A constant becomes zero where it does so however it was rounded."""
    slack = SLACK * x.bulk
    value, ends = function(x.value.clone()), (function(x.value - slack), function(x.value + slack))
    zero = (ends[0] == 0) & (ends[1] == 0)
    return _signal(x.present, x.fed, torch.where(zero, 0.0, value), torch.where(zero, 0.0, x.bulk + value.abs()))


def _averaged(pool: Callable[[Tensor], Tensor], x: Signal) -> Signal:
    paths = pool(x.present)
    if bool((paths < 0).any()):
        raise UnsupportedNetworkError("no rule for average pooling with a negative divisor")
    return _signal(paths, pool(x.fed.double()) > 0, pool(x.value), pool(x.bulk))


def _max_pool(
    x: Signal, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False,
    return_indices: bool = False,
) -> Signal:  # fmt: skip
    if dilation not in (1, (1, 1)) or return_indices:
        raise UnsupportedNetworkError(f"no rule for max pooling with dilation={dilation} or indices")

    def largest(value: Tensor) -> Tensor:
        return F.max_pool2d(value, kernel_size, stride, padding, 1, ceil_mode)

    paths = F.avg_pool2d(x.present, kernel_size, stride, padding, ceil_mode)
    return _signal(paths, largest(x.fed.double()) > 0, largest(x.value), largest(x.bulk))


def _max_pool_layer(layer: nn.MaxPool2d, x: Signal) -> Signal:
    return _max_pool(
        x, layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.ceil_mode, layer.return_indices
    )  # fmt: skip


def _shaped(change: Callable[..., Tensor]) -> Callable[..., Signal]:
    return lambda x, *args, **kwargs: Signal(*(change(part, *args, **kwargs) for part in x))


def _add(a: Any, b: Any, alpha: float = 1) -> Signal:
    if not isinstance(a, Signal) or not isinstance(b, Signal) or alpha != 1:
        raise UnsupportedNetworkError("no rule for adding a constant, or with a factor, inside the network's forward")
    return _signal(a.present + b.present, a.fed | b.fed, a.value + b.value, a.bulk + b.bulk)


def _cat(parts: Sequence[Signal], dim: int = 0) -> Signal:
    return Signal(*(torch.cat(same, dim) for same in zip(*parts, strict=True)))


def _average_call(call: Callable[..., Tensor]) -> Callable[..., Signal]:
    return lambda x, *args, **kwargs: _averaged(lambda value: call(value, *args, **kwargs), x)


POINTWISE = (nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Tanh, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Sigmoid)
_FLATTEN = _shaped(torch.flatten)
RULES: Mapping[Any, Any] = {
    **dict.fromkeys((nn.Linear, nn.Conv2d), affine),
    nn.BatchNorm2d: _batchnorm,
    Normalize: _normalise,
    **dict.fromkeys((nn.Identity, nn.Dropout, nn.Dropout2d), lambda _, x: x),
    nn.Flatten: lambda layer, x: _FLATTEN(x, layer.start_dim, layer.end_dim),
    **dict.fromkeys(POINTWISE, _elementwise),
    nn.MaxPool2d: _max_pool_layer,
    **dict.fromkeys((nn.AvgPool2d, nn.AdaptiveAvgPool2d), _averaged),
    **dict.fromkeys((operator.add, operator.iadd, torch.add), _add),
    torch.cat: _cat,
    **dict.fromkeys((torch.flatten, "flatten"), _FLATTEN),
    **dict.fromkeys((F.relu, torch.relu, "relu"), lambda x, *_, **__: _elementwise(torch.relu, x)),
    F.max_pool2d: _max_pool,
    **{call: _average_call(call) for call in (F.avg_pool2d, F.adaptive_avg_pool2d)},
}
