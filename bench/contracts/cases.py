"""Networks, images and budgets small enough to train in a blink: what plug-ins are tried on."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data import Split
from ..errors import first_line
from ..methods import Dense
from ..objectives import Benign
from ..phases import fit, own_randomness
from ..train import Budget, Objective, Training

CLASSES = 3
TINY = {"pretrain": 2, "prune": 2, "finetune": 2, "lr": 0.1, "prune_lr": 0.1, "finetune_lr": 0.05, "batch": 16}


@dataclass(frozen=True)
class Finding:
    """One contract tried on one case: `why` is what is wrong, empty where it holds; `refused` is why it could not be tried."""

    contract: str
    case: str
    why: str = ""
    refused: str = ""

    @property
    def holds(self) -> bool:
        return not (self.why or self.refused)


def found(contract: str, case: str, complaints: Callable[[], Iterable[str]]) -> Finding:
    """What the complaints say, an exception among them being one: code from outside may raise anything."""
    try:
        return Finding(contract, case, "; ".join(complaints()))
    except Exception as reason:
        return Finding(contract, case, f"raises {first_line(reason)}")


def toy_split(seed: int = 0, n: int = 40) -> Split:
    """Grey 8x8 images with a bright stripe whose place is the class; n is no multiple of the batch size."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % CLASSES
    images = torch.randint(0, 120, (n, 1, 8, 8), generator=generator, dtype=torch.uint8)
    for place, label in enumerate(labels.tolist()):
        images[place, :, :, 2 * label : 2 * label + 2] += 110
    return Split(images, labels, torch.arange(n), 255.0)


def small_net(seed: int = 0, batchnorm: bool = False) -> nn.Sequential:
    """A convolution and two linear layers on 1x8x8 images: 1,108 prunable weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        middle = [nn.BatchNorm2d(4)] if batchnorm else []
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2, padding=1), *middle, nn.ReLU(),
            nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, CLASSES),
        )  # fmt: skip


def tiny_training(
    objective: Objective | None = None, data: Split | None = None, seed: int = 0, augment: str = "none", **budget: Any
) -> Training:
    """Two epochs of each phase on the toy images, unless the budget says otherwise."""
    return Training(objective or Benign(), data or toy_split(), Budget(**{**TINY, **budget}), seed, augment)


def short(kind: type) -> Any:
    """An objective with the toy's eps and as few attack steps as still do something."""
    fields = getattr(kind, "__dataclass_fields__", {})
    quick = {"eps": Fraction(1, 20), "steps": 2, "beta": 2.0}
    return kind(**{name: value for name, value in quick.items() if name in fields})


@functools.cache
def _trained(narrow: bool) -> nn.Module:
    with own_randomness():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, CLASSES)) if narrow else small_net()
        fit(model, Dense(), Fraction(1), tiny_training(pretrain=15))
    return model.eval().requires_grad_(False)


def trained_net(narrow: bool = False) -> nn.Module:
    """A network that knows the toy images, in eval mode and with frozen weights; `narrow` has eight hidden units only."""
    return copy.deepcopy(_trained(narrow))


# ---- what must be as it was ------------------------------------------------------------------------------------------


def _hooks(module: nn.Module) -> dict[str, list[int]]:
    return {name: sorted(value) for name, value in vars(module).items() if name.endswith("_hooks") and isinstance(value, dict)}


def attached_hooks(model: nn.Module) -> list[str]:
    """The names of the modules that hold hooks (of forward, backward or the state dict)."""
    return [name or "the network" for name, module in model.named_modules() if any(_hooks(module).values())]


@dataclass(frozen=True)
class _Standing:
    """All of a network and of the random generators that a tool which only looks must leave alone."""

    tensors: dict[str, Tensor]
    gradients: dict[str, Tensor | None]
    modes: dict[str, bool]
    moving: dict[str, bool]
    hooks: dict[str, dict[str, list[int]]]
    torch_state: Tensor
    other_states: str

    @classmethod
    def of(cls, model: nn.Module) -> _Standing:
        parameters = dict(model.named_parameters())
        return cls(
            {name: value.detach().clone() for name, value in [*parameters.items(), *model.named_buffers()]},
            {name: None if value.grad is None else value.grad.clone() for name, value in parameters.items()},
            {name: module.training for name, module in model.named_modules()},
            {name: value.requires_grad for name, value in parameters.items()},
            {name: _hooks(module) for name, module in model.named_modules()},
            torch.get_rng_state(),
            repr((random.getstate(), np.random.get_state(legacy=True))),  # noqa: NPY002  (the one a plug-in may have drawn from)
        )


def changed(before: _Standing, model: nn.Module, random_too: bool = True) -> Iterator[str]:
    """A sentence for each kind of thing that is no longer as it was."""
    after = _Standing.of(model)
    if not _same(before.tensors, after.tensors):
        yield "changes the network's weights or buffers"
    if not _same(before.gradients, after.gradients):
        yield "changes the gradients that the parameters hold"
    if before.modes != after.modes:
        yield "leaves layers in another mode (train or eval) than it found them in"
    if before.moving != after.moving:
        yield "leaves parameters with another requires_grad"
    if before.hooks != after.hooks:
        yield "leaves a hook on the network"
    if random_too and not torch.equal(before.torch_state, after.torch_state):
        yield "draws from torch's global random generator; make one of your own from a seed"
    if random_too and before.other_states != after.other_states:
        yield "draws from the global generator of `random` or numpy; make one of your own from a seed"


def _same(before: dict[str, Any], after: dict[str, Any]) -> bool:
    return before.keys() == after.keys() and all(equal(before[name], after[name]) for name in before)


def equal(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors, or gradients that need not be there, agree to the bit."""
    return a is b or (a is not None and b is not None and a.shape == b.shape and torch.equal(a, b))


@contextmanager
def watched(model: nn.Module, complaints: list[str], random_too: bool = True) -> Iterator[None]:
    """Adds to `complaints` whatever the code inside has changed."""
    before = _Standing.of(model)
    yield
    complaints += changed(before, model, random_too)


def alone_complaints(tool: Any, x: Tensor, y: Tensor) -> Iterator[str]:
    """What a tool changes beside its answer: in a network whose parameters hold gradients, in a frozen one, in the images."""
    complaints: list[str] = []
    for frozen in (False, True):
        model = small_net(batchnorm=True).eval()
        model(x).sum().backward()
        model.requires_grad_(not frozen)
        given = x.clone(), y.clone()
        with watched(model, complaints):
            tool(model, *given)
        if not (torch.equal(given[0], x) and torch.equal(given[1], y)):
            complaints.append("writes into the images or labels that it is given; work on a copy")
    yield from dict.fromkeys(complaints)
