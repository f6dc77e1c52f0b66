"""alpha-CROWN: sound, at least CROWN, repeatable, guarded, and visibly CROWN where the library cannot optimise slopes."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

from bench.models import build_model
from tests.verifiers.small_nets import RULE_NETS, images, labels, linear, lowest_reached, randomised
from tests.verifiers.test_lirpa import BROKEN
from verifiers import IBP, AlphaCrown, Crown, CrownIBP, UnsupportedNetworkError, lirpa_compat
from verifiers.ball import region
from verifiers.rounding import allowance

SIDES = {"mlp": 8, "cnn_small": 8, "cnn_large": 4, "lenet": 16}
BALLS = [("linf", Fraction(1, 50)), ("l2", Fraction(1, 10))]
FALLBACK = "without optimised slopes"


@pytest.mark.parametrize("norm, eps", BALLS)
@pytest.mark.parametrize("name", ["mlp", "cnn_small", pytest.param("lenet", marks=pytest.mark.slow)])
def test_models_of_the_suite_are_bounded_in_order_and_soundly(name: str, norm: str, eps: Fraction) -> None:
    in_order(name, norm, eps, AlphaCrown(norm, eps, iterations=4))


@pytest.mark.slow
def test_the_large_model_is_bounded_in_order_and_soundly() -> None:
    in_order("cnn_large", "linf", Fraction(1, 50), AlphaCrown("linf", Fraction(1, 50), iterations=2), n=1)


@pytest.mark.slow
@pytest.mark.parametrize("norm, eps", BALLS)
def test_the_large_model_is_bounded_in_order_and_soundly_in_ten_steps(norm: str, eps: Fraction) -> None:
    in_order("cnn_large", norm, eps, AlphaCrown(norm, eps))


def in_order(name: str, norm: str, eps: Fraction, alpha: AlphaCrown, n: int = 3) -> None:
    """Answers ibp <= crown-ibp <= crown <= alpha-crown <= what an attack reaches."""
    shape = (1, SIDES[name], SIDES[name])
    net = randomised(build_model(name, shape, 5, (0.4,), (0.5,)), gain=1.2, kept=0.5)
    x = images(n, shape)
    y = labels(net, x)
    proofs = [verifier(net, x, y) for verifier in (IBP(norm, eps), CrownIBP(norm, eps), Crown(norm, eps), alpha)]
    for looser, tighter in itertools.pairwise(proofs):
        assert (looser.radius <= tighter.radius).all()
        assert (looser.margin <= tighter.margin + 1e-6).all()
    slack = allowance(net, region(x, norm, eps)).double()
    assert (proofs[3].margin <= lowest_reached(net, x, y, norm, eps) + slack).all()
    if name == "lenet":
        assert FALLBACK in proofs[3].notes[-1]
        torch.testing.assert_close(proofs[3].margin, proofs[2].margin)
    else:
        assert not any(FALLBACK in note for note in proofs[3].notes)
        assert (proofs[3].margin > proofs[2].margin + 1e-3).any(), "optimised slopes are tighter somewhere"


OPTIMISED = ["Conv2d", "Conv2d grouped", "Conv2d dilated", "BatchNorm2d", "ReLU", "residual", "+", "torch.cat", "AvgPool2d"]


@pytest.mark.parametrize("norm, eps", [("linf", Fraction(1, 20)), ("l2", Fraction(1, 2))])
@pytest.mark.parametrize("name", OPTIMISED)
def test_no_attack_refutes_alpha_crown(name: str, norm: str, eps: Fraction) -> None:
    for seed in range(2):
        net, x = randomised(RULE_NETS[name](), seed=seed), images(3, seed=seed)
        y = labels(net, x)
        try:
            proof = AlphaCrown(norm, eps, iterations=5)(net, x, y)
        except UnsupportedNetworkError:
            assert norm == "l2"
            return
        slack = allowance(net, region(x, norm, eps)).double()
        assert (proof.margin <= lowest_reached(net, x, y, norm, eps) + slack).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_same_question_has_the_same_answer_to_the_bit(norm: str) -> None:
    net = randomised(build_model("mlp", (1, 4, 4), 4), gain=1.5)
    x = images(3, (1, 4, 4))
    y = labels(net, x)
    ask = AlphaCrown(norm, Fraction(1, 20))
    first = ask(net, x, y)
    torch.manual_seed(99)
    assert torch.equal(first.margin, ask(net, x, y).margin)
    assert torch.equal(first.details["raw_margin"], ask(net, x, y).details["raw_margin"])


def test_a_batch_gives_the_margins_of_its_images_one_at_a_time() -> None:
    net, x = randomised(RULE_NETS["ReLU"]()), images(4)
    y, ask = labels(net, x), AlphaCrown(eps=Fraction(1, 50), iterations=5)
    single = torch.cat([ask(net, x[i : i + 1], y[i : i + 1]).margin for i in range(4)])
    torch.testing.assert_close(ask(net, x, y).margin, single, atol=1e-4, rtol=1e-4)


def test_more_steps_are_not_looser_and_ten_beat_one() -> None:
    net, x = randomised(build_model("mlp", (1, 4, 4), 4), gain=1.5), images(4, (1, 4, 4))
    y, eps = labels(net, x), Fraction(1, 20)
    one, ten = (AlphaCrown("linf", eps, iterations=n)(net, x, y).margin for n in (1, 10))
    assert (ten >= one - 1e-5).all()
    assert (ten > one + 1e-3).any()


def test_the_toy_keeps_its_clipped_box_and_slopes_cannot_help_it() -> None:
    """margin = relu(h1) - relu(h2): h1 is stable and h2 enters from above, where there is no slope to choose: -0.109091."""
    net = nn.Sequential(nn.Flatten(), linear([[1, 1], [1, -1]]), nn.ReLU())
    x = torch.tensor([0.6, 0.2]).view(1, 1, 1, 2)
    proof = AlphaCrown(eps=Fraction(3, 10))(net, x, torch.tensor([0]))
    assert proof.margin.item() == pytest.approx(-0.109091, abs=1e-5)


def test_a_network_without_relu_is_answered_by_crown_and_says_so() -> None:
    net, x = randomised(nn.Sequential(nn.Flatten(), nn.Linear(72, 4))), 0.3 + 0.4 * images(3)
    y = labels(net, x)
    proof = AlphaCrown(eps=Fraction(1, 50))(net, x, y)
    torch.testing.assert_close(proof.margin, Crown(eps=Fraction(1, 50))(net, x, y).margin)
    assert FALLBACK in proof.notes[-1]


SEEN_ON_LOOSE_BOUNDS = set(BROKEN) - {"another forward", "slightly too high at the full radius"}


@pytest.mark.parametrize("name", sorted(SEEN_ON_LOOSE_BOUNDS))
def test_wrong_optimised_bounds_are_caught_before_they_are_believed(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Only alpha-CROWN's bounds are wrong here, so its own self-check must see it."""
    net, x = randomised(build_model("mlp", (1, 4, 4), 4)), 0.3 + 0.4 * images(3, (1, 4, 4))
    y, eps = labels(net, x), Fraction(1, 50)
    assert AlphaCrown(eps=eps, iterations=2)(net, x, y).status

    class OptimisedWrongly(BROKEN[name]):  # type: ignore[misc]
        def compute_bounds(self, *args: object, method: str = "", **options: object) -> tuple[Tensor, Tensor]:
            kind = type(self) if method == "alpha-CROWN" else BROKEN[name]
            found: tuple[Tensor, Tensor] = super(kind, self).compute_bounds(*args, method=method, **options)
            return found

    monkeypatch.setattr(lirpa_compat, "BoundedModule", OptimisedWrongly)
    with pytest.raises(UnsupportedNetworkError, match="alpha-CROWN bounds failed the self-check"):
        AlphaCrown(eps=eps, iterations=2)(net, x, y)
    assert Crown(eps=eps)(net, x, y).status


@pytest.mark.parametrize("fields", [{"iterations": 0}, {"lr": 0.0}, {"lr": float("nan")}, {"lr": float("inf")}])
def test_senseless_optimisers_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="iterations >= 1 and lr > 0"):
        AlphaCrown(**fields)  # type: ignore[arg-type]


def test_the_network_and_gradient_mode_are_left_as_they_were() -> None:
    net, x = randomised(build_model("mlp", (1, 4, 4), 4)), images(2, (1, 4, 4))
    AlphaCrown(eps=Fraction(1, 50), iterations=2)(net, x, labels(net, x))
    assert torch.is_grad_enabled()
    assert all(parameter.requires_grad and parameter.grad is None for parameter in net.parameters())
