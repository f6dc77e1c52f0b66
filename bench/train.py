"""What training is made of: objectives, budgets, phases and the methods that yield them; `loop` runs a phase."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import Split, batches


@dataclass(frozen=True)
class Progress:
    """Where a phase stands. `ramp` is 0 for wait_steps steps, then goes to 1 over ramp_steps; eps schedules multiply by it.

    `epochs` counts the passes over the data that the steps make up.
    """

    step: int
    steps: int
    ramp_steps: int = 0
    epochs: int = 1
    wait_steps: int = 0

    @property
    def ramp(self) -> float:
        begun = self.step - self.wait_steps
        return 1.0 if begun >= self.ramp_steps else max(0, begun) / max(1, self.ramp_steps)

    @property
    def fraction(self) -> float:
        return self.step / max(1, self.steps)

    @property
    def epoch(self) -> int:
        return self.step * self.epochs // max(1, self.steps)

    @property
    def ramp_epochs(self) -> int:
        """The ramp in whole epochs, for schedules that move once per epoch."""
        return self._in_epochs(self.ramp_steps)

    @property
    def ramp_epoch(self) -> int:
        """Whole epochs since the ramp began."""
        return max(0, self.epoch - self._in_epochs(self.wait_steps))

    def _in_epochs(self, steps: int) -> int:
        return round(steps * self.epochs / max(1, self.steps))


class Objective(Protocol):
    """A frozen dataclass: the loss of one batch. x: float32 [N, C, H, W] in [0,1], y: int64 [N]; returns a scalar.

    With a field `replays`, the loop meets every batch so many times, an optimizer step each, in as many fewer epochs. With a
    method `moved` too, it is given the images plus a perturbation that lives from step to step (see `Carrying`).
    """

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, progress: Progress) -> Tensor: ...


class Carrying(Objective, Protocol):
    """An objective whose perturbation [batch, C, H, W] lives in the loop, is saved with it, and starts as zeros."""

    renewed: bool  # zeros again in every epoch

    def moved(self, perturbation: Tensor, gradient: Tensor) -> Tensor:
        """The next perturbation, from the gradient of the step's loss with respect to the last one."""


@dataclass(frozen=True)
class Benign:
    """Cross-entropy on clean images: the reference without robustness."""

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, progress: Progress) -> Tensor:
        return F.cross_entropy(model(x), y)


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
    """One stretch of training with one optimizer. `trains` names the parameters that move; all others stay bit-identical.

    objective, data: None for the suite's own.
    """

    name: str
    epochs: int
    lr: float
    ramp: float = 0.0
    wait: float = 0.0
    trains: Callable[[nn.Module], set[str]] = all_parameters
    penalty: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None
    after_backward: Callable[[Step], None] = nothing
    after_step: Callable[[Step], None] = nothing
    after_epoch: Callable[[Step], None] = nothing
    objective: Objective | None = None
    data: Split | None = None

    @property
    def is_plain(self) -> bool:
        """Nothing of a method's own takes part in it, so methods may share its result."""
        hooks = (self.after_backward, self.after_step, self.after_epoch)
        return self.penalty is None and all(hook is nothing for hook in hooks)


CHOICES = {
    "optimizer": ("sgd", "adam"), "schedule": ("cosine", "step", "one-cycle"), "precision": ("float32", "bf16"),
    "init": ("torch", "kaiming", "ibp"),
}  # fmt: skip


@dataclass(frozen=True)
class Budget:
    """Epochs, learning rates, optimizer and speed: the suite's, equal for all methods.

    `init` draws the first weights (`models.initialise_`). `ramp` is the share of pre-training over which eps grows, after the
    share `wait` at eps 0. `schedule` is cosine (to 0), step (times lr_drop after each of the
    milestones, which are shares of a phase) or one-cycle (up for 30 %, then down; Smith & Topin 2019). Without decay_all,
    BatchNorm and biases have no weight decay. gradient_clip is the largest norm of a step's gradient, 0 for no limit. precision
    bf16 computes training in mixed precision, never a certificate; channels_last and compile change results by rounding only.
    """

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
    init: str = "torch"
    wait: float = 0.0
    ramp: float = 0.6
    nesterov: bool = False
    decay_all: bool = True
    schedule: str = "cosine"
    milestones: tuple[float, ...] = (0.5, 0.75)
    lr_drop: float = 0.1
    gradient_clip: float = 0.0
    precision: str = "float32"
    channels_last: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {', '.join(known[:-1])} or {known[-1]}, got {getattr(self, name)!r}")
        if min(self.pretrain, self.prune, self.finetune) < 0 or self.batch < 1:
            raise ValueError("a budget needs epochs >= 0 and batch >= 1")
        if not (0 <= self.ramp <= 1 and 0 <= self.wait <= 1 and self.wait + self.ramp <= 1):
            raise ValueError(f"wait and ramp are shares of the training, at most 1 together, got {self.wait} and {self.ramp}")
        if self.nesterov and (self.optimizer != "sgd" or self.momentum <= 0):
            raise ValueError(f"nesterov needs sgd with momentum, got {self.optimizer} with momentum {self.momentum}")
        if not all(isinstance(share, int | float) and 0 < share < 1 for share in self.milestones):
            raise ValueError(f"milestones are shares of a phase between 0 and 1, got {self.milestones}")
        if not (self.gradient_clip >= 0 and self.lr_drop > 0):
            raise ValueError(f"gradient_clip is >= 0 and lr_drop > 0, got {self.gradient_clip} and {self.lr_drop}")


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
    def benign(self) -> Training:
        """The same training with the benign objective, for methods that score or train without robustness."""
        return replace(self, objective=Benign())

    @property
    def replays(self) -> int:
        """How many optimizer steps the objective takes on each batch."""
        return int(getattr(self.objective, "replays", 1))

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass over the data."""
        return self.replays * math.ceil(len(self.data) / self.budget.batch)

    def passes(self, phase: Phase) -> int:
        """Passes over the data that a phase of so many epochs makes: the replays share them."""
        return math.ceil(phase.epochs / self.replays)

    def progress(self, phase: Phase, step: int) -> Progress:
        steps = self.passes(phase) * self.steps_per_epoch
        return Progress(step, steps, round(phase.ramp * steps), self.passes(phase), round(phase.wait * steps))

    def pretrain(self) -> Phase:
        return self._from_scratch("pretrain", self.budget.pretrain)

    def prune(self, trains: Callable[[nn.Module], set[str]] = all_parameters) -> Phase:
        return Phase("prune", self.budget.prune, self.budget.prune_lr, trains=trains, objective=self.objective)

    def finetune(self) -> Phase:
        return Phase("finetune", self.budget.finetune, self.budget.finetune_lr, objective=self.objective)

    def train(self) -> Phase:
        """For methods that train from scratch: all epochs of the budget in one phase."""
        epochs = self.budget.pretrain + self.budget.prune + self.budget.finetune
        return self._from_scratch("train", epochs)

    def _from_scratch(self, name: str, epochs: int) -> Phase:
        budget = self.budget
        return Phase(name, epochs, budget.lr, ramp=budget.ramp, wait=budget.wait, objective=self.objective)

    def of(self, phase: Phase) -> Training:
        """The training that this phase runs under: with its own objective and images where it has any."""
        data = self.data if phase.data is None else phase.data
        return replace(self, objective=phase.objective or self.objective, data=data)


class PruningMethod(Protocol):
    """A frozen dataclass whose generator's order is the method's life cycle: set-up, phase, surgery, phase."""

    def __call__(self, model: nn.Module, density: Any, training: Training) -> Iterator[Phase]: ...


def derived_seed(*parts: object) -> int:
    """A 63-bit seed from any values: equal values, equal seed; different purposes never share a stream."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1
