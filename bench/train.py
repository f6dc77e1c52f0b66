"""The one training loop: a pruning method yields phases, this runs each of them with the objective as its loss."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .data import Split, batches


class TrainingDivergedError(Exception):
    """The loss stopped being a finite number."""


@dataclass(frozen=True)
class Progress:
    """Where a phase stands. `ramp` goes 0 to 1 over its first ramp_steps steps; eps schedules multiply by it."""

    step: int
    steps: int
    ramp_steps: int = 0

    @property
    def ramp(self) -> float:
        return 1.0 if self.step >= self.ramp_steps else self.step / self.ramp_steps

    @property
    def fraction(self) -> float:
        return self.step / max(1, self.steps)


class Objective(Protocol):
    """A frozen dataclass: the loss of one batch. x: float32 [N, C, H, W] in [0,1], y: int64 [N]; returns a scalar."""

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, progress: Progress) -> Tensor: ...


@dataclass(frozen=True)
class Step:
    """What a hook may touch after a backward pass or an optimizer step."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    progress: Progress


def nothing(*_: object) -> None: ...


def all_parameters(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters()}


@dataclass(frozen=True)
class Phase:
    """One stretch of training with one optimizer. `trains` names the parameters that move; all others stay bit-identical."""

    name: str
    epochs: int
    lr: float
    ramp: float = 0.0
    trains: Callable[[nn.Module], set[str]] = all_parameters
    penalty: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None
    after_backward: Callable[[Step], None] = nothing
    after_step: Callable[[Step], None] = nothing
    after_epoch: Callable[[Step], None] = nothing

    @property
    def is_plain(self) -> bool:
        """Nothing of a method's own takes part in it, so methods may share its result."""
        hooks = (self.after_backward, self.after_step, self.after_epoch)
        return self.penalty is None and all(hook is nothing for hook in hooks)


@dataclass(frozen=True)
class Budget:
    """Epochs and learning rates: the suite's, equal for all methods. `ramp` is the share of pre-training that ramps eps."""

    pretrain: int = 100
    prune: int = 20
    finetune: int = 100
    lr: float = 0.1
    prune_lr: float = 0.1
    finetune_lr: float = 0.01
    batch: int = 128
    optimizer: str = "sgd"
    momentum: float = 0.9
    weight_decay: float = 1e-4
    ramp: float = 0.6

    def __post_init__(self) -> None:
        if self.optimizer not in ("sgd", "adam"):
            raise ValueError(f"optimizer is sgd or adam, got {self.optimizer!r}")
        if min(self.pretrain, self.prune, self.finetune) < 0 or self.batch < 1 or not 0 <= self.ramp <= 1:
            raise ValueError("a budget needs epochs >= 0, batch >= 1 and a ramp between 0 and 1")


@dataclass(frozen=True)
class Training:
    """Everything a method may ask of the suite: the objective, the data and phases of the suite's budget."""

    objective: Objective
    data: Split
    budget: Budget
    seed: int = 0
    augment: str = "none"

    def batches(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        return batches(self.data, self.budget.batch, generator, self.augment)

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.data) / self.budget.batch)

    def pretrain(self) -> Phase:
        return Phase("pretrain", self.budget.pretrain, self.budget.lr, ramp=self.budget.ramp)

    def prune(self, trains: Callable[[nn.Module], set[str]] = all_parameters) -> Phase:
        return Phase("prune", self.budget.prune, self.budget.prune_lr, trains=trains)

    def finetune(self) -> Phase:
        return Phase("finetune", self.budget.finetune, self.budget.finetune_lr)

    def train(self) -> Phase:
        """For methods that train from scratch: all epochs of the budget in one phase."""
        epochs = self.budget.pretrain + self.budget.prune + self.budget.finetune
        return Phase("train", epochs, self.budget.lr, ramp=self.budget.ramp)


class PruningMethod(Protocol):
    """A frozen dataclass whose generator's order is the method's life cycle: set-up, phase, surgery, phase."""

    def __call__(self, model: nn.Module, density: Any, training: Training) -> Iterator[Phase]: ...


def derived_seed(*parts: object) -> int:
    """A 63-bit seed from any values: equal values, equal seed; different purposes never share a stream."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


class Snapshots:
    """Where a phase keeps its state within the phase; this one keeps nothing."""

    def load(self) -> dict[str, Any] | None:
        return None

    def save(self, state: Callable[[], dict[str, Any]]) -> None:
        """Called after every epoch; `state()` builds what `load()` must give back."""


@dataclass
class _Run:
    """The moving parts of a phase under way, as one state that can be saved and restored."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    order: torch.Generator
    epoch: int = 0

    def state(self) -> dict[str, Any]:
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": {"last_epoch": self.schedule.last_epoch},
            "order": self.order.get_state(),
            "noise": torch.get_rng_state(),
            "noise_cuda": cuda,
            "epoch": self.epoch,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.last_epoch = state["schedule"]["last_epoch"]
        self.order.set_state(state["order"].cpu())
        torch.set_rng_state(state["noise"].cpu())
        if torch.cuda.is_available():
            torch.cuda.set_rng_state_all([one.cpu() for one in state["noise_cuda"]])
        self.epoch = state["epoch"]


def _start(model: nn.Module, phase: Phase, training: Training, seed: int) -> _Run:
    chosen = phase.trains(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
    moving = [parameter for parameter in model.parameters() if parameter.requires_grad]
    budget, steps = training.budget, max(1, phase.epochs * training.steps_per_epoch)
    optimizer: torch.optim.Optimizer
    if budget.optimizer == "adam":
        optimizer = torch.optim.Adam(moving, lr=phase.lr, weight_decay=budget.weight_decay)
    else:
        optimizer = torch.optim.SGD(moving, phase.lr, momentum=budget.momentum, weight_decay=budget.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)
    torch.manual_seed(derived_seed(seed, phase.name, "noise"))
    order = torch.Generator().manual_seed(derived_seed(seed, phase.name, "order"))
    return _Run(model, optimizer, schedule, order)


def run_phase(
    model: nn.Module,
    phase: Phase,
    training: Training,
    snapshots: Snapshots | None = None,
    report: Callable[[str, int, int, float], None] = nothing,
) -> None:
    """Train `model` through one phase, in place; equal seeds give equal weights, interrupted or not.

    report(phase, epoch, epochs, mean loss) is called after every epoch. Raises TrainingDivergedError.
    """
    if phase.epochs == 0:
        return
    snapshots = snapshots or Snapshots()
    run = _start(model, phase, training, training.seed)
    saved = snapshots.load()
    if saved is not None:
        run.restore(saved)
    while run.epoch < phase.epochs:
        loss = _epoch(run, phase, training)
        run.epoch += 1
        if not math.isfinite(loss):
            raise TrainingDivergedError(
                f"the loss is {loss} in epoch {run.epoch} of phase {phase.name!r}; lower its learning rate ({phase.lr})"
            )
        report(phase.name, run.epoch, phase.epochs, loss)
        if run.epoch < phase.epochs:
            snapshots.save(run.state)


def _fill_cache(model: nn.Module) -> None:
    """Compute every effective weight with its gradient: one first met under no_grad would be cached without."""
    for module in model.modules():
        if parametrize.is_parametrized(module):
            for name in module.parametrizations:  # type: ignore[union-attr]
                getattr(module, str(name))


def _epoch(run: _Run, phase: Phase, training: Training) -> float:
    """One pass over the data; returns the mean loss (the only synchronisation with the device)."""
    model, optimizer = run.model, run.optimizer
    model.train()
    steps = phase.epochs * training.steps_per_epoch
    step = run.epoch * training.steps_per_epoch
    total: Tensor | float = 0.0
    for x, y in training.batches(run.order):
        progress = Progress(step, steps, round(phase.ramp * steps))
        optimizer.zero_grad(set_to_none=True)
        with parametrize.cached():  # effective weights are computed once per step, not once per forward pass
            _fill_cache(model)
            loss = training.objective(model, x, y, progress)
            if phase.penalty is not None:
                loss = loss + phase.penalty(model, x, y)
            loss.backward()
        now = Step(model, optimizer, progress)
        phase.after_backward(now)
        optimizer.step()
        run.schedule.step()
        phase.after_step(now)
        total = total + loss.detach()
        step += 1
    phase.after_epoch(Step(model, optimizer, Progress(step, steps, round(phase.ramp * steps))))
    return float(total) / training.steps_per_epoch
