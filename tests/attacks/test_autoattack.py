"""The standard bundle: its published strength arrives at the parts, each of which sees only what the earlier left standing."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
import torchattacks
from torch import Tensor, nn

from attacks import PGD, AutoAttack, Library, lp
from attacks.pgd import margin_loss

EPS = Fraction(1, 8)
CHEAP: dict[str, Any] = {"steps": 10, "targets": 2, "queries": 30}
Log = list[tuple[str, dict[str, Any], int]]


def classes(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).argmax(dim=1)


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Log:
    """(name, its arguments and what they became, images it was given) of each part that is run; they give back what they got."""
    seen: Log = []
    for name in ("APGD", "APGDT", "FAB", "Square"):
        _watch(monkeypatch, getattr(torchattacks, name), seen)
    return seen


def _watch(monkeypatch: pytest.MonkeyPatch, kind: type, seen: Log) -> None:
    defaults = {key: one.default for key, one in inspect.signature(kind).parameters.items() if key != "model"}
    original: Callable[..., None] = kind.__init__  # type: ignore[misc]

    def build(self: Any, model: nn.Module, **given: Any) -> None:
        original(self, model, **given)
        self.given = {**defaults, **given}

    def call(self: Any, x: Tensor, y: Tensor) -> Tensor:
        seen.append((kind.__name__, {**vars(self), **self.given}, len(x)))
        return x

    build.__signature__ = inspect.signature(kind.__init__)  # type: ignore[attr-defined, misc]
    monkeypatch.setattr(kind, "__init__", build)
    monkeypatch.setattr(kind, "__call__", call)


def wide(n: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, n)).eval()


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("n, targets", [(100, 9), (10, 9), (7, 6), (4, 3)])
def test_the_published_parameters_arrive_at_the_parts(parts: Log, norm: str, n: int, targets: int) -> None:
    """Croce and Hein 2020, and the authors' own code: one run each of 100 steps, nine targets, 5000 queries, not rescaled."""
    model, x = wide(n), torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(AutoAttack(norm=norm, eps=EPS)(model, x, classes(model, x)), x)
    names, given, images = zip(*parts, strict=True)
    assert names == ("APGD", "APGDT", "FAB", "Square")
    assert images == (3, 3, 3, 3)
    ce, targeted, fab, square = given
    for one in given:
        assert (one["norm"], one["eps"], one["n_restarts"]) == ({"linf": "Linf", "l2": "L2"}[norm], 0.125, 1)
    assert [one["steps"] for one in (ce, targeted, fab)] == [100, 100, 100]
    assert [one["eot_iter"] for one in (ce, targeted)] == [1, 1]
    assert [one["rho"] for one in (ce, targeted)] == [0.75, 0.75]
    assert ce["loss"] == "ce"
    assert [one["n_target_classes"] for one in (targeted, fab)] == [targets, targets]
    assert (fab["multi_targeted"], fab["alpha_max"], fab["eta"], fab["beta"]) == (True, 0.1, 1.05, 0.9)
    assert (square["n_queries"], square["p_init"], square["resc_schedule"], square["loss"]) == (5000, 0.8, False, "margin")


@pytest.mark.parametrize("n", [2, 3])
def test_below_four_classes_apgd_ascends_the_margin_instead_of_the_targeted_dlr_loss(parts: Log, n: int) -> None:
    model, x = wide(n), torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    AutoAttack(eps=EPS)(model, x, classes(model, x))
    assert [name for name, _, _ in parts] == ["APGD", "APGD", "FAB", "Square"]
    assert parts[1][1]["dlr_loss"] is margin_loss
    assert (parts[1][1]["loss"], parts[1][1]["steps"], parts[2][1]["n_target_classes"]) == ("dlr", 100, n - 1)


@pytest.mark.parametrize("n", [2, 3, 5])
def test_it_breaks_networks_of_few_classes(n: int) -> None:
    model, x = wide(n), 0.4 + 0.2 * torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    y = classes(model, x)
    assert (classes(model, AutoAttack(eps=EPS, **CHEAP)(model, x, y)) != y).all()


def test_each_part_sees_only_what_the_earlier_ones_left_standing(digits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[str, int, int]] = []
    original = Library.__call__

    def watched(self: Library, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        x_adv = original(self, model, x, y)
        broken = classes(model, lp.project(x_adv, x, self.norm, self.eps)) != y
        given.append((self.attack, len(x), int(broken.sum())))
        return x_adv

    monkeypatch.setattr(Library, "__call__", watched)
    x, y = digits.x[:24], digits.y[:24]
    x_adv = AutoAttack(eps=EPS, **CHEAP)(digits.model, x, y)
    assert [name for name, _, _ in given] == ["apgd", "apgdt", "fab", "square"]
    standing = int((classes(digits.model, x) == y).sum())
    for _, images, broken in given:
        assert images == standing
        standing -= broken
    assert given[0][2] > 0
    assert int((classes(digits.model, x_adv) == y).sum()) == standing


def test_as_strong_as_its_own_parts_run_in_full_and_never_weaker_than_one_of_them(digits: Any) -> None:
    x, y = digits.x[:24], digits.y[:24]
    bundle = AutoAttack(eps=EPS, **CHEAP)
    x_adv = bundle(digits.model, x, y)
    assert (lp.distance(x_adv, x, "linf") <= 0.125).all()
    standing = classes(digits.model, x_adv) == y
    each = [classes(digits.model, lp.project(one(digits.model, x, y), x, "linf", EPS)) == y for one in bundle.parts(10)]
    assert torch.equal(standing, torch.stack(each).all(dim=0))
    pgd = classes(digits.model, PGD(eps=EPS)(digits.model, x, y)) == y
    assert abs(int(standing.sum()) - int(pgd.sum())) <= 3
    assert 0 < standing.sum() < 22


def test_images_that_are_misclassified_or_stand_come_back_as_they_were(digits: Any) -> None:
    x, y = digits.x[:6], (digits.y[:6] + 1) % 10
    assert torch.equal(AutoAttack(eps=EPS, **CHEAP)(digits.model, x, y), x)
    tiny = AutoAttack(eps=Fraction(1, 10**4), steps=2, targets=1, queries=5)
    assert torch.equal(tiny(digits.model, x, classes(digits.model, x)), x)
    assert tiny(digits.model, x[:0], y[:0]).shape == (0, 1, 8, 8)


def test_whatever_is_weaker_than_published_says_so() -> None:
    assert AutoAttack(eps=EPS).label == "autoattack"
    assert AutoAttack(eps=EPS, queries=100).label == "autoattack (queries 100)"
    assert AutoAttack(eps=EPS, **CHEAP).label == "autoattack (steps 10, targets 2, queries 30)"
    assert repr(AutoAttack(eps=EPS)) == (
        "AutoAttack(norm='linf', eps=Fraction(1, 8), steps=100, targets=9, queries=5000, seed=0)"
    )
    with pytest.raises(ValueError, match="at least 1, got 100, 0 and 5000"):
        AutoAttack(eps=EPS, targets=0)
    with pytest.raises(ValueError, match="unknown norm 'l1'"):
        AutoAttack(norm="l1", eps=EPS)
