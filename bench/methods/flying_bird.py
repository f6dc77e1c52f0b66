"""Flying Bird, and Flying Bird+, whose budget breathes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from math import cos, floor, pi
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..modes import evaluating
from ..train import Phase, Progress, Step, Training, derived_seed
from .rigl import due, opened, rewiring, sparse_start

WINDOW = 4  # epochs that are looked back upon


@dataclass(frozen=True)
class FlyingBird:
    """Trains sparse from start to end; to the end a falling share of each layer's smallest weights makes room for new ones.

    Chen et al. 2022 (ICLR). As RigL, with the budget floor(density N) shared out by ideal gas quotas, and a moving share that
    falls from `first` to `last` as a cosine over the whole training, every `every` steps but in the last epoch.
    """

    allocation: Literal["igq", "erk", "uniform"] = "igq"
    first: float = 0.5
    last: float = 0.005
    every: int = 900
    rescale: bool = True
    scope: ClassVar[str] = "global, shared out by a rule"

    def __post_init__(self) -> None:
        if not (0 <= self.last <= self.first <= 1 and self.every >= 1):
            raise ValueError(
                f"Flying Bird needs 0 <= last <= first <= 1 and every >= 1, got {self.last}, {self.first} and {self.every}"
            )

    def share(self, progress: Progress) -> float:
        """The fraction of each layer that moves at this step; 0 where none does."""
        if not due(progress, self.every):
            return 0.0
        return self.last + (self.first - self.last) / 2 * (1 + cos(pi * progress.fraction))

    def __call__(self, model: nn.Module, density: Fraction, training: Training) -> Iterator[Phase]:
        sparse_start(model, density, self.allocation, self.rescale)
        yield replace(training.train(), after_backward=rewiring(self.share))


def set_apart(training: Training, share: float) -> tuple[Training, Training]:
    """The training without a random share of its images, and one of these images alone, as they are."""
    count = len(training.data)
    held = min(count - 1, max(1, round(share * count)))
    if held < 1:
        raise ValueError(f"no validation images can be held out of {count} training images; use more")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(derived_seed(training.seed, "held out")))
    rest, own = (training.data.at(part.sort().values) for part in (order[held:], order[:held]))
    return replace(training, data=rest), replace(training, data=replace(own, extra=None), augment="none")


@torch.no_grad()
def mean_loss(model: nn.Module, training: Training) -> float:
    """The objective at the end of its ramp, in eval mode, with the same random numbers at every call; the network rests."""
    total = 0.0
    with evaluating(model), torch.random.fork_rng():
        torch.manual_seed(0)
        for x, y in training.batches(torch.Generator().manual_seed(0)):
            total += len(x) * float(training.objective(model, x, y, Progress(0, 1)))
    return total / len(training.data)


def rose(values: Tensor) -> bool:
    """Whether at least half of the steps from one value to the next go up; NaN, for what is not known yet, does not."""
    return 2 * int((values[1:] > values[:-1]).sum()) >= len(values) - 1


@dataclass(frozen=True)
class FlyingBirdPlus(FlyingBird):
    """As `flyingbird`, but prunes more while it overfits and grows again while it gets worse, never beyond the density.

    Chen et al. 2022 (ICLR). A share `held_out` of the training images is never trained on. After the share `start` of the
    training each rewiring drops `pruned` times more if the objective's gap between held-out and training images rose in at
    least two of the last four epochs, and grows `grown` of each layer more if the held-out objective did; a layer never gets
    more weights than it started with, so the density asked for is the most there can be.
    """

    start: float = 0.5
    pruned: float = 0.4
    grown: float = 0.05
    held_out: float = 0.1
    scope: ClassVar[str] = "global, at most"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 <= self.start <= 1 and self.pruned >= 0 and self.grown >= 0 and 0 < self.held_out < 1):
            raise ValueError(
                "Flying Bird+ needs start from 0 to 1, pruned and grown >= 0 and held_out between 0 and 1, got "
                f"{self.start}, {self.pruned}, {self.grown} and {self.held_out}"
            )

    def moves(self, step: Step, part: Any, share: float) -> tuple[int, int]:
        """(how many weights a layer drops, how many it grows)."""
        history, active = _memory(step.model).losses, int(part.mask.sum())
        drop = grow = floor(share * active)
        if step.progress.fraction >= self.start:
            drop += floor(self.pruned * share * active) * rose(history[:, 0] - history[:, 1])
            grow += floor(self.grown * active) * rose(history[:, 0])
        drop = min(drop, active)
        return drop, min(grow, int(part.quota) - (active - drop))

    def __call__(self, model: nn.Module, density: Fraction, training: Training) -> Iterator[Phase]:
        rest, held = set_apart(training, self.held_out)
        trained = replace(held, data=replace(rest.data.first(len(held.data)), extra=None))
        sparse_start(model, density, self.allocation, self.rescale)
        for part, _ in opened(model):
            part.register_buffer("quota", part.mask.sum())
        _memory(model).register_buffer("losses", torch.full((WINDOW + 1, 2), torch.nan).to(_memory(model).mask))

        def look(step: Step) -> None:
            if step.progress.epoch >= self.start * step.progress.epochs - WINDOW:
                losses = _memory(step.model).losses
                losses.copy_(losses.roll(-1, 0))
                losses[-1] = losses.new_tensor([mean_loss(step.model, held), mean_loss(step.model, trained)])

        yield replace(training.train(), data=rest.data, after_backward=rewiring(self.share, self.moves), after_epoch=look)


def _memory(model: nn.Module) -> Any:
    """The part that remembers (held-out, training) losses of the last epochs: that of the first layer."""
    return opened(model)[0][0]
