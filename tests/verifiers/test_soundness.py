"""Property: on random small networks, no sampled or attacked point of the ball contradicts a bound or a certificate."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.verifiers.small_nets import Forward, exact, images, labels, lowest_attacked, lowest_sampled, points_of_ball, randomised
from verifiers import IBP, Crown, CrownIBP, Exact, SymbolicInterval
from verifiers.ball import region
from verifiers.bounds import ibp_logits
from verifiers.normalise import Normalize
from verifiers.proof import UnsupportedNetworkError
from verifiers.rounding import allowance

SHAPE = (2, 6, 6)


def residual(channels: int) -> nn.Module:
    return Forward(
        lambda s, x: torch.relu(x + s.second(torch.relu(s.first(x)))),
        first=nn.Conv2d(channels, channels, 3, padding=1), second=nn.Conv2d(channels, channels, 1),
    )


MIDDLE = {
    "relu": lambda c: nn.ReLU(),
    "batchnorm": lambda c: nn.Sequential(nn.BatchNorm2d(c), nn.ReLU()),
    "residual": residual,
    "max": lambda c: nn.MaxPool2d(2),
    "average": lambda c: nn.AvgPool2d(2),
    "strided": lambda c: nn.Sequential(nn.ReLU(), nn.Conv2d(c, c, 3, stride=2, padding=1), nn.ReLU()),
    "dilated": lambda c: nn.Sequential(nn.ReLU(), nn.Conv2d(c, c, 2, dilation=2, padding=1), nn.ReLU()),
    "grouped": lambda c: nn.Sequential(nn.ReLU(), nn.Conv2d(c, c, 3, padding=1, groups=c)),
}


@st.composite
def networks(draw: st.DrawFn) -> nn.Module:
    """A convolution or a linear layer, up to two blocks, a linear head; sometimes normalised, sometimes sparse."""
    layers: list[nn.Module] = []
    if draw(st.booleans()):
        layers.append(Normalize([0.4, 0.6], [0.5, draw(st.sampled_from([0.25, 0.5, 1.0]))]))
    if draw(st.booleans()):
        channels = draw(st.integers(1, 4))
        layers.append(nn.Conv2d(2, channels, draw(st.integers(1, 3)), padding=draw(st.integers(0, 1))))
        layers += [MIDDLE[draw(st.sampled_from(sorted(MIDDLE)))](channels) for _ in range(draw(st.integers(0, 2)))]
        layers.append(nn.Flatten())
    else:
        layers += [nn.Flatten(), nn.Linear(72, 8), nn.ReLU()]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        width = nn.Sequential(*layers).eval()(torch.zeros(2, *SHAPE)).shape[1]
        if draw(st.booleans()):
            layers += [nn.Linear(width, 6), nn.ReLU()]
            width = 6
        layers.append(nn.Linear(width, draw(st.integers(2, 4))))
    kept = draw(st.sampled_from([0.1, 0.3, 1.0]))
    gain = draw(st.sampled_from([0.5, 2.0, 30.0]))
    return randomised(nn.Sequential(*layers), seed=draw(st.integers(0, 1000)), kept=kept, gain=gain)


BALLS = st.tuples(
    st.sampled_from(["linf", "l2"]),
    st.sampled_from([Fraction(0), Fraction(1, 10**6), Fraction(1, 255), Fraction(8, 255), Fraction(3, 10), Fraction(2)]),
)


def check(net: nn.Module, ball: tuple[str, Fraction], seed: int) -> None:
    norm, eps = ball
    x = images(3, SHAPE, seed)
    x[0] = x[0].round()  # black and white pixels: the ball is cut by the box
    y = labels(net, x)
    sampled, attacked = lowest_sampled(net, x, y, norm, eps, 24), lowest_attacked(net, x, y, norm, eps, steps=8)
    reached = torch.minimum(sampled, attacked)
    slack = allowance(net, region(x, norm, eps)).double()

    logits_hold_samples(net, x, norm, eps)
    proofs = [verifier(norm=norm, eps=eps)(net, x, y) for verifier in (IBP, CrownIBP, Crown)]
    for proof in proofs:
        assert (proof.margin <= reached + slack).all()
        survives = reached > 0
        certified = torch.tensor([status == "proved" for status in proof.status])
        assert survives[certified].all()
        assert torch.equal(certified, (proof.radius >= float(eps)) & (proof.margin > 0))
    for looser, tighter in itertools.pairwise(proofs):
        assert (looser.radius <= tighter.radius).all()
        assert (looser.margin <= tighter.margin + slack).all()


def logits_hold_samples(net: nn.Module, x: Tensor, norm: str, eps: Fraction) -> None:
    """In float64 the interval of every logit holds the logits of all sampled points."""
    wide = exact(net)
    bounds = ibp_logits(wide, region(x.double(), norm, eps))
    logits = wide(points_of_ball(x, norm, eps, 24).flatten(0, 1)).unflatten(0, (24, 3))
    slack = 1e-9 * (1 + logits.abs().max())
    assert (bounds.lower - slack <= logits).all()
    assert (logits <= bounds.upper + slack).all()


QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}


@settings(max_examples=25, **QUIET)
@given(net=networks(), ball=BALLS, seed=st.integers(0, 100))
def test_no_point_contradicts_ibp_crown_ibp_or_crown(net: nn.Module, ball: tuple[str, Fraction], seed: int) -> None:
    check(net, ball, seed)


@pytest.mark.slow
@settings(max_examples=1000, **QUIET)
@given(net=networks(), ball=BALLS, seed=st.integers(0, 10**6))
def test_no_point_contradicts_bounds_of_many_networks(net: nn.Module, ball: tuple[str, Fraction], seed: int) -> None:
    check(net, ball, seed)


def test_the_networks_above_include_certified_and_open_ones() -> None:
    """A property that never certifies proves nothing: on this grid both answers occur for every verifier."""
    net = randomised(nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(108, 3)), seed=2)
    x = images(6, SHAPE)
    y = labels(net, x)
    for verifier in (IBP, CrownIBP, Crown):
        answers = [status for eps in (1, 5, 50) for status in verifier(eps=Fraction(eps, 1000))(net, x, y).status]
        assert {"proved", "open"} == set(answers)


@pytest.mark.parametrize("verifier", [IBP, CrownIBP, Crown])
def test_an_empty_batch_has_an_empty_answer(verifier: type) -> None:
    net = randomised(nn.Sequential(nn.Flatten(), nn.Linear(72, 3)))
    proof = verifier(eps=Fraction(1, 10))(net, images(0, SHAPE), torch.zeros(0, dtype=torch.int64))
    assert (proof.status, proof.margin.shape, proof.radius.shape) == ((), (0,), (0,))



@pytest.mark.parametrize("verifier", [IBP, CrownIBP, Exact, SymbolicInterval])
def test_a_wrong_answer_is_never_certified_even_where_pixels_lie_outside_of_the_unit_box(verifier: Any) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, 2)).eval()
    net[1].weight.data, net[1].bias.data = torch.eye(2), torch.tensor([0.0, -0.5])
    x, y = torch.tensor([1.0, 2.0]).view(1, 1, 1, 2), torch.tensor([0])
    assert net(x).argmax(1).tolist() == [1]  # cut to [0,1] it would be class 0 by far
    proof = verifier(eps=Fraction(1, 100))(net, x, y)
    assert proof.status == ("open",)
    assert proof.predicted.tolist() == [1]


@pytest.mark.parametrize("verifier", [IBP, CrownIBP, Exact, SymbolicInterval])
def test_numbers_that_are_not_finite_are_called_so(verifier: Any) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, 2)).eval()
    x = torch.tensor([[0.5, math.nan], [0.5, 0.5]]).view(2, 1, 1, 2)
    with pytest.raises(UnsupportedNetworkError, match="no finite numbers"):
        verifier(eps=Fraction(1, 100))(net, x, torch.zeros(2, dtype=torch.long))
