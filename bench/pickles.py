"""What a pickle says, read without doing any of it: `pickletools` walks the codes, nothing is imported, built or executed."""

from __future__ import annotations

import pickletools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass
class Inert:
    """What a pickle names or asks to call, kept as words: it is never looked up and never called."""

    name: str
    arguments: Any = ()
    state: Any = None


class _Walk:
    """The stack and the memo of a pickle whose objects stay `Inert`."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def since_mark(self) -> list[Any]:
        at = max(i for i, value in enumerate(self.stack) if value is _MARK)
        values = self.stack[at + 1 :]
        del self.stack[at:]
        return values

    def last(self, count: int) -> tuple[Any, ...]:
        if len(self.stack) < count:
            raise ValueError("the pickle takes more from its stack than it put there")
        values = tuple(self.stack[-count:])
        del self.stack[-count:]
        return values

    def extend(self, values: Sequence[Any]) -> None:
        self.stack[-1].extend(values)

    def set_items(self, values: Sequence[Any]) -> None:
        for key, value in zip(values[::2], values[1::2], strict=True):
            self.stack[-1][_bytes(key).decode("latin-1")] = value

    def new_dict(self, values: Sequence[Any]) -> None:
        self.push({})
        self.set_items(values)

    def name(self, name: str) -> None:
        if name not in _NAMES:
            raise ValueError(f"it names {name}, which no CIFAR batch does")
        self.push(Inert(name))

    def reduce(self) -> None:
        function, arguments = self.last(2)
        self.push(Inert(function.name, arguments))

    def build(self) -> None:
        (state,) = self.last(1)
        self.stack[-1].state = state


_MARK = object()
_NAMES = {"_codecs.encode", "numpy.ndarray", "numpy.dtype"} | {
    f"numpy.{core}.{name}" for core in ("core", "_core") for name in ("multiarray._reconstruct", "numeric._frombuffer")
}
_LITERALS = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "UNICODE", "BINUNICODE",
    "SHORT_BINUNICODE", "BINUNICODE8",
}  # fmt: skip
_SILENT = {"PROTO", "FRAME", "STOP"}
_STEPS: dict[str, Callable[[_Walk, Any], Any]] = {
    "NONE": lambda w, _: w.push(None),
    "NEWTRUE": lambda w, _: w.push(True),
    "NEWFALSE": lambda w, _: w.push(False),
    "MARK": lambda w, _: w.push(_MARK),
    "EMPTY_LIST": lambda w, _: w.push([]),
    "EMPTY_TUPLE": lambda w, _: w.push(()),
    "EMPTY_DICT": lambda w, _: w.push({}),
    "LIST": lambda w, _: w.push(w.since_mark()),
    "DICT": lambda w, _: w.new_dict(w.since_mark()),
    "TUPLE": lambda w, _: w.push(tuple(w.since_mark())),
    "TUPLE1": lambda w, _: w.push(w.last(1)),
    "TUPLE2": lambda w, _: w.push(w.last(2)),
    "TUPLE3": lambda w, _: w.push(w.last(3)),
    "APPEND": lambda w, _: w.extend(w.last(1)),
    "APPENDS": lambda w, _: w.extend(w.since_mark()),
    "SETITEM": lambda w, _: w.set_items(w.last(2)),
    "SETITEMS": lambda w, _: w.set_items(w.since_mark()),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), lambda w, at: w.memo.update({at: w.stack[-1]})),
    "MEMOIZE": lambda w, _: w.memo.update({len(w.memo): w.stack[-1]}),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda w, at: w.push(w.memo[at])),
    "GLOBAL": lambda w, name: w.name(name.replace(" ", ".")),
    "STACK_GLOBAL": lambda w, _: w.name(".".join(w.last(2))),
    "REDUCE": lambda w, _: w.reduce(),
    "BUILD": lambda w, _: w.build(),
}


def walk_pickle(content: bytes) -> Any:
    """The value a pickle describes, with every name and call left inert: nothing is imported, built or executed.

    Lists, tuples, dicts (keys as text), numbers and strings come as they are, everything else as `Inert`. Raises ValueError
    and its like where the pickle is not a plain CIFAR batch.
    """
    walk = _Walk()
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name in _LITERALS:
            walk.push(argument)
        elif opcode.name in _STEPS:
            _STEPS[opcode.name](walk, argument)
        elif opcode.name not in _SILENT:
            raise ValueError(f"it uses the pickle code {opcode.name}, which no CIFAR batch does")
    return walk.stack[-1]


def _bytes(value: Any) -> bytes:
    """The bytes a pickled string stands for: Python 2 wrote str, protocol 2 of Python 3 writes a call of encode."""
    if isinstance(value, Inert) and value.name == "_codecs.encode":
        value, encoding = value.arguments
        if encoding not in ("latin1", "latin-1"):
            raise ValueError(f"it encodes bytes as {encoding!r}")
    return value.encode("latin-1") if isinstance(value, str) else bytes(memoryview(value))


def array_of(value: Any) -> np.ndarray:
    """The array that a list, a byte string or an inert numpy array describes."""
    if isinstance(value, list):
        return np.array(value)
    if not isinstance(value, Inert) or value.name == "_codecs.encode":
        return np.frombuffer(_bytes(value), np.uint8)
    if value.name.endswith("_frombuffer"):
        data, dtype, shape, order = value.arguments
    else:
        _, shape, dtype, fortran, data = value.state
        order = "F" if fortran else "C"
    code, endian = dtype.arguments[0], dtype.state[1]
    if not re.fullmatch("[<>=|][iu][1248]", endian + code):
        raise ValueError(f"it holds an array of {endian + code!r}")
    return np.frombuffer(_bytes(data), np.dtype(endian + code)).reshape(shape, order=order)
