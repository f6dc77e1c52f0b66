"""When a margin computed in floating point may be believed (docs/decisions/0002-rounding.md)."""

from __future__ import annotations

import contextlib
import copy
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ball import Interval, Region
from .bounds import INTERVAL_RULES, BatchNorm, batchnorm_scale, conv
from .graph import layer_type, share_trace, walk
from .normalise import Normalize
from .proof import UnsupportedNetworkError

SHARE = {torch.float32: 1e-4, torch.float64: 1e-9}
UNIT = {dtype: torch.finfo(dtype).eps for dtype in SHARE}
SAFETY = 4.0
AVERAGES = (nn.AvgPool2d, nn.AdaptiveAvgPool2d, F.avg_pool2d, F.adaptive_avg_pool2d)
MEANS = ("mean", torch.mean)
ELEMENTWISE = (  # no two values move apart: the error stays what it was
    nn.Tanh, nn.Sigmoid, nn.ReLU6, nn.Hardtanh, nn.ReLU, F.relu6,
)
SHAPES = ("size", getattr, operator.getitem)


class Tracked(NamedTuple):
    """Bounds of a value, a bound of its accumulated rounding error in units of the machine's precision, and per sample
    the largest sum |w||x| + |b| met so far."""

    bounds: Region
    error: Tensor
    largest: Tensor

    @property
    def size(self) -> Tensor:
        return torch.maximum(self.bounds.lower.abs(), self.bounds.upper.abs())


def _per_sample(x: Tensor) -> Tensor:
    return x.flatten(1).amax(1)


def _affine(layer: nn.Module, x: Tracked, op: Callable[[Tensor], Tensor], terms: int, shift: Tensor | float) -> Tracked:
    """`op` applies the layer's absolute weights; a sum of n terms loses at most n units of its absolute sum."""
    total, error = op(torch.cat([x.size, x.error])).chunk(2)  # once, since absolute weights cost more than a single sample
    bounds = INTERVAL_RULES[layer_type(layer)](layer, x.bounds)
    return _fresh(bounds, error, x.largest, total + shift, terms)


def _linear(layer: nn.Linear, x: Tracked) -> Tracked:
    shift: Tensor | float = 0.0 if layer.bias is None else layer.bias.abs()
    return _affine(layer, x, lambda v: F.linear(v, layer.weight.abs()), layer.in_features + 1, shift)


def _conv(layer: nn.Conv2d, x: Tracked) -> Tracked:
    shift: Tensor | float = 0.0 if layer.bias is None else layer.bias.abs().view(1, -1, 1, 1)
    return _affine(layer, x, lambda v: conv(layer, v, layer.weight.abs()), layer.weight[0].numel() + 1, shift)


def _batchnorm(layer: BatchNorm, x: Tracked) -> Tracked:
    scale, _ = batchnorm_scale(layer, x.error.dim())
    assert layer.running_mean is not None
    shift = layer.running_mean.abs().view_as(scale) * scale.abs()  # rounded apart from the bias that it may cancel with
    if layer.affine:
        shift = shift + layer.bias.abs().view_as(scale)
    return _affine(layer, x, lambda v: v * scale.abs(), 8, shift)


def _normalise(layer: Normalize, x: Tracked) -> Tracked:
    return _affine(layer, x, lambda v: v / layer.std.abs(), 4, (layer.mean / layer.std).abs())


def _other_layer(kind: type[nn.Module]) -> Callable[..., Tracked]:
    """Layers that never move two values further apart than they were: the error bound goes through them as a value does."""

    def rule(layer: nn.Module, x: Tracked) -> Tracked:
        bounds = INTERVAL_RULES[kind](layer, x.bounds)
        error = x.error if kind in ELEMENTWISE else layer(x.error)
        terms = _window(layer, x.size) if kind in AVERAGES else 2
        reached = torch.maximum(bounds.lower.abs(), bounds.upper.abs())  # a Hardtanh below 0 makes values larger, not smaller
        return _fresh(bounds, error, x.largest, torch.maximum(layer(x.size), reached), terms)

    return rule


def _window(layer: Any, x: Tensor) -> int:
    """No more values than this are summed for one output of an average."""
    kernel = getattr(layer, "kernel_size", None)
    if kernel is None:
        return 2 + x.shape[2] * x.shape[3]
    return 2 + (kernel * kernel if isinstance(kernel, int) else kernel[0] * kernel[1])


def _fresh(bounds: Region, error: Tensor, largest: Tensor, total: Tensor, terms: int) -> Tracked:
    """`total` bounds the absolute sums behind the bounds; products may also underflow, by less than the smallest normal."""
    info = torch.finfo(total.dtype)
    return Tracked(bounds, error + terms * (total + info.tiny / info.eps), torch.maximum(largest, _per_sample(total)))


def _call(kind: Any) -> Callable[..., Tracked]:
    def through(value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return INTERVAL_RULES[kind](Interval(value, value), *args, **kwargs).upper

    def rule(x: Tracked, *args: Any, **kwargs: Any) -> Tracked:
        bounds = INTERVAL_RULES[kind](x.bounds, *args, **kwargs)
        size = through(x.size, *args, **kwargs)
        error = x.error if kind in ELEMENTWISE else through(x.error, *args, **kwargs)
        terms = 2
        if kind in AVERAGES:
            terms = _window(None, x.size)
        elif kind in MEANS:
            terms += x.size[0].numel() // max(1, size[0].numel())
        return _fresh(bounds, error, x.largest, size, terms)

    return rule


def _add(a: Tracked, b: Tracked, alpha: float = 1) -> Tracked:
    bounds = INTERVAL_RULES[torch.add](a.bounds, b.bounds, alpha)
    return _fresh(bounds, a.error + b.error, torch.maximum(a.largest, b.largest), a.size + b.size, 2)


def _cat(parts: Sequence[Tracked], dim: int = 0) -> Tracked:
    bounds = INTERVAL_RULES[torch.cat]([part.bounds for part in parts], dim)
    largest = torch.stack([part.largest for part in parts]).amax(0)
    return Tracked(bounds, torch.cat([part.error for part in parts], dim), largest)


def _shape(kind: Any) -> Callable[..., Any]:
    """What a forward asks of shapes, not of values."""
    return lambda x, *args: INTERVAL_RULES[kind](x.bounds if isinstance(x, Tracked) else x, *args)


_OWN: dict[Any, Callable[..., Any]] = {
    nn.Linear: _linear,
    nn.Conv2d: _conv,
    nn.BatchNorm1d: _batchnorm,
    nn.BatchNorm2d: _batchnorm,
    Normalize: _normalise,
    operator.add: _add,
    torch.add: _add,
    torch.cat: _cat,
    **{kind: _shape(kind) for kind in SHAPES},
}
ERROR_RULES: Mapping[Any, Callable[..., Any]] = {
    kind: _OWN.get(kind) or (_other_layer(kind) if isinstance(kind, type) else _call(kind)) for kind in INTERVAL_RULES
}


@torch.no_grad()
def allowance(model: nn.Module, x: Region) -> Tensor:
    """The margin [N] that a bound in x's precision must exceed to count: above its own worst-case rounding error.

    With S the largest sum |w||x| + |b| met while propagating, it is the larger of 1e-4 S (float32; 1e-9 S in float64) and
    SAFETY times a running error bound, which also sees errors that later layers magnify.
    """
    return bounds_and_allowance(model, x)[1]


@torch.no_grad()
def bounds_and_allowance(model: nn.Module, x: Region) -> tuple[Region, Tensor]:
    """Interval bounds of the logits [N, C] and the allowance [N], in one walk."""
    dtype = x.lower.dtype
    start = torch.maximum(x.lower.abs(), x.upper.abs())
    output = walk(model, Tracked(x, start, _per_sample(start)), ERROR_RULES)
    needed = torch.maximum(SHARE[dtype] * output.largest, SAFETY * UNIT[dtype] * _per_sample(output.error))
    return output.bounds, needed


def box_around(x: Region) -> Interval:
    """One box that holds every sample's region: its allowance is at least each sample's, at the price of one."""
    return Interval(x.lower.amin(0, keepdim=True), x.upper.amax(0, keepdim=True))


@torch.no_grad()
def allowance_for(model: nn.Module, x: Region, margin: Tensor, around: Tensor | None = None) -> Tensor:
    """A valid allowance [N] for each margin: `around`, that of the box around all, where it decides, else the sample's own."""
    if len(margin) == 0:
        return torch.zeros_like(margin)
    around = allowance(model, box_around(x)) if around is None else around
    allowed = around.expand(len(margin)).clone()
    close = (~(margin.abs() > around)).nonzero().flatten()
    if len(close):
        parts = [part[close] if len(part) == len(margin) else part for part in x]
        allowed[close] = allowance(model, type(x)(*parts)).to(allowed.dtype)
    return allowed


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """No autocast, no TF32, no reduced matrix products inside: float32 means float32, as the allowance assumes."""
    try:
        cudnn, matmul = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    except RuntimeError as reason:  # torch refuses its old switches once a new one (fp32_precision) was set
        raise UnsupportedNetworkError(
            "torch.backends...fp32_precision was set in this process, so float32 may not be float32; set it after certifying"
        ) from reason
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        torch.backends.cudnn.allow_tf32 = cudnn
        torch.set_float32_matmul_precision(matmul)


def in_float64(model: nn.Module) -> nn.Module:
    """A copy of a plain network in double precision, in eval mode."""
    double = copy.deepcopy(model).double().eval()
    share_trace(model, double)
    return double


class Settled(NamedTuple):
    margin: Tensor
    proved: Tensor
    rechecked: Tensor


def settle(margin: Tensor, allowed: Tensor, recompute: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Settled:
    """Certified samples: a float32 margin above its allowance, or a float64 margin above the (smaller) float64 one.

    `recompute(indices)` returns margins and allowances in float64 for the samples that float32 cannot decide.
    """
    margin, allowed = margin.double(), allowed.double()
    proved = torch.isfinite(margin) & (margin > allowed)
    undecided = ~proved & ~(margin <= -allowed)
    unsure = undecided.nonzero().flatten()
    if len(unsure):
        exact, needed = recompute(unsure)
        margin = margin.index_copy(0, unsure, exact)
        proved = proved.index_copy(0, unsure, torch.isfinite(exact) & (exact > needed))
    return Settled(margin, proved, undecided)
