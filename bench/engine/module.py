"""The compiled network as a torch module, and the choice between it and the dense one."""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .kernel import NoKernelError, variant_here
from .layers import NoProgramError, read
from .plan import LANES
from .program import Program

Path = Literal["auto", "engine", "dense"]
ROUNDS = 3
ALLOWANCE = 1e-4  # of the largest logit: what float32 may differ by on the example


class _Run(torch.autograd.Function):
    """The program's logits; their gradient with respect to the images."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, program: Program) -> Tensor:
        logits, ctx.record = program.forward(x.contiguous(), remember=ctx.needs_input_grad[0])
        ctx.program = program
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.program.backward(gradient.contiguous(), ctx.record), None


@dataclass(frozen=True)
class Speeds:
    """Seconds for the logits and input gradients of one block of images."""

    dense: float
    engine: float


class Accelerated(nn.Module):
    """Answers as the plain network does, up to float32 rounding, from its sparse program where that is faster.

    A frozen snapshot in eval mode: `plain` is a copy of the network that was given, without gradients for its parameters.
    On the engine's path an image's logits and gradients are the same bits in every batch. Images of another shape, type or
    device, and a copy that was changed since, are answered by the plain network.
    """

    def __init__(self, plain: nn.Module, program: Program | None, reason: str, speeds: Speeds | None = None) -> None:
        super().__init__()
        self.plain = plain
        self.program, self.reason, self.speeds = program, reason, speeds
        self._compiled = self._state()
        self.training = False

    @property
    def path(self) -> str:
        """`engine-avx512`, `engine-avx2`, `engine-portable` or `dense`: what a record should name; `reason` says why."""
        return "dense" if self.program is None else f"engine-{self.program.variant}"

    def forward(self, x: Tensor) -> Tensor:
        if self.program is None or not self._fits(x):
            logits: Tensor = self.plain(x)
            return logits
        logits = _Run.apply(x, self.program)
        return logits

    def _fits(self, x: Tensor) -> bool:
        assert self.program is not None
        same = x.dtype == torch.float32 and x.device.type == "cpu" and x.shape[1:] == self.program.in_shape and len(x) > 0
        return same and self._state() == self._compiled

    def _state(self) -> tuple[tuple[int, int], ...]:
        """Changes when a parameter or buffer is replaced or written to."""
        return tuple((id(one), one._version) for one in (*self.plain.parameters(), *self.plain.buffers()))

    def train(self, mode: bool = True) -> Accelerated:
        """Nothing: a snapshot stays in eval mode, whatever mode an attack means to bring back."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Accelerated:
        return Accelerated(copy.deepcopy(self.plain, memo), self.program if self._state() == self._compiled else None,
                           self.reason, self.speeds)  # fmt: skip


def accelerated(model: nn.Module, example: Tensor, path: Path = "auto") -> Accelerated:
    """The plain network `model` as it now stands, answering from a sparse program where that is faster.

    example: float32 [N, C, H, W], some images of the kind to come (at most 16 are used): the program is checked against
    the dense network on them, and both are timed. path: `engine` takes the program wherever there is one, `dense` never;
    `auto` takes the faster one, which is measured once per network and remembered. What is taken and why: `.path`, `.reason`.
    Never fails where the dense network works.
    """
    plain = copy.deepcopy(model).eval().requires_grad_(False)
    if path == "dense":
        return Accelerated(plain, None, "asked for")
    x = example[:LANES].detach()
    try:
        program = Program(read(plain, x), variant_here())
    except (NoProgramError, NoKernelError) as error:
        return Accelerated(plain, None, str(error))
    engine = Accelerated(plain, program, "asked for")
    difference = _difference(engine, plain, x)
    if difference is not None:
        return Accelerated(plain, None, f"{difference}; please report this network")
    if path == "engine":
        return engine
    speeds = _speeds(engine, plain, x)
    faster = speeds.engine < speeds.dense
    reason = f"{speeds.dense / speeds.engine:.1f}x as fast as the dense network, measured on {len(x)} images"
    return Accelerated(plain, program if faster else None, reason, speeds)


@torch.no_grad()
def _difference(engine: nn.Module, plain: nn.Module, x: Tensor) -> str | None:
    """What tells the two apart on the images, beyond rounding."""
    got, want = engine(x), plain(x)
    if got.shape != want.shape:
        return f"the program returns {tuple(got.shape)}, the network {tuple(want.shape)}"
    difference, size = float((got - want).abs().max()), float(want.abs().max())
    return None if difference <= ALLOWANCE * max(size, 1e-30) else f"the program differs by {difference:.3g} of {size:.3g}"


# ---- which is faster --------------------------------------------------------------------------------------------------------


_measured: dict[str, Speeds] = {}


def _speeds(engine: Accelerated, plain: nn.Module, x: Tensor) -> Speeds:
    """Measured once per network, kind of image and number of threads in this process."""
    assert engine.program is not None
    key = _digest(plain, f"{engine.program.variant}/{tuple(x.shape)}/{torch.get_num_threads()}")
    if key not in _measured:
        block = x.repeat(-(-LANES // len(x)), 1, 1, 1)[:LANES]
        seconds: dict[str, list[float]] = {"dense": [], "engine": []}
        for _ in range(ROUNDS):
            seconds["dense"].append(_seconds(plain, block))
            seconds["engine"].append(_seconds(engine, block))
        _measured[key] = Speeds(min(seconds["dense"]), min(seconds["engine"]))
    return _measured[key]


def _seconds(model: Callable[[Tensor], Tensor], x: Tensor) -> float:
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter  # the former is blind to other work
    with torch.enable_grad():
        start = clock()
        x = x.clone().requires_grad_()
        torch.autograd.grad(model(x).sum(), x)
        return clock() - start


def _digest(model: nn.Module, more: str) -> str:
    total = hashlib.sha256(f"{model}/{more}".encode())
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        total.update(name.encode())
        total.update(value.detach().contiguous().view(-1).numpy().tobytes())
    return total.hexdigest()
