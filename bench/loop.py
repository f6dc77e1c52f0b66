"""The one training loop: a phase from its first step, or from where it was killed, to its end."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .train import (
    Budget,
    Phase,
    Progress,
    Step,
    Training,
    derived_seed,
    nothing,
)


class TrainingDivergedError(Exception):
    """The loss stopped being a finite number."""


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
