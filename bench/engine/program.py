"""A plan bound to memory: buffers shared by what does not live at the same time, and the structs that the kernel reads."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .kernel import NoKernelError, load
from .layers import Network, NoProgramError
from .plan import LANES, POINTWISE, Buffer, Grid, Group, Step, View, plan

_pointer, _size = ctypes.c_void_p, ctypes.c_int64


class _Place(ctypes.Structure):
    _fields_ = (("p", _pointer), ("at", _pointer), ("row", _size), ("column", _size))


class _Windows(ctypes.Structure):
    _fields_ = (("first", _pointer), ("last", _pointer), ("since", _pointer), ("to", _pointer))


class _Step(ctypes.Structure):
    """As in kernel.cpp."""

    _fields_ = (
        ("kind", _size), ("channels", _size), ("rows", _size), ("columns", _size),
        ("source", _Place), ("out", _Place), ("addend", _Place), ("bits", _Place),
        ("relu", _size), ("written", _size), ("read", _size),
        ("taps", _pointer), ("offset", _pointer), ("weight", _pointer),
        ("shift", _pointer), ("scale", _pointer), ("bias", _pointer),
        ("down", _Windows), ("across", _Windows), ("share", _pointer), ("outputs_across", _size),
        ("which", _size), ("which_channel", _size),
    )  # fmt: skip


@dataclass(frozen=True)
class _Bound:
    """A step's struct but for the addresses of its buffers: name of the place, slot, floats from the slot's start."""

    struct: _Step
    places: tuple[tuple[str, int, int], ...]


class Program:
    """Logits, and input gradients, of batches of any size; an image's are the same, bit for bit, in every batch.

    Several threads may run one program. Raises NoProgramError or NoKernelError.
    """

    def __init__(self, network: Network, variant: str) -> None:
        self.network, self.variant = network, variant
        self._library = load(variant)
        if self._library.engine_step_size() != ctypes.sizeof(_Step):
            raise NoKernelError("the compiler lays out the kernel's structs in another way")
        made = plan(network)
        self.slots: list[int] = []  # floats of each
        self._slot_of_kind: dict[tuple[int, ...], list[int]] = {}
        self._alive: list[Any] = []  # arrays that the structs point to
        self.record = made.record
        self._forward = self._bind(made.forward)
        self._backward = self._bind(made.backward)
        self._idle: list[_Workspace] = []
        self.in_shape = network.input.shape
        channels, height, width = network.output.shape
        self.out_shape: tuple[int, ...] = (channels * height * width,) if network.flat else (channels, height, width)

    def __deepcopy__(self, memo: dict[int, Any]) -> Program:
        return self  # nothing in it ever changes but idle memory

    def forward(self, x: Tensor, remember: bool) -> tuple[Tensor, Tensor | None]:
        """Logits of x, float32 [N, C, H, W] contiguous, and if wanted what `backward` needs to know."""
        out = torch.empty(len(x), *self.out_shape)
        blocks = -(-len(x) // LANES)
        record = torch.empty(blocks * self.record, dtype=torch.uint8) if remember else None
        self._run("forward", x, out, record)
        return out, record

    def backward(self, gradient: Tensor, record: Tensor) -> Tensor:
        """The gradient of the images, from that of their logits."""
        out = torch.empty(len(gradient), *self.in_shape)
        self._run("backward", gradient, out, record)
        return out

    def _run(self, way: str, x: Tensor, out: Tensor, record: Tensor | None) -> None:
        try:
            workspace = self._idle.pop()
        except IndexError:
            workspace = _Workspace(self)
        steps, images = workspace.steps[way], len(x)
        self._library.engine_run(
            ctypes.addressof(steps), len(steps), x.data_ptr(), x[0].numel(), out.data_ptr(), out[0].numel(), images,
            None if record is None else record.data_ptr(), self.record,
        )  # fmt: skip
        self._idle.append(workspace)

    # ---- memory ---------------------------------------------------------------------------------------------------------

    def _bind(self, groups: list[Group]) -> list[_Bound]:
        slots = self._allocate(groups)
        return [self._bound(step, slots) for group in groups for step in group]

    def _allocate(self, groups: list[Group]) -> dict[Buffer, int]:
        """A slot per buffer; two buffers share one only where they have one geometry, whose borders then stay zero."""
        last = {buffer: at for at, group in enumerate(groups) for step in group for buffer in _buffers(step)}
        free = {kind: list(slots) for kind, slots in self._slot_of_kind.items()}
        found: dict[Buffer, int] = {}
        for at, group in enumerate(groups):
            out, released = group[0].out, {one for step in group for one in _buffers(step) if last[one] == at}
            if out is not None and out.buffer not in found:
                taken = _in_place(group[0], out, released, found)
                released -= {taken}
                found[out.buffer] = self._slot(out.buffer, free) if taken is None else found[taken]
            for one in released:
                free.setdefault(one.geometry, []).append(found[one])
        return found

    def _slot(self, buffer: Buffer, free: dict[tuple[int, ...], list[int]]) -> int:
        if free.get(buffer.geometry):
            return free[buffer.geometry].pop()
        self.slots.append(buffer.floats)
        self._slot_of_kind.setdefault(buffer.geometry, []).append(len(self.slots) - 1)
        return len(self.slots) - 1

    # ---- structs --------------------------------------------------------------------------------------------------------

    def _array(self, values: np.ndarray, kind: Any) -> int:
        """The address of the values, for as long as the program lives."""
        kept = np.ascontiguousarray(values, dtype=kind)
        self._alive.append(kept)
        return kept.ctypes.data

    def _bound(self, step: Step, slots: dict[Buffer, int]) -> _Bound:
        struct = _Step(kind=step.kind, channels=step.channels, rows=step.rows, columns=step.columns)
        struct.relu, struct.written, struct.read, struct.which = step.relu, step.written, step.read, step.which
        places = []
        for name, view in (("source", step.source), ("out", step.out), ("addend", step.addend)):
            if view is not None:
                setattr(struct, name, self._place(view, step.reads if name == "source" else step.writes))
                places.append((name, slots[view.buffer], view.start))
        if step.out is not None:
            struct.bits = self._bits(step.out, step.writes)
        self._weights(struct, step)
        self._pooling(struct, step)
        if step.affine is not None:
            struct.shift, struct.scale, struct.bias = (self._array(one, np.float32) for one in step.affine)
        return _Bound(struct, tuple(places))

    def _place(self, view: View, grid: Grid) -> _Place:
        c, y, x = _first_pixels(view, grid)
        row, column = grid.down * view.buffer.row, grid.across * LANES
        return _Place(at=self._array(view.offsets(c, y, x), np.int64), row=row, column=column)

    def _bits(self, view: View, grid: Grid) -> _Place:
        """One per pixel, without borders."""
        _, height, width = view.shape
        c, y, x = _first_pixels(view, grid)
        at = (c * height + y) * width + x
        return _Place(at=self._array(at, np.int64), row=grid.down * width, column=grid.across)

    def _weights(self, struct: _Step, step: Step) -> None:
        weights = step.weights
        if weights is None or step.source is None:
            return
        offsets = step.source.offsets(weights.channel, weights.dy, weights.dx)
        if len(offsets) and int(np.abs(offsets).max()) > np.iinfo(np.int32).max - step.source.buffer.floats:
            raise NoProgramError(f"a value of {step.source.shape} is too large")
        counts = np.bincount(weights.out, minlength=step.channels)
        struct.taps = self._array(np.concatenate([[0], np.cumsum(counts)]), np.int32)
        struct.offset, struct.weight = self._array(offsets, np.int32), self._array(weights.weight, np.float32)
        if weights.bias is not None:
            struct.bias = self._array(weights.bias, np.float32)

    def _pooling(self, struct: _Step, step: Step) -> None:
        if step.down is None or step.across is None:
            return
        for name, windows, inputs in (("down", step.down, step.inputs[0]), ("across", step.across, step.inputs[1])):
            columns = (windows.first, windows.last, *windows.covering(inputs))
            setattr(struct, name, _Windows(*(self._array(one, np.int32) for one in columns)))
        struct.outputs_across = len(step.across.first)
        struct.which_channel = len(step.down.first) * len(step.across.first) * LANES
        if step.share is not None:
            struct.share = self._array(step.share, np.float32)

    def bound(self, way: str) -> list[_Bound]:
        return self._forward if way == "forward" else self._backward


class _Workspace:
    """The memory of one block of images; borders are zero and stay so."""

    def __init__(self, program: Program) -> None:
        self.slots = [torch.zeros(floats) for floats in program.slots]
        self.steps = {way: self._addressed(program.bound(way)) for way in ("forward", "backward")}

    def _addressed(self, bound: list[_Bound]) -> Any:
        steps = (_Step * len(bound))(*(one.struct for one in bound))
        for step, one in zip(steps, bound):
            for name, slot, start in one.places:
                getattr(step, name).p = self.slots[slot].data_ptr() + 4 * start
        return steps


def _buffers(step: Step) -> set[Buffer]:
    return {view.buffer for view in (step.source, step.out, step.addend) if view is not None}


def _in_place(step: Step, out: View, released: set[Buffer], found: dict[Buffer, int]) -> Buffer | None:
    """A buffer that the step may overwrite while it reads it: one that it reads pixel by pixel, for the last time."""
    pixelwise = [step.addend] if step.kind != POINTWISE else [step.addend, step.source]
    elsewhere = step.source.buffer if step.source is not None and step.kind != POINTWISE else None
    for view in pixelwise:
        last_read = view is not None and view.whole and view.buffer in released and view.buffer is not elsewhere
        if view is not None and last_read and out.whole and view.buffer.geometry == out.buffer.geometry:
            return view.buffer
    return None


def _first_pixels(view: View, grid: Grid) -> tuple[np.ndarray, Any, Any]:
    """Channel, row and column of the first pixel of every channel that a step writes or reads."""
    channels, height, width = view.shape
    if grid.flat:
        c, y, x = np.indices((channels, height, width)).reshape(3, -1)
        return c, y, x
    return np.arange(channels), grid.y, grid.x
