"""The verifier `mixtrain`: symbolic interval analysis, which training by MixTrain uses too.

Wang et al. 2018, "MixTrain: scalable training of verifiably robust neural networks" (arXiv 1811.02625). Every value is an
affine form in the pixels' noise and in one new symbol per unstable ReLU: affine layers act on it exactly, an unstable ReLU
becomes a parallelogram, a maximum max(a, b) = b + relu(a - b), and differences of classes are taken between forms, before
they are made numbers.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
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
from .proof import Proof, UnsupportedNetworkError, fixed_radius_proof, require_finite
from .rounding import SAFETY, SHARE, UNIT, Settled, full_precision, in_float64, settle

BATCH = 128
COPIES = 4  # a layer's coefficients before and after it, their absolute values, and scratch


class Form(NamedTuple):
    """centre + sum_k spread[:, k] * e_k with every e_k in [-1, 1]; centre [N, ...], spread [N, K, ...].

    blocks: (number, count) of the groups of symbols that follow each other in `spread`, in the order they came to be; equal
    numbers mean equal symbols. error: bound of the rounding error accumulated in centre and spread together, in units of the
    precision, [N, ...]. largest: per sample the largest sum |w||x| + |b| met so far.
    """

    centre: Tensor
    spread: Tensor
    blocks: tuple[tuple[int, int], ...]
    error: Tensor
    largest: Tensor

    @property
    def radius(self) -> Tensor:
        return self.spread.abs().sum(1)

    def over(self, blocks: Sequence[tuple[int, int]]) -> Tensor:
        """The spread over these blocks, 0 for those that the form does not hold."""
        own = dict(zip(self.blocks, self.spread.split([count for _, count in self.blocks], 1)))
        n, shape = len(self.spread), self.spread.shape[2:]
        return torch.cat([own[one] if one in own else self.spread.new_zeros(n, one[1], *shape) for one in blocks], 1)


_numbers = itertools.count(1)  # of groups of symbols; the pixels are 0


def _form(box: Interval) -> Form:
    """The box with one symbol per pixel."""
    centre, radius = (box.lower + box.upper) / 2, (box.upper - box.lower) / 2
    pixels = radius.flatten(1)
    spread = torch.diag_embed(pixels).view(len(pixels), pixels.shape[1], *radius.shape[1:])
    size = torch.maximum(box.lower.abs(), box.upper.abs()).detach()
    return Form(centre, spread, ((0, pixels.shape[1]),), 4 * size, size.flatten(1).amax(1))


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
    return Form(centre, _each(apply, x.spread), x.blocks, error, largest)


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
    return Form(x.centre.flatten(1), x.spread.flatten(2), x.blocks, x.error.flatten(1), x.largest)


def _relu(x: Form) -> Form:
    """max(z, 0) lies within (-l) s / 2 of s z - l s / 2 where l < 0 < u and s = u / (u - l)."""
    radius = x.radius
    lower, upper = x.centre - radius, x.centre + radius
    unstable = (lower < 0) & (upper > 0)
    slope = torch.where(unstable, upper / torch.where(unstable, upper - lower, 1.0), (lower >= 0).to(lower.dtype))
    half = torch.where(unstable, -lower * slope / 2, 0.0)
    fresh = _fresh_symbols(half, unstable)
    spread = torch.cat([x.spread * slope.unsqueeze(1), fresh], 1)
    with torch.no_grad():
        size = x.centre.abs() + radius  # |z| as known here, and the absolute sums behind it
        error = x.error + (x.spread.shape[1] + 16) * (size + _underflow(size))
        largest = torch.maximum(x.largest, size.flatten(1).amax(1))
    return Form(x.centre * slope + half, spread, (*x.blocks, (next(_numbers), fresh.shape[1])), error, largest)


def _fresh_symbols(half: Tensor, unstable: Tensor) -> Tensor:
    """One new symbol per unstable neuron, of coefficient `half` there: [N, most unstable neurons of a sample, ...]."""
    flat, mask = half.flatten(1), unstable.flatten(1)
    count = int(mask.sum(1).max()) if len(mask) else 0
    order = mask.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :count]
    fresh = torch.zeros(len(flat), count, flat.shape[1], dtype=half.dtype, device=half.device)
    fresh = fresh.scatter(2, order.unsqueeze(2), flat.gather(1, order).unsqueeze(2))
    return fresh.view(len(flat), count, *half.shape[1:])


def _joined(forms: Sequence[Form]) -> tuple[list[Tensor], tuple[tuple[int, int], ...]]:
    """Spreads over the symbols of all of them."""
    blocks = tuple(sorted({one for form in forms for one in form.blocks}))
    return [form.over(blocks) for form in forms], blocks


def _add(a: Any, b: Any, alpha: float = 1) -> Form:
    if alpha != 1:
        raise UnsupportedNetworkError(f"no symbolic rule for torch.add with alpha={alpha}")
    if not isinstance(a, Form) or not isinstance(b, Form):
        raise UnsupportedNetworkError("no symbolic rule to add a constant inside the network's forward")
    spreads, blocks = _joined([a, b])
    with torch.no_grad():
        total = a.centre.abs() + a.radius + b.centre.abs() + b.radius
        error = a.error + b.error + 2 * (total + _underflow(total))
        largest = torch.maximum(torch.maximum(a.largest, b.largest), total.flatten(1).amax(1))
    return Form(a.centre + b.centre, spreads[0] + spreads[1], blocks, error, largest)


def _cat(parts: Sequence[Form], dim: int = 0) -> Form:
    if dim <= 0:
        raise UnsupportedNetworkError(f"no symbolic rule for torch.cat along {dim}; name a dimension from 1 on")
    spreads, blocks = _joined(parts)
    largest = torch.stack([part.largest for part in parts]).amax(0)
    centre, error = (torch.cat([getattr(part, name) for part in parts], dim) for name in ("centre", "error"))
    return Form(centre, torch.cat(spreads, dim + 1), blocks, error, largest)


def _maximum(a: Form, b: Form) -> Form:
    """max(a, b) = b + relu(a - b)."""
    return _add(b, _relu(_add(a, b._replace(centre=-b.centre, spread=-b.spread))))


def _max_pool(layer: nn.MaxPool2d, x: Form) -> Form:
    """The maximum of every window by pairs."""
    if pair(layer.padding) != (0, 0) or layer.ceil_mode or layer.return_indices:
        raise UnsupportedNetworkError("no symbolic rule for MaxPool2d with padding, ceil_mode or return_indices")
    rows, columns = pair(layer.kernel_size)
    parts = [_window(layer, x, place) for place in itertools.product(range(rows), range(columns))]
    while len(parts) > 1:
        parts = [*parts[2:], _maximum(parts[0], parts[1])]
    return parts[0]


def _window(layer: nn.MaxPool2d, x: Form, place: tuple[int, int]) -> Form:
    """One place of every window."""
    cuts: list[Any] = [...]
    steps = pair(layer.kernel_size), pair(layer.stride), pair(layer.dilation)
    for length, at, size, stride, gap in zip(x.centre.shape[2:], place, *steps):
        count = (length - gap * (size - 1) - 1) // stride + 1
        cuts.append(slice(at * gap, at * gap + stride * (count - 1) + 1, stride))
    at_all = tuple(cuts)
    return x._replace(centre=x.centre[at_all], spread=x.spread[at_all], error=x.error[at_all])


def _max_pool_call(x: Form, *args: Any, **options: Any) -> Form:
    return _max_pool(nn.MaxPool2d(*args, **options), x)


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
    nn.MaxPool2d: _max_pool,
    F.max_pool2d: _max_pool_call,
    operator.add: _add,
    torch.add: _add,
    torch.cat: _cat,
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
MAXIMA = (nn.MaxPool2d, F.max_pool2d)


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
    """Interval bounds on the way, the symbols so far by the operation they came from, and the most coefficients that a layer
    has held; per sample."""

    bounds: Interval
    symbols: dict[int, Tensor]
    most: Tensor


def _counting(kind: Any) -> Callable[..., _Tally]:
    def rule(*args: Any, **kwargs: Any) -> _Tally:
        inputs = [one for one in (*args, *(args[0] if kind is torch.cat else ())) if isinstance(one, _Tally)]
        intervals = [_interval_of(one) for one in args]
        bounds = INTERVAL_RULES[kind](*intervals, **kwargs)
        fresh = _fresh_of(kind, inputs[0].bounds, bounds)
        symbols = {number: count for one in inputs for number, count in one.symbols.items()}
        symbols |= {} if fresh is None else {next(_numbers): fresh}
        width = torch.stack([*symbols.values()]).sum(0) * bounds.lower[0].numel()
        return _Tally(bounds, symbols, torch.stack([width, *(one.most for one in inputs)]).amax(0))

    return rule


def _interval_of(value: Any) -> Any:
    if isinstance(value, _Tally):
        return value.bounds
    return [_interval_of(one) for one in value] if isinstance(value, list | tuple) else value


def _fresh_of(kind: Any, before: Interval, after: Interval) -> Tensor | None:
    """About how many new symbols an operation makes per sample: one per unstable ReLU, and per comparison of a maximum."""
    if kind in RELUS:
        return ((before.lower < 0) & (before.upper > 0)).flatten(1).sum(1)
    if kind in MAXIMA:
        loose = (after.upper > after.lower).flatten(1).sum(1)
        return loose * max(1, before.lower[0].numel() // max(1, after.lower[0].numel()) - 1)
    return None


TALLY_RULES = {kind: _counting(kind) for kind in SYMBOLIC_RULES}


@torch.no_grad()
def symbolic_bytes(model: nn.Module, box: Interval) -> float:
    """About what the forms of one sample take, (pixels + unstable ReLUs so far) x width, unstable by interval bounds."""
    pixels = box.lower[0].numel()
    symbols = torch.full((len(box.lower),), pixels, device=box.lower.device)
    found = walk(model, _Tally(box, {0: symbols}, symbols * pixels), TALLY_RULES)
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
    points = Form(x, x.new_zeros(len(x), 0, *x.shape[1:]), ((0, 0),), x.abs(), x.abs().flatten(1).amax(1))
    out = walk(plain, points, SYMBOLIC_RULES)
    allowed = torch.maximum(SHARE[x.dtype] * out.largest, SAFETY * UNIT[x.dtype] * out.error.amax(1))
    logits = model(x)
    require_finite(x, logits)
    if not bool(((out.centre - logits).abs().amax(1) <= allowed).all()):
        raise UnsupportedNetworkError("the network's forward computes something else than its traced graph; build it anew")
