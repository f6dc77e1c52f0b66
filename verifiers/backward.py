"""CROWN-IBP for training: interval bounds on the way up, one backward linear relaxation from the margins, differentiable.

Zhang et al. 2020, "Towards stable and efficient training of verifiably robust neural networks" (arXiv 1906.06316). Certificates
come from verifiers/lirpa.py; tests hold the two against each other.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ball import Interval
from .bounds import INTERVAL_RULES, batchnorm_scale, conv, difference_rows, ibp_margins
from .graph import walk
from .normalise import Normalize
from .pooling import ARGUMENTS, pair
from .proof import UnsupportedNetworkError

Pulled = tuple[Sequence[Tensor], Tensor | float]
Pull = Callable[[Tensor], Pulled]


class Value(NamedTuple):
    """A value's interval, what it was made from, and how linear lower bounds in it become bounds in those.

    pull(rows [N, S, *shape]) returns rows for every source and what is added, [N, S]. No source has the same or a larger depth.
    """

    bounds: Interval
    sources: tuple[Value, ...] = ()
    pull: Pull | None = None
    depth: int = 0
    linear: bool = False


def _made(bounds: Interval, sources: Sequence[Value], pull: Pull, linear: bool = False) -> Value:
    return Value(bounds, tuple(sources), pull, 1 + max(source.depth for source in sources), linear)


def _sum(rows: Tensor) -> Tensor:
    """Over everything but images and specifications."""
    return rows.flatten(2).sum(2)


def _per_row(x: Tensor) -> Tensor:
    return x.unsqueeze(1)


# ---- affine operations ---------------------------------------------------------------------------------------------------


def _linear(layer: nn.Linear, x: Value) -> Value:
    def pull(rows: Tensor) -> Pulled:
        return [rows @ layer.weight], 0.0 if layer.bias is None else rows @ layer.bias

    return _made(INTERVAL_RULES[nn.Linear](layer, x.bounds), [x], pull, linear=True)


def _conv(layer: nn.Conv2d, x: Value) -> Value:
    bounds = INTERVAL_RULES[nn.Conv2d](layer, x.bounds)
    size = x.bounds.lower.shape[1:]

    def pull(rows: Tensor) -> Pulled:
        if isinstance(layer.padding, str):
            back = _transposed(lambda v: conv(layer, v, layer.weight), size, rows)
        else:
            extra = [
                (size[1 + k] + 2 * layer.padding[k] - layer.dilation[k] * (layer.kernel_size[k] - 1) - 1) % layer.stride[k]
                for k in (0, 1)
            ]
            flat = F.conv_transpose2d(
                rows.flatten(0, 1), layer.weight, None, layer.stride, layer.padding, extra, layer.groups, layer.dilation
            )
            back = flat.unflatten(0, rows.shape[:2])
        return [back], 0.0 if layer.bias is None else rows.sum((3, 4)) @ layer.bias

    return _made(bounds, [x], pull)


def _transposed(op: Callable[[Tensor], Tensor], size: torch.Size, rows: Tensor) -> Tensor:
    """The transpose of an operation that is linear and treats every sample alike, at rows [N, S, ...]."""
    flat = rows.flatten(0, 1)
    with torch.enable_grad():
        point = flat.new_zeros(len(flat), *size).requires_grad_()
        (back,) = torch.autograd.grad(op(point), point, flat, create_graph=True)
    return back.unflatten(0, rows.shape[:2])


def _batchnorm(layer: nn.BatchNorm1d | nn.BatchNorm2d, x: Value) -> Value:
    scale, shift = batchnorm_scale(layer, x.bounds.lower.dim())
    return _scaled(x, INTERVAL_RULES[nn.BatchNorm2d](layer, x.bounds), scale, shift)


def _normalise(layer: Normalize, x: Value) -> Value:
    return _scaled(x, INTERVAL_RULES[Normalize](layer, x.bounds), 1 / layer.std, -layer.mean / layer.std)


def _scaled(x: Value, bounds: Interval, scale: Tensor | float, shift: Tensor | float) -> Value:
    return _made(bounds, [x], lambda rows: ([rows * scale], _sum(rows * shift)))


Bounding = Callable[[Interval], Interval]


def _on_one(kind: Any, pulling: Callable[[Bounding, torch.Size], Pull]) -> Callable[..., Value]:
    """The interval rule of an operation on one value, and pulling(that rule, the shape of a sample before it)."""

    def rule(*args: Any, **kwargs: Any) -> Value:
        layer, x, rest = (args[:1], args[1], args[2:]) if isinstance(kind, type) else ((), args[0], args[1:])

        def bounding(bounds: Interval) -> Interval:
            after: Interval = INTERVAL_RULES[kind](*layer, bounds, *rest, **kwargs)
            return after

        return _made(bounding(x.bounds), [x], pulling(bounding, x.bounds.lower.shape[1:]))

    return rule


def _averaged(bounding: Bounding, size: torch.Size) -> Pull:
    """Averages of any kind, whose transpose torch takes."""
    return lambda rows: ([_transposed(lambda v: bounding(Interval(v, v)).lower, size, rows)], 0.0)


def _reshaped(_: Bounding, size: torch.Size) -> Pull:
    """The same numbers in another shape, or in the same."""
    return lambda rows: ([rows.reshape(*rows.shape[:2], *size)], 0.0)


def _add(a: Any, b: Any, alpha: float = 1) -> Value:
    if not isinstance(a, Value) or not isinstance(b, Value) or alpha != 1 or a.bounds.lower.shape != b.bounds.lower.shape:
        raise UnsupportedNetworkError("no relaxation for sums other than of two values of one shape")
    return _made(INTERVAL_RULES[torch.add](a.bounds, b.bounds), [a, b], lambda rows: ([rows, rows], 0.0))


def _cat(parts: Sequence[Value], dim: int = 0) -> Value:
    bounds = INTERVAL_RULES[torch.cat]([part.bounds for part in parts], dim)
    along = dim % bounds.lower.dim()
    if along == 0:
        raise UnsupportedNetworkError("no relaxation for torch.cat along the images of a batch")
    sizes = [part.bounds.lower.shape[along] for part in parts]
    return _made(bounds, parts, lambda rows: (rows.split(sizes, along + 1), 0.0))


# ---- ReLUs and maxima ----------------------------------------------------------------------------------------------------


def _relu(x: Value) -> Value:
    """u / (u - l) (z - l) from above, z or 0 from below (z where u > -l), if l < 0 < u."""
    lower, upper = x.bounds
    unstable = (lower < 0) & (upper > 0)
    active = (lower >= 0).to(lower.dtype)
    slope = torch.where(unstable, upper / torch.where(unstable, upper - lower, 1.0), active)
    height = torch.where(unstable, -slope * lower, 0.0)
    below = torch.where(unstable, (upper > -lower).to(lower.dtype), active)

    def pull(rows: Tensor) -> Pulled:
        falling = rows.clamp(max=0)
        return [rows.clamp(min=0) * _per_row(below) + falling * _per_row(slope)], _sum(falling * _per_row(height))

    return _made(Interval(lower.relu(), upper.relu()), [x], pull)


def _clip(x: Value, low: float, high: float) -> Value:
    """min(max(z, a), b) = b - relu((b - a) - relu(z - a))."""

    def shifted(value: Value, sign: float, by: float) -> Value:
        ends = [sign * end + by for end in (value.bounds if sign > 0 else reversed(value.bounds))]
        return _scaled(value, Interval(*ends), sign, by)

    return shifted(_relu(shifted(_relu(shifted(x, 1.0, -low)), -1.0, high - low)), -1.0, high)


def _max_pool(layer: nn.MaxPool2d, x: Value) -> Value:
    """From below the entry of the largest lower bound; from above it too where no other can exceed it, else a number."""
    if layer.ceil_mode or layer.return_indices:
        raise UnsupportedNetworkError("no relaxation for MaxPool2d with ceil_mode or return_indices")
    lower, upper = x.bounds
    bounds = Interval(*(layer(end) for end in x.bounds))
    best, at = F.max_pool2d(
        lower, layer.kernel_size, layer.stride, layer.padding, layer.dilation, return_indices=True
    )
    decided = _undisputed(layer, upper, best, at)

    def pull(rows: Tensor) -> Pulled:
        falling = rows.clamp(max=0)
        chosen = rows.clamp(min=0) + falling * _per_row(decided)
        back = rows.new_zeros(*rows.shape[:3], lower[0, 0].numel())
        back = back.scatter_add(3, _per_row(at).flatten(3).expand(*rows.shape[:3], -1), chosen.flatten(3))
        return [back.view(*rows.shape[:3], *lower.shape[2:])], _sum(falling * _per_row(torch.where(decided, 0.0, bounds.upper)))

    return _made(bounds, [x], pull)


@torch.no_grad()
def _undisputed(layer: nn.MaxPool2d, upper: Tensor, best: Tensor, at: Tensor) -> Tensor:
    """Whether no entry of a window but the one `at` can exceed `best`, the window's largest lower bound: [N, C, H', W']."""
    rows, columns = pair(layer.padding)
    padded = F.pad(upper, (columns, columns, rows, rows), value=-torch.inf)
    windows = F.unfold(padded, layer.kernel_size, layer.dilation, 0, layer.stride).unflatten(1, (upper.shape[1], -1))
    largest, own = best.flatten(2), upper.flatten(2).gather(2, at.flatten(2))
    rivals = (windows > largest.unsqueeze(2)).sum(2) - (own > largest).to(torch.int64)
    return (rivals == 0).view_as(best)


def _max_pool_call(x: Value, *args: Any, **kwargs: Any) -> Value:
    make, names = ARGUMENTS[F.max_pool2d]
    return _max_pool(make(**dict(zip(names, args)), **kwargs), x)


def _shape(kind: Any) -> Callable[..., Any]:
    return lambda x, *args: INTERVAL_RULES[kind](x.bounds if isinstance(x, Value) else x, *args)


BACKWARD_RULES: Mapping[Any, Callable[..., Any]] = {
    nn.Linear: _linear,
    nn.Conv2d: _conv,
    nn.BatchNorm1d: _batchnorm,
    nn.BatchNorm2d: _batchnorm,
    Normalize: _normalise,
    nn.ReLU: lambda _, x: _relu(x),
    F.relu: lambda x, inplace=False: _relu(x),
    **dict.fromkeys((torch.relu, "relu"), _relu),
    **dict.fromkeys((nn.ReLU6, nn.Hardtanh), lambda layer, x: _clip(x, layer.min_val, layer.max_val)),
    F.relu6: lambda x, inplace=False: _clip(x, 0.0, 6.0),
    nn.MaxPool2d: _max_pool,
    F.max_pool2d: _max_pool_call,
    **{
        kind: _on_one(kind, _averaged)
        for kind in (nn.AvgPool2d, nn.AdaptiveAvgPool2d, F.avg_pool2d, F.adaptive_avg_pool2d, "mean", torch.mean)
    },
    **{
        kind: _on_one(kind, _reshaped)
        for kind in (
            nn.Flatten, torch.flatten, "flatten", "view", "reshape", nn.Identity, nn.Dropout, nn.Dropout2d, F.dropout, F.dropout2d
        )
    },
    **{kind: _shape(kind) for kind in ("size", getattr, operator.getitem)},
    operator.add: _add,
    torch.add: _add,
    torch.cat: _cat,
}


def bounded(model: nn.Module, box: Interval) -> Value:
    """The logits' interval over the box, and the way back to the pixels.

    Raises UnsupportedNetworkError, naming the operation, for layers without a rule.
    """
    value: Value = walk(model, Value(box), BACKWARD_RULES)
    return value


def _least(rows: Tensor, box: Interval) -> Tensor:
    """The smallest rows @ z over the box, [N, S]."""
    return _sum(rows * _per_row(box.centre)) - _sum(rows.abs() * _per_row(box.radius))


def interval_rows(logits: Value, rows: Tensor) -> Tensor:
    """Lower bounds [N, S] of rows [N, S, C] @ logits by intervals, the last linear layer merged with the rows."""
    if not logits.linear:
        return _least(rows, logits.bounds)
    assert logits.pull is not None
    (merged,), more = logits.pull(rows)
    return _least(merged, logits.sources[0].bounds) + more


def relaxed_rows(logits: Value, rows: Tensor) -> Tensor:
    """Lower bounds [N, S] of rows [N, S, C] @ logits by one backward linear relaxation, S passes wide; up to rounding.

    Differentiable: nothing is constant but which lower slope (0 or 1) an unstable ReLU has and which entry a maximum.
    """
    total = torch.zeros_like(rows[..., 0])
    pending: dict[int, tuple[Value, Tensor]] = {id(logits): (logits, rows)}
    while pending:
        value, rows = pending.pop(max(pending, key=lambda one: pending[one][0].depth))
        if value.pull is None:
            total = total + _least(rows, value.bounds)
            continue
        parts, more = value.pull(rows)
        total = total + more
        for source, part in zip(value.sources, parts, strict=True):
            known = pending.get(id(source))
            pending[id(source)] = source, part if known is None else known[1] + part
    return total


def crown_ibp_margins(model: nn.Module, box: Interval, y: Tensor, beta: float = 1.0, fused: bool = False) -> Tensor:
    """Lower bounds [N, C] of f_y - f_j over the box, 0 in column y: beta * CROWN-IBP + (1 - beta) * IBP, up to rounding.

    Differentiable and right on parametrized layers. With `fused`, only each sample's worst class by intervals is relaxed, at one
    backward pass instead of C - 1, and the others keep their intervals. Raises UnsupportedNetworkError, naming the operation,
    for layers without a rule.
    """
    if beta == 0:
        return ibp_margins(model, box, y)
    logits = bounded(model, box)
    classes = logits.bounds.lower.shape[1]
    rows = difference_rows(y, classes, box.lower.dtype)
    intervals = interval_rows(logits, rows)
    if fused:
        worst = intervals.argmin(1, keepdim=True)
        row = rows.gather(1, worst.unsqueeze(2).expand(-1, -1, classes))
        margins = intervals.scatter(1, worst, relaxed_rows(logits, row).to(intervals.dtype))
    else:
        margins = relaxed_rows(logits, rows)
    mixed = beta * margins + (1 - beta) * intervals
    return mixed.new_zeros(len(y), classes).masked_scatter(F.one_hot(y, classes) == 0, mixed)
