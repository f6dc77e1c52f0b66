"""MAD, masking adversarial damage."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from math import expm1, floor, log
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from attacks.pgd import PGD

from ..sparsity import Masks, budget_of, keep_largest_of_all, mask_layers, prunable, top_k, weights
from ..train import Phase, Training

LEAST, ONE = log(expm1(1e-4)), log(expm1(1.0))  # softplus maps them to 1e-4 and 1


def masked_weights(model: nn.Module, raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each layer's weight times softplus of its raw mask, by its name in the state dict."""
    return {f"{name}.weight": layer.weight * F.softplus(raw[name]) for name, layer in prunable(model).items()}


def soft_masks(model: nn.Module, x: Tensor, y: Tensor, steps: int, lr: float) -> dict[str, Tensor]:
    """Raw masks after so many steps of Adam on the cross-entropy at x; softplus of them starts at 1 and stays in [1e-4, 1]."""
    raw = {name: torch.full_like(layer.weight, ONE).requires_grad_() for name, layer in prunable(model).items()}
    optimizer = torch.optim.Adam(raw.values(), lr)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(functional_call(model, masked_weights(model, raw), x), y).backward()
        optimizer.step()
        with torch.no_grad():
            for one in raw.values():
                one.clamp_(LEAST, ONE)
    return {name: one.detach() for name, one in raw.items()}


def inputs_and_slopes(
    model: nn.Module, masked: Mapping[str, Tensor], x: Tensor, y: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """What each layer is given at x, and the gradient of each image's own cross-entropy with respect to what it returns.

    masked: the weights to use instead of the model's, by their names in the state dict.
    """
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str) -> Any:
        def keep(module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
            seen[name] = given[0].detach(), out

        return keep

    handles = [layer.register_forward_hook(watch(name)) for name, layer in prunable(model).items()]
    try:
        loss = F.cross_entropy(functional_call(model, dict(masked), x.detach().requires_grad_()), y, reduction="sum")
    finally:
        for handle in handles:
            handle.remove()
    slopes = torch.autograd.grad(loss, [out for _, out in seen.values()])
    return {name: (given, slope) for (name, (given, _)), slope in zip(seen.items(), slopes, strict=True)}


def saliency(layer: nn.Module, change: Tensor, given: Tensor, slope: Tensor) -> Tensor:
    """1/2 G_ii D_ij (D A)_ij: what the change D of the layer's weight does to the loss by its Kronecker-factored curvature.

    A = E[a a^T] of the inputs, summed over the places of a convolution; G = E[g g^T] of the outputs' gradients, its mean over
    them. D A is the gradient of E|D a|^2 / 2, so that neither factor is ever formed.
    """
    moved = change.detach().requires_grad_()
    own = {"weight": moved} if layer.bias is None else {"weight": moved, "bias": torch.zeros_like(layer.bias)}  # type: ignore[arg-type]
    energy = functional_call(layer, own, given).square().sum() / (2 * len(given))
    (along,) = torch.autograd.grad(energy, moved)
    curvature = slope.square().transpose(0, 1).flatten(1).mean(1)
    return curvature.view(-1, *[1] * (change.dim() - 1)) * change * along / 2


def ranks(scores: Mapping[str, Tensor], sizes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The place of every weight in the order of all scores; of equal ones, such as zeros, the larger weight stands higher."""
    order = torch.cat([sizes[name].abs().flatten() for name in scores]).argsort(stable=True)
    order = order[torch.cat([score.flatten() for score in scores.values()])[order].argsort(stable=True)]
    places = torch.empty(len(order), dtype=torch.float64, device=order.device)
    places[order] = torch.arange(len(order), dtype=torch.float64, device=order.device)
    parts = places.split([score.numel() for score in scores.values()])
    return {name: part.view_as(score) for (name, score), part in zip(scores.items(), parts, strict=True)}


def keep_salient(scores: Mapping[str, Tensor], density: Fraction) -> Masks:
    """A mask of floor(density N) scores: the last layer's largest of every row, equally many, then the others' largest.

    Raises ValueError where that leaves fewer weights than there are other layers.
    """
    sizes = {name: score.numel() for name, score in scores.items()}
    *others, last = scores
    rows = scores[last].flatten(1)
    per_row = max(1, floor(density * rows.shape[1]))
    left = min(sum(sizes[name] for name in others), budget_of(sum(sizes.values()), density) - per_row * len(rows))
    if left < len(others):
        raise ValueError(
            f"density {density} leaves {max(0, left)} weights for the layers before the last, which takes {per_row} of each row; "
            "ask for a larger one"
        )
    masks = keep_largest_of_all({name: scores[name] for name in others}, left) if others else {}
    return {**masks, last: torch.stack([top_k(row, per_row) for row in rows]).view_as(scores[last])}


@dataclass(frozen=True)
class MAD:
    """Keeps the weights whose masking would damage the attacked network most, by a second-order estimate, and fine-tunes them.

    Lee et al. 2022 (CVPR). On PGD examples (linf, eps, `steps`) of each batch, soft masks are learned that lower the
    cross-entropy, in `mask_steps` of Adam; what they take from the weights is the change whose `saliency` is averaged over the
    training set, or over so many `batches`. Only the score has a loss of its own: the trainings are the objective's.
    """

    eps: Fraction = Fraction(8, 255)
    steps: int = 10
    mask_steps: int = 20
    mask_lr: float = 0.1
    batches: int | None = None
    scope: ClassVar[str] = "global, the last layer per row"
    fixes_loss: ClassVar[str] = "cross-entropy on PGD examples in its score"

    def __post_init__(self) -> None:
        self.attack()
        if self.mask_steps < 1 or not self.mask_lr > 0 or (self.batches is not None and self.batches < 1):
            got = f"{self.mask_steps}, {self.mask_lr} and {self.batches}"
            raise ValueError(f"MAD needs mask_steps >= 1, mask_lr > 0 and batches >= 1, got {got}")

    def attack(self) -> PGD:
        """The paper's steps of 2.3 eps / steps; noise is drawn from torch's global generator."""
        size = self.eps * Fraction(23, 10) / max(1, self.steps)
        return PGD(norm="linf", eps=self.eps, steps=self.steps, step_size=size, seed=None, last=True)

    def scores(self, model: nn.Module, training: Training) -> dict[str, Tensor]:
        """The mean saliency of every prunable weight; the model is left as it was."""
        probe = copy.deepcopy(model).eval().requires_grad_(False)
        total = {name: torch.zeros_like(layer.weight) for name, layer in prunable(probe).items()}
        order, attack, seen = torch.Generator().manual_seed(int(torch.randint(2**62, ()))), self.attack(), 0
        for x, y in islice(training.batches(order), self.batches):
            x_adv = attack(probe, x, y)
            masked = masked_weights(probe, soft_masks(probe, x_adv, y, self.mask_steps, self.mask_lr))
            watched = inputs_and_slopes(probe, masked, x_adv, y)
            for name, layer in prunable(probe).items():
                total[name] += len(x) * saliency(layer, layer.weight - masked[f"{name}.weight"], *watched[name])
            seen += len(x)
        return {name: one / seen for name, one in total.items()}

    def __call__(self, model: nn.Module, density: Fraction, training: Training) -> Iterator[Phase]:
        yield training.pretrain()
        places = ranks(self.scores(model, training), weights(model))
        mask_layers(model, {name: mask.float() for name, mask in keep_salient(places, density).items()})
        yield training.finetune()
