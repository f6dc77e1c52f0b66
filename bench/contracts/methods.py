"""What a pruning method promises: its density exactly, a plain network, nothing lost in a kill, any objective."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from math import floor
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from .. import phases
from ..data import Split
from ..errors import first_line
from ..factors import form_of
from ..objectives import OBJECTIVES, StabilityTraining
from ..phases import fit
from ..sparsity import kept_of, prunable
from ..train import PruningMethod, Training, nothing
from .cases import Finding, attached_hooks, found, short, small_net, tiny_training, toy_split

DENSITY = "meets its density exactly"
PLAIN = "the plain network equals the trained one"
NOTHING = "leaves nothing attached"
OBJECTIVE = "trains under every objective"
REPEATS = "the same seed gives the same weights"
DURABLE = "its state is durable: finished phases can be loaded"
RESUMES = "killed and resumed, it ends with bit-identical weights"
DENSITIES = (Fraction(1, 3), Fraction(1, 8), Fraction(1))
SCOPES = "'per layer', 'global', 'global, at most' or 'whole filters per layer'"
LIVES = 50  # of a run that is killed after every epoch
Make = Callable[[], PruningMethod]


def method_findings(make: Make) -> Iterator[Finding]:
    """Every contract of a method; make() gives a new one each time, as a new process would."""
    for name, kind in OBJECTIVES.items():
        yield from _fits(make, f"{name}, density {DENSITIES[0]}", tiny_one(short(kind)), DENSITIES[0])
    for density in DENSITIES[1:]:
        yield from _fits(make, f"benign, density {density}", tiny_one(), density)
    yield from _fits(make, f"BatchNorm, density {DENSITIES[0]}", tiny_one(), DENSITIES[0], batchnorm=True)
    yield found(REPEATS, "two runs", lambda: repeat_complaints(make))
    yield found(DURABLE, "a second run from the store", lambda: durable_complaints(make))
    yield found(RESUMES, "abandoned after every epoch", lambda: resume_complaints(make))


def tiny_one(objective: Any = None) -> Training:
    """One epoch of each phase on sixteen images: a step each."""
    return tiny_training(objective, data=toy_split().first(16), pretrain=1, prune=1, finetune=1)


def _fits(make: Make, case: str, training: Training, density: Fraction, batchnorm: bool = False) -> Iterator[Finding]:
    model = small_net(batchnorm=batchnorm)
    try:
        method = make()
        state = fit(model, method, density, training)
    except Exception as reason:
        yield Finding(OBJECTIVE, case, f"raises {first_line(reason)}")
        return
    yield found(OBJECTIVE, case, lambda: finite_complaints(state))
    yield found(DENSITY, case, lambda: density_complaints(model, method, density))
    yield found(NOTHING, case, lambda: attached_complaints(model, state, small_net(batchnorm=batchnorm)))
    yield found(PLAIN, case, lambda: plain_complaints(model, state, small_net(1, batchnorm), toy_split()))


# ---- one contract each -----------------------------------------------------------------------------------------------


def finite_complaints(state: Mapping[str, Tensor]) -> Iterator[str]:
    for name, value in state.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            yield f"ends with NaN or infinity in {name}"


def density_complaints(model: nn.Module, method: Any, density: Fraction) -> Iterator[str]:
    """Its own budget (house.md 12.17), exactly: per layer, or over the whole network; counted on what is stored (12.18)."""
    layers = prunable(model)
    sizes = {name: layer.weight.numel() for name, layer in layers.items()}
    kept = {name: sum(int((part != 0).sum()) for part in form_of(layer).parts.values()) for name, layer in layers.items()}
    scope, budget = getattr(method, "scope", None), floor(density * sum(sizes.values()))
    if not getattr(method, "prunes", True):
        yield from _per_layer(kept, sizes, density=Fraction(1))
    elif scope == "per layer":
        yield from _per_layer(kept, sizes, density)
    elif scope is not None and scope.endswith("at most"):
        if not 0 < sum(kept.values()) <= budget:
            yield f"keeps {sum(kept.values())} weights of the network, density {density} allows 1 to {budget}"
    elif scope is not None and scope.startswith("global"):
        if sum(kept.values()) != budget:
            yield f"keeps {sum(kept.values())} weights of the network, density {density} means exactly {budget}"
    elif scope != "whole filters per layer":
        yield f"has no scope that its density can be held against ({scope!r}); say `scope: ClassVar[str] =` {SCOPES}"


def _per_layer(kept: Mapping[str, int], sizes: Mapping[str, int], density: Fraction) -> Iterator[str]:
    for name, size in sizes.items():
        if kept[name] != kept_of(size, density):
            yield f"keeps {kept[name]} weights of layer {name}, density {density} means exactly {kept_of(size, density)}"


def attached_complaints(model: nn.Module, state: Mapping[str, Tensor], plain: nn.Module) -> Iterator[str]:
    """The result has the tensors of the architecture and no others, and the network that was trained has no hooks left."""
    names = set(plain.state_dict())
    if extra := sorted(set(state) - names):
        yield f"leaves {extra[0]} in the result, which the plain network does not have"
    if missing := sorted(names - set(state)):
        yield f"leaves the result without the plain network's {missing[0]}; is something attached to it?"
    if hooked := attached_hooks(model):
        yield f"leaves a hook on {hooked[0]}"


def plain_complaints(model: nn.Module, state: Mapping[str, Tensor], plain: nn.Module, images: Split) -> Iterator[str]:
    """Loaded into a plain network of the architecture, the result answers as the network that was trained."""
    try:
        plain.load_state_dict(dict(state))
    except RuntimeError as reason:
        yield f"gives a result that the plain network cannot load ({' '.join(str(reason).split())})"
        return
    with torch.no_grad():
        far = float((plain.eval()(images.pixels()) - model.eval()(images.pixels())).abs().max())
    if not far <= 1e-6:
        yield f"gives a plain network whose logits differ by up to {far:.3g} from those of the network that was trained"


def difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> str:
    """The first tensor in which two states differ by a bit; empty where there is none."""
    if one.keys() != other.keys():
        return "the names of its tensors"
    return next((name for name in one if not torch.equal(one[name], other[name])), "")


@dataclass
class _Runs:
    """The same run again and again, each from new objects, with noise and augmentation drawn in every step."""

    make: Make
    training: Training = field(
        default_factory=lambda: tiny_training(StabilityTraining(), augment="crop", lr=0.05, prune_lr=0.05, finetune_lr=0.02)
    )

    def __call__(self, store: Path | None = None, report: Callable[..., None] = nothing) -> dict[str, Tensor]:
        return fit(small_net(batchnorm=True), self.make(), DENSITIES[0], self.training, store, report)


def repeat_complaints(make: Make) -> Iterator[str]:
    run = _Runs(make)
    if name := difference(run(), run()):
        yield f"two runs with one seed differ in {name}; draw from torch's global generator only, which is seeded for you"


def durable_complaints(make: Make) -> Iterator[str]:
    """With every finished phase loaded instead of trained, nothing is trained and the weights are the same."""
    run, trained = _Runs(make), list[str]()
    with tempfile.TemporaryDirectory() as folder:
        first = run(Path(folder))
        again = run(Path(folder), lambda name, *_: trained.append(name))
    if trained:
        yield f"trains phase {trained[0]!r} again although it is stored, {LOST}"
    if name := difference(first, again):
        yield f"ends with another {name} where its phases are loaded, {LOST}"
    if name := difference(first, run()):
        yield f"ends with another {name} without a store"


LOST = "so something that it remembers is lost; make it a parameter or buffer of an attached part"


class _Killed(BaseException):
    """As abrupt as it gets within a process."""


def _dies_at_the_second() -> Callable[..., None]:
    """A report that kills the run after its second epoch, so that each life gets one epoch further."""
    seen: list[str] = []

    def report(name: str, *_: object) -> None:
        seen.append(name)
        if len(seen) == 2:
            raise _Killed

    return report


def resume_complaints(make: Make) -> Iterator[str]:
    """Abandoned between epochs, again and again, and resumed from the store each time with nothing but what lies there."""
    run = _Runs(make)
    whole, state = run(), dict[str, Tensor]()
    with tempfile.TemporaryDirectory() as folder, patch.object(phases, "SECONDS_BETWEEN_SNAPSHOTS", 0.0):
        for _ in range(LIVES):
            try:
                state = run(Path(folder), _dies_at_the_second())
                break
            except _Killed:
                continue
        else:
            yield f"is not done after {LIVES} lives of one epoch each, {LOST}"
            return
    if name := difference(whole, state):
        yield f"ends with another {name} when it is killed and resumed, {LOST}"

