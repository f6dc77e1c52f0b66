"""Margins that floating point gets wrong: crafted networks whose exact margin is known in rationals."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.verifiers.small_nets import RULE_NETS, SHAPE_NETS, Forward, exact, images, labels, linear, randomised
from verifiers import IBP, Crown, CrownIBP, UnsupportedNetworkError
from verifiers.ball import Ellipsoid, Interval, region
from verifiers.bounds import INTERVAL_RULES, ibp_margins, smallest_margin
from verifiers.graph import walk
from verifiers.rounding import ERROR_RULES, SAFETY, UNIT, Tracked, allowance, allowance_for, settle

NETS = {**RULE_NETS, **SHAPE_NETS}
TINY_EPS = Fraction(1, 10**12)
VERIFIERS = [IBP, CrownIBP, Crown]


def tracked(net: nn.Module, ball: Interval | Ellipsoid) -> Tracked:
    size = torch.maximum(ball.lower.abs(), ball.upper.abs())
    return walk(net, Tracked(ball, size, size.flatten(1).amax(1)), ERROR_RULES)


@pytest.mark.parametrize("norm, eps", [("linf", Fraction(1, 20)), ("l2", Fraction(1, 2))])
@pytest.mark.parametrize("name", NETS)
def test_the_running_error_bound_holds_for_every_rule(name: str, norm: str, eps: Fraction) -> None:
    """Bounds over the very same float32 region, propagated in float32 and in float64, differ by no more."""
    net, ball = randomised(NETS[name](), gain=20.0), region(images(4), norm, eps)
    wide = type(ball)(*(part.double() for part in ball))
    single, double = (walk(n, b, INTERVAL_RULES) for n, b in ((net, ball), (exact(net), wide)))
    error = UNIT[torch.float32] * tracked(net, ball).error.double()
    for low, reference in zip(single, double, strict=True):
        difference = (low.double() - reference).abs()
        assert (difference <= error).all()
        assert difference.max() > 0
    y = labels(net, images(4))
    margins = [smallest_margin(ibp_margins(n, b, y), y).double() for n, b in ((net, ball), (exact(net), wide))]
    assert ((margins[0] - margins[1]).abs() <= allowance(net, ball)).all()


def test_every_interval_rule_has_an_error_rule() -> None:
    assert set(ERROR_RULES) == set(INTERVAL_RULES)


# -- weights of 1e6 that cancel ----------------------------------------------------------------------------------------


def cancelling(seed: int, target: float) -> nn.Sequential:
    """One margin of 64 terms of size 1e6 whose exact value is near `target` at a black image.

    Hidden units are their positive biases (their weights of 1e-9 hardly see the ball), so nothing hides the rounding.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.rand(64, generator=generator) + 0.5
    w = 1e6 * torch.randn(64, generator=generator)
    products = sum((Fraction(a) * Fraction(b) for a, b in zip(hidden.tolist(), w.tolist(), strict=True)), Fraction(0))
    bias = torch.tensor(float(Fraction(target) - products), dtype=torch.float32).item()
    first = linear([[1e-9]] * 64, hidden.tolist())
    return nn.Sequential(nn.Flatten(), first, nn.ReLU(), linear([w.tolist(), [0.0] * 64], [bias, 0.0]))


def exact_minimum(net: nn.Module, eps: Fraction) -> Fraction:
    """The smallest f_0 - f_1, in rationals, over a pixel in [0, eps] of linear layers with active ReLUs."""
    value, slope = [Fraction(0)], [Fraction(1)]
    for layer in net:
        if isinstance(layer, nn.Linear):
            rows = [[Fraction(w) for w in row] for row in layer.weight.tolist()]
            bias = [Fraction(b) for b in layer.bias.tolist()]
            value = [sum((w * v for w, v in zip(row, value, strict=True)), b) for row, b in zip(rows, bias, strict=True)]
            slope = [sum((w * v for w, v in zip(row, slope, strict=True)), Fraction(0)) for row in rows]
        if isinstance(layer, nn.ReLU):
            assert all(v + min(0, s) * eps > 0 for v, s in zip(value, slope, strict=True))
    return value[0] - value[1] + min(Fraction(0), eps * (slope[0] - slope[1]))


BLACK, ZERO = torch.zeros(1, 1, 1, 1), torch.tensor([0])


def float32_margin(net: nn.Module) -> float:
    return smallest_margin(ibp_margins(net, region(BLACK, "linf", TINY_EPS), ZERO), ZERO).item()


def certified(net: nn.Module, x: Tensor, verifier: Any = IBP, norm: str = "linf") -> bool:
    """Whether the verifier says so; a refusal (the self-check of linear relaxations may see the rounding) is a no."""
    assert labels(net, x).item() == 0, "only a correct answer could be certified"
    try:
        return verifier(norm=norm, eps=TINY_EPS)(net, x, ZERO).status == ("proved",)
    except UnsupportedNetworkError:
        return False


def misjudged(build: Callable[[int, float], nn.Module], target: float) -> tuple[nn.Module, Fraction]:
    """The first of many crafted networks whose float32 margin is positive though the exact one is not."""
    for seed in range(200):
        net = build(seed, target)
        truth = exact_minimum(net, TINY_EPS)
        if truth <= 0 and float32_margin(net) > 0 and labels(net, BLACK).item() == 0:
            return net, truth
    raise AssertionError("no crafted network was misjudged by float32: the construction is at fault")


@pytest.mark.parametrize("verifier", VERIFIERS)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_cancelling_weights_of_1e6_are_not_certified_where_the_exact_margin_is_not_positive(verifier: type, norm: str) -> None:
    net, truth = misjudged(cancelling, -0.03)
    assert float32_margin(net) > 0 >= truth, "float32 alone would certify"
    assert not certified(net, BLACK, verifier, norm)
    proof = IBP(norm=norm, eps=TINY_EPS)(net, BLACK, ZERO)
    assert (proof.status, proof.radius.item(), proof.rechecked) == (("open",), 0, 1)


@pytest.mark.parametrize("verifier", VERIFIERS)
def test_a_truly_positive_margin_that_float32_cannot_decide_is_certified_and_counted(verifier: type) -> None:
    net = cancelling(0, 5.0)
    truth = exact_minimum(net, TINY_EPS)
    assert truth > 0
    assert allowance(net, region(BLACK, "linf", TINY_EPS)).item() > abs(float32_margin(net))
    proof = verifier(eps=TINY_EPS)(net, BLACK, ZERO)
    assert proof.status == ("proved",)
    assert proof.margin.item() == pytest.approx(float(truth), rel=1e-4)
    assert proof.rechecked == 1


def two_levels(seed: int, target: float) -> nn.Module:
    """The cancelling margin of before, multiplied by 1e6 in another layer."""
    return cancelling(seed, target).append(linear([[1e6, 0], [0, 1]], [0, 0]))


@pytest.mark.parametrize("verifier", VERIFIERS)
def test_an_error_that_a_later_layer_magnifies_is_seen_where_the_largest_sum_alone_misses_it(verifier: type) -> None:
    net, truth = misjudged(two_levels, -0.03)
    hidden, w, bias = net[1].bias, net[3].weight[0], net[3].bias[0]
    largest = max(float(((w.abs() @ hidden) + bias.abs()).detach()), float32_margin(net))
    assert float32_margin(net) > 1e-4 * largest, "1e-4 S alone would certify"
    assert truth <= 0
    assert not certified(net, BLACK, verifier)


# -- the same, hidden in other layers ----------------------------------------------------------------------------------


def test_a_batchnorm_whose_mean_and_bias_cancel_is_not_certified_on_rounding() -> None:
    """(x - m) / 3 * g + b with m and b near 1e6: the shift b - g m / 3 is rounded, though it and x are small."""
    found = 0
    for seed in range(40):
        batchnorm = nn.BatchNorm2d(1, eps=0.0).eval()
        mean, gamma = (torch.rand(2, generator=torch.Generator().manual_seed(seed)) + 0.5).tolist()
        nn.init.constant_(batchnorm.running_mean, 1e6 * mean)
        nn.init.constant_(batchnorm.running_var, 9.0)  # a square, so that the exact value is rational
        nn.init.constant_(batchnorm.weight, -gamma)
        product = Fraction(batchnorm.running_mean.item()) * Fraction(batchnorm.weight.item()) / 3
        nn.init.constant_(batchnorm.bias, float(product + Fraction(1, 5)))
        clean, slope = Fraction(batchnorm.bias.item()) - product, -Fraction(batchnorm.weight.item()) / 3
        eps = (clean + Fraction(1, 1000)) / slope  # the exact margin at pixel eps is -1 / 1000
        net = nn.Sequential(batchnorm, nn.Flatten(), linear([[1.0], [0.0]], [0.0, 0.0])).eval()
        bound = smallest_margin(ibp_margins(net, region(BLACK, "linf", eps), ZERO), ZERO).item()
        if eps <= 1 and bound > 0 and labels(net, BLACK).item() == 0:
            found += 1
            assert IBP(eps=eps)(net, BLACK, ZERO).status == ("open",)
    assert found > 0, "no crafted network was misjudged by float32: the construction is at fault"


def test_a_large_average_that_swallows_small_terms_is_not_certified_on_rounding() -> None:
    """-8 and then many -4e-7 (lost beside it), +8, many +4e-7 (kept): the exact average is negative, the summed one positive."""
    x = torch.full((1, 1, 28, 28), 4e-7)
    x[..., 0, :8] = 1
    down, up = nn.Conv2d(1, 1, 1, bias=False), nn.Conv2d(1, 1, 1, bias=False)
    nn.init.constant_(down.weight, -1.0 - 2.0**-20)
    nn.init.constant_(up.weight, 1.0)
    net = Forward(
        lambda s, x: s.head(s.pool(torch.cat([s.down(x), s.up(x)], dim=2)).flatten(1)),
        down=down, up=up, pool=nn.AvgPool2d((56, 28)), head=linear([[1e8], [0.0]], [0.0, 0.0]),
    ).eval()
    with torch.no_grad():
        assert exact(net)(x.double())[0, 0] < 0, "in exact arithmetic class 0 loses"
    assert smallest_margin(ibp_margins(net, region(x, "linf", TINY_EPS), ZERO), ZERO).item() > 0, "float32 says it wins"
    assert not certified(net, x)


def test_an_unused_second_head_does_not_stand_in_for_the_networks_own_rounding() -> None:
    """The graph ends with a tiny side branch that nobody returns; the allowance must be that of the logits."""

    def function(s: Forward, x: Tensor) -> Tensor:
        logits = s.net(x)
        s.side(torch.flatten(x, 1))
        return logits

    net, _ = misjudged(two_levels, -0.03)
    shared = Forward(function, net=net, side=linear([[1e-6]], [0.0])).eval()
    assert not certified(shared, BLACK)
    ball = region(BLACK, "linf", TINY_EPS)
    torch.testing.assert_close(allowance(shared, ball), allowance(net, ball))


def test_l2_spreads_of_tiny_weights_do_not_underflow() -> None:
    """w^2 of 1e-24 is zero in float32, the spread eps * |w| is not: a later 1e24 makes it 1."""
    net = nn.Sequential(nn.Flatten(), linear([[1e-24, 0.0]], [0.0]), linear([[1e24], [0.0]], [-0.4, 0.0]))
    x, eps = torch.full((1, 1, 1, 2), 0.5), Fraction(1, 4)
    truth = 0.5 - 0.4 - 0.25
    ball = region(x, "l2", eps)
    assert smallest_margin(ibp_margins(exact(net), region(x.double(), "l2", eps), ZERO), ZERO).item() == pytest.approx(truth)
    assert smallest_margin(ibp_margins(net, ball, ZERO), ZERO).item() <= truth + allowance(net, ball).item()
    assert IBP(norm="l2", eps=eps)(net, x, ZERO).status == ("open",)


def test_products_that_underflow_are_not_taken_for_zero() -> None:
    """1e-30 * 1e-30 is zero in float32; two layers of 1e30 later it is 1 and turns the answer."""
    chain = [linear([[value]]) for value in (1e-30, 1e-30, 1e30, 1e30)]
    net = nn.Sequential(nn.Flatten(), *chain, linear([[-1.0], [0.0]], [0.5, 0.0]))
    x = torch.full((1, 1, 1, 1), 0.9)
    assert exact(net)(x.double())[0, 0].item() == pytest.approx(-0.4)
    assert not certified(net, x)


def test_lower_precision_switched_on_around_the_call_certifies_nothing_that_is_false() -> None:
    """autocast rounds 1.004 to 1.0078: 0.753 - 0.7535 becomes positive, far beyond what float32 could be blamed for."""
    net = nn.Sequential(nn.Flatten(), linear([[1.004]], [-0.7535]), linear([[1.0], [0.0]]))
    x = torch.full((1, 1, 1, 1), 0.75)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert labels(net, x).item() == 0
        proof = IBP(eps=TINY_EPS)(net, x, ZERO)
    assert proof.status == ("open",)


# -- which margins count -----------------------------------------------------------------------------------------------


def test_settle_recomputes_exactly_the_undecided_margins() -> None:
    asked: list[list[int]] = []

    def recompute(at: Tensor) -> tuple[Tensor, Tensor]:
        asked.append(at.tolist())
        return torch.tensor([0.2, 0.001, -0.3, 0.5, torch.nan], dtype=torch.float64), torch.full((5,), 0.01, dtype=torch.float64)

    margin = torch.tensor([2.0, 0.9, 0.9, -0.9, -2.0, torch.nan, torch.inf])
    settled = settle(margin, torch.ones(7), recompute)
    assert asked == [[1, 2, 3, 5, 6]]
    assert settled.proved.tolist() == [True, True, False, False, False, True, False]
    assert settled.margin[:5].tolist() == [2.0, 0.2, 0.001, -0.3, -2.0]
    assert int(torch.as_tensor(settled.rechecked).sum()) == 5


def test_a_margin_equal_to_its_allowance_does_not_count() -> None:
    settled = settle(torch.zeros(1), torch.zeros(1), lambda at: (torch.zeros(1).double(), torch.zeros(1).double()))
    assert settled.proved.tolist() == [False]


@pytest.mark.parametrize("dtype, share", [(torch.float32, 1e-4), (torch.float64, 1e-9)])
def test_the_allowance_is_at_least_a_share_of_the_largest_sum(dtype: torch.dtype, share: float) -> None:
    """|w||x| + |b| by hand: 3 * 1 + 1 = 4 in the first layer, 100 * 4 in the second."""
    net = nn.Sequential(nn.Flatten(), linear([[3.0]], [1.0]), linear([[100.0], [0.0]], [0.0, 0.0])).to(dtype)
    ball = region(torch.ones(1, 1, 1, 1, dtype=dtype), "linf", Fraction(1, 100))
    assert allowance(net, ball).item() == pytest.approx(share * 400, rel=1e-6)
    assert 0 < SAFETY * UNIT[dtype] * tracked(net, ball).error.max() < share * 400


@pytest.mark.parametrize("norm, eps", [("linf", Fraction(1, 20)), ("l2", Fraction(1, 2))])
@pytest.mark.parametrize("name", NETS)
def test_the_allowance_of_a_batch_is_never_below_a_samples_own_and_equal_where_it_matters(
    name: str, norm: str, eps: Fraction
) -> None:
    net, ball = randomised(NETS[name]()), region(images(5), norm, eps)
    own = allowance(net, ball)
    margin = torch.tensor([1e9, -1e9, 0.0, torch.nan, float(own[4])])
    found = allowance_for(net, ball, margin)
    assert (found >= own * (1 - 1e-5)).all(), "kernels may round another batch size differently"
    torch.testing.assert_close(found[2:], own[2:])


def test_the_running_error_grows_by_the_size_of_what_a_clip_below_zero_leaves() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Hardtanh(-50.0, -20.0)).eval()
    box = region(torch.rand(2, 1, 2, 2), "linf", Fraction(1, 10))
    start = Tracked(box, torch.zeros_like(box.upper), box.upper.flatten(1).amax(1))
    before, after = (walk(part, start, ERROR_RULES).error for part in (net[:2], net))
    assert (after >= before + 20).all()  # values of at least 20, rounded once
