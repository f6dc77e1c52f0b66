"""The attack of distributionally robust training: penalised ascent without a ball, which the threat's ball then cuts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks import lp
from attacks.pgd import classes_of


def ascend_penalised(loss: Callable[[Tensor], Tensor], x: Tensor, gamma: float, steps: int, clip: bool) -> Tensor:
    """Gradient ascent from x on gamma * loss(x') - |x' - x|^2 / 2 with step sizes 1, 1/sqrt(2), 1/sqrt(3), ...

    `loss` is summed over images [N, C, H, W], so that each image is moved by its own gradient alone.
    """
    moved = x
    for step in range(steps):
        moved = moved.detach().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(loss(moved), moved)
        moved = moved.detach() + (gamma * gradient + x - moved.detach()) / (step + 1) ** 0.5
        if clip:
            moved = moved.clamp(0, 1)
    return moved.detach()


@dataclass(frozen=True, kw_only=True)
class WRM:
    """Every returned image is the maximiser found of gamma * CE - |x' - x|^2 / 2, put into the exact ball and [0,1].

    gamma is ATMC's: the larger, the stronger; in the paper's Lagrangian it is 1 / (2 gamma). The penalty decides how far the
    ascent goes and the threat's ball what of that counts, so accuracy under this attack is a statement about gamma and eps.
    ATMC takes 7 steps and clips to [0,1] after each. An image that is misclassified already comes back as it is.

    x is float32 [N,C,H,W] in [0,1], y int64 [N], eps in pixel units. Nothing is random here: `seed` is there so that every
    attack can be given one. Raises ValueError or TypeError on construction. Sinha, Namkoong, Duchi 2018, arXiv 1710.10571.
    """

    norm: str = "linf"
    eps: Fraction
    gamma: float = 1.3
    steps: int = 7
    clip: bool = True
    seed: int | None = 0

    def __post_init__(self) -> None:
        lp.check_ball(self.norm, self.eps)
        if not (0 <= self.gamma < float("inf")) or self.steps < 1:
            raise ValueError(f"WRM needs gamma >= 0 and steps >= 1, got {self.gamma} and {self.steps}")

    @property
    def cost(self) -> float:
        """About how many forward passes an image costs."""
        return 3 * self.steps + 1

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        x = x.detach()
        if len(x) == 0:
            return x.clone()
        with torch.no_grad():
            standing = (classes_of(model(x)) == y).view(-1, *[1] * (x.dim() - 1))
        moved = ascend_penalised(
            lambda at: F.cross_entropy(model(at), y, reduction="sum"), x, self.gamma, self.steps, self.clip
        )
        return torch.where(standing, lp.project(moved, x, self.norm, self.eps), x)
