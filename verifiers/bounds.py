"""Interval bound propagation: sound for every network it accepts, differentiable, and right on parametrized layers.

Gowal et al. 2018, "On the effectiveness of interval bound propagation" (arXiv 1810.12715). Training and certification share
this code; tests hold it against auto-LiRPA, brute force and samples.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ball import Ellipsoid, Interval, Region
from .graph import layer_type, output_of, trace, walk
from .normalise import Normalize
from .proof import UnsupportedNetworkError

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def conv(layer: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The layer's convolution with another weight and bias."""
    if layer.padding_mode != "zeros":
        raise UnsupportedNetworkError(f"no bound rule for a convolution with padding_mode={layer.padding_mode!r}")
    return F.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)


BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d


def batchnorm_scale(layer: BatchNorm, dims: int = 4) -> tuple[Tensor, Tensor]:
    """The layer as x * scale + shift in eval mode, shaped for values of so many dimensions, [N, C, ...]."""
    if layer.training or layer.running_mean is None or layer.running_var is None:
        raise UnsupportedNetworkError(f"interval bounds of {layer_type(layer).__name__} need eval mode and running statistics")
    scale = 1 / (layer.running_var + layer.eps).sqrt()
    shift = -layer.running_mean * scale
    if layer.affine:
        scale, shift = scale * layer.weight, shift * layer.weight + layer.bias
    channels = (1, -1, *[1] * (dims - 2))
    return scale.view(channels), shift.view(channels)


def _affine(x: Region, op: Linear, weight: Tensor, bias: Tensor | None) -> Interval:
    """Exact bounds of op(x, weight, bias), linear in x, over the region."""
    half = weight / 2  # exact, and cheaper than halving activations
    middle, spread = op(x.lower + x.upper, half, bias), op(x.upper - x.lower, half.abs(), None)
    box = Interval(middle - spread, middle + spread)
    if isinstance(x, Interval):
        return box
    middle, spread = op(x.middle, weight, bias), _dual_norm(x.spread, op, weight)
    return Interval(torch.maximum(box.lower, middle - spread), torch.minimum(box.upper, middle + spread))


def _dual_norm(spread: Tensor, op: Linear, weight: Tensor) -> Tensor:
    """sqrt(sum (w * spread)^2) per output, rounded up; in float64, where squares of float32 numbers do not underflow.

    The floor keeps the gradient of an output without weights finite.
    """
    squares = op(spread.double().square(), weight.double().square(), None)
    norm = squares.clamp_min(1e-300).sqrt()
    return norm.to(spread.dtype) * (1 + 2 * torch.finfo(spread.dtype).eps)


def _linear(layer: nn.Linear, x: Region) -> Interval:
    return _affine(x, F.linear, layer.weight, layer.bias)


def _conv(layer: nn.Conv2d, x: Region) -> Interval:
    return _affine(x, lambda value, weight, bias: conv(layer, value, weight, bias), layer.weight, layer.bias)


def _batchnorm(layer: BatchNorm, x: Region) -> Interval:
    scale, shift = batchnorm_scale(layer, x.lower.dim())
    return _affine(x, lambda value, by, plus: value * by if plus is None else value * by + plus, scale, shift)


def _normalise(layer: Normalize, x: Region) -> Region:
    box = layer(x.lower), layer(x.upper)
    return Interval(*box) if isinstance(x, Interval) else Ellipsoid(*box, layer(x.middle), x.spread / layer.std)


def _flatten(layer: nn.Flatten, x: Region) -> Region:
    return type(x)(*(layer(part) for part in x))


def _flatten_call(x: Region, start_dim: int = 0, end_dim: int = -1) -> Region:
    return type(x)(*(torch.flatten(part, start_dim, end_dim) for part in x))


def row_shape(x: Tensor, sizes: Sequence[Any]) -> torch.Size:
    """The shape of one sample after x.reshape(*sizes), which must keep the samples apart."""
    after = x.reshape(sizes[0] if len(sizes) == 1 and isinstance(sizes[0], tuple | list) else sizes).shape
    if after[:1] != x.shape[:1]:
        raise UnsupportedNetworkError(f"no bound rule for a view of {tuple(x.shape)} as {tuple(after)}, which mixes the images")
    return after[1:]


def _reshape(x: Region, *sizes: Any) -> Region:
    rest = row_shape(x.lower, sizes)
    return type(x)(*(part.reshape(len(part), *rest) for part in x))


def _mean(x: Region, dim: int | Sequence[int] | None = None, keepdim: bool = False) -> Interval:
    dims = [dim] if isinstance(dim, int) else list(dim or [0])
    if any(one % x.lower.dim() == 0 for one in dims):
        raise UnsupportedNetworkError("no bound rule for a mean over the images of a batch")
    return _monotone(torch.mean, x, dims, keepdim)


def _attribute(x: Region, name: str) -> torch.Size:
    if name != "shape":
        raise UnsupportedNetworkError(f"no bound rule for the attribute {name!r} of a value inside the network's forward")
    return x.lower.shape


def item(sizes: Any, at: Any) -> Any:
    """An entry of a shape; values themselves may not be cut up."""
    if not isinstance(sizes, torch.Size):
        raise UnsupportedNetworkError("no bound rule for getitem of a value inside the network's forward")
    return sizes[at]


def _monotone(layer: Callable[..., Tensor], x: Region, *args: Any, **kwargs: Any) -> Interval:
    return Interval(layer(x.lower, *args, **kwargs), layer(x.upper, *args, **kwargs))


def _monotone_call(function: Callable[..., Tensor]) -> Callable[..., Interval]:
    return lambda x, *args, **kwargs: _monotone(function, x, *args, **kwargs)


def _averaged(layer: Callable[..., Tensor], x: Region, *args: Any, **kwargs: Any) -> Interval:
    divisor = kwargs.get("divisor_override", getattr(layer, "divisor_override", args[5] if len(args) > 5 else None))
    if divisor is not None and divisor <= 0:
        raise UnsupportedNetworkError(f"no bound rule for average pooling with divisor_override={divisor}")
    return _monotone(layer, x, *args, **kwargs)


def _add(a: Any, b: Any, alpha: float = 1) -> Interval:
    if alpha != 1:
        raise UnsupportedNetworkError(f"no bound rule for torch.add with alpha={alpha}")
    if not isinstance(a, Interval | Ellipsoid) or not isinstance(b, Interval | Ellipsoid):
        raise UnsupportedNetworkError("no bound rule for adding a constant inside the network's forward")
    return Interval(a.lower + b.lower, a.upper + b.upper)


def _cat(parts: Sequence[Region], dim: int = 0) -> Interval:
    return Interval(torch.cat([x.lower for x in parts], dim), torch.cat([x.upper for x in parts], dim))


def _dropout(layer: nn.Dropout | nn.Dropout2d, x: Region) -> Region:
    if layer.training and layer.p > 0:
        raise UnsupportedNetworkError(f"interval bounds of {layer_type(layer).__name__} need eval mode")
    return x


def _dropout_call(x: Region, p: float = 0.5, training: bool = True, inplace: bool = False) -> Region:
    if training and p > 0:
        raise UnsupportedNetworkError("no bound rule for a dropout that drops in eval mode too; give it training=self.training")
    return x


MONOTONE_LAYERS = (nn.ReLU, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.ReLU6, nn.Hardtanh, nn.Tanh, nn.Sigmoid)

INTERVAL_RULES: dict[Any, Callable[..., Any]] = {
    nn.Linear: _linear,
    nn.Conv2d: _conv,
    nn.BatchNorm1d: _batchnorm,
    nn.BatchNorm2d: _batchnorm,
    Normalize: _normalise,
    nn.Flatten: _flatten,
    nn.Identity: lambda _, x: x,
    nn.Dropout: _dropout,
    nn.Dropout2d: _dropout,
    F.dropout: _dropout_call,
    F.dropout2d: _dropout_call,
    **dict.fromkeys(MONOTONE_LAYERS, _monotone),
    nn.AvgPool2d: _averaged,
    operator.add: _add,
    torch.add: _add,
    torch.cat: _cat,
    torch.flatten: _flatten_call,
    "flatten": _flatten_call,
    "view": _reshape,
    "reshape": _reshape,
    "size": lambda x, *dim: x.lower.size(*dim),
    getattr: _attribute,
    operator.getitem: item,
    "mean": _mean,
    torch.mean: _mean,
    F.relu: _monotone_call(F.relu),
    torch.relu: _monotone_call(torch.relu),
    "relu": _monotone_call(torch.relu),
    F.relu6: _monotone_call(F.relu6),
    F.max_pool2d: _monotone_call(F.max_pool2d),
    F.avg_pool2d: lambda x, *args, **kwargs: _averaged(F.avg_pool2d, x, *args, **kwargs),
    F.adaptive_avg_pool2d: _monotone_call(F.adaptive_avg_pool2d),
}


def ibp_logits(model: nn.Module, x: Region) -> Interval:
    """Interval that contains the logits [N, C] of every point of the region."""
    return walk(model, x, INTERVAL_RULES)


def ibp_margins(model: nn.Module, x: Region, y: Tensor) -> Tensor:
    """Lower bounds [N, C] of f_y - f_j over the region, 0 in column y; the last linear layer is merged with the margins."""
    graph = trace(model)
    head = output_of(graph)
    layer = dict(model.named_modules()).get(str(head.target)) if head.op == "call_module" else None
    if layer is None or layer_type(layer) is not nn.Linear:
        return _subtract(ibp_logits(model, x), y)
    (source,) = head.all_input_nodes
    return _merged_margins(layer, walk(model, x, INTERVAL_RULES, wanted=source), y)


def _subtract(logits: Interval, y: Tensor) -> Tensor:
    margins = logits.lower.gather(1, y[:, None]) - logits.upper
    return margins.scatter(1, y[:, None], 0.0)


def _merged_margins(layer: Any, x: Region, y: Tensor) -> Tensor:
    weight, bias = layer.weight, layer.bias
    rows = weight.unsqueeze(1) - weight.unsqueeze(0)  # [C, C, d]: row (i, j) is w_i - w_j

    def op(value: Tensor, matrix: Tensor, plus: Tensor | None) -> Tensor:
        out = torch.einsum("ncd,nd->nc", matrix[y], value.expand(len(y), -1))
        return out if plus is None else out + plus

    shift = None if bias is None else bias[y].unsqueeze(1) - bias
    return _affine(x, op, rows, shift).lower


def smallest_margin(margins: Tensor, y: Tensor) -> Tensor:
    """min over j != y of margins [N, C]: [N]."""
    return margins.scatter(1, y[:, None], torch.inf).amin(1)


def difference_rows(y: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """Rows f_y - f_j for every j != y: [N, C - 1, C]."""
    eye = torch.eye(classes, device=y.device, dtype=dtype)
    rows = eye[y].unsqueeze(1) - eye.unsqueeze(0)
    keep = torch.arange(classes, device=y.device) != y.unsqueeze(1)
    return rows[keep].view(len(y), classes - 1, classes)
