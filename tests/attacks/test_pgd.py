"""PGD against what can be done by hand (linear networks, crafted curves) and against torchattacks on trained digits."""

from __future__ import annotations

import copy
from fractions import Fraction
from typing import Any

import pytest
import torch
import torchattacks
from torch import Tensor, nn

from attacks import FGSM, PGD, lp
from attacks.pgd import TooFewClassesError, dlr_loss, margin_loss

EPS = Fraction(1, 10)


def linear_pair() -> tuple[nn.Module, Tensor]:
    """Two classes whose margin is w.x, and w."""
    w = torch.randn(12, generator=torch.Generator().manual_seed(0))
    layer = nn.Linear(12, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.stack([w / 2, -w / 2]))
    return nn.Sequential(nn.Flatten(), layer).eval(), w


def margin(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return -margin_loss(model(x), y)


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return (model(x).argmax(dim=1) == y).double().mean().item()


@pytest.mark.parametrize("attack", [PGD, FGSM])
@pytest.mark.parametrize("norm, dual", [("linf", 1), ("l2", 2)])
def test_on_a_linear_network_the_margin_falls_by_eps_times_the_dual_norm(attack: Any, norm: str, dual: int) -> None:
    model, w = linear_pair()
    x = 0.5 + 0.1 * torch.rand(5, 1, 3, 4, generator=torch.Generator().manual_seed(1))
    y = model(x).argmax(dim=1)
    # a small eps keeps every image on its side: the search then returns the point of highest loss
    eps = Fraction((margin(model, x, y).min() / w.norm(p=dual) / 2).item()).limit_denominator(10**4)
    fall = margin(model, x, y) - margin(model, attack(norm=norm, eps=eps)(model, x, y), y)
    torch.testing.assert_close(fall, (float(eps) * w.norm(p=dual)).expand(5), atol=2e-6, rtol=0)


def test_margin_loss_is_the_best_other_logit_minus_the_true_one() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0], [0.0, -5.0, 4.0]])
    assert margin_loss(logits, torch.tensor([0, 0])).tolist() == [-1.0, 4.0]


def test_dlr_is_the_margin_over_the_gap_between_first_and_third_and_no_scale_changes_it(digits: Any) -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0], [0.0, -5.0, 4.0]])
    torch.testing.assert_close(dlr_loss(logits, torch.tensor([0, 0])), torch.tensor([-1 / 2, 4 / 9]))
    with torch.no_grad():
        found = digits.model(digits.x)
    theirs = torchattacks.APGD(digits.model, loss="dlr").dlr_loss(found, digits.y)
    torch.testing.assert_close(dlr_loss(found, digits.y), theirs)
    torch.testing.assert_close(dlr_loss(1000 * found, digits.y), dlr_loss(found, digits.y))
    assert (margin_loss(1000 * found, digits.y) - margin_loss(found, digits.y)).abs().max() > 1


def test_dlr_needs_three_classes_and_says_what_to_use_instead() -> None:
    model, _ = linear_pair()
    x = torch.rand(2, 1, 3, 4)
    with pytest.raises(TooFewClassesError, match="dlr needs at least 3 classes, the network has 2: use loss = margin"):
        PGD(eps=EPS, loss="dlr")(model, x, torch.zeros(2, dtype=torch.long))


def test_kl_ascends_the_divergence_from_the_clean_prediction_whatever_the_label_is(digits: Any) -> None:
    x, y = digits.x[:20], digits.model(digits.x[:20]).argmax(1)

    def divergence(x_adv: Tensor) -> Tensor:
        with torch.no_grad():
            clean, moved = digits.model(x).softmax(1), digits.model(x_adv).softmax(1)
        return (clean * (clean / moved).log()).sum(1)

    path = {"eps": Fraction(1, 50), "steps": 20, "loss": "kl", "last": True}
    far, random = divergence(PGD(**path)(digits.model, x, y)), divergence(lp.random_start(x, "linf", Fraction(1, 50), seed=0))
    assert (far > random).all()
    assert torch.equal(PGD(**path)(digits.model, x, y), PGD(**path)(digits.model, x, (y + 1) % 10))


def test_kl_equals_torchattacks_tpgd_step_for_step(digits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, where the sign of a gradient that starts near zero is no matter of rounding."""
    x, y, model = digits.x[:20].double(), digits.y[:20], copy.deepcopy(digits.model).double()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        noise = torch.randn_like(x)
        torch.manual_seed(0)
        theirs = torchattacks.TPGD(model, eps=0.1, alpha=1 / 40, steps=7)(x, y)
    monkeypatch.setattr(PGD, "_start", lambda self, x, restart: (x + 0.001 * noise).clamp(0, 1))
    ours = PGD(eps=EPS, steps=7, step_size=Fraction(1, 40), loss="kl", last=True)(model, x, y)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


class Curved(nn.Module):
    """Three classes, computed entry by entry: no kernel rounds an image differently in another batch."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = x[:, 0, 0, 0], x[:, 0, 0, 1]
        return torch.stack([(9 * a).sin() + (7 * b).cos() + 1.2, (5 * a * b).sin(), (8 * b).sin() * (6 * a).cos()], dim=1)


@pytest.mark.parametrize("norm, eps, loss", [
    ("linf", Fraction(1, 12), "ce"), ("linf", Fraction(1, 12), "kl"), ("l2", Fraction(1, 10), "dlr"),
])  # fmt: skip
def test_restarts_in_one_batch_answer_bit_for_bit_as_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch, norm: str, eps: Fraction, loss: str
) -> None:
    x = torch.rand(20, 1, 1, 2, generator=torch.Generator().manual_seed(0))
    y = Curved()(x).argmax(dim=1)
    shown: list[int] = []
    attack = PGD(norm=norm, eps=eps, steps=6, step_size=eps / 8, restarts=15, loss=loss)

    def answer() -> Tensor:
        model = Curved()
        model.register_forward_hook(lambda *passed: shown.append(len(passed[1][0])))
        return attack(model, x, y)

    together, batches = answer(), len(shown)
    monkeypatch.setattr(PGD, "_at_once", lambda *_: 1)
    shown.clear()
    assert torch.equal(answer(), together)
    assert batches < 0.6 * len(shown)
    broken = Curved()(together).argmax(dim=1) != y
    first = Curved()(PGD(norm=norm, eps=eps, steps=6, step_size=eps / 8, loss=loss)(Curved(), x, y)).argmax(dim=1) != y
    assert first.sum() < broken.sum() < len(x), "later restarts broke some, and some stand"


def test_restarts_in_one_batch_break_the_same_images_of_a_trained_network(digits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = digits.x[:40], digits.y[:40]
    attack = PGD(eps=Fraction(1, 12), steps=4, restarts=8)
    together = attack(digits.model, x, y)
    monkeypatch.setattr(PGD, "_at_once", lambda *_: 1)
    torch.testing.assert_close(attack(digits.model, x, y), together, atol=1e-5, rtol=0)


class Hole(nn.Module):
    """Logits without a number where the first pixel is above 0.55; elsewhere class 0, surely and without a slope to go up."""

    def __init__(self, value: float, place: int) -> None:
        super().__init__()
        self.value, self.place = value, place

    def forward(self, x: Tensor) -> Tensor:
        pixel = x.flatten(1)[:, 0]
        logits = torch.stack([1 - pixel, pixel - 1, pixel - 2], dim=1)
        hole = torch.zeros(3)
        hole[self.place] = self.value
        return torch.where((pixel > 0.55).unsqueeze(1), logits + hole, logits)


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("value, loss", [
    *((float("nan"), loss) for loss in ("ce", "margin", "dlr", "kl")), (float("inf"), "ce"), (float("-inf"), "dlr"),
])  # fmt: skip
def test_logits_without_a_number_on_the_way_count_as_broken_and_stop_nothing(value: float, place: int, loss: str) -> None:
    """argmax of a NaN is its own place: with the NaN in the true class, a plain comparison would call the image correct."""
    x, y = torch.tensor([0.5, 0.52, 0.1]).view(3, 1, 1, 1), torch.zeros(3, dtype=torch.long)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for seed in (0, None):  # kl may lead away from the hole, so that it needs several starts
            x_adv = PGD(eps=EPS, steps=10, restarts=8, loss=loss, seed=seed)(Hole(value, place), x, y)
            assert x_adv.isfinite().all()
            assert (x_adv.flatten() > 0.55).tolist() == [True, True, False]
        last = PGD(eps=EPS, steps=10, loss=loss, seed=None, last=True)(Hole(value, place), x, y)
        assert last.isfinite().all()
    already = torch.full((1, 1, 1, 1), 0.6)
    assert torch.equal(PGD(eps=EPS, loss=loss)(Hole(value, place), already, y[:1]), already)


@pytest.mark.parametrize("norm, eps", [("linf", EPS), ("l2", Fraction(1, 2))])
@pytest.mark.parametrize("loss", ["ce", "margin", "dlr", "kl"])
@pytest.mark.parametrize("extra", [{}, {"seed": None}, {"last": True}, {"seed": None, "last": True}])
def test_every_answer_is_in_the_exact_ball(digits: Any, norm: str, eps: Fraction, loss: str, extra: dict[str, Any]) -> None:
    x, y = digits.x[:40], digits.y[:40]
    x_adv = PGD(norm=norm, eps=eps, steps=5, loss=loss, **extra)(digits.model, x, y)
    assert (lp.distance(x_adv, x, norm) <= float(eps)).all()
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    assert (x_adv.requires_grad, x_adv.shape, x_adv.dtype) == (False, x.shape, torch.float32)
    if loss != "kl":  # which may lead to the own class as well
        assert accuracy(digits.model, x_adv, y) < accuracy(digits.model, x, y) - 0.1


def test_as_strong_as_torchattacks_on_trained_digits(digits: Any) -> None:
    eps = Fraction(1, 8)
    ours = PGD(eps=eps, steps=40)(digits.model, digits.x, digits.y)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = torchattacks.PGD(digits.model, eps=1 / 8, alpha=1 / 32, steps=40)(digits.x, digits.y)
    robust = [accuracy(digits.model, x_adv, digits.y) for x_adv in (ours, theirs)]
    assert 0.05 < robust[1] < 0.9  # neither trivial nor hopeless, so that the comparison says something
    assert robust[0] <= robust[1] + 3 / len(digits.x)
    assert robust[0] >= robust[1] - 10 / len(digits.x)


def test_last_iterate_equals_torchattacks_step_for_step(digits: Any) -> None:
    x, y = digits.x[:30], digits.y[:30]
    ours = PGD(eps=EPS, steps=7, step_size=Fraction(1, 40), random_start=False, last=True)(digits.model, x, y)
    theirs = torchattacks.PGD(digits.model, eps=0.1, alpha=1 / 40, steps=7, random_start=False)(x, y)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_fgsm_equals_torchattacks_and_one_step_of_pgd(digits: Any) -> None:
    x, y = digits.x[:30], digits.y[:30]
    ours = FGSM(eps=EPS)(digits.model, x, y)
    torch.testing.assert_close(ours, torchattacks.FGSM(digits.model, eps=0.1)(x, y), atol=1e-6, rtol=0)


@pytest.mark.parametrize("norm, eps", [("linf", EPS), ("l2", Fraction(1, 2))])
def test_more_restarts_and_more_steps_never_raise_accuracy(digits: Any, norm: str, eps: Fraction) -> None:
    x, y = digits.x[:80], digits.y[:80]

    def standing(**strength: int) -> Tensor:
        x_adv = PGD(norm=norm, eps=eps, **strength)(digits.model, x, y)
        with torch.no_grad():
            return digits.model(x_adv).argmax(dim=1) == y

    for weaker, stronger in [({"steps": 2}, {"steps": 8}), ({"steps": 4}, {"steps": 4, "restarts": 4})]:
        before, after = standing(**weaker), standing(**stronger)
        assert not (after & ~before).any()


def test_restarts_find_what_one_start_misses() -> None:
    """A broken strip that covers a tenth of a flat ball: one start rarely falls into it, forty do."""

    class Strip(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            inside = (x.flatten(1)[:, 0] - 0.65).abs() < 0.02
            z = 0 * x.flatten(1).sum(dim=1) + torch.where(inside, -1.0, 1.0)
            return torch.stack([z, -z], dim=1)

    x = 0.5 + torch.arange(20).view(-1, 1, 1, 1) * 1e-4
    y = torch.zeros(20, dtype=torch.long)
    one, forty = (PGD(eps=Fraction(1, 5), steps=1, restarts=n)(Strip(), x, y) for n in (1, 40))
    assert accuracy(Strip(), forty, y) < 0.3 < accuracy(Strip(), one, y)


def test_the_verdict_of_an_image_does_not_depend_on_its_batch(digits: Any) -> None:
    attack = PGD(eps=EPS, steps=10, restarts=2)
    x, y = digits.x[:24], digits.y[:24]
    orders = [torch.arange(24), torch.arange(24).flip(0)]
    verdicts = []
    for order, size in zip(orders, [24, 5], strict=True):
        wrong = torch.zeros(24, dtype=torch.bool)
        for rows in order.split(size):
            with torch.no_grad():
                wrong[rows] = digits.model(attack(digits.model, x[rows], y[rows])).argmax(dim=1) != y[rows]
        verdicts.append(wrong)
    assert torch.equal(verdicts[0], verdicts[1])
    assert 0 < verdicts[0].sum() < 24


class Valley(nn.Module):
    """Class 0 unless x is within 0.02 of 0.6; counts the images it is shown."""

    seen = 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        z = (x.flatten(1)[:, 0] - 0.6).abs() - 0.02
        return torch.stack([z, torch.zeros_like(z)], dim=1)


def test_an_iterate_that_broke_the_image_is_kept_when_later_ones_do_not() -> None:
    """From 0.5 steps of 0.11 go to 0.61 (broken) and back to 0.50 (not broken)."""
    x, y = torch.full((1, 1, 1, 1), 0.5), torch.zeros(1, dtype=torch.long)
    path = {"eps": Fraction(3, 10), "steps": 2, "step_size": Fraction(11, 100), "random_start": False}
    assert PGD(**path, last=True)(Valley(), x, y).item() == pytest.approx(0.5, abs=1e-6)
    for seed in (0, None):
        assert PGD(**path, seed=seed)(Valley(), x, y).item() == pytest.approx(0.61, abs=1e-6)


def test_the_first_misclassified_iterate_wins_over_later_and_deeper_ones() -> None:
    class Ramp(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            z = 0.6 - x.flatten(1)[:, 0]
            return torch.stack([z, -z], dim=1)

    x, y = torch.full((1, 1, 1, 1), 0.5), torch.zeros(1, dtype=torch.long)
    path = {"eps": Fraction(2, 5), "steps": 3, "step_size": Fraction(11, 100), "random_start": False}
    for seed in (0, None):
        assert PGD(**path, seed=seed)(Ramp(), x, y).item() == pytest.approx(0.61, abs=1e-6)


def test_a_misclassified_iterate_wins_over_a_correct_one_of_higher_loss() -> None:
    """Above 0.55 the true class loses narrowly to one rival (loss 0.7); below it wins over nine equals (loss 2.3)."""

    class Cliff(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            pixel = x.flatten(1)
            rival = torch.where(pixel > 0.55, 20.1, 0.0)
            true = torch.where(pixel > 0.55, 20.0, 0.01) - 1e-3 * pixel
            return torch.cat([true, rival, torch.zeros(len(x), 8)], dim=1)

    x, y = torch.full((1, 1, 1, 1), 0.5), torch.zeros(1, dtype=torch.long)
    x_adv = PGD(eps=EPS, steps=1, step_size=EPS, random_start=False)(Cliff(), x, y)
    assert accuracy(Cliff(), x, y) == 1
    assert accuracy(Cliff(), x_adv, y) == 0


def test_broken_images_leave_the_batch_in_evaluation_only() -> None:
    x = torch.tensor([0.5, 0.1, 0.6]).view(3, 1, 1, 1)  # breaks at step 1, never, is broken already
    y = torch.zeros(3, dtype=torch.long)
    path = {"eps": Fraction(3, 10), "steps": 4, "step_size": Fraction(11, 100), "random_start": False}
    model, training = Valley(), Valley()
    x_adv = PGD(**path)(model, x, y)
    PGD(**path, seed=None)(training, x, y)
    # clean look at 3; then 2 open images at the start, 2 after one step, 1 after steps 2 to 4
    assert model.seen == 3 + 2 + 2 + 3
    assert training.seen == 3 + 5 * 3
    assert x_adv[2].item() == x[2].item()


def test_margin_loss_breaks_what_a_vanished_cross_entropy_gradient_hides(digits: Any) -> None:
    class Loud(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = 1e4 * digits.model(x)
            return logits

    model, x, y = Loud(), digits.x[:60], digits.y[:60]
    blind = PGD(eps=EPS, steps=15)(model, x, y)
    seeing = PGD(eps=EPS, steps=15, loss="margin")(model, x, y)
    assert accuracy(model, blind, y) > accuracy(model, seeing, y) + 0.2


def test_pgd_touches_neither_gradients_nor_modes_and_works_without_grad(digits: Any) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 10))
    model[2].eval()  # frozen statistics in a model that trains: only the caller may change that
    model[1].weight.grad = torch.ones_like(model[1].weight)
    model[3].weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for attack in (PGD(eps=EPS, steps=2, restarts=2), PGD(eps=EPS, steps=2, seed=None, last=True), FGSM(eps=EPS)):
            attack(model, digits.x[:8], digits.y[:8])
    assert [module.training for module in model.modules()] == [True, True, True, False, True]
    assert model[1].weight.grad.eq(1).all()
    assert [p.grad is None for p in model.parameters()] == [False, True, True, True, True, True]
    assert [p.requires_grad for p in model.parameters()] == [True, True, True, True, False, True]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_only_the_unseeded_attack_draws_from_the_global_generator(digits: Any) -> None:
    x, y = digits.x[:4], digits.y[:4]
    with torch.random.fork_rng(devices=[]):
        state = torch.get_rng_state()
        PGD(eps=EPS, steps=1)(digits.model, x, y)
        assert torch.equal(torch.get_rng_state(), state)
        PGD(eps=EPS, steps=1, seed=None)(digits.model, x, y)
        assert not torch.equal(torch.get_rng_state(), state)


def test_an_empty_batch_is_answered_with_an_empty_batch(digits: Any) -> None:
    assert PGD(eps=EPS)(digits.model, digits.x[:0], digits.y[:0]).shape == (0, 1, 8, 8)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"loss": "hinge"}, "unknown loss 'hinge': choose one of ce, margin, dlr, kl"),
        ({"loss": "kl", "random_start": False}, "kl has no gradient at the clean image"),
        ({"steps": 0}, "at least 1, got 0"),
        ({"restarts": 3, "random_start": False}, "3 restarts would repeat"),
        ({"restarts": 2, "last": True}, "2 restarts would repeat"),
        ({"norm": "l1"}, "unknown norm 'l1'"),
    ],
)
def test_fields_that_make_no_sense_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PGD(**{"eps": EPS, **fields})


def test_repr_is_the_identity_and_attacks_are_hashable() -> None:
    assert repr(FGSM(eps=Fraction(8, 255))) == "FGSM(norm='linf', eps=Fraction(8, 255), seed=0)"
    assert len({PGD(eps=EPS), PGD(eps=Fraction("1/10")), PGD(eps=EPS, steps=10)}) == 2
