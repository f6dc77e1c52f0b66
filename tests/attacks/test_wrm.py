"""The WRM attack against its maximiser in closed form (linear networks)."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from attacks import WRM, lp

FAR = Fraction(30)


def objective(model: Any, x_adv: Any, x: Any, y: Any, gamma: float) -> Any:
    with torch.no_grad():
        return gamma * F.cross_entropy(model(x_adv), y, reduction="none") - (x_adv - x).flatten(1).square().sum(1) / 2


def test_in_a_ball_that_holds_everything_it_raises_the_penalised_loss_and_a_larger_gamma_goes_further(digits: Any) -> None:
    x = digits.x[:30]
    y = digits.model(x).argmax(1)
    moved = {gamma: WRM(norm="l2", eps=FAR, gamma=gamma)(digits.model, x, y) for gamma in (0.0, 0.1, 1.3)}
    assert torch.equal(moved[0.0], x)
    assert (objective(digits.model, moved[0.1], x, y, 0.1) >= objective(digits.model, x, x, y, 0.1) - 1e-6).all()
    assert (lp.distance(moved[1.3], x, "l2") >= lp.distance(moved[0.1], x, "l2") - 1e-6).all()
    assert (digits.model(moved[1.3]).argmax(1) != y).sum() > (digits.model(moved[0.1]).argmax(1) != y).sum()


def test_a_small_penalised_step_is_gamma_times_the_gradient(digits: Any) -> None:
    x = digits.x[:10].clamp(0.1, 0.9)
    y = digits.model(x).argmax(1)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(digits.model(leaf), y, reduction="sum"), leaf)
    moved = WRM(norm="l2", eps=FAR, gamma=1e-3)(digits.model, x, y)
    torch.testing.assert_close(moved - x, 1e-3 * gradient, atol=1e-6, rtol=1e-2)


@pytest.mark.parametrize("norm, eps", [("linf", Fraction(1, 20)), ("l2", Fraction(3, 10))])
def test_the_threats_ball_cuts_what_the_penalty_allows(digits: Any, norm: str, eps: Fraction) -> None:
    x, y = digits.x[:30], digits.y[:30]
    free, cut = (WRM(norm=norm, eps=radius, gamma=20.0)(digits.model, x, y) for radius in (FAR, eps))
    far = lp.distance(cut, x, norm)
    assert (far <= float(eps)).all()
    assert (lp.distance(free, x, norm) > float(eps)).any()
    torch.testing.assert_close(cut, lp.project(free, x, norm, eps))


def test_a_misclassified_image_comes_back_as_it_is_and_nonsense_is_refused(digits: Any) -> None:
    x, y = digits.x[:5], (digits.y[:5] + 1) % 10
    assert torch.equal(WRM(eps=FAR)(digits.model, x, y), x)
    assert WRM(eps=FAR)(digits.model, x[:0], y[:0]).shape == (0, 1, 8, 8)
    with pytest.raises(ValueError, match="gamma >= 0 and steps >= 1, got -1 and 7"):
        WRM(eps=FAR, gamma=-1)
    with pytest.raises(ValueError, match="unknown norm 'l1'"):
        WRM(norm="l1", eps=FAR)
