"""What auto-LiRPA gets to see: a plain graph equal to the network, or a refusal that names the operation."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bench.models import PLAIN, build_model
from bench.sparsity import Mask, attach
from tests.verifiers.small_nets import RULE_NETS, Forward, exact, images, labels, linear, lowest_reached, randomised
from verifiers import Crown, UnsupportedNetworkError
from verifiers.ball import region
from verifiers.lirpa import Relaxation
from verifiers.lowering import lower, simplified
from verifiers.normalise import Normalize
from verifiers.rounding import allowance

SIDES = {"mlp": 8, "cnn_small": 8, "cnn_large": 8, "lenet": 16}
SEES_NO_RELAXATION = {
    "Linear", "Tanh", "Sigmoid", "MaxPool2d overlapping", "AvgPool2d without padding in the mean", "AdaptiveAvgPool2d to 4x4",
    "F.max_pool2d padded",
}


@pytest.mark.parametrize("name", sorted(RULE_NETS))
def test_the_lowered_network_equals_the_original_in_float64_or_is_refused(name: str) -> None:
    net, x = exact(randomised(RULE_NETS[name]())), images(4, dtype=torch.float64, seed=3)
    try:
        lowered = lower(net, x[:1])
    except UnsupportedNetworkError:
        assert name in SEES_NO_RELAXATION
        return
    assert name not in SEES_NO_RELAXATION
    torch.testing.assert_close(lowered.network(lowered.move(x)), net(x), atol=1e-10, rtol=1e-10)
    kinds = {type(layer) for layer in lowered.network.modules()}
    assert not kinds & {Normalize, nn.Dropout, nn.Identity}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", PLAIN)
def test_models_of_the_suite_keep_their_function_with_normalisation_folded(name: str, channels: int) -> None:
    shape, mean, std = (channels, SIDES[name], SIDES[name]), (0.3, 0.5, 0.7)[:channels], (0.2, 0.5, 1.5)[:channels]
    net, x = randomised(build_model(name, shape, 7, mean, std), kept=0.3), images(4, shape)
    lowered = lower(net, x)
    assert lowered.shift is not None
    torch.testing.assert_close(lowered.shift.flatten().tolist(), list(mean))
    want = exact(net)(x.double()).detach()
    got = exact(lowered.network)(lowered.move(x.double())).detach()
    torch.testing.assert_close(got, want, atol=1e-5 * float(want.abs().max()), rtol=0)
    assert len(lowered.steps) == 2
    double = lower(exact(net), x.double())
    torch.testing.assert_close(double.network(double.move(x.double())), want, atol=1e-9, rtol=1e-9)


def test_the_original_network_is_left_as_it_was() -> None:
    net = randomised(build_model("cnn_small", (1, 8, 8), 5, (0.3,), (0.4,))).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    lower(net, images(2, (1, 8, 8)))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert net.training


def test_padding_sees_the_mean_not_zero_pixels() -> None:
    """By hand: zero padding of normalised pixels is padding with the mean; a 3x3 sum of one pixel v is (v - mean) / std."""
    conv = nn.Conv2d(1, 1, 3, padding=1, bias=False)
    nn.init.ones_(conv.weight)
    net = nn.Sequential(Normalize([0.25], [0.5]), conv, nn.Flatten(), linear([[1.0], [-1.0]]))
    lowered = lower(net, torch.rand(1, 1, 1, 1))
    x = torch.full((1, 1, 1, 1), 0.75)
    assert lowered.network(lowered.move(x)).flatten().tolist() == [1.0, -1.0]
    assert lowered.move(x).item() == 0.5


def test_layers_that_do_nothing_are_dropped_and_named() -> None:
    net = randomised(nn.Sequential(nn.Identity(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(72, 5), nn.Identity()))
    assert lower(net, images(2)).steps == ("dropped Identity 0", "dropped Dropout 2", "dropped Identity 4")


def test_a_normalisation_of_unit_std_is_a_translation_only() -> None:
    net = randomised(nn.Sequential(Normalize([0.3, 0.4], [1, 1]), nn.ReLU(), nn.Flatten(), nn.Linear(72, 5)))
    assert len(lower(net, images(2)).steps) == 1


def head(width: int = 72) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(width, 5))


SCALE = Normalize([0.1, 0.2], [0.5, 0.25])
REFUSED: dict[str, tuple[nn.Module, str]] = {
    "LeakyReLU": (nn.Sequential(nn.Conv2d(2, 2, 1), nn.LeakyReLU(), head()), "LeakyReLU"),
    "Tanh": (nn.Sequential(nn.Conv2d(2, 2, 1), nn.Tanh(), head()), "Tanh"),
    "Softmax": (nn.Sequential(head(), nn.Softmax(1)), "Softmax"),
    "GroupNorm": (nn.Sequential(nn.GroupNorm(1, 2), head()), "GroupNorm"),
    "average without padding in the mean (U7)": (
        nn.Sequential(nn.AvgPool2d(2, padding=1, count_include_pad=False), head(32)), "AvgPool2d"
    ),
    "average with ceil mode": (nn.Sequential(nn.AvgPool2d(4, ceil_mode=True), head(8)), "AvgPool2d"),
    "maximum with ceil mode (U7)": (nn.Sequential(nn.Conv2d(2, 2, 1), nn.MaxPool2d(4, ceil_mode=True), head(8)), "MaxPool2d"),
    "padded maximum": (nn.Sequential(nn.Conv2d(2, 2, 1), nn.MaxPool2d(2, padding=1), head(32)), "MaxPool2d"),
    "product": (Forward(lambda s, x: s.head(x * 2), head=head()), "mul"),
    "difference": (Forward(lambda s, x: s.head(x - 0.5), head=head()), "sub"),
    "sum with a constant (U5)": (Forward(lambda s, x: s.conv(x + 0.5).flatten(1), conv=nn.Conv2d(2, 2, 3, padding=1)), "add"),
    "torch.add with a factor": (Forward(lambda s, x: s.head(torch.add(x, x, alpha=2)), head=head()), "add"),
    "view of the wrong width": (Forward(lambda s, x: s.head(x.view(-1, 36)), head=nn.Linear(36, 5)), "view"),
    "view of part of the image": (Forward(lambda s, x: s.head(x.view(-1, 2, 36)).flatten(1), head=nn.Linear(36, 5)), "view"),
    "mean over channels": (Forward(lambda s, x: s.head(x.mean((1, 2))), head=nn.Linear(6, 5)), "mean"),
    "active dropout": (Forward(lambda s, x: s.head(F.dropout(x, 0.5)), head=head()), "dropout"),
    "BatchNorm1d that leads": (
        nn.Sequential(nn.Flatten(), nn.BatchNorm1d(72), nn.Linear(72, 5)), "BatchNorm1d"
    ),
    "adaptive average of uneven parts": (
        nn.Sequential(nn.Conv2d(2, 2, 1), nn.AdaptiveAvgPool2d(4), head(32)), "AdaptiveAvgPool2d"
    ),
    "maximum too large for ReLUs": (
        nn.Sequential(nn.Conv2d(2, 400, 1), nn.ReLU(), nn.MaxPool2d(5, stride=1), head(1600)), "would take 25600 ReLUs"
    ),
    "a layer fed with normalised and plain pixels": (
        Forward(lambda s, x: s.head(s.conv(s.scale(x)) + s.conv(x)), scale=SCALE, conv=nn.Conv2d(2, 2, 1), head=head()),
        "more than once",
    ),
    "mask in the graph (U1)": (
        Forward(lambda s, x: F.linear(x.flatten(1), s.head.weight * (s.head.weight > 0)), head=nn.Linear(72, 5)), "head.weight"
    ),
    "two normalisations": (nn.Sequential(SCALE, nn.Conv2d(2, 2, 1), SCALE, head()), "normalisation"),
    "normalisation inside": (nn.Sequential(nn.Conv2d(2, 2, 1), SCALE, head()), "normalisation"),
    "normalisation before ReLU": (nn.Sequential(SCALE, nn.ReLU(), head()), "feeds _1"),
    "normalisation before BatchNorm": (nn.Sequential(SCALE, nn.BatchNorm2d(2), head()), "feeds _1"),
    "normalisation before a grouped convolution": (nn.Sequential(SCALE, nn.Conv2d(2, 2, 3, groups=2), head(32)), "feeds _1"),
    "normalisation with a shortcut": (
        Forward(lambda s, x: s.head(s.conv(s.scale(x)) + s.scale(x)), scale=SCALE, conv=nn.Conv2d(2, 2, 1), head=head()),
        "normalisation",
    ),
    "normalisation with a shortcut of its own": (
        Forward(lambda s, x: s.head((lambda z: s.conv(z) + z)(s.scale(x))), scale=SCALE, conv=nn.Conv2d(2, 2, 1), head=head()),
        "feeds add",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_linear_relaxations_are_not_sound_on_is_refused_by_name(name: str) -> None:
    net, word = REFUSED[name]
    with pytest.raises(UnsupportedNetworkError, match=word):
        lower(net.eval(), images(2))


def test_attached_parametrizations_are_refused_with_the_way_out() -> None:
    net = randomised(nn.Sequential(nn.Flatten(), nn.Linear(72, 5)))
    attach(net[1], Mask((torch.rand(5, 72, generator=torch.Generator().manual_seed(0)) < 0.5).float()))
    with pytest.raises(UnsupportedNetworkError, match="bake its masks"):
        lower(net, images(2))


# -- the known errors of auto-LiRPA 0.3 (U numbers of docs/decisions/0003): refused, or bounds that no attack refutes -----


def sound_or_refused(net: nn.Module, norm: str, eps: Fraction, seed: int = 0, n: int = 4) -> bool:
    """Whether the network was bounded; fails where a margin is above one that PGD or a sample reached."""
    x = images(n, seed=seed)
    y = labels(net, x)
    try:
        proof = Crown(norm=norm, eps=eps)(net, x, y)
    except UnsupportedNetworkError:
        return False
    slack = allowance(simplified(net, x)[0], region(x, norm, eps)).double()
    assert (proof.margin <= lowest_reached(net, x, y, norm, eps) + slack).all()
    return True


NOT_BOUNDED_BY_THE_LIBRARY = {"Conv2d same"}


@pytest.mark.parametrize("norm, eps", [("linf", Fraction(1, 20)), ("l2", Fraction(1, 2))])
@pytest.mark.parametrize("name", sorted(set(RULE_NETS) - SEES_NO_RELAXATION))
def test_no_attack_refutes_crown_on_any_network_that_is_lowered(name: str, norm: str, eps: Fraction) -> None:
    if not sound_or_refused(randomised(RULE_NETS[name]()), norm, eps):
        assert norm == "l2" or name in NOT_BOUNDED_BY_THE_LIBRARY, "refusing too much would hide the comparison"


FIRST_OPERATION: dict[str, nn.Module] = {
    "ReLU": nn.Sequential(nn.ReLU(), nn.Flatten()),
    "centred ReLU": nn.Sequential(Normalize([0.5, 0.5], [1.0, 1.0]), nn.ReLU(), nn.Flatten()),
    "MaxPool2d": nn.Sequential(nn.MaxPool2d(2), nn.Flatten()),
    "AvgPool2d": nn.Sequential(nn.AvgPool2d(2), nn.Flatten()),
    "AdaptiveAvgPool2d": nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    "BatchNorm2d": nn.Sequential(nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten()),
    "sum": Forward(lambda s, x: torch.flatten(s.conv(x + x), 1), conv=nn.Conv2d(2, 2, 3, padding=1)),
    "shortcut": Forward(lambda s, x: torch.flatten(torch.relu(s.conv(x) + x), 1), conv=nn.Conv2d(2, 2, 3, padding=1)),
    "concatenation": Forward(lambda s, x: torch.flatten(s.conv(torch.cat([x, x], 1)), 1), conv=nn.Conv2d(4, 2, 3, padding=1)),
}
WIDTH = {"MaxPool2d": 18, "AvgPool2d": 18, "AdaptiveAvgPool2d": 2}


@pytest.mark.parametrize("name", FIRST_OPERATION)
def test_l2_bounds_are_sound_or_refused_whatever_the_first_operation_is(name: str) -> None:
    """U2: auto-LiRPA is right on l2 balls only where the first operation is a convolution or a linear layer."""
    tail = nn.Sequential(nn.Linear(WIDTH.get(name, 72), 8), nn.ReLU(), nn.Linear(8, 5))
    for seed in range(5):
        net = randomised(nn.Sequential(FIRST_OPERATION[name], tail), seed=seed, gain=1.5)
        sound_or_refused(net, "l2", Fraction(1, 2), seed=seed)


@pytest.mark.parametrize("name", ["Conv2d grouped", "Conv2d dilated", "Conv2d rectangular", "MaxPool2d", "Linear without bias"])
def test_patches_are_not_used_where_they_are_wrong(name: str) -> None:
    """U3, U4: groups, dilation, rectangular kernels and pooling need the matrix mode."""
    assert "matrix mode" in Relaxation(randomised(RULE_NETS[name]()), images(2), "linf", Fraction(1, 10)).notes[-1]


@pytest.mark.parametrize("options", [{"stride": (1, 2)}, {"padding": (2, 0)}, {"stride": (2, 1), "padding": (0, 1)}])
def test_strides_and_paddings_that_differ_by_axis_are_bounded_rightly_or_refused(options: dict[str, tuple[int, int]]) -> None:
    second = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5))
    net = nn.Sequential(nn.Conv2d(2, 3, 3, **options), nn.ReLU(), second)
    net(images(1))
    for norm, eps in (("linf", Fraction(1, 20)), ("l2", Fraction(1, 2))):
        sound_or_refused(randomised(net), norm, eps)
