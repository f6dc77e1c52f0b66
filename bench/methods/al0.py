"""Al0."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from math import floor
from typing import ClassVar, Literal

from torch import nn

from ..sparsity import budget_of, keep_only_largest_, prunable
from ..train import Phase, Step, Training


def project_(model: nn.Module, keep: int) -> None:
    """Make the network's weights the closest ones (in l2) of which `keep` are non-zero."""
    keep_only_largest_({name: layer.weight for name, layer in prunable(model).items()}, keep)


@dataclass(frozen=True)
class AL0:
    """Projects the whole network onto its floor(density N) largest weights after every step; zeroed weights can come back.

    Gui et al. 2019 (ATMC, arXiv 1902.03538), from the robust pre-training on, for the prune and fine-tune epochs. `schedule`:
    the last budget from the first step on, or one that shrinks exponentially from the dense network to it.
    """

    schedule: Literal["constant", "exp"] = "constant"
    scope: ClassVar[str] = "global"

    def __call__(self, model: nn.Module, density: Fraction, training: Training) -> Iterator[Phase]:
        total = sum(layer.weight.numel() for layer in prunable(model).values())
        keep = budget_of(total, density)

        def project(step: Step) -> None:
            done = (step.progress.step + 1) / step.progress.steps
            now = floor(total * float(density) ** done) if self.schedule == "exp" else keep
            project_(step.model, max(keep, now))

        yield training.pretrain()
        budget, phase = training.budget, training.finetune()
        yield replace(phase, name="project", epochs=budget.prune + budget.finetune, after_step=project)
        project_(model, keep)
