"""A toy data set of three classes and networks small enough to train in a blink, shared by the tests of bench."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import nn

from bench.data import Split
from bench.objectives import Benign
from bench.train import Budget, Objective, Training

CLASSES = 3
TINY = {"pretrain": 2, "prune": 2, "finetune": 2, "lr": 0.1, "prune_lr": 0.1, "finetune_lr": 0.05, "batch": 16}


def toy_split(seed: int = 0, n: int = 40) -> Split:
    """Grey 8x8 images with a bright stripe whose place is the class; n is no multiple of the batch size."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % CLASSES
    images = torch.randint(0, 120, (n, 1, 8, 8), generator=generator, dtype=torch.uint8)
    for place, label in enumerate(labels.tolist()):
        images[place, :, :, 2 * label : 2 * label + 2] += 110
    return Split(images, labels, torch.arange(n), 255.0)


def small_net(seed: int = 0, batchnorm: bool = False) -> nn.Sequential:
    """A convolution and two linear layers on 1x8x8 images: 1,108 prunable weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        middle = [nn.BatchNorm2d(4)] if batchnorm else []
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2, padding=1), *middle, nn.ReLU(),
            nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, CLASSES),
        )  # fmt: skip


@pytest.fixture(scope="session")
def toy() -> Split:
    return toy_split()


@pytest.fixture(scope="session")
def toy_of() -> Callable[..., Split]:
    return toy_split


@pytest.fixture(scope="session")
def net_of() -> Callable[..., nn.Sequential]:
    return small_net


@pytest.fixture(scope="session")
def training_of(toy: Split) -> Callable[..., Training]:
    """training_of(objective, data=..., seed=..., augment=..., **budget): tiny by default."""

    def make(
        objective: Objective | None = None, data: Split | None = None, seed: int = 0, augment: str = "none", **budget: Any
    ) -> Training:
        return Training(objective or Benign(), data or toy, Budget(**{**TINY, **budget}), seed, augment)

    return make


@pytest.fixture(scope="session")
def short() -> Callable[[type], Any]:
    """short(kind): an objective with the toy's eps and as few attack steps as still do something."""

    def make(kind: type) -> Any:
        fields = getattr(kind, "__dataclass_fields__", {})
        quick = {"eps": Fraction(1, 20), "steps": 2, "beta": 2.0}
        return kind(**{name: value for name, value in quick.items() if name in fields})

    return make
