"""AutoAttack at its published strength, built from the parts of torchattacks (whose own bundle runs 10 steps)."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor, nn

from attacks import lp
from attacks.library import Library, untouched
from attacks.pgd import classes_of

STANDARD = {"steps": 100, "targets": 9, "queries": 5000}


@dataclass(frozen=True, kw_only=True)
class AutoAttack:
    """Every returned image lies in the exact ball and is the first misclassified one that the standard bundle found, or x.

    The parts, each run only on the images that all earlier ones left standing: APGD on the cross entropy, APGD on the targeted
    DLR loss, targeted FAB, each of `steps` steps without restarts and the targeted ones against the `targets` nearest classes
    (all others where there are fewer), and Square with `queries` queries. Below 4 classes, where there is no targeted DLR loss,
    APGD ascends the margin instead. Anything below 100, 9 and 5000 is not AutoAttack, and `label` says so.

    x is float32 [N,C,H,W] in [0,1], y int64 [N], eps in pixel units, norm linf or l2. The model and every random generator are
    left as they were; an answer depends on its image only (beyond the rounding of the network's own kernels).
    Raises ValueError or TypeError on construction. Croce and Hein 2020, arXiv 2003.01690.
    """

    norm: str = "linf"
    eps: Fraction
    steps: int = 100
    targets: int = 9
    queries: int = 5000
    seed: int = 0
    rest: ClassVar[bool] = True  # where nothing cheaper has broken an image
    black_box: ClassVar[None] = None  # parts of both kinds

    def __post_init__(self) -> None:
        lp.check_ball(self.norm, self.eps)
        if min(self.steps, self.targets, self.queries) < 1:
            raise ValueError(f"steps, targets and queries are at least 1, got {self.steps}, {self.targets} and {self.queries}")

    @property
    def label(self) -> str:
        """autoattack for the standard bundle, else with what was changed."""
        changed = [f"{name} {getattr(self, name)}" for name, value in STANDARD.items() if getattr(self, name) != value]
        return f"autoattack ({', '.join(changed)})" if changed else "autoattack"

    @property
    def cost(self) -> float:
        """About how many forward passes an image costs."""
        return sum(part.cost for part in self.parts(classes=self.targets + 1))

    def parts(self, classes: int) -> list[Library]:
        """The four attacks for a network of that many classes."""
        targets = min(self.targets, classes - 1)
        many = classes >= 4
        return [
            self._part("apgd", steps=self.steps, loss="ce", n_restarts=1),
            self._part("apgdt", steps=self.steps, targets=targets, n_restarts=1) if many
            else self._part("apgd", steps=self.steps, loss="margin", n_restarts=1),
            self._part("fab", steps=self.steps, multi_targeted=True, targets=targets, n_restarts=1),
            self._part("square", n_queries=self.queries, n_restarts=1, resc_schedule=False),
        ]  # fmt: skip

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        x_adv = x.detach().clone()
        if len(x) == 0:
            return x_adv
        predicted, classes = _classes(model, x_adv)
        rows = (predicted == y).nonzero().flatten()
        for part in self.parts(classes):
            if len(rows) == 0:
                break
            images, labels = x_adv[rows], y[rows]
            found = lp.project(part(model, images, labels), images, self.norm, self.eps)
            broken = _classes(model, found)[0] != labels
            x_adv[rows[broken]] = found[broken]
            rows = rows[~broken]
        return x_adv

    def _part(self, attack: str, **params: object) -> Library:
        return Library(norm=self.norm, eps=self.eps, attack=attack, params=tuple(params.items()), seed=self.seed)


def _classes(model: nn.Module, x: Tensor) -> tuple[Tensor, int]:
    """(predicted classes of the model as the parts see it, how many classes there are)."""
    with untouched(model), torch.no_grad():
        logits = model(x)
    return classes_of(logits), logits.shape[1]
