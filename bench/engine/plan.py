"""A network's operations as steps of the kernel, forwards and backwards, and where each step reads and writes."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from .layers import Concatenation, Network, Operation, Pointwise, Pool, Taps, Value, Windows

LANES = 16
PACK, UNPACK, CONVOLVE, POINTWISE, MAX_POOL, MAX_POOL_BACK, AVERAGE_POOL, AVERAGE_POOL_BACK = range(8)

Affine = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(eq=False)
class Buffer:
    """Memory for a value of 16 images, with as many zeros around every channel as its readers reach for."""

    channels: int
    height: int
    width: int
    above: int = 0
    aside: int = 0

    def widen(self, above: int, aside: int) -> None:
        self.above, self.aside = max(self.above, above), max(self.aside, aside)

    @property
    def geometry(self) -> tuple[int, int, int, int, int]:
        return self.channels, self.height, self.width, self.above, self.aside

    # rows outermost: what a convolution reads for one row of its output lies close together
    @property
    def plane(self) -> int:
        """Floats of one row of one channel."""
        return (self.width + 2 * self.aside) * LANES

    @property
    def row(self) -> int:
        return self.channels * self.plane

    @property
    def floats(self) -> int:
        return (self.height + 2 * self.above) * self.row


@dataclass(frozen=True)
class View:
    """Some channels of a buffer, from `first` on."""

    buffer: Buffer
    first: int
    shape: tuple[int, int, int]

    @property
    def whole(self) -> bool:
        return self.shape[0] == self.buffer.channels

    @property
    def start(self) -> int:
        """Where its first pixel lies, in floats."""
        return self.first * self.buffer.plane + self.buffer.above * self.buffer.row + self.buffer.aside * LANES

    def offsets(self, channel: np.ndarray, y: np.ndarray | int, x: np.ndarray | int) -> np.ndarray:
        """Floats from the first pixel to these."""
        return channel.astype(np.int64) * self.buffer.plane + np.asarray(y) * self.buffer.row + np.asarray(x) * LANES


@dataclass(frozen=True)
class Grid:
    """The pixels (y0 + a * down, x0 + b * across) of every channel; `flat`: every pixel is a channel of its own."""

    y: int = 0
    x: int = 0
    down: int = 1
    across: int = 1
    flat: bool = False


ALL = Grid()


@dataclass(frozen=True)
class Weights:
    """Taps of a convolution step, sorted by the output channel: source channel, and where it lies from the output's pixel."""

    out: np.ndarray
    channel: np.ndarray
    dy: np.ndarray
    dx: np.ndarray
    weight: np.ndarray
    bias: np.ndarray | None


@dataclass(frozen=True)
class Step:
    """One call of the kernel. `written` and `read`: offsets in a block's record of the bits of a ReLU."""

    kind: int
    channels: int
    rows: int
    columns: int
    source: View | None = None
    out: View | None = None
    addend: View | None = None
    reads: Grid = ALL
    writes: Grid = ALL
    relu: bool = False
    written: int = -1
    read: int = -1
    weights: Weights | None = None
    affine: Affine | None = None
    down: Windows | None = None
    across: Windows | None = None
    inputs: tuple[int, int] = (0, 0)
    share: np.ndarray | None = None
    which: int = -1


Group = list[Step]  # steps that make one buffer together


@dataclass
class Plan:
    """Groups of steps forwards and backwards; what a block of 16 images has to remember for the way back, in bytes."""

    forward: list[Group] = field(default_factory=list)
    backward: list[Group] = field(default_factory=list)
    record: int = 0


def plan(network: Network) -> Plan:
    made = Plan()
    records = _Forward(network, made).records
    _Backward(network, made, records)
    return made


def _new(value: Value) -> View:
    return View(Buffer(*value.shape), 0, value.shape)


# ---- forwards ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Records:
    """Where the bits of a value's ReLU, and the winners of a maximum, lie in a block's record."""

    bits: dict[Value, int]
    winners: dict[Operation, int]


class _Forward:
    def __init__(self, network: Network, made: Plan) -> None:
        self.plan, self.records = made, _Records({}, {})
        self.views: dict[Value, View] = {}
        self.homes = _homes(network)
        image = self._place(network.input)
        made.forward.append([Step(PACK, *image.shape, out=image, affine=network.affine)])
        for operation in network.operations:
            self._operation(operation)
        output = self.views[network.output]
        made.forward.append([Step(UNPACK, *output.shape, source=output)])

    def _place(self, value: Value) -> View:
        """Its own buffer, or its channels of the concatenation that it goes into."""
        if value in self.homes:
            whole, first = self.homes[value]
            self.views[value] = View(self._place_once(whole).buffer, first, value.shape)
        else:
            self._place_once(value)
        return self.views[value]

    def _place_once(self, value: Value) -> View:
        return self.views.setdefault(value, _new(value))

    def _remember(self, size: int) -> int:
        at = self.plan.record
        self.plan.record += -(-size // 64) * 64
        return at

    def _operation(self, operation: Operation) -> None:
        if isinstance(operation, Concatenation):
            self._concatenate(operation)
            return
        source, out = self.views[operation.source], self._place(operation.out)
        addend = None if operation.addend is None else self.views[operation.addend]
        bits = -1
        if operation.relu:
            bits = self.records.bits[operation.out] = self._remember(2 * out.shape[0] * out.shape[1] * out.shape[2])
        step = Step(-1, *out.shape, source=source, out=out, addend=addend, relu=operation.relu, written=bits)
        self.plan.forward.append([self._specific(step, operation)])

    def _specific(self, step: Step, operation: Operation) -> Step:
        if isinstance(operation, Taps):
            return _convolution(step, operation)
        if isinstance(operation, Pointwise):
            return replace(step, kind=POINTWISE, affine=operation.affine)
        assert isinstance(operation, Pool)
        inputs = operation.source.shape[1:]
        pool = replace(step, down=operation.down, across=operation.across, inputs=inputs)
        if operation.share is not None:
            return replace(pool, kind=AVERAGE_POOL, share=operation.share)
        channels, rows, columns = operation.out.shape
        winners = self.records.winners[operation] = self._remember(LANES * channels * rows * columns)
        return replace(pool, kind=MAX_POOL, which=winners)

    def _concatenate(self, operation: Concatenation) -> None:
        """Parts that were not written in their place are copied there."""
        whole, first = self._place(operation.out), 0
        for part in operation.parts:
            home = self.homes.get(part)
            if home is None or home != (operation.out, first):
                out = View(whole.buffer, whole.first + first, part.shape)
                self.plan.forward.append([Step(POINTWISE, *part.shape, source=self.views[part], out=out)])
            first += part.channels


def _homes(network: Network) -> dict[Value, tuple[Value, int]]:
    """(whole, first channel) for what can be written straight into the concatenation that it goes into."""
    homes: dict[Value, tuple[Value, int]] = {}
    wholes = {one.out for one in network.operations if isinstance(one, Concatenation)}
    for operation in network.operations:
        first = 0
        for part in operation.sources if isinstance(operation, Concatenation) else ():
            if part not in homes and part not in wholes and part is not network.input:
                homes[part] = operation.out, first
            first += part.channels
    return homes


def _convolution(step: Step, operation: Taps) -> Step:
    down, across = operation.stride
    weights = Weights(operation.o, operation.i, operation.dy, operation.dx, operation.weight, operation.bias)
    return _reaching(replace(step, kind=CONVOLVE, reads=Grid(down=down, across=across), weights=weights))


def _reaching(step: Step) -> Step:
    """The step, its source with zeros as far out as it reaches."""
    assert step.source is not None
    assert step.weights is not None
    _, height, width = step.source.shape
    above = _beyond(step.weights.dy, (step.rows - 1) * step.reads.down, height)
    step.source.buffer.widen(above, _beyond(step.weights.dx, (step.columns - 1) * step.reads.across, width))
    return step


def _beyond(offset: np.ndarray, last: int, size: int) -> int:
    return max(0, -int(offset.min()), last + int(offset.max()) - size + 1) if len(offset) else 0


# ---- backwards --------------------------------------------------------------------------------------------------------------


class _Backward:
    """Walks the operations from the last to the first; the gradient of a value is complete once all its readers were passed.

    The last contribution to a gradient is also where the value's ReLU is undone.
    """

    def __init__(self, network: Network, made: Plan, records: _Records) -> None:
        self.plan, self.records = made, records
        self.left = Counter(one for operation in network.operations for one in operation.sources)
        self.left[network.output] += 1
        self.gradients: dict[Value, View] = {}
        given = _new(network.output)
        made.backward.append([Step(PACK, *given.shape, out=given)])
        self._same(network.output, given)
        for operation in reversed(network.operations):
            if operation.out in self.gradients:
                self._operation(operation, self.gradients.pop(operation.out))
        gradient = self.gradients[network.input]
        made.backward.append([Step(UNPACK, *gradient.shape, source=gradient, affine=network.affine)])

    def _operation(self, operation: Operation, gradient: View) -> None:
        if isinstance(operation, Concatenation):
            first = gradient.first
            for part in operation.parts:
                self._same(part, View(gradient.buffer, first, part.shape))
                first += part.channels
            return
        if operation.addend is not None:
            self._same(operation.addend, gradient)
        if isinstance(operation, Pointwise) and operation.affine is None:
            self._same(operation.source, gradient)
        else:
            self._made(operation.source, gradient, operation)

    def _step(self, value: Value, source: View) -> Step:
        """A contribution to the value's gradient, added to what is there already."""
        self.left[value] -= 1
        bits = -1 if self.left[value] else self.records.bits.get(value, -1)
        return Step(POINTWISE, *value.shape, source=source, out=_new(value), addend=self.gradients.get(value), read=bits)

    def _same(self, value: Value, gradient: View) -> None:
        """The value's gradient takes in `gradient` as it is; if there is nothing else to do, nothing is done."""
        step = self._step(value, gradient)
        if step.addend is None and step.read < 0:
            self.gradients[value] = gradient
        else:
            self._emit(value, [step])

    def _made(self, value: Value, gradient: View, operation: Operation) -> None:
        step = self._step(value, gradient)
        if isinstance(operation, Taps):
            self._emit(value, [_reaching(one) for one in _transposed(step, operation)])
        elif isinstance(operation, Pool):
            kind = MAX_POOL_BACK if operation.share is None else AVERAGE_POOL_BACK
            self._emit(value, [replace(
                step, kind=kind, down=operation.down, across=operation.across, inputs=value.shape[1:], share=operation.share,
                which=self.records.winners.get(operation, -1),
            )])  # fmt: skip
        else:
            assert isinstance(operation, Pointwise)
            assert operation.affine is not None
            _, scale, _ = operation.affine
            self._emit(value, [replace(step, affine=(np.zeros_like(scale), scale, np.zeros_like(scale)))])

    def _emit(self, value: Value, group: Group) -> None:
        self.plan.backward.append(group)
        out = group[0].out
        assert out is not None
        self.gradients[value] = out


def _transposed(step: Step, taps: Taps) -> Iterator[Step]:
    """The gradient of a convolution's source: one step per remainder of the pixel's coordinates by the stride."""
    if taps.flat:
        _, height, width = taps.source.shape
        feature = (taps.i.astype(np.int64) * height + taps.dy) * width + taps.dx
        zero = np.zeros_like(taps.o)
        weights = _sorted(Weights(feature, taps.o, zero, zero, taps.weight, None))
        yield replace(
            step, kind=CONVOLVE, channels=taps.source.channels * height * width, rows=1, columns=1, weights=weights,
            writes=Grid(flat=True),
        )  # fmt: skip
        return
    down, across = taps.stride
    for y, x in itertools.product(range(down), range(across)):
        rows, columns = -(-(step.rows - y) // down), -(-(step.columns - x) // across)
        if rows <= 0 or columns <= 0:
            continue
        at = ((y - taps.dy) % down == 0) & ((x - taps.dx) % across == 0)
        weights = Weights(
            taps.i[at], taps.o[at], (y - taps.dy[at]) // down, (x - taps.dx[at]) // across, taps.weight[at], None
        )
        yield replace(
            step, kind=CONVOLVE, rows=rows, columns=columns, weights=_sorted(weights), writes=Grid(y, x, down, across)
        )


def _sorted(weights: Weights) -> Weights:
    order = np.argsort(weights.out, kind="stable")
    return Weights(
        weights.out[order], weights.channel[order], weights.dy[order], weights.dx[order], weights.weight[order], weights.bias
    )
