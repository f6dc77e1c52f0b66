"""The verifier `mixtrain`: symbolic interval analysis, which training by MixTrain uses too.

Wang et al. 2018, "MixTrain: scalable training of verifiably robust neural networks" (arXiv 1811.02625). Every value is an
affine form in the pixels' noise and in one new symbol per unstable ReLU: affine layers act on it exactly, an unstable ReLU
becomes a parallelogram, and differences of classes are taken between forms, before they are made numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ball import Interval, float_above, outward_box
from .bounds import INTERVAL_RULES, batchnorm_scale, conv, smallest_margin
from .graph import walk
from .lowering import simplified
from .memory import batch_that_fits, in_batches
from .normalise import Normalize
from .pooling import pair
from .proof import Proof, UnsupportedNetworkError, fixed_radius_proof
from .rounding import SAFETY, SHARE, UNIT, Settled, full_precision, in_float64, settle

BATCH = 128
COPIES = 4  # a layer's coefficients before and after it, their absolute values, and scratch


class Form(NamedTuple):
    """centre + sum_k spread[:, k] * e_k with every e_k in [-1, 1]; centre [N, ...], spread [N, K, ...].

    error: bound of the rounding error accumulated in centre and spread together, in units of the precision, [N, ...].
    largest: per sample the largest sum |w||x| + |b| met so far.
    """

    centre: Tensor
    spread: Tensor
    error: Tensor
    largest: Tensor

    @property
    def radius(self) -> Tensor:
        return self.spread.abs().sum(1)


def _form(box: Interval) -> Form:
    """The box with one symbol per pixel."""
    centre, radius = (box.lower + box.upper) / 2, (box.upper - box.lower) / 2
    pixels = radius.flatten(1)
    spread = torch.diag_embed(pixels).view(len(pixels), pixels.shape[1], *radius.shape[1:])
    size = torch.maximum(box.lower.abs(), box.upper.abs()).detach()
    return Form(centre, spread, 4 * size, size.flatten(1).amax(1))


def _each(apply: Callable[[Tensor], Tensor], spread: Tensor) -> Tensor:
    """A layer applied to the coefficients of every symbol: [N, K, ...]."""
    n, symbols = spread.shape[:2]
    return apply(spread.flatten(0, 1)).unflatten(0, (n, symbols))


Apply = Callable[[Tensor], Tensor]


def _affine(x: Form, apply: Apply, shift: Tensor | None, absolute: Apply, offset: Tensor | float, terms: int) -> Form:
    """apply(x) + shift; `absolute` is the layer with absolute weights, `offset` bounds the absolute summands of the shift."""
    centre = apply(x.centre) if shift is None else apply(x.centre) + shift
    with torch.no_grad():
        total = absolute(x.centre.abs() + x.radius) + offset
        error = absolute(x.error) + terms * (total + _underflow(total))
        largest = torch.maximum(x.largest, total.flatten(1).amax(1))
    return Form(centre, _each(apply, x.spread), error, largest)


def _underflow(like: Tensor) -> float:
    """Products may underflow, by less than the smallest normal number; in units of the precision."""
    info = torch.finfo(like.dtype)
    return info.tiny / info.eps


def _linear(layer: nn.Linear, x: Form) -> Form:
    weight, bias = layer.weight, layer.bias
    offset: Tensor | float = 0.0 if bias is None else bias.abs()
    return _affine(
        x, lambda v: F.linear(v, weight), bias, lambda v: F.linear(v, weight.abs()), offset, layer.in_features + 2
    )


def _conv(layer: nn.Conv2d, x: Form) -> Form:
    weight, bias = layer.weight, None if layer.bias is None else layer.bias.view(-1, 1, 1)
    offset: Tensor | float = 0.0 if bias is None else bias.abs()
    return _affine(
        x, lambda v: conv(layer, v, weight), bias, lambda v: conv(layer, v, weight.abs()), offset, weight[0].numel() + 2
    )


def _batchnorm(layer: nn.BatchNorm2d, x: Form) -> Form:
    scale, shift = batchnorm_scale(layer)
    assert layer.running_mean is not None
    offset = layer.running_mean.abs().view(1, -1, 1, 1) * scale.abs()  # rounded apart from the bias that it may cancel with
    if layer.affine:
        offset = offset + layer.bias.abs().view(1, -1, 1, 1)
    return _affine(x, lambda v: v * scale, shift, lambda v: v * scale.abs(), offset, 8)


def _normalise(layer: Normalize, x: Form) -> Form:
    offset = (layer.mean / layer.std).abs()
    return _affine(x, lambda v: v / layer.std, -layer.mean / layer.std, lambda v: v / layer.std.abs(), offset, 8)


def _average(layer: Any, x: Form) -> Form:
    divisor = getattr(layer, "divisor_override", None)
    if divisor is not None and divisor <= 0:
        raise UnsupportedNetworkError(f"no symbolic rule for average pooling with divisor_override={divisor}")
    rows, columns = pair(getattr(layer, "kernel_size", x.centre.shape[2:]))
    return _affine(x, layer, None, layer, 0.0, rows * columns + 2)


def _flatten(layer: nn.Flatten, x: Form) -> Form:
    if (layer.start_dim, layer.end_dim) != (1, -1):
        raise UnsupportedNetworkError(f"no symbolic rule for Flatten({layer.start_dim}, {layer.end_dim}); use Flatten()")
    return _flatten_call(x, 1)


def _flatten_call(x: Form, start_dim: int = 0, end_dim: int = -1) -> Form:
    if (start_dim, end_dim) != (1, -1):
        raise UnsupportedNetworkError(f"no symbolic rule for flatten({start_dim}, {end_dim}); use flatten(x, 1)")
    return Form(x.centre.flatten(1), x.spread.flatten(2), x.error.flatten(1), x.largest)


def _relu(x: Form) -> Form:
    """max(z, 0) lies within (-l) s / 2 of s z - l s / 2 where l < 0 < u and s = u / (u - l)."""
    radius = x.radius
    lower, upper = x.centre - radius, x.centre + radius
    unstable = (lower < 0) & (upper > 0)
    slope = torch.where(unstable, upper / torch.where(unstable, upper - lower, 1.0), (lower >= 0).to(lower.dtype))
    half = torch.where(unstable, -lower * slope / 2, 0.0)
    spread = torch.cat([x.spread * slope.unsqueeze(1), _fresh_symbols(half, unstable)], 1)
    with torch.no_grad():
        size = x.centre.abs() + radius  # |z| as known here, and the absolute sums behind it
        error = x.error + (x.spread.shape[1] + 16) * (size + _underflow(size))
        largest = torch.maximum(x.largest, size.flatten(1).amax(1))
    return Form(x.centre * slope + half, spread, error, largest)


def _fresh_symbols(half: Tensor, unstable: Tensor) -> Tensor:
    """One new symbol per unstable neuron, of coefficient `half` there: [N, most unstable neurons of a sample, ...]."""
    flat, mask = half.flatten(1), unstable.flatten(1)
    count = int(mask.sum(1).max()) if len(mask) else 0
    order = mask.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :count]
    fresh = torch.zeros(len(flat), count, flat.shape[1], dtype=half.dtype, device=half.device)
    fresh = fresh.scatter(2, order.unsqueeze(2), flat.gather(1, order).unsqueeze(2))
    return fresh.view(len(flat), count, *half.shape[1:])


def _dropout(layer: nn.Dropout, x: Form) -> Form:
    if layer.training and layer.p > 0:
        raise UnsupportedNetworkError("symbolic bounds of Dropout need eval mode")
    return x


SYMBOLIC_RULES: Mapping[Any, Callable[..., Form]] = {
    nn.Linear: _linear,
    nn.Conv2d: _conv,
    nn.BatchNorm2d: _batchnorm,
    Normalize: _normalise,
    nn.AvgPool2d: _average,
    nn.AdaptiveAvgPool2d: _average,
    nn.Flatten: _flatten,
    torch.flatten: _flatten_call,
    "flatten": _flatten_call,
    nn.ReLU: lambda _, x: _relu(x),
    torch.relu: _relu,
    "relu": _relu,
    F.relu: lambda x, inplace=False: _relu(x),
    nn.Identity: lambda _, x: x,
    nn.Dropout: _dropout,
}
RELUS = (nn.ReLU, torch.relu, "relu", F.relu)


def symbolic_margins(model: nn.Module, box: Interval, y: Tensor) -> Tensor:
    """Lower bounds [N, C] of f_y - f_j over the box, 0 in column y, up to rounding; differentiable, right on parametrized layers.

    Takes (pixels + unstable ReLUs) times the width of a layer per sample, and as much again for gradients. Raises
    UnsupportedNetworkError, naming the operation, for layers without a rule.
    """
    return _margins(walk(model, _form(box), SYMBOLIC_RULES), y)


def _margins(out: Form, y: Tensor) -> Tensor:
    at = y.view(-1, 1, 1).expand(-1, out.spread.shape[1], 1)
    falls = (out.spread.gather(2, at) - out.spread).abs().sum(1)
    return out.centre.gather(1, y[:, None]) - out.centre - falls


@torch.no_grad()
def _settleable(model: nn.Module, box: Interval, y: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest margin [N] and what it must exceed to count (docs/decisions/0002-rounding.md, for symbols)."""
    out = walk(model, _form(box), SYMBOLIC_RULES)
    margin = smallest_margin(_margins(out, y), y)
    size = (out.centre.abs() + out.radius).amax(1)
    error = 2 * (out.error.amax(1) + (out.spread.shape[1] + 4) * size)
    dtype = margin.dtype
    return margin, torch.maximum(SHARE[dtype] * out.largest, SAFETY * UNIT[dtype] * error)


class _Tally(NamedTuple):
    """Interval bounds on the way, the symbols so far, and the most coefficients that a layer has held, per sample."""

    bounds: Interval
    symbols: Tensor
    most: Tensor


def _counting(kind: Any) -> Callable[..., _Tally]:
    def rule(*args: Any, **kwargs: Any) -> _Tally:
        layer, x, rest = (args[:1], args[1], args[2:]) if isinstance(kind, type) else ((), args[0], args[1:])
        symbols = x.symbols
        if kind in RELUS:
            symbols = symbols + ((x.bounds.lower < 0) & (x.bounds.upper > 0)).flatten(1).sum(1)
        bounds = INTERVAL_RULES[kind](*layer, x.bounds, *rest, **kwargs)
        return _Tally(bounds, symbols, torch.maximum(x.most, symbols * bounds.lower[0].numel()))

    return rule


TALLY_RULES = {kind: _counting(kind) for kind in SYMBOLIC_RULES}


@torch.no_grad()
def symbolic_bytes(model: nn.Module, box: Interval) -> float:
    """About what the forms of one sample take, (pixels + unstable ReLUs so far) x width, unstable by interval bounds."""
    pixels = box.lower[0].numel()
    symbols = torch.full((len(box.lower),), pixels, device=box.lower.device)
    found = walk(model, _Tally(box, symbols, symbols * pixels), TALLY_RULES)
    return float(found.most.amax()) * box.lower.element_size() * COPIES


@dataclass(frozen=True)
class SymbolicInterval:
    """Symbolic intervals (MixTrain's): a certified sample is robust in the whole ball, cut with [0,1]; linf only.

    Wang et al. 2018 (arXiv 1811.02625). eps is in [0,1] pixel units, boxes are rounded outwards. With clip="tensor" the box
    is cut with the smallest and largest value of the images given instead, as published code does: that is UNSOUND, because
    the cut depends on which images come together; such proofs carry a note, and the verifier is not `deterministic`. Raises
    UnsupportedNetworkError for layers without a rule and for networks too wide for the memory limit.
    """

    norm: str = "linf"
    eps: Fraction = Fraction(8, 255)
    clip: Literal["unit", "tensor"] = "unit"
    QUIRK: ClassVar[str] = "unsound quirk: boxes are clipped to the range of the images given, not to [0,1]"

    def __post_init__(self) -> None:
        if self.norm != "linf":
            raise ValueError(f"symbolic intervals certify linf balls, not {self.norm!r}; use crown for l2")
        if self.clip not in ("unit", "tensor"):
            raise ValueError(f"clip must be unit or tensor, got {self.clip!r}")

    @property
    def deterministic(self) -> bool:
        return self.clip == "unit"

    @torch.no_grad()
    @full_precision()
    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Proof:
        predicted = model(x).argmax(1)
        notes: tuple[str, ...] = () if self.clip == "unit" else (self.QUIRK,)
        if len(x) == 0:
            return fixed_radius_proof(float(self.eps), predicted == y, x.new_zeros(0), predicted, notes)
        plain, steps = simplified(model, x)
        _require_same_function(model, plain, x[:4])
        settled, notes = self._settled(plain, x, y), (*notes, *steps)
        return fixed_radius_proof(
            float(self.eps), settled.proved & (predicted == y), settled.margin, predicted, notes, int(settled.rechecked.sum())
        )

    def _settled(self, model: nn.Module, x: Tensor, y: Tensor) -> Settled:
        box = self.box(x)
        margin, allowed = _in_batches(model, box, y)

        def recompute(at: Tensor) -> tuple[Tensor, Tensor]:
            whole = self.box(x.double())
            return _in_batches(in_float64(model), Interval(whole.lower[at], whole.upper[at]), y[at])

        return settle(margin, allowed, recompute)

    def box(self, x: Tensor) -> Interval:
        """What is certified around the images x: [N, C, H, W] in [0,1]."""
        if self.clip == "unit":
            return outward_box(x, self.eps)
        wide = float_above(self.eps, torch.float64)
        lower, upper = (x.double() - wide).to(x.dtype), (x.double() + wide).to(x.dtype)
        return Interval(lower.clamp_min(x.min()), upper.clamp_max(x.max()))


def _in_batches(model: nn.Module, box: Interval, y: Tensor) -> tuple[Tensor, Tensor]:
    size = batch_that_fits(symbolic_bytes(model, box), BATCH, "symbolic interval analysis of this network")

    def bound(at: Tensor) -> Tensor:
        return torch.stack(_settleable(model, Interval(box.lower[at], box.upper[at]), y[at]), 1)

    margin, allowed = in_batches(bound, len(y), size).unbind(1)
    return margin, allowed


def _require_same_function(model: nn.Module, plain: nn.Module, x: Tensor) -> None:
    """The traced graph must compute what the network computes: a flag may have flipped, a forward been replaced."""
    out = walk(plain, Form(x, x.new_zeros(len(x), 0, *x.shape[1:]), x.abs(), x.abs().flatten(1).amax(1)), SYMBOLIC_RULES)
    allowed = torch.maximum(SHARE[x.dtype] * out.largest, SAFETY * UNIT[x.dtype] * out.error.amax(1))
    if not bool(((out.centre - model(x)).abs().amax(1) <= allowed).all()):
        raise UnsupportedNetworkError("the network's forward computes something else than its traced graph; build it anew")
