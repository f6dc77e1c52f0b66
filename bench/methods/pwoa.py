"""PwoA, pruning without adversarial examples."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..sparsity import attach, keep_largest, kept_of, mask_layers, prunable, weights
from ..train import Phase, Progress, Step, Training
from .admm import Anchor, anchor_penalty, anchored

RIDGE = 1e-5  # times the batch size, in the normalised HSIC


def gaussian_kernel(x: Tensor, sigma: float) -> Tensor:
    """exp(-|x_i - x_j|^2 / (2 sigma^2 d)) for the d numbers of each sample."""
    flat = x.flatten(1)
    return (-torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist").square() / (2 * sigma**2 * flat.shape[1])).exp()


def normalised(kernel: Tensor) -> Tensor:
    """K_c (K_c + ridge)^-1 of the centred kernel K_c."""
    centred = kernel - kernel.mean(0, keepdim=True)
    centred = centred - centred.mean(1, keepdim=True)
    ridge = RIDGE * len(kernel) * torch.eye(len(kernel), device=kernel.device, dtype=kernel.dtype)
    return torch.linalg.solve(centred + ridge, centred)


def hsic(one: Tensor, other: Tensor) -> Tensor:
    """Normalised HSIC (CCA-type) of two normalised kernels: 0 where one side is constant, at most the batch size."""
    return (one * other.T).sum()


@contextmanager
def watching(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collects the outputs of the prunable layers but the last while the network is called inside."""
    seen: list[Tensor] = []
    hidden = list(prunable(model).values())[:-1]
    hooks = [layer.register_forward_hook(lambda module, given, out: seen.append(out)) for layer in hidden]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class Distillation:
    """alpha T^2 KL(teacher / T || student / T) on clean images, a mean over samples and classes; with HSIC terms if asked for."""

    teacher: nn.Module = field(repr=False)
    alpha: float
    temperature: float
    lambda_x: float = 0.0
    lambda_y: float = 0.0
    sigma: float = 5.0

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, progress: Progress) -> Tensor:
        with watching(model) as hidden:
            logits = model(x)
        with torch.no_grad():
            target = (self.teacher(x) / self.temperature).log_softmax(1)
        student = (logits / self.temperature).log_softmax(1)
        loss = self.alpha * self.temperature**2 * F.kl_div(student, target, reduction="none", log_target=True).mean()
        if self.lambda_x or self.lambda_y:
            labels = F.one_hot(y, logits.shape[1]).to(x)
            of_x, of_y = normalised(gaussian_kernel(x, self.sigma)), normalised(labels @ labels.T)
            of_hidden = [normalised(gaussian_kernel(one, self.sigma)) for one in hidden]
            loss = loss + sum(self.lambda_x * hsic(of_x, one) - self.lambda_y * hsic(of_y, one) for one in of_hidden)
        return loss


@dataclass(frozen=True)
class PwoA:
    """Prunes a robust network on clean images alone: ADMM, then fine-tuning, towards the outputs of the robust dense one.

    Jian et al. 2022 (ICDM). Only the pre-training sees the objective. The ADMM stage and the fine-tuning distil with weight
    `alpha` at `temperature`; the fine-tuning also lowers the HSIC of the images with each layer and raises that of the labels.
    The dual is updated every `every` epochs, where rho grows by `growth` up to `largest_rho`.
    """

    alpha: float = 10.0
    temperature: float = 30.0
    lambda_x: float = 2e-5
    lambda_y: float = 1e-4
    rho: float = 0.01
    growth: float = 1.35
    largest_rho: float = 1.0
    every: int = 3
    scope: ClassVar[str] = "per layer"
    fixes_loss: ClassVar[str] = "distillation on clean images after the pre-training"

    def __post_init__(self) -> None:
        if min(self.alpha, self.temperature, self.rho, self.every) <= 0 or self.growth < 1:
            raise ValueError("PwoA needs alpha, temperature and rho > 0, every >= 1 and growth >= 1")

    def __call__(self, model: nn.Module, density: Fraction, training: Training) -> Iterator[Phase]:
        yield training.pretrain()
        teacher = copy.deepcopy(model).eval().requires_grad_(False)
        distil = Distillation(teacher, self.alpha, self.temperature)
        for layer in prunable(model).values():
            attach(layer, Anchor(layer.weight, kept_of(layer.weight.numel(), density), self.rho))
        yield replace(training.prune(), name="admm", objective=distil, penalty=anchor_penalty, after_epoch=self._update)
        mask_layers(model, keep_largest({name: weight.abs() for name, weight in weights(model).items()}, density))
        full = replace(distil, lambda_x=self.lambda_x, lambda_y=self.lambda_y)
        yield replace(training.finetune(), objective=full)

    def _update(self, step: Step) -> None:
        if step.progress.epoch % self.every == 0 and step.progress.epoch < step.progress.epochs:
            for anchor, weight in anchored(step.model):
                anchor.update_dual(weight, self.growth)
                anchor.rho.clamp_(max=self.largest_rho)
