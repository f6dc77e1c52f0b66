"""The ball is the exact one; checked with rational arithmetic, by hand and against the laws of the noise."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attacks import lp

PIXEL = st.floats(0, 1, width=32)
ANYTHING = st.one_of(st.floats(-2, 3, width=32), st.floats(width=32))
EPS = st.one_of(
    st.fractions(0, 1, max_denominator=255),
    st.builds(Fraction, st.integers(0, 10**6), st.just(10**9 + 7)),
    st.sampled_from([Fraction(8, 255), Fraction(1, 4), Fraction(0), Fraction(1)]),
)


def image(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).view(1, 1, 1, -1)


def exactly_inside(x_adv: torch.Tensor, x: torch.Tensor, norm: str, eps: Fraction) -> bool:
    pairs = zip(x_adv.flatten().tolist(), x.flatten().tolist(), strict=True)
    gaps = [abs(Fraction(a) - Fraction(b)) for a, b in pairs]
    return max(gaps) <= eps if norm == "linf" else sum(gap**2 for gap in gaps) <= eps**2


@pytest.mark.parametrize("norm", lp.NORMS)
@settings(max_examples=250, deadline=None)
@given(pairs=st.lists(st.tuples(PIXEL, ANYTHING), min_size=1, max_size=9), eps=EPS)
def test_project_lands_in_the_exact_ball_and_in_the_pixel_box(norm: str, pairs: list[tuple[float, float]], eps: Fraction) -> None:
    x, raw = image([p for p, _ in pairs]), image([q for _, q in pairs])
    x_adv = lp.project(raw, x, norm, eps)
    assert exactly_inside(x_adv, x, norm, eps)
    assert lp.distance(x_adv, x, norm).item() <= float(eps)
    assert x_adv.dtype == torch.float32
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    assert torch.equal(lp.project(x, x, norm, eps), x)


@pytest.mark.parametrize("norm", lp.NORMS)
@settings(max_examples=100, deadline=None)
@given(pairs=st.lists(st.tuples(PIXEL, st.floats(-2, 3, width=32)), min_size=1, max_size=9), eps=EPS)
def test_project_is_the_nearest_point_up_to_rounding(norm: str, pairs: list[tuple[float, float]], eps: Fraction) -> None:
    x, raw = image([p for p, _ in pairs]), image([q for _, q in pairs])
    fast = lp.clip_to_ball(raw, x, norm, float(eps))
    torch.testing.assert_close(lp.project(raw, x, norm, eps), fast, atol=3e-7, rtol=0)
    if norm == "linf":
        by_hand = [min(max(q, p - float(eps), 0.0), p + float(eps), 1.0) for p, q in pairs]
        torch.testing.assert_close(fast, image(by_hand), atol=3e-7, rtol=0)


def test_rounding_to_float32_alone_would_leave_the_ball() -> None:
    """The crafted case: without rounding inwards these pixels are outside, so the property above can fail."""
    x, eps = torch.rand(1, 1, 40, 40, generator=torch.Generator().manual_seed(0)), Fraction(8, 255)
    naive = (x.double() + float(eps)).to(torch.float32).clamp(0, 1)
    assert not exactly_inside(naive, x, "linf", eps)
    assert exactly_inside(lp.project(naive, x, "linf", eps), x, "linf", eps)


def test_an_eps_whose_float_is_larger_is_not_rounded_up() -> None:
    eps = Fraction(1, 4) - Fraction(1, 10**30)
    assert lp.project(image([0.75]), image([0.5]), "linf", eps).item() < 0.75


def test_a_float64_difference_that_rounds_down_to_eps_is_still_outside() -> None:
    """hi - x is eps + ulp/4, which float64 rounds to eps: only the rounding error tells."""
    hi = image([0.3])
    ulp = math.ulp(hi.item())
    eps, x = Fraction(hi.item()) - Fraction(ulp), image([0.75 * ulp])
    assert lp.distance(hi, x, "linf").item() == float(eps)
    assert exactly_inside(lp.project(hi, x, "linf", eps), x, "linf", eps)


def test_a_sum_of_squares_that_rounds_down_to_eps_is_still_outside() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = 0
    for _ in range(20):
        x, raw = torch.rand(2, 1, 1, 8, 8, generator=generator)
        eps = Fraction(lp.distance(raw, x, "l2").item())
        hidden += not exactly_inside(raw, x, "l2", eps)
        assert exactly_inside(lp.project(raw, x, "l2", eps), x, "l2", eps)
    assert hidden > 3  # float64 alone calls all twenty inside


def test_l2_projection_shortens_a_3_4_5_triangle_by_hand() -> None:
    x, raw = image([0.5, 0.5]), image([0.8, 0.9])
    torch.testing.assert_close(lp.project(raw, x, "l2", Fraction(1, 4)), image([0.65, 0.7]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("norm", lp.NORMS)
def test_a_pixel_that_is_not_finite_becomes_the_clean_pixel(norm: str) -> None:
    x, raw = image([0.25, 0.5, 0.75]), image([float("nan"), 0.5625, float("inf")])
    assert torch.equal(lp.project(raw, x, norm, Fraction(1, 2)), image([0.25, 0.5625, 0.75]))


def test_distance_is_taken_in_float64() -> None:
    x, x_adv = image([1.0, 0.0]), image([1.0, 2.0**-30])
    assert lp.distance(x_adv, x, "l2").dtype == torch.float64
    assert lp.distance(image([0.0, 1.0]), image([2.0**-30, 1.0]), "linf").item() == 2.0**-30
    assert lp.distance(image([0.3, 0.4]), image([0.0, 0.0]), "l2").item() == pytest.approx(0.5, abs=1e-7)


def test_ascend_moves_by_the_step_in_its_own_norm() -> None:
    x, gradient = torch.full((2, 1, 2, 2), 0.5), torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    for norm in lp.NORMS:
        moved = lp.ascend(x, gradient, norm, Fraction(1, 8))
        torch.testing.assert_close(lp.distance(moved, x, norm), torch.full((2,), 0.125).double(), atol=1e-6, rtol=0)
        assert ((moved - x) * gradient).sum() > 0


@pytest.mark.parametrize("norm", lp.NORMS)
@pytest.mark.parametrize("size, expected", [(0.0, 0.0), (1e-30, 0.125)])
def test_ascend_survives_zero_and_underflowing_gradients(norm: str, size: float, expected: float) -> None:
    x = torch.full((1, 1, 2, 2), 0.5)
    moved = lp.ascend(x, torch.full_like(x, size), norm, 0.125)
    assert lp.distance(moved, x, norm).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("norm", lp.NORMS)
def test_seeded_start_of_an_image_ignores_its_batch_and_the_global_generator(norm: str) -> None:
    x = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(2))
    state = torch.get_rng_state()
    together = lp.random_start(x, norm, Fraction(1, 10), seed=3)
    alone = torch.cat([lp.random_start(x[i : i + 1], norm, Fraction(1, 10), seed=3) for i in range(6)])
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(together, alone)
    for other in [lp.random_start(x, norm, Fraction(1, 10), seed=4), lp.random_start(x, norm, 0.1, seed=3, restart=1)]:
        assert (other != together).flatten(1).any(dim=1).all()


def test_unseeded_start_draws_from_the_global_generator() -> None:
    x = torch.full((3, 1, 2, 2), 0.5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        first, second = lp.random_start(x, "linf", 0.25), lp.random_start(x, "linf", 0.25)
        torch.manual_seed(5)
        assert torch.equal(lp.random_start(x, "linf", 0.25), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("seed", [None, 0])
def test_random_start_is_uniform_in_the_ball(seed: int | None) -> None:
    """The share of a uniform n-dimensional ball within r of its centre is r^n (n = 3); in a cube mean |u| is 1/2."""
    x = torch.full((4000, 1, 1, 3), 0.5) + torch.arange(4000).view(-1, 1, 1, 1) * 1e-6
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        radius = lp.distance(lp.random_start(x, "l2", 0.25, seed), x, "l2") / 0.25
        offset = (lp.random_start(x, "linf", 0.25, seed) - x) / 0.25
    for r in (0.5, 0.8):
        assert (radius <= r).double().mean().item() == pytest.approx(r**3, abs=0.035)  # over four standard errors
    assert radius.max() <= 1 + 1e-5
    assert offset.abs().mean().item() == pytest.approx(0.5, abs=0.015)
    assert abs(offset.mean().item()) < 0.03


def test_unknown_norms_and_inexact_radii_are_refused() -> None:
    x = torch.zeros(1, 1, 1, 1)
    for call in [
        lambda: lp.distance(x, x, "l7"),
        lambda: lp.project(x, x, "l7", 0.1),
        lambda: lp.clip_to_ball(x, x, "l7", 0.1),
        lambda: lp.ascend(x, x, "l7", 0.1),
        lambda: lp.random_start(x, "l7", 0.1),
        lambda: lp.check_ball("l7", Fraction(1)),
    ]:
        with pytest.raises(ValueError, match=r"unknown norm 'l7': choose one of linf, l2"):
            call()
    with pytest.raises(TypeError, match=r"0\.031.*Fraction"):
        lp.check_ball("linf", 0.031)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="-1/2"):
        lp.check_ball("linf", Fraction(-1, 2))


@pytest.mark.parametrize("norm", lp.NORMS)
@pytest.mark.parametrize("eps", [Fraction(0), Fraction(1, 10), Fraction(8, 255), Fraction(3)])
def test_a_ball_projects_as_project_does(norm: str, eps: Fraction) -> None:
    generator = torch.Generator().manual_seed(0)
    x, rows = torch.rand(7, 1, 4, 4, generator=generator), torch.tensor([5, 0, 3])
    x[0] = 0.0
    x[3] = 1.0
    x_adv = x[rows] + torch.randn(3, 1, 4, 4, generator=generator) / 5
    x_adv[0, 0, 0, 0] = torch.nan
    assert torch.equal(lp.Ball(x, norm, eps).project(x_adv, rows), lp.project(x_adv, x[rows], norm, eps))
