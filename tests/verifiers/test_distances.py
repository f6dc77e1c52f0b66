"""Brackets of the smallest adversarial distance: against a formula and against brute force."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import nn

from tests.verifiers.brute_force import true_margin
from tests.verifiers.small_nets import images, labels, linear, randomised
from verifiers import exact_radius
from verifiers.ball import outward_box


def tiny() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))


def test_brackets_hold_the_known_distance_of_a_linear_network() -> None:
    """The margin w.x + b changes sign at linf distance margin / |w|_1 while the ball stays inside [0,1]."""
    net = nn.Sequential(linear([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0]], [0.6, 0.0]))
    x = torch.tensor([[0.5, 0.4, 0.5], [0.4, 0.5, 0.5], [0.5, 0.5, 0.45]])
    y, tolerance = labels(net, x), Fraction(1, 10**4)
    truth = (net(x)[:, 0] / 3.5).abs().double()
    lower, upper = exact_radius(net, x, y, Fraction(1, 3), tolerance)
    assert ((lower - 1e-6 <= truth) & (truth <= upper + 1e-6)).all()
    assert (upper - lower <= 1.1e-4).all()


def test_brackets_of_tiny_networks_are_the_truth_and_misclassified_images_have_distance_0() -> None:
    net = randomised(tiny(), seed=2)
    x = images(4, (3,), 2)
    y = labels(net, x)
    y[3] = (y[3] + 1) % 3
    lower, upper = exact_radius(net, x, y, Fraction(1, 2), Fraction(1, 100))
    assert (lower[3], upper[3]) == (0, 0)
    for i in range(3):
        double = randomised(tiny(), seed=2)
        ends = float(lower[i]), min(float(upper[i]), 0.5)
        below, above = (outward_box(x[i : i + 1].double(), Fraction(end)) for end in ends)
        assert true_margin(double, below.lower, below.upper, int(y[i]), 3) > 0  # type: ignore[arg-type]
        if upper[i] <= 0.5:
            assert true_margin(double, above.lower, above.upper, int(y[i]), 3) <= 1e-6  # type: ignore[arg-type]
            assert upper[i] - lower[i] <= 0.0101
        else:
            assert lower[i] == 0.5
    assert upper.isfinite().any()


def test_distances_need_a_positive_tolerance() -> None:
    y = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="positive tolerance"):
        exact_radius(nn.Linear(2, 2), torch.zeros(1, 2), y, Fraction(1), Fraction(0))
