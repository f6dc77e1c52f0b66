"""Symbolic intervals: by hand, against interval and exact bounds, samples and attacks; the published quirk is unsound."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bench.models import PLAIN, build_model
from bench.sparsity import Mask, attach
from tests.verifiers.small_nets import (
    RULE_NETS,
    Forward,
    exact,
    images,
    labels,
    linear,
    lowest_reached,
    margins_at,
    points_of_ball,
    randomised,
)
from verifiers import IBP, SymbolicInterval, UnsupportedNetworkError, memory
from verifiers.ball import Interval, outward_box
from verifiers.bounds import ibp_margins, smallest_margin
from verifiers.graph import operation, trace
from verifiers.normalise import Normalize
from verifiers.symbolic import SYMBOLIC_RULES, symbolic_bytes, symbolic_margins

EPS = Fraction(1, 50)


def toy() -> nn.Module:
    return nn.Sequential(nn.Flatten(), linear([[1, 1], [1, -1]]), nn.ReLU())


TOY = {
    "clipped": ([0.3, 0.0], [0.9, 0.5], -0.109091),
    "not clipped": ([0.3, -0.1], [0.9, 0.5], -0.3),
    "clipped to the image's own range": ([0.3, 0.2], [0.6, 0.5], 0.3),
}


@pytest.mark.parametrize("name", TOY)
def test_toy_table_of_symbolic_intervals(name: str) -> None:
    low, high, want = TOY[name]
    box = Interval(torch.tensor([low], dtype=torch.float64), torch.tensor([high], dtype=torch.float64))
    got = symbolic_margins(toy().double(), box, torch.tensor([0]))
    assert got.tolist() == [[0.0, pytest.approx(want, abs=1e-6)]]


def test_the_verifier_clips_the_toy_to_pixels_and_the_quirk_certifies_what_an_input_breaks() -> None:
    """x = (0.6, 0.2), eps 0.3: (0.9, 0) is a legal image of margin 0, yet the quirk's margin is +0.3."""
    x, y, eps = torch.tensor([0.6, 0.2]).view(1, 1, 1, 2), torch.tensor([0]), Fraction(3, 10)
    net = toy()
    honest, quirk = SymbolicInterval(eps=eps)(net, x, y), SymbolicInterval(eps=eps, clip="tensor")(net, x, y)
    assert honest.margin.item() == pytest.approx(-0.109091, abs=1e-5)
    assert (honest.status, honest.notes) == (("open",), ())
    assert quirk.margin.item() == pytest.approx(0.3, abs=1e-5)
    assert quirk.status == ("proved",)
    legal = torch.tensor([0.5, 0.0]).view(1, 1, 1, 2)
    assert (legal - x).abs().max() <= 0.3
    assert margins_at(net, legal, y).item() == pytest.approx(0.0, abs=1e-7)
    assert "unsound quirk" in quirk.notes[0]
    assert SymbolicInterval(eps=eps).deterministic
    assert not SymbolicInterval(eps=eps, clip="tensor").deterministic


def test_the_quirk_is_refuted_by_a_legal_image_that_is_misclassified() -> None:
    """The toy with the margin lowered by 0.05: the quirk still certifies, and a legal image is misclassified."""
    net = nn.Sequential(nn.Flatten(), linear([[1, 1], [1, -1]]), nn.ReLU(), linear([[1, 0], [0, 1]], [-0.05, 0.0]))
    x, y = torch.tensor([0.6, 0.2]).view(1, 1, 1, 2), torch.tensor([0])
    assert SymbolicInterval(eps=Fraction(3, 10), clip="tensor")(net, x, y).status == ("proved",)
    assert SymbolicInterval(eps=Fraction(3, 10))(net, x, y).status == ("open",)
    assert margins_at(net, torch.tensor([0.5, 0.0]).view(1, 1, 1, 2), y).item() == pytest.approx(-0.05, abs=1e-6)


def test_a_dead_neuron_contributes_nothing() -> None:
    """By hand: h2 = -1 - x <= 0 everywhere, so the margin relu(h1) - 100 relu(h2) is h1 >= 0.1."""
    net = nn.Sequential(nn.Flatten(), linear([[1.0], [-1.0]], [0.0, -1.0]), nn.ReLU(), linear([[1, 0], [0, 100]])).double()
    x = torch.full((1, 1, 1, 1), 0.3, dtype=torch.float64)
    box = outward_box(x, Fraction(1, 5))
    assert symbolic_margins(net, box, torch.tensor([0]))[0, 1].item() == pytest.approx(0.1, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_purely_linear_networks_are_bounded_exactly(seed: int) -> None:
    """Against the network's own affine map, read off by differentiation: centre minus sum |gradient| radius."""
    layers = (Normalize([0.4, 0.6], [0.5, 0.2]), nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.AvgPool2d(3, 2, 1))
    net = exact(randomised(nn.Sequential(*layers, nn.Flatten(), nn.Linear(27, 4)), seed=seed))
    x, y = images(2, dtype=torch.float64, seed=seed), torch.tensor([1, 3])
    box = outward_box(x, Fraction(1, 10))
    torch.testing.assert_close(symbolic_margins(net, box, y), affine_minimum(net, box, y), atol=1e-9, rtol=1e-9)


def affine_minimum(net: nn.Module, box: Interval, y: Tensor) -> Tensor:
    """Exact minima [N, C] of f_y - f_j over the box, for a network that is affine on it."""
    centre, rows = (box.lower + box.upper) / 2, []
    for i in range(len(y)):
        slopes = torch.autograd.functional.jacobian(lambda z: net(z[None])[0], centre[i])
        falls = ((slopes[y[i]] - slopes).abs() * (box.upper - box.lower)[i] / 2).flatten(1).sum(1)
        logits = net(centre[i : i + 1])[0]
        rows.append(logits[y[i]] - logits - falls)
    return torch.stack(rows).detach()


def test_networks_whose_relus_are_all_stable_are_bounded_exactly() -> None:
    """Some always on, some always off."""
    torch.manual_seed(0)
    first = linear(torch.randn(12, 72).tolist(), [60.0, -60.0] * 6)
    net = exact(nn.Sequential(nn.Flatten(), first, nn.ReLU(), linear(torch.randn(3, 12).tolist())))
    x, y = images(2, dtype=torch.float64), torch.tensor([0, 2])
    box = outward_box(x, Fraction(1, 20))
    torch.testing.assert_close(symbolic_margins(net, box, y), affine_minimum(net, box, y), atol=1e-9, rtol=1e-9)


def test_one_unstable_relu_by_brute_force_of_its_parallelogram() -> None:
    """The form of relu(z), z in [-1, 3], is 0.75 z + 0.375 +- 0.375: it touches the graph at -1, 0 and 3."""
    net = nn.Sequential(nn.Flatten(), linear([[4.0]], [-1.0]), nn.ReLU(), linear([[1.0], [0.0]])).double()
    box = Interval(torch.zeros(1, 1, 1, 1, dtype=torch.float64), torch.ones(1, 1, 1, 1, dtype=torch.float64))
    assert symbolic_margins(net, box, torch.tensor([0]))[0, 1].item() == pytest.approx(-0.75, abs=1e-12)
    assert symbolic_margins(net, box, torch.tensor([1]))[0, 0].item() == pytest.approx(-3.0, abs=1e-12)


def operations(name: str) -> set[Any]:
    net = RULE_NETS[name]()
    modules = dict(net.named_modules())
    return {operation(node, modules) for node in trace(net).nodes if node.op not in ("placeholder", "output")}


PADDED = {"MaxPool2d overlapping", "F.max_pool2d padded"}
SUPPORTED = sorted(name for name in RULE_NETS if name not in PADDED and operations(name) <= set(SYMBOLIC_RULES))


@pytest.mark.parametrize("name", SUPPORTED)
def test_no_point_of_the_box_contradicts_the_symbolic_margins(name: str) -> None:
    for seed in range(3):
        net, x = randomised(RULE_NETS[name](), seed=seed), images(3, seed=seed)
        y, wide = labels(net, x), exact(net)
        margins = symbolic_margins(wide, outward_box(x.double(), Fraction(1, 20)), y)
        logits = wide(points_of_ball(x, "linf", Fraction(1, 20), 40).flatten(0, 1)).unflatten(0, (40, 3))
        differences = logits.gather(2, y.view(1, -1, 1).expand(40, -1, 1)) - logits
        assert (margins <= differences.amin(0) + 1e-9).all()
        assert (margins.gather(1, y[:, None]) == 0).all()
        reached = lowest_reached(net, x, y, "linf", Fraction(1, 20))
        assert (smallest_margin(margins, y) <= reached + 1e-6).all()
        proof = SymbolicInterval(eps=Fraction(1, 20))(net, x, y)
        assert (proof.margin <= reached + 1e-3 * (1 + reached.abs())).all()
        assert (reached[torch.tensor([one == "proved" for one in proof.status])] > 0).all()


def test_the_networks_above_use_every_symbolic_rule() -> None:
    assert {one for name in SUPPORTED for one in operations(name)} == set(SYMBOLIC_RULES)


@pytest.mark.parametrize("name", ["Tanh", "ReLU6", "MaxPool2d overlapping", "F.max_pool2d padded"])
def test_operations_without_a_symbolic_rule_are_refused_by_name(name: str) -> None:
    word = "MaxPool2d with padding" if "ax" in name else name
    net, x = randomised(RULE_NETS[name]()), images(2)
    with pytest.raises(UnsupportedNetworkError, match=word):
        SymbolicInterval(eps=EPS)(net, x, labels(net, x))


@pytest.mark.parametrize("name", [name for name in PLAIN if name != "lenet"])
def test_models_of_the_suite_are_bounded_soundly_and_more_tightly_than_by_intervals_somewhere(name: str) -> None:
    side = 4 if name == "cnn_large" else 8
    net = randomised(build_model(name, (1, side, side), 5, (0.4,), (0.5,)), gain=1.2, kept=0.5)
    x = images(4, (1, side, side))
    y = labels(net, x)
    proof, intervals = SymbolicInterval(eps=EPS)(net, x, y), IBP(eps=EPS)(net, x, y)
    assert (proof.margin <= lowest_reached(net, x, y, "linf", EPS) + 1e-3).all()
    assert (proof.margin > intervals.margin + 1e-3).any()
    tiny = SymbolicInterval(eps=Fraction(1, 10_000))(net, x, y)
    assert "proved" in tiny.status


def pooled(layer: nn.Module, width: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), layer, nn.Flatten(), nn.Linear(width, 5))


MAXIMA = [(nn.MaxPool2d(2), 27), (nn.MaxPool2d(3, 2), 12), (nn.MaxPool2d(2, 1, dilation=2), 48), (nn.MaxPool2d((1, 2)), 54)]


@pytest.mark.parametrize("layer, width", MAXIMA)
def test_maxima_are_bounded_soundly_and_exactly_where_no_other_pixel_can_win(layer: nn.Module, width: int) -> None:
    net, x = exact(randomised(pooled(layer, width))), images(3, dtype=torch.float64)
    y = labels(net, x)
    for eps in (Fraction(1, 10), Fraction(1, 1000)):
        margins = symbolic_margins(net, outward_box(x, eps), y)
        logits = net(points_of_ball(x, "linf", eps, 60).flatten(0, 1)).unflatten(0, (60, 3))
        reached = (logits.gather(2, y.view(1, -1, 1).expand(60, -1, 1)) - logits).amin(0)
        assert (margins <= reached + 1e-12).all()
    point = Interval(x, x)
    torch.testing.assert_close(symbolic_margins(net, point, y), ibp_margins(net, point, y), atol=1e-9, rtol=1e-9)


def test_the_maximum_of_two_by_hand() -> None:
    """max(x, 0.5) on [0, 1] as a form: 0.5 + 0.5 (x - 0.5) + 0.125 +- 0.125, so it lies in [0.25, 1]."""
    net = nn.Sequential(nn.MaxPool2d((1, 2)), nn.Flatten(), linear([[-1.0], [0.0]], [1.0, 0.0])).double()
    box = Interval(torch.tensor([[[[0.0, 0.5]]]]).double(), torch.tensor([[[[1.0, 0.5]]]]).double())
    assert symbolic_margins(net, box, torch.tensor([0]))[0, 1].item() == pytest.approx(0.0, abs=1e-12)
    assert symbolic_margins(net, box, torch.tensor([1]))[0, 0].item() == pytest.approx(-0.75, abs=1e-12)


def test_what_two_branches_share_cancels() -> None:
    """relu(z) - relu(z) as a residual sum is 0, since both branches hold the same symbols; relu(z) + relu(-z) is not |z|."""
    net = Forward(
        lambda s, x: (lambda z: s.head(s.minus(z) + s.plus(z)))(torch.relu(s.a(torch.flatten(x, 1)))),
        a=linear([[4.0]], [-1.0]), minus=linear([[-1.0]]), plus=linear([[1.0]]), head=linear([[1.0], [0.0]]),
    ).double()
    box = Interval(torch.zeros(1, 1, 1, 1, dtype=torch.float64), torch.ones(1, 1, 1, 1, dtype=torch.float64))
    for y in (0, 1):
        assert symbolic_margins(net, box, torch.tensor([y]))[0, 1 - y].item() == pytest.approx(0.0, abs=1e-12)


def test_lenet_is_bounded_and_gradients_pass_its_maxima() -> None:
    net, x = randomised(build_model("lenet", (1, 16, 16), 5), gain=1.2, kept=0.3), images(1, (1, 16, 16))
    y = labels(net, x)
    proof = SymbolicInterval(eps=EPS)(net, x, y)
    assert proof.margin.item() <= lowest_reached(net, x, y, "linf", EPS).item() + 1e-3
    assert proof.margin.item() > IBP(eps=EPS)(net, x, y).margin.item()
    smallest_margin(symbolic_margins(net, outward_box(x, Fraction(1, 1000)), y), y).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in net.parameters())


QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}


@st.composite
def networks(draw: st.DrawFn) -> nn.Module:
    layers: list[nn.Module] = [Normalize([0.4, 0.6], [0.5, 0.25])] if draw(st.booleans()) else []
    channels = draw(st.integers(1, 3))
    layers += [nn.Conv2d(2, channels, 3, stride=draw(st.integers(1, 2)), padding=draw(st.integers(0, 1)))]
    middle = {"none": [], "norm": [nn.BatchNorm2d(channels)], "average": [nn.AvgPool2d(2, stride=1)]}
    layers += middle[draw(st.sampled_from(sorted(middle)))] + [nn.ReLU(), nn.Flatten()]
    width = nn.Sequential(*layers).eval()(torch.zeros(1, 2, 6, 6)).shape[1]
    layers += [nn.Linear(width, 6), nn.ReLU(), nn.Linear(6, 3)]
    gain = draw(st.sampled_from([0.5, 2.0, 30.0]))
    return randomised(nn.Sequential(*layers), seed=draw(st.integers(0, 1000)), kept=draw(st.sampled_from([0.2, 1.0])), gain=gain)


def check(net: nn.Module, eps: Fraction, seed: int) -> None:
    x = images(3, seed=seed)
    x[0] = x[0].round()
    y = labels(net, x)
    reached = lowest_reached(net, x, y, "linf", eps)
    proof = SymbolicInterval(eps=eps)(net, x, y)
    scale = 1 + reached.abs() + exact(net)(x.double()).abs().amax(1)
    assert (proof.margin <= reached + 1e-3 * scale).all()
    certified = torch.tensor([status == "proved" for status in proof.status])
    assert (reached[certified] > 0).all()


EPSILONS = st.sampled_from([Fraction(0), Fraction(1, 10**6), Fraction(1, 255), Fraction(8, 255), Fraction(3, 10), Fraction(2)])


@settings(max_examples=20, **QUIET)
@given(net=networks(), eps=EPSILONS, seed=st.integers(0, 100))
def test_no_point_contradicts_symbolic_intervals(net: nn.Module, eps: Fraction, seed: int) -> None:
    check(net, eps, seed)


@pytest.mark.slow
@settings(max_examples=1000, **QUIET)
@given(net=networks(), eps=EPSILONS, seed=st.integers(0, 10**6))
def test_no_point_contradicts_symbolic_intervals_of_many_networks(net: nn.Module, eps: Fraction, seed: int) -> None:
    check(net, eps, seed)


# -- training ----------------------------------------------------------------------------------------------------------


def test_gradients_agree_with_differences_of_the_margins() -> None:
    """Through centres, slopes and new symbols, for weights in front of and behind unstable ReLUs."""
    net = exact(randomised(nn.Sequential(nn.Flatten(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))))
    box, y = outward_box(images(2, (2, 2, 2), dtype=torch.float64), Fraction(1, 10)), torch.tensor([0, 2])
    symbolic_margins(net, box, y).square().sum().backward()
    for layer in (net[1], net[3], net[5]):
        step = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        assert layer.weight.grad is not None
        along = float((layer.weight.grad * step).sum())
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                layer.weight += sign * 1e-6 * step
                values.append(float(symbolic_margins(net, box, y).square().sum()))
                layer.weight -= sign * 1e-6 * step
        assert along == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-4, abs=1e-5)
        assert along != 0


def test_attached_masks_are_seen_and_receive_gradients() -> None:
    net = randomised(nn.Sequential(nn.Flatten(), nn.Linear(72, 6), nn.ReLU(), nn.Linear(6, 3)))
    mask = (torch.rand(6, 72, generator=torch.Generator().manual_seed(0)) < 0.3).float()
    baked = exact(net)
    with torch.no_grad():
        baked[1].weight *= mask
    attach(net[1], Mask(mask))
    box, y = outward_box(images(2, dtype=torch.float64), EPS), torch.tensor([0, 1])
    margins = symbolic_margins(net.double(), box, y)
    torch.testing.assert_close(margins, symbolic_margins(baked, box, y), atol=1e-12, rtol=1e-12)
    margins.sum().backward()
    gradients = [parameter.grad for parameter in net.parameters() if parameter.requires_grad]
    assert all(grad is not None and grad.abs().sum() > 0 for grad in gradients)


# -- batches, rounding, refusals ---------------------------------------------------------------------------------------


def test_a_sample_has_the_margins_that_it_has_alone() -> None:
    """In a batch, samples have different numbers of unstable ReLUs."""
    net, x = exact(randomised(RULE_NETS["Conv2d"](), seed=3)), images(5, dtype=torch.float64)
    y, box = labels(net, x), outward_box(x, Fraction(1, 10))
    single = [symbolic_margins(net, Interval(box.lower[i : i + 1], box.upper[i : i + 1]), y[i : i + 1]) for i in range(5)]
    torch.testing.assert_close(symbolic_margins(net, box, y), torch.cat(single), atol=1e-12, rtol=1e-12)


def test_batches_shrink_with_the_memory_limit_and_too_wide_networks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = randomised(RULE_NETS["ReLU"]()), images(5)
    y = labels(net, x)
    whole = SymbolicInterval(eps=EPS)(net, x, y)
    needed = symbolic_bytes(net, outward_box(x, EPS))
    assert needed >= 72 * 144 * 4  # 72 pixels' coefficients of 144 neurons in float32
    monkeypatch.setattr(memory, "LIMIT", int(2.5 * needed))
    torch.testing.assert_close(SymbolicInterval(eps=EPS)(net, x, y).margin, whole.margin, atol=1e-5, rtol=1e-5)
    monkeypatch.setattr(memory, "LIMIT", int(0.5 * needed))
    with pytest.raises(UnsupportedNetworkError, match="more than the limit"):
        SymbolicInterval(eps=EPS)(net, x, y)


def test_a_margin_that_only_float32_sees_is_not_certified() -> None:
    """f = (relu(x + 2^24) - 2^24, 0.3): float32 loses x = 0.5, so class 1 seems to win; in exact arithmetic it loses by 0.2."""
    net = nn.Sequential(nn.Flatten(), linear([[1.0]], [2.0**24]), nn.ReLU(), linear([[1.0], [0.0]], [-(2.0**24), 0.3]))
    x, y, eps = torch.full((1, 1, 1, 1), 0.5), torch.tensor([1]), Fraction(1, 10)
    assert net(x).argmax(1).item() == 1
    assert symbolic_margins(net, outward_box(x, eps), y)[0, 0] > 0.1
    assert margins_at(net, x, y).item() == pytest.approx(-0.2, abs=1e-6)
    proof = SymbolicInterval(eps=eps)(net, x, y)
    assert (proof.status, proof.rechecked) == (("open",), 1)
    assert proof.margin.item() == pytest.approx(-0.3, abs=1e-6)


def test_errors_that_later_layers_magnify_are_not_certified() -> None:
    """A first layer loses x to 2^20, a second one multiplies what is left by 2^20: the largest sum alone would not show it."""
    big = 2.0**24
    layers = (linear([[1.0]], [big]), nn.ReLU(), linear([[1.0]], [-big]), nn.ReLU(), linear([[1e6], [0.0]], [0.0, 3e5]))
    net = nn.Sequential(nn.Flatten(), *layers)
    x, y, eps = torch.full((1, 1, 1, 1), 0.5), torch.tensor([1]), Fraction(1, 10)
    assert symbolic_margins(net, outward_box(x, eps), y)[0, 0] > 1e5
    assert margins_at(net, x, y).item() < -1e5
    assert SymbolicInterval(eps=eps)(net, x, y).status == ("open",)


def test_ibp_and_symbolic_intervals_agree_at_radius_zero() -> None:
    net, x = exact(randomised(RULE_NETS["BatchNorm2d"]())), images(3, dtype=torch.float64)
    box, y = Interval(x, x), labels(net, x)
    torch.testing.assert_close(symbolic_margins(net, box, y), ibp_margins(net, box, y), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("fields", [{"norm": "l2"}, {"clip": "batch"}])
def test_other_norms_and_clips_are_refused(fields: dict[str, str]) -> None:
    with pytest.raises(ValueError):
        SymbolicInterval(**fields)  # type: ignore[arg-type]


def test_an_empty_batch_has_an_empty_answer() -> None:
    proof = SymbolicInterval(eps=EPS)(toy(), torch.zeros(0, 1, 1, 2), torch.zeros(0, dtype=torch.int64))
    assert (proof.status, proof.margin.shape) == ((), (0,))


def test_views_are_bounded_and_named_in_the_notes() -> None:
    net = randomised(Forward(lambda s, x: s.head(x.view(x.size(0), -1)), head=nn.Linear(72, 5)))
    x = images(2)
    proof = SymbolicInterval(eps=EPS)(net, x, labels(net, x))
    assert proof.notes == ("view as Flatten",)
