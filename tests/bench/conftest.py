"""A toy data set of three classes and networks small enough to train in a blink, shared by the tests of bench."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from bench.contracts import cases
from bench.contracts.cases import small_net, tiny_training, toy_split
from bench.data import Split
from bench.train import Training


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

    def make(*words: Any, data: Split | None = None, **budget: Any) -> Training:
        return tiny_training(*words, data=data or toy, **budget)

    return make


@pytest.fixture(scope="session")
def short() -> Callable[[type], Any]:
    """short(kind): an objective with the toy's eps and as few attack steps as still do something."""
    return cases.short
