"""The ball in exact arithmetic: every bound starts from a box that must not lose a single point of it."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from verifiers.ball import Ellipsoid, Interval, float_above, outward_box, region

EPS = st.one_of(
    st.fractions(min_value=0, max_value=2, max_denominator=10**6),
    st.sampled_from([Fraction(8, 255), Fraction(2, 255), Fraction(1, 10), Fraction(1, 10**30), Fraction(0)]),
)
PIXELS = st.lists(st.floats(0, 1, width=32), min_size=1, max_size=8)


def holds_exact_ball(x: Tensor, eps: Fraction, box: Interval) -> bool:
    """Every pixel's exact interval [max(x - eps, 0), min(x + eps, 1)], in rationals, lies inside the box."""
    return all(
        Fraction(low) <= max(Fraction(pixel) - eps, 0) and Fraction(high) >= min(Fraction(pixel) + eps, 1)
        for pixel, low, high in zip(x.tolist(), box.lower.tolist(), box.upper.tolist(), strict=True)
    )


@settings(deadline=None, max_examples=150)
@given(pixels=PIXELS, eps=EPS)
def test_the_box_contains_the_exact_ball(pixels: list[float], eps: Fraction) -> None:
    for dtype in (torch.float32, torch.float64):
        x = torch.tensor(pixels, dtype=dtype)
        assert holds_exact_ball(x, eps, outward_box(x, eps))


def test_a_radius_beyond_all_floats_of_the_type_gives_the_whole_pixel_box() -> None:
    x = torch.tensor([0.0, 0.25, 1.0])
    box = outward_box(x, Fraction(10**45))
    assert box.lower.tolist() == [0.0] * 3
    assert box.upper.tolist() == [1.0] * 3


def test_the_plain_float_box_would_lose_points_of_the_ball() -> None:
    """The property above can fail: x -+ float(eps) without outward rounding does not pass it."""
    x, eps = torch.rand(1000, generator=torch.Generator().manual_seed(0)), Fraction(8, 255)
    naive = Interval((x - float(eps)).clamp(0, 1), (x + float(eps)).clamp(0, 1))
    assert not holds_exact_ball(x, eps, naive)
    assert holds_exact_ball(x, eps, outward_box(x, eps))


@settings(deadline=None, max_examples=100)
@given(pixels=PIXELS, eps=EPS)
def test_the_box_stays_in_the_pixel_range_and_is_barely_wider_than_the_ball(pixels: list[float], eps: Fraction) -> None:
    x = torch.tensor(pixels)
    lower, upper = outward_box(x, eps)
    assert lower.min() >= 0
    assert upper.max() <= 1
    tight_lower = (x.double() - float(eps)).clamp(0, 1)
    tight_upper = (x.double() + float(eps)).clamp(0, 1)
    assert (tight_lower - lower.double()).max() <= 2.0**-23
    assert (upper.double() - tight_upper).max() <= 2.0**-23


@settings(deadline=None, max_examples=150)
@given(eps=EPS)
def test_float_above_is_the_smallest_float_not_below(eps: Fraction) -> None:
    for dtype in (torch.float32, torch.float64):
        value = torch.tensor(float_above(eps, dtype), dtype=dtype)
        assert Fraction(value.item()) >= eps
        if eps > 0:
            before = torch.nextafter(value, torch.tensor(-1.0, dtype=dtype))
            assert Fraction(before.item()) < eps


def test_an_l2_region_is_the_ball_inside_its_box() -> None:
    x, eps = torch.rand(3, 1, 2, 2, generator=torch.Generator().manual_seed(1)), Fraction(1, 3)
    ball = region(x, "l2", eps)
    assert isinstance(ball, Ellipsoid)
    torch.testing.assert_close((ball.lower, ball.upper), tuple(outward_box(x, eps)), rtol=0, atol=0)
    assert torch.equal(ball.middle, x)
    assert all(Fraction(radius) >= eps for radius in ball.spread.flatten().tolist())
    assert ball.spread.max() <= 1 / 3 + 1e-7


def test_an_interval_knows_its_centre_and_radius() -> None:
    box = Interval(torch.tensor([1.0, -2.0]), torch.tensor([3.0, 4.0]))
    assert box.centre.tolist() == [2, 1]
    assert box.radius.tolist() == [1, 3]


@pytest.mark.parametrize("norm", ["l1", "l0", "Linf", ""])
def test_an_unknown_norm_is_refused_by_name(norm: str) -> None:
    with pytest.raises(ValueError, match=f"{norm!r}"):
        region(torch.zeros(1, 1), norm, Fraction(1, 10))
