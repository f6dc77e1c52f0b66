"""What an objective promises: a finite loss with a slope for every weight, the network's modes, and the ramp."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..methods import HYDRA, LWM
from ..phases import fit, own_randomness
from ..train import Progress
from .cases import Finding, equal, found, small_net, toy_split, watched
from .methods import density_complaints, finite_complaints, tiny_one

FINITE = "the loss is one finite number"
SLOPE = "gradients reach every trainable tensor"
REPEATS = "the same seed gives the same loss and gradients"
RESTORES = "restores the modes of BatchNorm and dropout, and all else"
RAMP = "respects progress.ramp"
PRUNES = "trains with pruning methods"
BEGIN, WAITING, HALF, FULL = Progress(0, 20, 5, 1, 5), Progress(4, 20, 5, 1, 5), Progress(5, 20, 10), Progress(19, 20, 5, 1, 5)
STAGES = {"while waiting": WAITING, "at ramp 1/2": HALF, "at ramp 1": FULL, "without a ramp": Progress(0, 20)}
NETS: dict[str, Callable[[], nn.Module]] = {
    "plain": small_net,
    "BatchNorm": lambda: small_net(batchnorm=True),
    "dropout": lambda: nn.Sequential(small_net(), nn.Dropout(0.2)),
}
Make = Callable[[], Any]


def objective_findings(make: Make) -> Iterator[Finding]:
    """Every contract of an objective on plain networks and on ones with BatchNorm or dropout."""
    for case, net in NETS.items():
        for stage, progress in STAGES.items():
            yield found(FINITE, f"{case}, {stage}", partial(loss_complaints, make(), net(), progress))
        yield found(SLOPE, case, partial(slope_complaints, make(), net()))
        yield found(REPEATS, case, partial(repeat_complaints, make(), net()))
        yield found(RESTORES, case, partial(restore_complaints, make(), net()))
    yield found(RAMP, "plain", partial(ramp_complaints, make(), small_net()))
    for method in (LWM(), HYDRA()):
        yield found(PRUNES, type(method).__name__.lower(), partial(pruned_complaints, make(), method))


def _loss(objective: Any, model: nn.Module, progress: Progress = FULL) -> Any:
    images = toy_split(n=16)
    with own_randomness():
        torch.manual_seed(0)
        return objective(model.train(), images.pixels(), images.labels, progress)


def loss_complaints(objective: Any, model: nn.Module, progress: Progress) -> Iterator[str]:
    loss = _loss(objective, model, progress)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        yield f"returns {tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__}, not one number"
    elif not bool(torch.isfinite(loss).all()):
        yield f"gives the loss {float(loss.detach())}"


def _gradients(objective: Any, model: nn.Module) -> dict[str, Tensor | None]:
    _loss(objective, model).backward()
    return {name: None if value.grad is None else value.grad.clone() for name, value in model.named_parameters()}


def slope_complaints(objective: Any, model: nn.Module) -> Iterator[str]:
    loss = _loss(objective, model)
    if not loss.requires_grad:
        yield "gives a loss without a gradient: it does not depend on the network's weights, or was detached"
        return
    for name, gradient in _gradients(objective, model).items():
        if gradient is None or not bool(gradient.any()):
            yield f"gives {name} no gradient"
        elif not bool(torch.isfinite(gradient).all()):
            yield f"gives {name} a gradient with NaN or infinity"


def repeat_complaints(objective: Any, model: nn.Module) -> Iterator[str]:
    """Two copies of the network, the same global seed."""
    one, other = copy.deepcopy(model), copy.deepcopy(model)
    a, b = (float(_loss(objective, net).detach()) for net in (one, other))
    if a != b:
        yield f"gives {a:.9g} and {b:.9g}; draw from torch's global generator, which the loop seeds"
        return
    first, second = _gradients(objective, one), _gradients(objective, other)
    if any(not equal(first[name], second[name]) for name in first):
        yield "gives equal losses with different gradients"


def restore_complaints(objective: Any, model: nn.Module) -> Iterator[str]:
    """Modes, weights, gradients and hooks; BatchNorm may have learnt running statistics, and random numbers may be drawn."""
    images, complaints = toy_split(n=16), list[str]()
    x, y = images.pixels(), images.labels
    model.train()
    next(model.children()).eval()  # not everywhere the same mode, as where a part is frozen
    running = {name: value.clone() for name, value in model.named_buffers()}
    model(x).sum().backward()
    with own_randomness(), watched(_Frozen(model), complaints, random_too=False):
        objective(model, x, y, FULL)
    if dict(model.named_buffers()).keys() != running.keys():
        complaints.append("leaves BatchNorm with other buffers than it found")
    if not (torch.equal(x, images.pixels()) and torch.equal(y, images.labels)):
        complaints.append("writes into the images or labels that it is given; work on a copy")
    yield from complaints


class _Frozen(nn.Module):
    """The network without the buffers that a forward pass in training mode may move."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def named_buffers(self, *_: Any, **__: Any) -> Iterator[tuple[str, Tensor]]:
        return iter(())


def ramp_complaints(objective: Any, model: nn.Module) -> Iterator[str]:
    """The ramp makes training harder, from its first step on and not before: waiting, the loss is as at the beginning."""
    begin, waiting, full = (float(_loss(objective, copy.deepcopy(model), at).detach()) for at in (BEGIN, WAITING, FULL))
    if begin != waiting:
        yield f"changes while progress.ramp is 0 ({begin:.6g} at the first step, {waiting:.6g} later); schedules follow the ramp"
    if begin > full + 1e-6:
        yield f"is harder at ramp 0 ({begin:.6g}) than at ramp 1 ({full:.6g}); eps is to be multiplied by progress.ramp"


def pruned_complaints(objective: Any, method: Any) -> Iterator[str]:
    model, density = small_net(), Fraction(1, 3)
    yield from finite_complaints(fit(model, method, density, tiny_one(objective)))
    yield from density_complaints(model, method, density)
