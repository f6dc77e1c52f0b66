"""Compacted networks against the originals: the same function, no wider bounds, and exactly the units that hand counts leave."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.models import ARCHITECTURES, PLAIN, build_model
from verifiers import IBP, Crown
from verifiers.ball import region
from verifiers.bounds import ibp_logits
from verifiers.compaction import compact, compacted
from verifiers.lirpa import Relaxation
from verifiers.normalise import Normalize
from verifiers.proof import UnsupportedNetworkError
from verifiers.rounding import allowance

from .small_nets import RULE_NETS, SHAPE_NETS, Forward, exact, images, linear, lowest_reached, randomised

LARGE = sorted(set(ARCHITECTURES) - set(PLAIN))
SHAPE = (2, 6, 6)


def require_same(net: nn.Module, x: Tensor) -> None:
    """To 1e-12 in float64; in float32 within the rounding allowance; and interval bounds that are no wider."""
    double = exact(net).requires_grad_(False)
    small, same = compact(net, x).network.requires_grad_(False), compact(double, x.double()).network
    points = torch.cat([x, images(3, tuple(x.shape[1:]), seed=9)])
    want = double(points.double())
    scale = float(want.abs().max())
    torch.testing.assert_close(same(points.double()), want, rtol=0, atol=1e-12 * scale)
    error = (small(points) - want).abs().amax(1)
    assert float(error.max()) <= 1e-5 * scale
    assert not (error > allowance(net, region(points, "linf", Fraction(1, 50)))).any()  # it is NaN where float32 bounds overflow
    near = region(points.double(), "linf", Fraction(1, 50))
    before, after = ibp_logits(double, near), ibp_logits(same, near)
    slack = 1e-12 * before.upper.abs().maximum(before.lower.abs()).amax()
    assert (after.lower >= before.lower - slack).all()
    assert (after.upper <= before.upper + slack).all()


def masked(arch: str, density: float, seed: int, gain: float = 2.0) -> nn.Module:
    """A random sparse network at width 1/16, with a normalisation and BatchNorm statistics of use."""
    model = build_model(f"{arch}@1/16", (3, 16, 16), 10, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
    return randomised(model, seed=seed, kept=density, gain=gain)


@pytest.mark.parametrize("density", [pytest.param(0.5, marks=pytest.mark.slow), 0.1, 0.02])
@pytest.mark.parametrize("arch", ["mlp", "cnn_small", "cnn_large", "lenet", "resnet18"])
def test_a_compacted_network_is_the_same_function_with_no_wider_bounds(arch: str, density: float) -> None:
    require_same(masked(arch, density, seed=1), images(2, (3, 16, 16)))


@pytest.mark.slow
@pytest.mark.parametrize("density", [0.5, 0.1, 0.02])
@pytest.mark.parametrize("arch", LARGE)
def test_every_large_architecture_compacts_to_the_same_function(arch: str, density: float) -> None:
    require_same(masked(arch, density, seed=2, gain=1.0), images(2, (3, 16, 16)))  # 2.0 takes a ResNet-101 beyond float32


REFUSED = {
    "BatchNorm1d first": "BatchNorm1d", "BatchNorm1d of sequences": "BatchNorm1d", "mean over rows": "mean",
    "F.relu6": "relu6", "average over what is there": "size",
}  # fmt: skip


@pytest.mark.parametrize("density", [pytest.param(0.3, marks=pytest.mark.slow), 0.1])
@pytest.mark.parametrize("name", sorted({**RULE_NETS, **SHAPE_NETS}))
def test_every_operation_compacts_to_the_same_function_or_is_refused_by_name(name: str, density: float) -> None:
    torch.manual_seed(0)
    net = randomised({**RULE_NETS, **SHAPE_NETS}[name](), seed=3, kept=density)
    if name not in REFUSED:
        require_same(net, images(2))
        return
    with pytest.raises(UnsupportedNetworkError, match=REFUSED[name]):
        compact(net, images(2))


@pytest.mark.parametrize("seed", range(4))
def test_random_small_cnns_with_residual_sums_and_concatenations_stay_the_same(seed: int) -> None:
    """Depthwise and grouped convolutions, strides, dilation and both poolings between."""

    def forward(s: Forward, x: Tensor) -> Tensor:
        a = F.relu(s.bn(s.a(x)))
        b = F.relu(s.depth(a)) + a
        c = torch.cat([F.max_pool2d(b, 3, 2, 1), F.avg_pool2d(F.relu(s.grouped(b)), 2)], 1)
        return s.head(torch.flatten(F.relu(s.wide(c)), 1))  # type: ignore[no-any-return]

    torch.manual_seed(seed)
    net = Forward(
        forward,
        a=nn.Conv2d(2, 6, 3, padding=1),
        bn=nn.BatchNorm2d(6),
        depth=nn.Conv2d(6, 6, 3, padding=1, groups=6),
        grouped=nn.Conv2d(6, 8, 3, padding=1, groups=2),
        wide=nn.Conv2d(14, 5, 3, padding=2, dilation=2),
        head=nn.Linear(45, 4),
    )
    require_same(randomised(net, seed=seed, kept=(0.05, 0.1, 0.25)[seed % 3]), images(2))


# ---- by hand ---------------------------------------------------------------------------------------------------------


def conv(rows: list[list[float]], bias: list[float], kernel: int = 3, padding: int = 1) -> nn.Conv2d:
    """A convolution with one value per output and input channel, in two corners of the kernel, which meet the padding."""
    layer = nn.Conv2d(len(rows[0]), len(rows), kernel, padding=padding)
    with torch.no_grad():
        layer.weight.zero_()[:, :, 0, 0] = torch.tensor(rows)
        layer.weight[:, :, -1, -1] = torch.tensor(rows)
        layer.bias.copy_(torch.tensor(bias))  # type: ignore[union-attr]
    return layer


def head(channels: int, places: int = 36) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * places, 3))


def units(net: nn.Module) -> dict[str, tuple[int, int]]:
    require_same(net.eval(), images(2))
    return dict(compact(net, images(2)).units)


def test_dead_and_constant_units_of_a_chain_go_and_the_constant_goes_into_the_next_bias() -> None:
    """Unit 0 lives; 1 leads nowhere; 2 is 0.5 always; 3 is cut off by ReLU."""
    first = linear([[1.0, -2.0], [1.0, 1.0], [0.0, 0.0], [0.0, 0.0]], [0.1, 0.2, 0.5, -1.0])
    last = linear([[1.0, 0.0, 4.0, 7.0], [-1.0, 0.0, 2.0, 7.0]], [0.25, 0.0])
    net = nn.Sequential(nn.Flatten(), first, nn.ReLU(), last).eval()
    small = compact(net, images(2, (1, 1, 2)))
    assert dict(small.units) == {"1": (1, 4), "3": (2, 2)}
    assert small.network.get_parameter("3.weight").tolist() == [[1.0], [-1.0]]
    assert small.network.get_parameter("3.bias").tolist() == [2.25, 1.0]
    assert not small.constant


def test_a_channel_that_is_dead_in_one_branch_of_a_sum_stays_for_the_other() -> None:
    net = Forward(
        lambda s, x: s.head(torch.relu(s.a(x) + s.b(x))),
        a=conv([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]], [0.1, 0.7, 0.3]),
        b=conv([[1.0, 1.0], [2.0, 1.0], [0.0, 0.0]], [0.0, 0.0, 0.1]), head=head(3),
    )  # fmt: skip
    assert units(net) == {"a": (2, 3), "b": (2, 3), "head.1": (3, 3)}


def test_dead_channels_of_a_concatenation_go_from_their_own_branch() -> None:
    last = nn.Linear(5 * 36, 3)
    with torch.no_grad():
        last.weight.view(3, 5, 36)[:, [0, 3, 4]] = 0.0
    net = Forward(
        lambda s, x: s.head(torch.cat([torch.relu(s.a(x)), s.b(x)], 1).flatten(1)),
        a=conv([[1.0, 0.0]] * 2, [0.1, 0.7]), b=conv([[1.0, 1.0]] * 3, [0.0, 0.1, 0.2]), head=last,
    )  # fmt: skip
    assert units(net) == {"a": (1, 2), "b": (1, 3), "head": (3, 3)}


@pytest.mark.parametrize("padding, left", [(0, 1), (1, 2)])
def test_constant_channels_before_padding_become_one_and_without_padding_a_bias(padding: int, left: int) -> None:
    """Channels 1 and 2 are constant; where zeros are padded, their contribution shows a border."""
    second = conv([[1.0, 2.0, -3.0], [0.5, 1.0, 1.0]], [0.1, 0.2], padding=padding)
    net = nn.Sequential(
        conv([[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]], [0.1, 0.7, 0.3]), nn.ReLU(), second, nn.ReLU(), head(2, 36 if padding else 16)
    )
    assert units(net) == {"0": (left, 3), "2": (2, 2), "4.1": (3, 3)}


def test_the_border_of_a_constant_is_what_a_bias_alone_would_get_wrong() -> None:
    """The centre of the map and its corner differ, so folding the constant into the bias is another function."""
    net = nn.Sequential(conv([[1.0, 1.0], [0.0, 0.0]], [0.1, 0.7]), nn.ReLU(), conv([[0.0, 2.0]], [0.0])).eval()
    out = net(images(1)).detach()[0, 0]
    assert (float(out[0, 0]), float(out[3, 3])) == pytest.approx((1.4, 2.8))
    small = compact(nn.Sequential(net, nn.Flatten()), images(2)).network
    torch.testing.assert_close(small(images(2)), net(images(2)).flatten(1))


def test_a_constant_with_borders_of_its_own_is_carried_along() -> None:
    """Two padded convolutions behind a constant channel: its map is uneven, and so it stays as it is."""
    net = nn.Sequential(
        conv([[1.0, 1.0], [0.0, 0.0]], [0.1, 0.7]), nn.ReLU(), conv([[1.0, 0.0], [0.0, 1.0]], [0.1, 0.2]), nn.ReLU(),
        conv([[1.0, 2.0]], [0.1]), nn.ReLU(), head(1),
    )  # fmt: skip
    assert units(net) == {"0": (2, 2), "2": (2, 2), "4": (1, 1), "6.1": (3, 3)}


def test_a_batchnorm_of_scale_0_makes_its_channel_constant_and_what_feeds_it_dead() -> None:
    norm = nn.BatchNorm2d(2)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.0, 2.0]))
        norm.bias.copy_(torch.tensor([0.5, -0.1]))
        norm.running_mean.copy_(torch.tensor([0.3, 0.2]))  # type: ignore[union-attr]
    net = nn.Sequential(conv([[1.0, 1.0], [1.0, 0.5]], [0.0, 0.1]), norm, nn.ReLU(), head(2))
    assert units(net) == {"0": (1, 2), "3.1": (3, 3)}


def test_depthwise_channels_go_together_with_their_inputs_and_outputs() -> None:
    depth = nn.Conv2d(3, 6, 3, padding=1, groups=3)
    last = nn.Linear(6 * 36, 3)
    with torch.no_grad():
        last.weight.view(3, 6, 36)[:, 2:4] = 0.0
    net = nn.Sequential(conv([[1.0, 1.0]] * 3, [0.1, 0.2, 0.3]), depth, nn.ReLU(), nn.Flatten(), last)
    assert units(net) == {"0": (2, 3), "1": (4, 6), "4": (3, 3)}
    assert compact(net, images(2)).network.get_submodule("1").groups == 2


def test_a_collapsed_network_is_called_constant_and_keeps_one_unit_per_layer() -> None:
    net = build_model("cnn_large@1/16", (1, 12, 12), 10).eval()
    with torch.no_grad():
        net.get_submodule("conv3").weight.zero_()
    x = images(3, (1, 12, 12))
    small = compact(net, x)
    assert small.constant
    assert [kept for kept, _ in small.units.values()] == [1] * (len(small.units) - 1) + [10]
    torch.testing.assert_close(small.network(x), net(x))
    assert not compact(build_model("cnn_large@1/16", (1, 12, 12), 10), x).constant


def test_a_layer_used_twice_is_cut_for_each_use() -> None:
    shared = linear([[1.0, 0.0], [0.0, 0.0]], [0.1, 0.4])
    net = Forward(lambda s, x: s.last(torch.relu(s.own(torch.relu(s.own(x.flatten(1)))))), own=shared, last=linear([[1.0, 2.0]]))
    small = compact(net.eval(), images(2, (1, 1, 2)))
    assert sorted(small.units.values()) == [(1, 1), (1, 2), (1, 2)]
    torch.testing.assert_close(small.network(images(4, (1, 1, 2))), net(images(4, (1, 1, 2))))


def test_the_original_network_is_left_as_it_is() -> None:
    net = masked("cnn_small", 0.1, seed=4)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    compact(net, images(2, (3, 16, 16)))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_verdicts_of_interval_bounds_are_those_of_the_original() -> None:
    net, x = masked("cnn_small", 0.1, seed=5), images(40, (3, 16, 16))
    y = net(x).argmax(1)
    for eps in (Fraction(1, 1000), Fraction(1, 100), Fraction(1, 20)):
        before, after = (IBP(eps=eps)(one, x, y) for one in (net, compact(net, x).network))
        assert torch.equal(before.radius, after.radius)
        torch.testing.assert_close(before.margin, after.margin, rtol=1e-4, atol=1e-5)


def test_the_example_of_the_page_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "compaction.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    exec(code, {})
    assert capsys.readouterr().out == "(5, 16) False\n"
    assert "# (5, 16) False" in code


# ---- in the linear relaxations -----------------------------------------------------------------------------------------


def test_crown_of_a_pruned_network_bounds_the_compacted_one_and_stays_below_every_reached_margin() -> None:
    net, x, eps = masked("cnn_small", 0.1, seed=5), images(6, (3, 16, 16)), Fraction(1, 100)
    y = net(x).argmax(1)
    proof = Crown(eps=eps)(net, x, y)
    assert proof.notes[0] == "removed 1 dead or constant units of 19"
    assert (proof.margin <= lowest_reached(net, x, y, "linf", eps) + 1e-5).all()
    bare = Relaxation(net, x, "linf", eps).margins(x, y, "CROWN")
    torch.testing.assert_close(proof.details["raw_margin"], bare.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size, status", [(1.0, "proved"), (1e12, "open")])
def test_constants_that_cancel_count_in_the_allowance_though_compaction_removes_them(size: float, status: str) -> None:
    """In the original two numbers of this size are subtracted for every logit, so no margin of 1 may be believed."""
    first = linear([[0.01, 0.01], [0.0, 0.0], [0.0, 0.0]], [0.5, size, size])
    net = nn.Sequential(nn.Flatten(), first, nn.ReLU(), linear([[4.0, 1.0, -1.0], [0.0, 1.0, -1.0]], [0.0, 0.0])).eval()
    x, y = images(1, (1, 1, 2)), torch.tensor([0])
    assert dict(compact(net, x).units) == {"1": (1, 3), "3": (2, 2)}
    assert Crown(eps=Fraction(1, 100))(net, x, y).status == (status,)


def test_a_dense_network_and_one_that_cannot_be_compacted_are_left_as_they_are() -> None:
    dense = build_model("cnn_small@1/16", (1, 8, 8), 10).eval()
    assert compacted(dense, images(2, (1, 8, 8))) == (dense, ())
    strange = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), head(2)).eval()
    with torch.no_grad():
        strange.get_submodule("0").weight[0] = 0.0
    assert compacted(strange, images(2)) == (strange, ())


# ---- refusals --------------------------------------------------------------------------------------------------------


def _parametrized() -> nn.Module:
    layer = nn.Linear(72, 2)
    torch.nn.utils.parametrizations.weight_norm(layer)
    return nn.Sequential(nn.Flatten(), layer)


REFUSALS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "parametrized": (_parametrized, "bake its masks"),
    "infinite": (lambda: nn.Sequential(nn.Flatten(), linear([[float("inf")] * 72])), "not finite"),
    "too large": (lambda: nn.Sequential(nn.Flatten(), linear([[0.0] * 72], [1e38]), linear([[1e38]])), "cannot hold"),
    "sequence": (lambda: nn.Sequential(nn.Flatten(2), nn.Linear(36, 2)), "not 3 axes"),
    "linear on rows": (lambda: nn.Sequential(nn.Linear(6, 2)), "not 4 axes"),
    "circular": (lambda: nn.Sequential(nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), head(2)), "padding_mode"),
    "in place": (lambda: Forward(lambda s, x: s.one(F.relu(x, inplace=True) + x), one=head(2)), "works in place"),
    "broadcast": (lambda: Forward(lambda s, x: s.one(x) + x, one=nn.Conv2d(2, 1, 1)), "no rule"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_compaction_cannot_do_is_refused_in_a_sentence(name: str) -> None:
    make, sentence = REFUSALS[name]
    with pytest.raises(UnsupportedNetworkError, match=sentence):
        compact(make().eval(), images(2))


def test_normalisation_channels_follow_their_stream() -> None:
    first, norm = conv([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]], [0.1, 0.2, 0.3]), Normalize([0.1, 0.2, 0.3], [1.0, 2.0, 3.0])
    net = nn.Sequential(first, norm, head(3))
    with torch.no_grad():
        net.get_submodule("2.1").weight.view(3, 3, 36)[:, 1] = 0.0
    assert units(net) == {"0": (2, 3), "2.1": (3, 3)}
