"""Whether a witness counts: exact at the boundary of the ball, never outside [0,1], measured and not believed."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from attacks import lp
from bench.build import construct
from bench.errors import UserError
from bench.threat import Threat, distance, within

RADII = [Fraction(1, 10), Fraction(8, 255), Fraction(2, 255), Fraction(1, 8), Fraction(1, 3)]


def image(*pixels: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor([pixels], dtype=dtype).view(1, 1, 1, -1)


def floats_around(eps: Fraction) -> list[float]:
    """The float64 numbers next to eps, below and above it."""
    near = float(eps)
    return [math.nextafter(near, 0), near, math.nextafter(near, 1)]


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("eps", RADII, ids=str)
def test_the_boundary_is_exact_where_eps_is_no_float(eps: Fraction, norm: str) -> None:
    for moved in floats_around(eps):
        assert bool(within(image(moved), image(0.0), norm, eps)) is (Fraction(moved) <= eps)


def test_a_tenth_as_a_float_is_already_outside_the_ball_of_radius_one_tenth() -> None:
    assert Fraction(0.1) > Fraction(1, 10)
    assert not bool(within(image(0.1), image(0.0), "linf", Fraction(1, 10)))


@pytest.mark.parametrize("eps", RADII, ids=str)
def test_a_float32_witness_is_judged_by_its_own_exact_distance(eps: Fraction) -> None:
    near = torch.tensor(float(eps), dtype=torch.float32)
    for toward in (0.0, 1.0):
        other = torch.nextafter(near, torch.tensor(toward))
        for value in (near, other):
            witness = value.view(1, 1, 1, 1)
            expected = Fraction(float(value)) <= eps
            assert bool(within(witness, torch.zeros(1, 1, 1, 1), "linf", eps)) is expected


@settings(deadline=None, max_examples=300)
@given(st.integers(0, 2**12), st.integers(0, 2**12), st.sampled_from([*RADII, Fraction(0), Fraction(1)]))
@example(0, 512, Fraction(1, 8))
@example(0, 513, Fraction(1, 8))
def test_within_agrees_with_fractions_on_dyadic_pixels(a: int, b: int, eps: Fraction) -> None:
    x, witness = (image(value / 2**12, dtype=torch.float32) for value in (a, b))
    assert bool(within(witness, x, "linf", eps)) is (abs(Fraction(a - b, 2**12)) <= eps)


def test_l2_by_hand_on_a_three_four_five_triangle() -> None:
    x, witness = image(0.25, 0.25), image(0.625, 0.75)
    assert distance(witness, x, "l2").tolist() == [0.625]
    assert distance(witness, x, "linf").tolist() == [0.5]
    assert bool(within(witness, x, "l2", Fraction(5, 8)))
    assert not bool(within(witness, x, "l2", Fraction(5, 8) - Fraction(1, 2**50)))


@pytest.mark.parametrize("pixel", [-1e-9, 1.0000001, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_witness_outside_0_1_or_without_a_number_never_counts(pixel: float, norm: str) -> None:
    x = image(0.5, 0.0 if pixel < 0.5 else 1.0)
    assert bool(within(x, x, norm, Fraction(1)))
    assert not bool(within(image(0.5, pixel), x, norm, Fraction(1)))


def test_every_sample_is_judged_alone() -> None:
    x = torch.full((3, 1, 2, 2), 0.5)
    witness = x.clone()
    witness[1, 0, 1, 1] = 0.75
    witness[2, 0, 0, 0] = 1.25
    assert within(witness, x, "linf", Fraction(1, 8)).tolist() == [True, False, False]
    assert within(witness, x, "linf", Fraction(1)).tolist() == [True, True, False]
    assert distance(witness, x, "linf").tolist() == [0.0, 0.25, 0.75]


def test_a_distance_is_a_float64_even_of_float32_images() -> None:
    x, witness = torch.full((1, 1, 1, 1), 0.1), torch.full((1, 1, 1, 1), 0.3)
    found = distance(witness, x, "linf")
    assert found.dtype == torch.float64
    assert Fraction(float(found)) == Fraction(float(witness)) - Fraction(float(x))


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("eps", [*RADII, Fraction(0)], ids=str)
def test_what_the_attacks_projection_returns_always_counts(norm: str, eps: Fraction) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(200, 1, 4, 4, generator=generator)
    x[::2] = x[::2].round()  # corners of the pixel box
    proposed = x + torch.randn(x.shape, generator=generator)
    assert bool(within(lp.project(proposed, x, norm, eps), x, norm, eps).all())


def test_a_threat_is_exact_and_refuses_what_is_no_ball() -> None:
    assert construct(Threat, {"norm": "l2", "eps": "8/255"}, "threat") == Threat("l2", Fraction(8, 255))
    with pytest.raises(UserError, match="threat: eps must not be negative, got -1/10"):
        construct(Threat, {"eps": "-0.1"}, "threat")
    with pytest.raises(UserError, match="norm of threat must be one of linf, l2, got 'l1'"):
        construct(Threat, {"norm": "l1"}, "threat")
