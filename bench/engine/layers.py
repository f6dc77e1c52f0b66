"""A plain network as a list of operations on [channels, rows, columns], read through torch.fx and fused.

Weights are folded with BatchNorm in float64 and rounded once; zeros are gone.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from verifiers.graph import walk
from verifiers.lowering import simplified
from verifiers.normalise import Normalize
from verifiers.pooling import ARGUMENTS, pair
from verifiers.proof import UnsupportedNetworkError

LARGEST_WINDOW = 255  # which input of a window won is kept in a byte
DENSE_FROM = 0.5  # above this share of multiplications nothing can be gained


class NoProgramError(Exception):
    """The network has no sparse program, or one that cannot pay; the message says why."""


@dataclass(eq=False)
class Value:
    """What an operation makes of every image."""

    channels: int
    height: int
    width: int

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.height, self.width


@dataclass(frozen=True)
class Flat:
    """A value read as one row of features per image."""

    value: Value

    @property
    def features(self) -> int:
        return self.value.channels * self.value.height * self.value.width


@dataclass(eq=False)
class Operation:
    """out = relu(f(source) + addend), where there is an addend and a ReLU."""

    source: Value
    out: Value
    addend: Value | None = None
    relu: bool = False

    @property
    def sources(self) -> tuple[Value, ...]:
        return (self.source,) if self.addend is None else (self.source, self.addend)


@dataclass(eq=False)
class Taps(Operation):
    """Convolution or linear layer: out[o, y, x] = bias[o] + the sum of weight * source[i, y * stride + dy, x * stride + dx].

    Sorted by output. `flat`: a linear layer, whose only output position is (0, 0).
    """

    o: np.ndarray = field(kw_only=True)
    i: np.ndarray = field(kw_only=True)
    dy: np.ndarray = field(kw_only=True)
    dx: np.ndarray = field(kw_only=True)
    weight: np.ndarray = field(kw_only=True)
    bias: np.ndarray = field(kw_only=True)
    stride: tuple[int, int] = field(kw_only=True)
    flat: bool = field(kw_only=True)


@dataclass(eq=False)
class Pointwise(Operation):
    """(source - shift) * scale + bias per channel; None: the source as it is."""

    affine: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None


@dataclass(frozen=True)
class Windows:
    """Along one direction: output k covers the inputs first[k] <= i < last[k]; both ascend."""

    first: np.ndarray
    last: np.ndarray

    def covering(self, inputs: int) -> tuple[np.ndarray, np.ndarray]:
        """The outputs from[i] <= k < to[i] that cover input i."""
        at = np.arange(inputs)
        start = np.searchsorted(self.last, at, side="right")
        return start, np.maximum(np.searchsorted(self.first, at, side="right"), start)


@dataclass(eq=False)
class Pool(Operation):
    """The maximum of windows, or (with `share`, [rows, columns] of outputs) their sum times a share."""

    down: Windows = field(kw_only=True)
    across: Windows = field(kw_only=True)
    share: np.ndarray | None = None


@dataclass(eq=False)
class Concatenation(Operation):
    """The channels of all parts in a row; `source` is the first."""

    parts: tuple[Value, ...] = ()

    @property
    def sources(self) -> tuple[Value, ...]:
        return self.parts


@dataclass(frozen=True)
class Network:
    """Operations in an order in which they can be done. `affine` is applied to the images first."""

    input: Value
    affine: tuple[np.ndarray, np.ndarray, np.ndarray] | None
    operations: tuple[Operation, ...]
    output: Value
    flat: bool
    multiplications: int
    dense_multiplications: int


@torch.no_grad()
def read(model: nn.Module, example: Tensor) -> Network:
    """The network for images of the example's shape. Raises NoProgramError, naming what stands in the way."""
    if example.dim() != 4 or example.dtype != torch.float32 or example.device.type != "cpu":
        given = f"{example.dtype} {tuple(example.shape)} on {example.device}"
        raise NoProgramError(f"the images are {given}; the sparse engine takes float32 [N, C, H, W] on cpu")
    tensors = [*model.parameters(), *model.buffers()]
    if any(one.is_floating_point() and one.dtype != torch.float32 for one in tensors):
        raise NoProgramError("the network is not float32 throughout")
    if any(one.is_floating_point() and not bool(one.isfinite().all()) for one in tensors):
        raise NoProgramError("a weight or statistic is not finite")
    share = _weights_kept(model)
    if share > DENSE_FROM:
        raise NoProgramError(f"{share:.0%} of the weights remain")
    image, reader = Value(*example.shape[1:]), _Reader()
    try:
        plain, _ = simplified(model, example)
        result = walk(plain, image, reader.rules())
    except UnsupportedNetworkError as reason:
        text = str(reason).partition("; known")[0].replace("no bound rule for", "the sparse engine has no rule for")
        raise NoProgramError(text) from reason
    output = result.value if isinstance(result, Flat) else result
    if not isinstance(output, Value) or output is image:
        raise NoProgramError("the network does not return one tensor that it computed")
    return _fused(image, reader.operations, output, isinstance(result, Flat), reader.dense)


def _weights_kept(model: nn.Module) -> float:
    weights = [layer.weight for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    return sum(int(one.count_nonzero()) for one in weights) / max(1, sum(one.numel() for one in weights))


def _refuse(what: str) -> UnsupportedNetworkError:
    return UnsupportedNetworkError(f"the sparse engine has no {what}")


# ---- reading ----------------------------------------------------------------------------------------------------------------


class _Reader:
    """One rule per layer or function; each appends its operation and returns the value it makes."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self.dense = 0

    def rules(self) -> dict[Any, Callable[..., Any]]:
        relu, add = self._on_values(self.relu), self.add
        table: dict[Any, Callable[..., Any]] = {
            nn.Conv2d: self.convolution, nn.Linear: self.linear, nn.BatchNorm2d: self.batch_norm, Normalize: self.normalise,
            nn.ReLU: lambda layer, x: relu(x), nn.Identity: lambda layer, x: x, nn.Dropout: lambda layer, x: x,
            F.relu: relu, torch.relu: relu, "relu": relu, torch.relu_: relu, "relu_": relu,
            operator.add: add, torch.add: add, operator.iadd: add, "add": add, "add_": add,
            torch.cat: self.concatenate, torch.concat: self.concatenate,
            nn.Flatten: lambda layer, x: self.flatten(x, layer.start_dim, layer.end_dim),
            torch.flatten: self.flatten, "flatten": self.flatten,
        }  # fmt: skip
        pools: dict[Any, Callable[..., Any]] = {
            nn.MaxPool2d: self.max_pool, nn.AvgPool2d: self.average_pool, nn.AdaptiveAvgPool2d: self.adaptive_pool,
        }  # fmt: skip
        for function, (layer, names) in ARGUMENTS.items():
            table[function] = _as_layer(layer, names, pools[layer])
        return table | pools

    def _done(self, operation: Operation) -> Value:
        self.operations.append(operation)
        return operation.out

    def _on_values(self, rule: Callable[[Value], Value]) -> Callable[..., Any]:
        def either(x: Any, inplace: bool = False) -> Any:
            return Flat(rule(x.value)) if isinstance(x, Flat) else rule(_image(x))

        return either

    def relu(self, x: Value) -> Value:
        return self._done(Pointwise(x, Value(*x.shape), relu=True))

    def convolution(self, layer: nn.Conv2d, x: Any) -> Value:
        x = _image(x)
        if layer.padding_mode != "zeros":
            raise _refuse(f"padding mode {layer.padding_mode!r}")
        out = _shape_of(layer, x)
        weight = layer.weight.detach().double().numpy()
        o, i, ky, kx = _nonzero(weight)
        group = o // (layer.out_channels // layer.groups)
        above, left = (_padding(layer, 0), _padding(layer, 1))
        return self._taps(
            x, out, weight[o, i, ky, kx], layer.bias, o=o, i=group * weight.shape[1] + i,
            dy=ky * layer.dilation[0] - above, dx=kx * layer.dilation[1] - left,
            stride=pair(layer.stride), flat=False, dense=weight.size,
        )  # fmt: skip

    def linear(self, layer: nn.Linear, x: Any) -> Flat:
        if not isinstance(x, Flat):
            raise _refuse("linear layer on unflattened values")
        _, height, width = x.value.shape
        weight = layer.weight.detach().double().numpy()
        o, feature = _nonzero(weight)
        i, place = np.divmod(feature, height * width)
        dy, dx = np.divmod(place, width)
        out = Value(layer.out_features, 1, 1)
        return Flat(self._taps(
            x.value, out, weight[o, feature], layer.bias, o=o, i=i, dy=dy, dx=dx, stride=(1, 1), flat=True, dense=weight.size,
        ))  # fmt: skip

    def _taps(self, x: Value, out: Value, weight: np.ndarray, bias: Tensor | None, dense: int, **taps: Any) -> Value:
        self.dense += dense * out.height * out.width
        biases = np.zeros(out.channels) if bias is None else bias.detach().double().numpy()
        return self._done(Taps(x, out, weight=weight, bias=biases, **taps))

    def batch_norm(self, layer: nn.BatchNorm2d, x: Any) -> Value:
        x = _image(x)
        if layer.running_mean is None or layer.running_var is None or layer.training:
            raise _refuse("BatchNorm that normalises by the batch")
        scale = 1 / np.sqrt(layer.running_var.double().numpy() + layer.eps)
        bias = np.zeros(x.channels)
        if layer.affine:
            scale, bias = scale * layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy()
        return self._done(Pointwise(x, Value(*x.shape), affine=(layer.running_mean.double().numpy(), scale, bias)))

    def normalise(self, layer: Normalize, x: Any) -> Value:
        x = _image(x)
        mean, std = (one.double().flatten().numpy() for one in (layer.mean, layer.std))
        spread = np.ones(x.channels)
        return self._done(Pointwise(x, Value(*x.shape), affine=(mean * spread, spread / std, np.zeros(x.channels))))

    def add(self, a: Any, b: Any, *more: Any, **options: Any) -> Any:
        if more or options or type(a) is not type(b) or not isinstance(a, Value | Flat):
            raise _refuse("sum of anything but two values")
        if isinstance(a, Flat):
            return Flat(self.add(a.value, b.value))
        if a.shape != b.shape:
            raise _refuse(f"sum of shapes {a.shape} and {b.shape}")
        return self._done(Pointwise(a, Value(*a.shape), addend=b))

    def concatenate(self, parts: Sequence[Any], dim: int = 0) -> Any:
        values = [part.value if isinstance(part, Flat) else part for part in parts]
        flat = {isinstance(part, Flat) for part in parts}
        if not all(isinstance(one, Value) for one in values) or len(flat) != 1 or len({one.shape[1:] for one in values}) != 1:
            raise _refuse("concatenation of unlike values")
        if flat == {True} and any(one.shape[1:] != (1, 1) for one in values):
            raise _refuse("concatenation of flattened images")
        if dim not in (1, -1 if flat == {True} else -3):
            raise _refuse(f"concatenation along dimension {dim}")
        out = Value(sum(one.channels for one in values), *values[0].shape[1:])
        self._done(Concatenation(values[0], out, parts=tuple(values)))
        return Flat(out) if flat == {True} else out

    def flatten(self, x: Any, start_dim: int = 0, end_dim: int = -1) -> Flat:
        if start_dim != 1 or end_dim not in (-1, 1 if isinstance(x, Flat) else 3):
            raise _refuse(f"flatten from {start_dim} to {end_dim}")
        return x if isinstance(x, Flat) else Flat(_image(x))

    def max_pool(self, layer: nn.MaxPool2d, x: Any) -> Value:
        x = _image(x)
        if pair(layer.dilation) != (1, 1) or layer.return_indices:
            raise _refuse("max pooling with dilation or indices")
        if np.prod(pair(layer.kernel_size)) > LARGEST_WINDOW:
            raise _refuse(f"max pooling over {layer.kernel_size}")
        out = _shape_of(layer, x)
        return self._done(Pool(x, out, down=_windows(layer, x, out, 0)[0], across=_windows(layer, x, out, 1)[0]))

    def average_pool(self, layer: nn.AvgPool2d, x: Any) -> Value:
        x = _image(x)
        out = _shape_of(layer, x)
        (down, tall), (across, wide) = _windows(layer, x, out, 0), _windows(layer, x, out, 1)
        if not layer.count_include_pad:
            tall, wide = down.last - down.first, across.last - across.first
        sizes = np.outer(tall, wide)
        if layer.divisor_override is not None:
            sizes = np.full_like(sizes, layer.divisor_override)
        return self._done(Pool(x, out, down=down, across=across, share=1 / sizes))

    def adaptive_pool(self, layer: nn.AdaptiveAvgPool2d, x: Any) -> Value:
        x = _image(x)
        out = _shape_of(layer, x)
        down, across = _parts(x.height, out.height), _parts(x.width, out.width)
        sizes = np.outer(down.last - down.first, across.last - across.first)
        return self._done(Pool(x, out, down=down, across=across, share=1 / sizes))


def _as_layer(layer: type, names: Sequence[str], rule: Callable[..., Any]) -> Callable[..., Any]:
    """The rule of a functional pooling, from its layer's."""
    return lambda x, *args, **options: rule(layer(**dict(zip(names, args)), **options), x)


def _nonzero(weight: np.ndarray) -> tuple[np.ndarray, ...]:
    return tuple(index.astype(np.int32) for index in np.nonzero(weight))


def _image(x: Any) -> Value:
    if not isinstance(x, Value):
        raise _refuse("layer for images after the network was flattened")
    return x


def _shape_of(layer: Any, x: Value) -> Value:
    """What the layer makes of x."""
    image = torch.empty(1, *x.shape, device="meta")
    if isinstance(layer, nn.Conv2d):
        weight = layer.weight.to("meta")
        made = F.conv2d(image, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)
    else:
        made = layer(image)
    return Value(*made.shape[1:])


def _padding(layer: nn.Conv2d, side: int) -> int:
    """Zeros above or to the left; 'same' puts the odd one below or to the right."""
    if isinstance(layer.padding, str):
        return layer.dilation[side] * (layer.kernel_size[side] - 1) // 2 if layer.padding == "same" else 0
    return pair(layer.padding)[side]


def _windows(layer: Any, x: Value, out: Value, side: int) -> tuple[Windows, np.ndarray]:
    """The windows inside the image along one direction, and their sizes with padding."""
    inputs, outputs = ((x.height, out.height), (x.width, out.width))[side]
    size, stride, pad = (pair(one)[side] for one in (layer.kernel_size, layer.stride, layer.padding))
    start = np.arange(outputs) * stride - pad
    with_padding = np.minimum(start + size, inputs + pad) - start
    return Windows(np.maximum(start, 0), np.minimum(start + size, inputs)), with_padding


def _parts(inputs: int, outputs: int) -> Windows:
    """Adaptive windows, as torch cuts them."""
    at = np.arange(outputs)
    return Windows(at * inputs // outputs, -(-(at + 1) * inputs // outputs))


# ---- fusing -----------------------------------------------------------------------------------------------------------------


def _fused(image: Value, operations: list[Operation], output: Value, flat: bool, dense: int) -> Network:
    graph = _Graph(image, operations, output)
    graph.drop_unused()
    for rule in (_affine_into_taps, _sum_into_producer, _relu_into_producer, _relu_after_maximum):
        for operation in list(graph.operations):
            rule(graph, operation)
    affine = _affine_of_images(graph)
    taps = [one for one in graph.operations if isinstance(one, Taps)]
    for one in taps:
        _round(one)
    kept = sum(len(one.weight) * one.out.height * one.out.width for one in taps)
    if not graph.operations:
        raise NoProgramError("the network does nothing but normalise its input")
    if kept > DENSE_FROM * dense:
        raise NoProgramError(f"{kept / dense:.0%} of the multiplications remain")
    return Network(graph.image, affine, tuple(graph.operations), output, flat, kept, dense)


class _Graph:
    def __init__(self, image: Value, operations: list[Operation], output: Value) -> None:
        self.image, self.operations, self.output = image, operations, output

    def uses(self, value: Value) -> int:
        return Counter(one for operation in self.operations for one in operation.sources)[value] + (value is self.output)

    def producer(self, value: Value) -> Operation | None:
        return next((one for one in self.operations if one.out is value), None)

    def drop_unused(self) -> None:
        for operation in reversed(list(self.operations)):
            if not self.uses(operation.out):
                self.operations.remove(operation)

    def only_producer(self, value: Value) -> Operation | None:
        """The operation that made a value which nothing else reads, and that something may still be fused into."""
        made = self.producer(value)
        return made if made is not None and not made.relu and self.uses(value) == 1 else None

    def absorb(self, made: Operation, operation: Operation) -> None:
        """`operation` is done by `made` from now on."""
        made.out = operation.out
        self.operations.remove(operation)


def _affine_into_taps(graph: _Graph, operation: Operation) -> None:
    made = graph.only_producer(operation.source)
    if not isinstance(operation, Pointwise) or operation.affine is None or not isinstance(made, Taps) or made.addend is not None:
        return
    shift, scale, bias = operation.affine
    made.weight = made.weight * scale[made.o]
    made.bias = (made.bias - shift) * scale + bias
    graph.absorb(made, operation)


def _sum_into_producer(graph: _Graph, operation: Operation) -> None:
    """The later of the two that are added takes the other one along."""
    if not isinstance(operation, Pointwise) or operation.addend is None or operation.affine is not None:
        return
    order = {one.out: at for at, one in enumerate(graph.operations)}
    first, second = sorted(operation.sources, key=lambda one: order.get(one, -1))
    made = graph.only_producer(second)
    if first is second or made is None or made.addend is not None or isinstance(made, Concatenation):
        return
    made.addend, made.relu = first, operation.relu
    graph.absorb(made, operation)


def _relu_into_producer(graph: _Graph, operation: Operation) -> None:
    made = graph.only_producer(operation.source)
    plain = isinstance(operation, Pointwise) and operation.affine is None and operation.addend is None and operation.relu
    if plain and made is not None and not isinstance(made, Concatenation):
        made.relu = True
        graph.absorb(made, operation)


def _relu_after_maximum(graph: _Graph, operation: Operation) -> None:
    """max(relu(x)) = relu(max(x)), with the same gradient; the smaller value has the smaller mask."""
    if isinstance(operation, Pool) and operation.share is None and operation.addend is None:
        made = graph.producer(operation.source)
        if made is not None and made.relu and graph.uses(operation.source) == 1:
            made.relu, operation.relu = False, True


def _affine_of_images(graph: _Graph) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    first = graph.operations[0]
    plain = isinstance(first, Pointwise) and first.affine is not None and first.addend is None and not first.relu
    if not plain or first.source is not graph.image or graph.uses(graph.image) != 1 or first.out is graph.output:
        return None
    assert isinstance(first, Pointwise)
    graph.operations.remove(first)
    graph.image = first.out
    return first.affine


def _round(taps: Taps) -> None:
    """To float32, once; what becomes zero is gone. Raises NoProgramError where a folded number is beyond float32."""
    with np.errstate(over="ignore", under="ignore"):
        weight, bias = taps.weight.astype(np.float32), taps.bias.astype(np.float32)
    if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
        raise NoProgramError("a weight is beyond float32 once its BatchNorm is folded in")
    kept = weight != 0
    taps.o, taps.i, taps.dy, taps.dx = taps.o[kept], taps.i[kept], taps.dy[kept], taps.dx[kept]
    taps.weight, taps.bias = weight[kept], bias
