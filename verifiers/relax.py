"""Own backward linear relaxation (CROWN, with optimised slopes and split constraints) over the lowered graph, in float64.

Zhang et al. 2018 (arXiv 1811.00866), Xu et al. 2020 (arXiv 2011.13824, alpha), Wang et al. 2021 (arXiv 2103.06624, beta).
Batched over subproblems of one image: auto-LiRPA 0.3 has no split constraints and its bounds serve as the tests' reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .ball import Interval
from .bounds import INTERVAL_RULES, batchnorm_scale
from .graph import name_of, operation, output_of, trace, walk
from .lowering import SUMS, Lowered, lower
from .proof import UnsupportedNetworkError
from .rounding import ERROR_RULES, SAFETY, SHARE, UNIT, Tracked

RELUS = (nn.ReLU, torch.relu, F.relu, "relu")
FLATS = (nn.Flatten, torch.flatten, "flatten")
MIXING = (nn.Linear, nn.Conv2d)
AFFINE = (*MIXING, *FLATS, *SUMS, nn.BatchNorm2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, torch.cat)
NUMBERS = 1_000_000  # coefficients of the widest layer held at once: a chunk stays well below half a second

Through = Callable[[fx.Node, Tensor], tuple[Tensor, Tensor]]


def nothing() -> None:
    """A pause that never interrupts."""


def never() -> bool:
    return False


class Layer(NamedTuple):
    """What is known of one ReLU layer on a box: `active` [n] is 1 where stable and open; bounds [k] of the unstable ones `at`."""

    active: Tensor
    at: Tensor
    lower: Tensor
    upper: Tensor


class Choice(NamedTuple):
    """Per subproblem and unstable neuron [R, K]: lower slope alpha in [0,1], multiplier beta >= 0, split sign -1, 0 or 1."""

    alpha: Tensor
    beta: Tensor
    sign: Tensor

    def rows(self, at: Tensor) -> Choice:
        return Choice(self.alpha[at], self.beta[at], self.sign[at])


class Bounded(NamedTuple):
    """Lower bounds [R] over the box and the splits, their minimisers' signs [R, ...], and coefficients [R, K] at the ReLUs."""

    value: Tensor
    downhill: Tensor
    coefficients: Tensor


@dataclass(frozen=True)
class Box:
    """One image's ball in the lowered network's coordinates: lower, upper [1, ...], its ReLU layers, and per unstable
    neuron [K] how far its computed value may be off."""

    lower: Tensor
    upper: Tensor
    layers: dict[fx.Node, Layer]
    error: Tensor

    @property
    def lowers(self) -> Tensor:
        return torch.cat([layer.lower for layer in self.layers.values()]) if self.layers else self.lower.new_zeros(0)

    @property
    def uppers(self) -> Tensor:
        return torch.cat([layer.upper for layer in self.layers.values()]) if self.layers else self.lower.new_zeros(0)


class ReluNetwork:
    """A plain ReLU network in float64 as affine steps and ReLUs: forward as it is, backward on coefficients.

    Raises UnsupportedNetworkError, naming the operation, for anything else (max pooling among them).
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, example: Tensor) -> None:
        self.lowered: Lowered = lower(model, example[:1])
        self.network = self.lowered.network.requires_grad_(False)
        graph = trace(self.network)
        self.modules = dict(self.network.named_modules())
        self.output = output_of(graph)
        self.nodes = [node for node in graph.nodes if node.op != "output"]
        (self.input,) = (node for node in self.nodes if node.op == "placeholder")
        self.relus = [node for node in self.nodes if self._kind(node) in RELUS]
        self._refuse_the_rest()
        generator = torch.Generator().manual_seed(0)
        noise = torch.rand(6, *example.shape[1:], generator=generator, dtype=torch.float64).to(example.device)
        points = torch.cat([example[:1].double(), noise[:3], 40 * (noise[3:] - 0.5)])
        values = self._values(self.lowered.move(points))
        self.shapes = {node: value.shape[1:] for node, value in values.items()}
        self.constants = {node: self._constant(node) for node in self.nodes if self._kind(node) in AFFINE}
        self.widest = max(int(shape.numel()) for shape in self.shapes.values())
        self._require_same_function(model(points), values)

    def _kind(self, node: fx.Node) -> Any:
        return None if node.op == "placeholder" else operation(node, self.modules)

    def _refuse_the_rest(self) -> None:
        for node in self.nodes:
            kind = self._kind(node)
            if kind is not None and kind not in RELUS and kind not in AFFINE:
                raise UnsupportedNetworkError(f"exact verification knows ReLU networks only, not {name_of(kind)} ({node.name})")

    def _apply(self, node: fx.Node, values: dict[fx.Node, Tensor]) -> Tensor:
        """ReLUs never work in place here: another step may read their input."""
        args: Any
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        if self._kind(node) in RELUS:
            return torch.relu(args[0])
        if node.op == "call_module":
            return self.modules[str(node.target)](*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    def _values(self, start: Tensor) -> dict[fx.Node, Tensor]:
        values = {self.input: start}
        for node in self.nodes:
            if node is not self.input:
                values[node] = self._apply(node, values)
        return values

    def activity(self, points: Tensor) -> dict[fx.Node, Tensor]:
        """Inputs of every ReLU at the given pixels [N, ...]: flattened."""
        values = self._values(self.lowered.move(points))
        return {relu: values[relu.all_input_nodes[0]].flatten(1) for relu in self.relus}

    def _constant(self, node: fx.Node) -> Tensor:
        return self._apply(node, {source: self._zeros(source, 1) for source in node.all_input_nodes})

    def _zeros(self, node: fx.Node, rows: int) -> Tensor:
        parameter = next(self.network.parameters())
        return torch.zeros(rows, *self.shapes[node], dtype=torch.float64, device=parameter.device)

    def _require_same_function(self, want: Tensor, values: dict[fx.Node, Tensor]) -> None:
        """A ReLU in place whose input is read elsewhere computes something else than the graph says."""
        size = max(1.0, *(float(value.abs().max()) for value in values.values()))
        if not float((want - values[self.output]).abs().max()) <= 1e-9 * size:
            raise UnsupportedNetworkError("the network computes something else than its graph of affine steps and ReLUs")

    # ---- coefficients, backwards --------------------------------------------------------------------------------------

    def pull(self, start: fx.Node, rows: Tensor, through: Through) -> tuple[Tensor, Tensor]:
        """Coefficients [R, ...] of the input and constants [R] of rows [R, *shape of start], back from `start`.

        `through(relu, a)` turns coefficients of a ReLU's output into those of its input and a constant [R].
        """
        found = {start: rows}
        constant = rows.new_zeros(len(rows))
        for node in reversed(self.nodes):
            if node is self.input or node not in found:
                continue
            a = found.pop(node)
            if self._kind(node) in RELUS:
                back, plus = through(node, a)
                pieces: Iterator[tuple[fx.Node, Tensor]] = iter([(node.all_input_nodes[0], back)])
            else:
                plus = (a * self.constants[node]).flatten(1).sum(1)
                pieces = self._transposed(node, a)
            constant = constant + plus
            for source, piece in pieces:
                found[source] = found[source] + piece if source in found else piece
        return found.get(self.input, self._zeros(self.input, len(rows))), constant

    def _transposed(self, node: fx.Node, a: Tensor) -> Iterator[tuple[fx.Node, Tensor]]:
        kind, (source, *_) = self._kind(node), node.all_input_nodes
        layer: Any = self.modules.get(str(node.target))
        if kind is nn.Linear:
            yield source, a @ layer.weight
        elif kind is nn.Conv2d and layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
            yield source, _transposed_conv(layer, a, self.shapes[source])
        elif kind is nn.BatchNorm2d:
            yield source, a * batchnorm_scale(layer)[0]
        elif kind in FLATS:
            yield source, a.reshape(len(a), *self.shapes[source])
        elif kind in SUMS and all(self.shapes[one] == a.shape[1:] for one in node.all_input_nodes):
            yield from ((one, a) for one in node.args if isinstance(one, fx.Node))
        else:
            yield from self._differentiated(node, a)

    def _differentiated(self, node: fx.Node, a: Tensor) -> Iterator[tuple[fx.Node, Tensor]]:
        with torch.enable_grad():
            values = {source: self._zeros(source, len(a)).requires_grad_() for source in node.all_input_nodes}
            pieces = torch.autograd.grad(self._apply(node, values), list(values.values()), a, create_graph=a.requires_grad)
        return zip(values, pieces)

    # ---- bounds ---------------------------------------------------------------------------------------------------------

    def box(
        self, pixels: Interval, pause: Callable[[], None] = nothing, intersect: bool = True, enough: Callable[[], bool] = never
    ) -> Box:
        """CROWN bounds of every ReLU's input over the pixel box [1, ...], widened by their own rounding error.

        intersect: take the better of these and interval bounds. pause is called often and may raise to stop. Once enough()
        is true, interval bounds have to do for the rest.
        """
        low, high = self.lowered.move(pixels.lower), self.lowered.move(pixels.upper)
        start = torch.maximum(low.abs(), high.abs())
        layers: dict[fx.Node, Layer] = {}
        errors: list[Tensor] = []
        for relu in self.relus:
            pause()
            (source,) = relu.all_input_nodes
            ibp = walk(self.network, Interval(low, high), INTERVAL_RULES, wanted=source)
            exact = Tracked(Interval(low, high), start, start.flatten(1).amax(1))
            tracked = walk(self.network, exact, ERROR_RULES, wanted=source)
            error = (SHARE[low.dtype] * tracked.size + SAFETY * UNIT[low.dtype] * tracked.error).flatten()
            widened = ibp.lower.flatten() - error, ibp.upper.flatten() + error
            known = Box(low, high, layers, low.new_zeros(0))
            bounds = self._tighten(known, source, Interval(*widened), error, intersect, pause, enough)
            layers[relu] = _layer(*bounds)
            errors.append(error[layers[relu].at])
        return Box(low, high, layers, torch.cat(errors) if errors else low.new_zeros(0))

    def _tighten(
        self, known: Box, source: fx.Node, ibp: Interval, error: Tensor, intersect: bool, pause: Callable[[], None],
        enough: Callable[[], bool],
    ) -> tuple[Tensor, Tensor]:
        """Backward bounds of the neurons that interval bounds leave unstable; where those are exact already there is no need."""
        if self._is_one_affine_step(source):
            return ibp.lower, ibp.upper
        at = ((ibp.lower < 0) & (ibp.upper > 0)).nonzero().flatten()
        low, high = ibp.lower.clone(), ibp.upper.clone()
        for part in at.split(max(1, NUMBERS // (2 * self.widest))):
            pause()
            if enough():
                break
            rows = torch.zeros(len(part), len(low), dtype=low.dtype, device=low.device)
            rows[torch.arange(len(part)), part] = 1
            rows = torch.cat([rows, -rows]).view(-1, *self.shapes[source])
            below, above = self.lower_bounds(known, rows, crown_choice(known), source).value.chunk(2)
            below, above = below - error[part], error[part] - above
            low[part] = torch.maximum(low[part], below) if intersect else below
            high[part] = torch.minimum(high[part], above) if intersect else above
        return low, high

    def _is_one_affine_step(self, node: fx.Node) -> bool:
        mixing = 0
        while node is not self.input:
            kind = self._kind(node)
            if kind not in (*MIXING, *FLATS, nn.BatchNorm2d):
                return False
            mixing += kind in MIXING
            (node,) = node.all_input_nodes
        return mixing <= 1

    def lower_bounds(self, box: Box, rows: Tensor, choice: Choice, start: fx.Node | None = None) -> Bounded:
        """Lower bounds [R] of rows [R, *shape of start] (of the logits by default) over the box and each row's splits.

        choice has R rows, or one for all. Sound for every alpha in [0,1] and beta >= 0, up to rounding.
        """
        low_slope, high_slope, shift, push = _lines(box, choice)
        slices, seen = _slices(box), torch.zeros_like(choice.alpha).expand(len(rows), -1).clone()

        def through(relu: fx.Node, a: Tensor) -> tuple[Tensor, Tensor]:
            layer, at = box.layers[relu], slices[relu]
            flat = a.flatten(1)
            part = flat[:, layer.at]
            seen[:, at] = part.detach()
            positive, negative = part.clamp(min=0), part.clamp(max=0)
            new = positive * low_slope[:, at] + negative * high_slope[:, at] - push[:, at]
            back = (flat * layer.active).index_copy(1, layer.at, new)
            return back.view_as(a), (negative * shift[:, at]).sum(1)

        a, constant = self.pull(self.output if start is None else start, rows, through)
        value = (a.clamp(min=0) * box.lower + a.clamp(max=0) * box.upper).flatten(1).sum(1) + constant
        return Bounded(value, a.detach() > 0, seen)


def _transposed_conv(layer: Any, a: Tensor, shape: torch.Size) -> Tensor:
    steps = zip(shape[1:], a.shape[2:], layer.stride, layer.padding, layer.dilation, layer.kernel_size)
    leftover = [size - ((out - 1) * stride - 2 * pad + gap * (kernel - 1) + 1) for size, out, stride, pad, gap, kernel in steps]
    return F.conv_transpose2d(a, layer.weight, None, layer.stride, layer.padding, leftover, layer.groups, layer.dilation)


def _layer(low: Tensor, high: Tensor) -> Layer:
    """A bound that is not finite leaves its neuron unstable, and every bound that rests on it without worth."""
    at = (~(low >= 0) & ~(high <= 0)).nonzero().flatten()
    return Layer((low >= 0).to(low.dtype), at, low[at], high[at])


def _slices(box: Box) -> dict[fx.Node, slice]:
    found, start = {}, 0
    for relu, layer in box.layers.items():
        found[relu] = slice(start, start + len(layer.at))
        start += len(layer.at)
    return found


def _lines(box: Box, choice: Choice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Slopes of the lower and upper line, the upper line's constant, and the pull of the split constraints: [R, K] each."""
    low, high = box.lowers, box.uppers
    slope = (high / (high - low)).expand_as(choice.alpha)
    fixed = (choice.sign > 0).to(slope.dtype)
    free = choice.sign == 0
    shift = torch.where(free, -low * slope, torch.zeros_like(slope))
    return torch.where(free, choice.alpha, fixed), torch.where(free, slope, fixed), shift, choice.sign * choice.beta


def crown_choice(box: Box, rows: int = 1) -> Choice:
    """CROWN's slopes: 1 where the upper line is steeper than 1/2, else 0; no splits."""
    low, high = box.lowers, box.uppers
    alpha = (high / (high - low) > 0.5).to(low.dtype).expand(rows, -1).clone()
    return Choice(alpha, torch.zeros_like(alpha), torch.zeros_like(alpha))
