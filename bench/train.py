"""The one training loop: a pruning method yields phases, this runs each of them with the objective as its loss."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .data import Split, batches


class TrainingDivergedError(Exception):
    """The loss stopped being a finite number."""


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


class Snapshots:
    """Where a phase keeps its state within the phase; this one keeps nothing."""

    def load(self) -> dict[str, Any] | None:
        return None

    def save(self, state: Callable[[], dict[str, Any]]) -> None:
        """Called after every epoch; `state()` builds what `load()` must give back."""


@dataclass(frozen=True)
class Epoch:
    """What an epoch was like: the mean loss of its steps, and the mean of |gradient| over their trained parameters' entries."""

    epoch: int
    loss: float
    gradient: float


@dataclass
class _Run:
    """The moving parts of a phase under way, as one state that can be saved and restored."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    order: torch.Generator
    epoch: int = 0
    perturbation: Tensor | None = None
    curve: list[Epoch] = field(default_factory=list)

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
            "perturbation": self.perturbation,
            "curve": [astuple(one) for one in self.curve],
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
        self.perturbation = state["perturbation"]
        self.curve = [Epoch(*one) for one in state["curve"]]

    def carried(self, x: Tensor) -> Tensor:
        """The perturbation of this batch, as a leaf that takes a gradient."""
        if self.perturbation is None:
            self.perturbation = torch.zeros_like(x)  # the first batch of an epoch is the largest
        self.perturbation = self.perturbation.to(x.device)
        return self.perturbation[: len(x)].clone().requires_grad_()


def _start(model: nn.Module, phase: Phase, training: Training) -> _Run:
    chosen = phase.trains(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
    if training.budget.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = _optimizer(model, phase.lr, training.budget)
    schedule = _schedule(optimizer, phase.lr, max(1, training.progress(phase, 0).steps), training.budget)
    torch.manual_seed(derived_seed(training.seed, phase.name, "noise"))
    order = torch.Generator().manual_seed(derived_seed(training.seed, phase.name, "order"))
    return _Run(model, optimizer, schedule, order)


def _optimizer(model: nn.Module, lr: float, budget: Budget) -> torch.optim.Optimizer:
    moving = [parameter for parameter in model.parameters() if parameter.requires_grad]
    free = set() if budget.decay_all else _norms_and_biases(model)
    groups = [
        {"params": [one for one in moving if one not in free], "weight_decay": budget.weight_decay},
        {"params": [one for one in moving if one in free], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if budget.optimizer == "adam":
        return torch.optim.Adam(groups, lr=lr)
    return torch.optim.SGD(groups, lr, momentum=budget.momentum, nesterov=budget.nesterov)


def _norms_and_biases(model: nn.Module) -> set[Tensor]:
    found: set[Tensor] = set()
    for module in model.modules():
        norm = isinstance(module, nn.modules.batchnorm._NormBase)
        found.update(value for name, value in module.named_parameters(recurse=False) if norm or name == "bias")
    return found


def _schedule(
    optimizer: torch.optim.Optimizer, lr: float, steps: int, budget: Budget
) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate as a function of the step, over all steps of a phase."""
    if budget.schedule == "step":
        milestones = [round(share * steps) for share in budget.milestones]
        return torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, budget.lr_drop)
    if budget.schedule == "one-cycle":
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, cycle_momentum=False)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)


@contextmanager
def _compiled(model: nn.Module, wanted: bool) -> Iterator[None]:
    """The network's forward is compiled inside, and as it was outside; bounds walk its graph and never meet the compiled one."""
    if not wanted:
        yield
        return
    # model.compile() would not do: dynamo passes over frames of torch.nn itself, and so over a whole nn.Sequential
    model._compiled_call_impl = torch.compile(lambda *inputs: type(model).forward(model, *inputs))
    try:
        yield
    finally:
        model._compiled_call_impl = None
        torch.compiler.reset()  # what was compiled counts against a limit of 8, above which dynamo gives up silently


def run_phase(
    model: nn.Module,
    phase: Phase,
    training: Training,
    snapshots: Snapshots | None = None,
    report: Callable[[str, int, int, float], None] = nothing,
) -> list[Epoch]:
    """Train `model` through one phase, in place; equal seeds give equal weights and an equal curve, interrupted or not.

    report(phase, epoch, epochs, mean loss) is called after every epoch. Raises TrainingDivergedError.
    """
    if phase.epochs == 0:
        return []
    training = training.of(phase)
    snapshots, epochs = snapshots or Snapshots(), training.passes(phase)
    run = _start(model, phase, training)
    saved = snapshots.load()
    if saved is not None:
        run.restore(saved)
    with _compiled(model, training.budget.compile):
        while run.epoch < epochs:
            loss, gradient = _epoch(run, phase, training)
            run.epoch += 1
            run.curve.append(Epoch(run.epoch, loss, gradient))
            if not math.isfinite(loss):
                raise TrainingDivergedError(
                    f"the loss is {loss} in epoch {run.epoch} of phase {phase.name!r}; lower its learning rate ({phase.lr})"
                )
            report(phase.name, run.epoch, epochs, loss)
            if run.epoch < epochs:
                snapshots.save(run.state)
    return run.curve


def _fill_cache(model: nn.Module) -> None:
    """Compute every effective weight with its gradient: one first met under no_grad would be cached without."""
    for module in model.modules():
        if parametrize.is_parametrized(module):
            for name in module.parametrizations:  # type: ignore[union-attr]
                getattr(module, str(name))


def _epoch(run: _Run, phase: Phase, training: Training) -> tuple[float, float]:
    """One pass over the data; returns the mean loss and gradient magnitude (the only synchronisation with the device)."""
    run.model.train()
    if getattr(training.objective, "renewed", False):
        run.perturbation = None
    step = run.epoch * training.steps_per_epoch
    total: Tensor | float = 0.0
    gradients: Tensor | float = 0.0
    for x, y in training.batches(run.order):
        if training.budget.channels_last:
            x = x.to(memory_format=torch.channels_last)
        for _ in range(training.replays):
            loss, gradient = _step(run, phase, training, x, y, training.progress(phase, step))
            total, gradients = total + loss, gradients + gradient
            step += 1
    phase.after_epoch(Step(run.model, run.optimizer, training.progress(phase, step)))
    return float(total) / training.steps_per_epoch, float(gradients) / training.steps_per_epoch


def _step(run: _Run, phase: Phase, training: Training, x: Tensor, y: Tensor, progress: Progress) -> tuple[Tensor, Tensor]:
    """One optimizer step, and one of the perturbation where the objective carries one; returns loss and gradient magnitude."""
    model, optimizer, objective = run.model, run.optimizer, training.objective
    optimizer.zero_grad(set_to_none=True)
    carried = run.carried(x) if hasattr(objective, "moved") else None
    seen = x if carried is None else (x + carried).clamp(0, 1)
    with parametrize.cached():  # effective weights are computed once per step, not once per forward pass
        _fill_cache(model)
        with _mixed(x.device, training.budget):
            loss = objective(model, seen, y, progress)
            if phase.penalty is not None:
                loss = loss + phase.penalty(model, x, y)
        loss.backward()
    if carried is not None:
        assert run.perturbation is not None
        assert carried.grad is not None
        run.perturbation[: len(x)] = objective.moved(carried.detach(), carried.grad)  # type: ignore[attr-defined]
    gradient = _magnitude(model)
    now = Step(model, optimizer, progress)
    phase.after_backward(now)
    if training.budget.gradient_clip:
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.budget.gradient_clip)
    optimizer.step()
    run.schedule.step()
    phase.after_step(now)
    return loss.detach(), gradient


def _magnitude(model: nn.Module) -> Tensor:
    """The mean of |gradient| over the entries of all parameters that have one, before any hook has touched it."""
    found = [one.grad for one in model.parameters() if one.grad is not None]
    total = torch.stack([gradient.abs().sum() for gradient in found]).sum() if found else torch.zeros(())
    return total / max(1, sum(gradient.numel() for gradient in found))


def _mixed(device: torch.device, budget: Budget) -> torch.autocast:
    """Mixed precision where asked for. Not cached: a weight first met under no_grad would be cached without its gradient."""
    return torch.autocast(device.type, torch.bfloat16, enabled=budget.precision == "bf16", cache_enabled=False)
