"""The normalisation layer holds numbers that float32 can divide by, or is refused."""

from __future__ import annotations

import math

import pytest
import torch

from verifiers.normalise import Normalize

BEYOND = pytest.param(10**400, id="10^400")


@pytest.mark.parametrize("std", [0, -1.0, math.nan, math.inf, 1e-46, 1e39, BEYOND])
def test_a_std_that_is_not_finite_and_positive_in_float32_is_refused(std: float) -> None:
    with pytest.raises(ValueError, match="std must be positive and finite"):
        Normalize([0.5, 0.5], [0.2, std])


@pytest.mark.parametrize("mean", [math.nan, math.inf, -math.inf, 1e39, BEYOND])
def test_a_mean_that_is_not_finite_in_float32_is_refused(mean: float) -> None:
    with pytest.raises(ValueError, match="mean must be finite"):
        Normalize([0.5, mean], [0.2, 0.2])


def test_what_is_accepted_is_normalised_per_channel() -> None:
    x = torch.tensor([[[[0.5]], [[1.0]]]])
    assert Normalize([0, 0.5], [1, 0.25])(x).flatten().tolist() == [0.5, 2.0]
