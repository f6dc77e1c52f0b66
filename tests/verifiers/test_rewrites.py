"""Rewritten operations: the same function in float64, bounds that no attack refutes, and a step that says so."""

from __future__ import annotations

import copy
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.verifiers.small_nets import Forward, exact, images, labels, linear, lowest_reached, randomised
from verifiers import AlphaCrown, Crown, CrownIBP, UnsupportedNetworkError
from verifiers.ball import region
from verifiers.bounds import ibp_logits
from verifiers.lirpa import Relaxation
from verifiers.lowering import lower, simplified
from verifiers.normalise import Normalize
from verifiers.rounding import allowance


def calling(function: Callable[[Tensor], Tensor], width: int, *middle: nn.Module) -> nn.Module:
    """function(relu(conv(x))) of [2, 6, 6] images, then a linear head on `width` values."""
    first = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), *middle)
    return Forward(lambda s, x: s.head(function(s.first(x))), first=first, head=nn.Linear(width, 5))


def head(width: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(width, 5))


def sound(net: nn.Module, norm: str, eps: Fraction, seed: int, verifier: Callable[..., Any]) -> None:
    """Fails where the network is refused, or a margin is above one that PGD or a sample reached."""
    x = images(4, seed=seed)
    y = labels(net, x)
    proof = verifier(norm=norm, eps=eps)(net, x, y)
    reached = lowest_reached(net, x, y, norm, eps)
    slack = allowance(simplified(net, x)[0], region(x, norm, eps)).double()
    assert (proof.margin <= reached + slack).all()
    assert (reached[torch.tensor([status == "proved" for status in proof.status])] > 0).all()


def before_head(layer: nn.Module, width: int, first: nn.Module | None = None) -> nn.Module:
    first = first or nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU())
    return nn.Sequential(first, layer, nn.Flatten(), nn.Linear(width, 5))


def flat(*middle: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(72, 8), *middle, nn.Linear(8, 5))


BARE = nn.Conv2d(2, 3, 3, padding=1)
REWRITTEN: dict[str, tuple[nn.Module, str]] = {
    "ReLU6": (before_head(nn.ReLU6(), 108, copy.deepcopy(BARE)), "two ReLUs"),
    "ReLU6 of flat values": (flat(nn.ReLU6()), "two ReLUs"),
    "Hardtanh": (before_head(nn.Hardtanh(-0.7, 0.4), 108, copy.deepcopy(BARE)), "two ReLUs"),
    "Hardtanh of flat values": (flat(nn.Hardtanh(0.1, 0.9)), "two ReLUs"),
    "padded average (U6)": (before_head(nn.AvgPool2d(2, padding=1), 48), "fixed convolution"),
    "overlapping average (U6)": (before_head(nn.AvgPool2d(3, stride=1), 48), "fixed convolution"),
    "padded and overlapping average": (before_head(nn.AvgPool2d(3, stride=2, padding=1), 27), "fixed convolution"),
    "rectangular average": (before_head(nn.AvgPool2d((1, 3), stride=(2, 1), padding=(0, 1)), 54), "fixed convolution"),
    "gapped average (U6)": (before_head(nn.AvgPool2d(1, stride=2), 27), "fixed convolution"),
    "average with its own divisor": (before_head(nn.AvgPool2d(3, padding=1, divisor_override=2), 12), "fixed convolution"),
    "average without padding": (before_head(nn.AvgPool2d(3, stride=2, count_include_pad=False), 12), "fixed convolution"),
    "adaptive average of parts": (before_head(nn.AdaptiveAvgPool2d((3, 2)), 18), "as AvgPool2d"),
    "overlapping maximum": (before_head(nn.MaxPool2d(3, stride=1), 48), "ReLUs"),
    "overlapping maximum of any sign": (before_head(nn.MaxPool2d(3, stride=2), 12, copy.deepcopy(BARE)), "ReLUs"),
    "overlapping maximum of four": (before_head(nn.MaxPool2d(4, stride=1), 27, copy.deepcopy(BARE)), "ReLUs"),
    "padded maximum after ReLU": (before_head(nn.MaxPool2d(3, stride=2, padding=1), 27), "ReLUs"),
    "padded plain maximum after ReLU": (before_head(nn.MaxPool2d(2, padding=1), 48), "ReLUs"),
    "padded maximum after ReLU6": (
        before_head(nn.MaxPool2d(3, 2, 1), 27, nn.Sequential(copy.deepcopy(BARE), nn.ReLU6())), "ReLUs"
    ),
    "padded maximum after maximum": (before_head(nn.Sequential(nn.MaxPool2d(2), nn.MaxPool2d(2, 1, 1)), 48), "ReLUs"),
    "dilated maximum (U7)": (before_head(nn.MaxPool2d(2, stride=2, dilation=2), 12), "ReLUs"),
    "rectangular maximum": (before_head(nn.MaxPool2d((1, 3), stride=(2, 1), padding=(0, 1)), 54), "ReLUs"),
    "F.max_pool2d": (calling(lambda x: F.max_pool2d(x, 2).flatten(1), 27), "as MaxPool2d"),
    "F.avg_pool2d": (calling(lambda x: F.avg_pool2d(x, 3, stride=1, padding=1).flatten(1), 108), "fixed convolution"),
    "F.adaptive_avg_pool2d": (calling(lambda x: F.adaptive_avg_pool2d(x, (1, 1)).flatten(1), 3), "as AdaptiveAvgPool2d"),
    "view(-1, n)": (calling(lambda x: x.view(-1, 108), 108), "as Flatten"),
    "view(size, -1)": (calling(lambda x: x.view(x.size(0), -1), 108), "as Flatten"),
    "view(shape, n)": (calling(lambda x: x.view(x.shape[0], 108), 108), "as Flatten"),
    "reshape((size, -1))": (calling(lambda x: x.reshape((x.size()[0], -1)), 108), "as Flatten"),
    "torch.reshape": (calling(lambda x: torch.reshape(x, (-1, 108)), 108), "as Flatten"),
    "mean((2, 3))": (calling(lambda x: x.mean((2, 3)), 3), "AdaptiveAvgPool2d(1)"),
    "mean(dim=[-1, -2])": (calling(lambda x: x.mean(dim=[-1, -2]), 3), "AdaptiveAvgPool2d(1)"),
    "torch.mean keeping": (calling(lambda x: torch.mean(x, (2, 3), keepdim=True).flatten(1), 3), "AdaptiveAvgPool2d(1)"),
    "Dropout2d": (before_head(nn.Dropout2d(0.5), 108), "dropped Dropout2d"),
    "F.dropout": (calling(lambda x: F.dropout(x.flatten(1), 0.5, False), 108), "dropped dropout"),
    "BatchNorm2d": (before_head(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), 108, copy.deepcopy(BARE)), "folded BatchNorm2d"),
    "BatchNorm2d after another user": (
        Forward(lambda s, x: s.head((lambda z: s.norm(z) + z)(s.conv(x)).flatten(1)), conv=copy.deepcopy(BARE),
                norm=nn.BatchNorm2d(3), head=nn.Linear(108, 5, bias=False)),
        "gave head a bias of zero",
    ),
    "BatchNorm2d without weights after ReLU": (before_head(nn.BatchNorm2d(3, affine=False), 108), "unit weights"),
    "BatchNorm1d": (flat(nn.BatchNorm1d(8), nn.ReLU()), "folded BatchNorm1d"),
    "BatchNorm1d without weights": (flat(nn.BatchNorm1d(8, affine=False), nn.ReLU()), "folded BatchNorm1d"),
    "padding='same'": (nn.Sequential(nn.Conv2d(2, 3, 3, padding="same"), nn.ReLU(), head(108)), "padding as numbers"),
}


def built(name: str, seed: int = 0) -> nn.Module:
    net = randomised(copy.deepcopy(REWRITTEN[name][0]), seed=seed, gain=3.0)
    generator = torch.Generator().manual_seed(seed)
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm1d):
            assert layer.running_mean is not None
            assert layer.running_var is not None
            layer.running_mean.copy_(torch.randn(8, generator=generator))
            layer.running_var.copy_(0.3 + torch.rand(8, generator=generator))
    return net


@pytest.mark.parametrize("name", REWRITTEN)
def test_a_rewritten_network_is_the_same_function_and_the_step_is_named(name: str) -> None:
    net = exact(built(name))
    lowered = lower(net, images(2, dtype=torch.float64))
    for n, scale in ((1, 1.0), (3, 1.0), (5, 40.0)):
        x = scale * (images(n, dtype=torch.float64, seed=n) - (scale > 1) * 0.5)
        torch.testing.assert_close(lowered.network(lowered.move(x)), net(x), atol=1e-9, rtol=1e-10)
    assert any(REWRITTEN[name][1] in step for step in lowered.steps)


@pytest.mark.parametrize("norm, eps", [("linf", Fraction(1, 20)), ("l2", Fraction(1, 2))])
@pytest.mark.parametrize("name", REWRITTEN)
def test_no_attack_refutes_crown_on_a_rewritten_network(name: str, norm: str, eps: Fraction) -> None:
    for seed in range(3):
        sound(built(name, seed), norm, eps, seed, Crown)


@pytest.mark.parametrize("name", REWRITTEN)
def test_no_attack_refutes_alpha_crown_on_a_rewritten_network(name: str) -> None:
    for norm, eps in (("linf", Fraction(1, 20)), ("l2", Fraction(1, 2))):
        sound(built(name, 4), norm, eps, 4, lambda norm, eps: AlphaCrown(norm, eps, iterations=3))


def test_networks_of_forms_without_interval_rule_are_certified_by_intervals_of_their_simplified_form() -> None:
    net = built("view(size, -1)")
    plain, steps = simplified(net, images(2))
    assert steps == ("view as Flatten",)
    box = region(images(3), "linf", Fraction(1, 50))
    twin = copy.deepcopy(net)
    twin.function = lambda s, x: s.head(torch.flatten(s.first(x), 1))
    torch.testing.assert_close(ibp_logits(plain, box).lower, ibp_logits(twin, box).lower)


def test_a_network_without_such_forms_is_its_own_simplified_form() -> None:
    net = built("BatchNorm2d")
    assert simplified(net, images(2)) == (net, ())


def test_a_folded_bias_that_cancels_keeps_its_digits() -> None:
    """bias - mean = 2^-20 next to 2^20 by hand: rounding in between would give 0 or twice as much."""
    conv, norm = nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1, eps=0.0)
    with torch.no_grad():
        conv.weight.fill_(1.0)
        conv.bias.fill_(3.0)
        norm.running_mean.fill_(3.0)
        norm.running_var.fill_(4.0)
        norm.weight.fill_(2.0**20)
        norm.bias.fill_(2.0**-20)
    net = nn.Sequential(conv, norm, nn.Flatten(), linear([[1.0], [-1.0]])).eval()
    folded = next(layer for layer in lower(net, torch.rand(1, 1, 1, 1)).network.modules() if isinstance(layer, nn.Conv2d))
    assert (folded.weight.item(), folded.bias.item()) == (2.0**19, 2.0**-20)


def test_a_convolution_used_twice_is_not_folded_into() -> None:
    net = randomised(
        Forward(lambda s, x: s.head((s.norm(s.conv(x)) + s.conv(x)).flatten(1)), conv=nn.Conv2d(2, 2, 1), norm=nn.BatchNorm2d(2),
                head=nn.Linear(72, 3))
    )
    x = images(3, dtype=torch.float64)
    lowered = lower(exact(net), x)
    assert not any("folded" in step for step in lowered.steps)
    torch.testing.assert_close(lowered.network(x), exact(net)(x))


# -- several of them in one network ------------------------------------------------------------------------------------

MIDDLE: dict[str, Callable[[int], nn.Module]] = {
    "clip": lambda c: nn.ReLU6(),
    "hard clip": lambda c: nn.Hardtanh(-0.4, 0.6),
    "norm": lambda c: nn.Sequential(nn.BatchNorm2d(c), nn.ReLU()),
    "bare norm": lambda c: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(c, affine=False)),
    "overlapping average": lambda c: nn.AvgPool2d(3, stride=2, padding=1),
    "overlapping maximum": lambda c: nn.MaxPool2d(2, stride=1),
    "padded maximum": lambda c: nn.Sequential(nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1)),
    "same": lambda c: nn.Sequential(nn.ReLU(), nn.Conv2d(c, c, 3, padding="same", bias=False), nn.ReLU()),
    "dropout": lambda c: nn.Sequential(nn.ReLU(), nn.Dropout2d(0.5)),
}


@st.composite
def networks(draw: st.DrawFn) -> nn.Module:
    """A convolution, two rewritten blocks, a head that flattens by view, mean or layer; sometimes normalised, sparse, large."""
    channels = draw(st.integers(1, 3))
    layers: list[nn.Module] = [Normalize([0.4, 0.6], [0.5, 0.25])] if draw(st.booleans()) else []
    layers.append(nn.Conv2d(2, channels, 3, stride=draw(st.integers(1, 2)), padding=1, bias=draw(st.booleans())))
    layers += [MIDDLE[draw(st.sampled_from(sorted(MIDDLE)))](channels) for _ in range(draw(st.integers(1, 2)))]
    body = nn.Sequential(*layers).eval()
    shape = body(torch.zeros(2, 2, 6, 6)).shape
    ending = draw(st.sampled_from(["view", "mean", "layers"]))
    width = shape[1] if ending == "mean" else shape[1:].numel()
    ends: dict[str, Callable[[Tensor], Tensor]] = {
        "view": lambda x: x.view(x.size(0), -1), "mean": lambda x: x.mean((2, 3)), "layers": lambda x: torch.flatten(x, 1)
    }
    tail = [nn.Linear(width, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3, bias=False)]
    net = Forward(lambda s, x: s.tail(ends[ending](s.body(x))), body=body, tail=nn.Sequential(*tail))
    gain = draw(st.sampled_from([0.5, 2.0, 20.0]))
    return randomised(net, seed=draw(st.integers(0, 1000)), kept=draw(st.sampled_from([0.3, 1.0])), gain=gain)


BALLS = st.tuples(st.sampled_from(["linf", "l2"]), st.sampled_from([Fraction(1, 255), Fraction(1, 20), Fraction(3, 10)]))
QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}


def check(net: nn.Module, ball: tuple[str, Fraction], seed: int) -> None:
    norm, eps = ball
    for verifier in (CrownIBP, Crown):
        sound(net, norm, eps, seed, verifier)


@settings(max_examples=15, **QUIET)
@given(net=networks(), ball=BALLS, seed=st.integers(0, 100))
def test_no_point_contradicts_bounds_of_rewritten_parts(net: nn.Module, ball: tuple[str, Fraction], seed: int) -> None:
    check(net, ball, seed)


@pytest.mark.slow
@settings(max_examples=500, **QUIET)
@given(net=networks(), ball=BALLS, seed=st.integers(0, 10**6))
def test_no_point_contradicts_bounds_of_many_such_networks(net: nn.Module, ball: tuple[str, Fraction], seed: int) -> None:
    check(net, ball, seed)
    sound(net, *ball, seed, lambda norm, eps: AlphaCrown(norm, eps, iterations=3))


def test_rounding_of_the_rewritten_network_counts_too() -> None:
    """A clip at 2^25: 2^25 - relu(2^25 - x) loses x in float32, so the lowered network's allowance must be far above 0.2."""
    net = nn.Sequential(nn.Flatten(), linear([[1.0]]), nn.Hardtanh(0.0, 2.0**25), linear([[1.0], [0.0]], [0.0, 0.3]))
    x = torch.full((1, 1, 1, 1), 0.5)
    assert Relaxation(net, x, "linf", Fraction(1, 10)).allowance(x).item() > 1
    assert allowance(net, region(x, "linf", Fraction(1, 10))).item() < 0.1
    with pytest.raises(UnsupportedNetworkError, match="failed the self-check"):
        Crown(eps=Fraction(1, 10))(net, x, torch.tensor([1]))
