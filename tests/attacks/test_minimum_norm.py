"""Minimum-norm attacks against distances known by hand (linear networks), and against torchattacks on trained digits."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
import torchattacks
from torch import Tensor, nn

from attacks import DDN, FMN, PGD, lp

FAR = Fraction(30)  # a ball that holds every image
BOTH = [(FMN, "linf"), (FMN, "l2"), (DDN, "l2")]


def linear_pair(scale: float = 1.0) -> tuple[nn.Module, Tensor]:
    """Two classes whose margin is w.x, and w."""
    w = scale * torch.randn(12, generator=torch.Generator().manual_seed(0))
    layer = nn.Linear(12, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.stack([w / 2, -w / 2]))
    return nn.Sequential(nn.Flatten(), layer).eval(), w


def middle(n: int = 20) -> Tensor:
    return 0.4 + 0.2 * torch.rand(n, 1, 3, 4, generator=torch.Generator().manual_seed(1))


def classes(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).argmax(dim=1)


@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("attack, norm", BOTH)
def test_on_a_linear_network_the_distance_is_the_margin_over_the_dual_norm(attack: Any, norm: str, scale: float) -> None:
    """100: the cross entropy is nearly flat then, as in trained networks."""
    model, w = linear_pair(scale)
    x = middle()
    y = classes(model, x)
    exact = (x.flatten(1) @ w).abs().double() / w.norm(p=1 if norm == "linf" else 2)
    x_adv = attack(norm=norm, eps=FAR)(model, x, y)
    ratio = lp.distance(x_adv, x, norm) / exact
    assert (classes(model.double(), x_adv.double()) != y).all()
    assert (ratio >= 1 - 1e-6).all(), "nothing is nearer than the boundary"
    assert (ratio <= (1.005 if attack is FMN else 1.03)).all()


@pytest.mark.parametrize("attack, norm", BOTH)
def test_pixels_at_the_edge_of_the_box_are_not_moved_beyond_it(attack: Any, norm: str) -> None:
    """Class 0 where 4 a + b > 1: from (0.1, 0.9), b alone can give way once a is at 0."""
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[4.0, 1.0], [0.0, 0.0]]))
        layer.bias.copy_(torch.tensor([-0.2, 0.0]))
    model, x, y = nn.Sequential(nn.Flatten(), layer), torch.tensor([0.1, 0.9]).view(1, 1, 1, 2), torch.zeros(1, dtype=torch.long)
    x_adv = attack(norm=norm, eps=FAR)(model, x, y)
    assert classes(model, x_adv).item() == 1
    assert x_adv.min() >= 0
    # at a = 0, b = 0.2 is needed: a distance of 0.7 in linf, and of sqrt(0.1^2 + 0.7^2) in l2
    assert lp.distance(x_adv, x, norm).item() == pytest.approx(0.7 if norm == "linf" else 0.5**0.5, rel=0.03)


@pytest.mark.parametrize("norm, eps", [("linf", Fraction(1, 4)), ("l2", Fraction(2))])
def test_a_security_curve_of_fmn_breaks_at_each_eps_about_what_pgd_breaks_there(digits: Any, norm: str, eps: Fraction) -> None:
    model, x, y = digits.model, digits.x[:40], digits.y[:40]
    x_adv = FMN(norm=norm, eps=eps)(model, x, y)
    far = torch.where(classes(model, x_adv) != y, lp.distance(x_adv, x, norm), torch.inf)
    for share in (Fraction(1, 4), Fraction(1, 2)):
        pgd = classes(model, PGD(norm=norm, eps=eps * share, steps=20, loss="margin")(model, x, y)) != y
        assert (far <= float(eps * share)).sum() >= pgd.sum() - 2
    assert (classes(model, x) == y).sum() > (far > float(eps) / 2).sum() > 0


@pytest.mark.parametrize("attack, norm", BOTH)
def test_as_near_as_torchattacks_fab_on_trained_digits(digits: Any, attack: Any, norm: str) -> None:
    right = (classes(digits.model, digits.x) == digits.y).nonzero().flatten()[:12]
    x, y = digits.x[right], digits.y[right]
    theirs = torchattacks.FAB(digits.model, norm={"linf": "Linf", "l2": "L2"}[norm], eps=30.0, steps=20)(x, y)
    assert (classes(digits.model, theirs) != y).all()
    ours = attack(norm=norm, eps=FAR)(digits.model, x, y)
    assert (classes(digits.model, ours) != y).all()
    assert lp.distance(ours, x, norm).mean() <= 1.05 * lp.distance(theirs, x, norm).mean()


@pytest.mark.parametrize("attack, norm", BOTH)
def test_every_answer_lies_in_the_exact_ball_and_the_box_and_depends_on_its_image_only(
    digits: Any, attack: Any, norm: str
) -> None:
    eps = Fraction(1, 10) if norm == "linf" else Fraction(1, 2)
    x, y = digits.x[:20], digits.y[:20]
    x_adv = attack(norm=norm, eps=eps, steps=30)(digits.model, x, y)
    assert (lp.distance(x_adv, x, norm) <= float(eps)).all()
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    broken = classes(digits.model, x_adv) != y
    assert 0 < broken.sum() < 20
    alone = torch.cat([attack(norm=norm, eps=eps, steps=30)(digits.model, x[[i]], y[[i]]) for i in range(3)])
    torch.testing.assert_close(alone, x_adv[:3], atol=1e-4, rtol=0)


@pytest.mark.parametrize("attack, norm", BOTH)
def test_an_image_that_is_misclassified_already_comes_back_as_it_is(digits: Any, attack: Any, norm: str) -> None:
    x, y = digits.x[:10], (digits.y[:10] + 1) % 10
    assert torch.equal(attack(norm=norm, eps=FAR, steps=5)(digits.model, x, y), x)
    assert attack(norm=norm, eps=FAR)(digits.model, x[:0], y[:0]).shape == (0, 1, 8, 8)


@pytest.mark.parametrize("attack, norm", BOTH)
def test_logits_without_a_number_are_misclassified_and_stop_nothing(attack: Any, norm: str) -> None:
    class Hole(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            pixel = x.flatten(1)[:, :1]
            return torch.cat([torch.where(pixel > 0.55, torch.nan, 1 - pixel), pixel - 1], dim=1)

    x, y = torch.tensor([0.5, 0.6]).view(2, 1, 1, 1), torch.zeros(2, dtype=torch.long)
    x_adv = attack(norm=norm, eps=Fraction(1, 5))(Hole(), x, y)
    assert x_adv.isfinite().all()
    assert x_adv[0].item() > 0.55
    assert x_adv[1].item() == x[1].item()


@pytest.mark.parametrize("make, message", [
    (lambda: DDN(norm="linf", eps=FAR), "'ddn' works in l2, not in 'linf'"),
    (lambda: DDN(eps=FAR, start=Fraction(0)), "length `start` > 0, got 0"),
    (lambda: FMN(norm="l1", eps=FAR), "unknown norm 'l1'"),
    (lambda: FMN(eps=FAR, steps=0), "steps >= 1 and 0 < gamma < 1, got 0 and 0.05"),
    (lambda: FMN(eps=FAR, gamma=1.0), "got 100 and 1.0"),
])  # fmt: skip
def test_fields_that_make_no_sense_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
