"""Interval bounds: by hand, by samples for every rule, by brute force, and against what affine networks do exactly."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

from bench.models import PLAIN, build_model
from bench.sparsity import TopKScores, attach, effective_state, is_attached, kept_of, prunable
from tests.verifiers.small_nets import (
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
from verifiers import IBP
from verifiers.ball import Ellipsoid, Interval, region
from verifiers.bounds import ibp_logits, ibp_margins, smallest_margin
from verifiers.normalise import Normalize

NORMS = [("linf", Fraction(1, 10)), ("l2", Fraction(1, 2))]
SIDES = {"mlp": 8, "cnn_small": 8, "cnn_large": 8, "lenet": 16}


def box(lower: list[float], upper: list[float]) -> Interval:
    return Interval(torch.tensor([lower], dtype=torch.float64), torch.tensor([upper], dtype=torch.float64))


def toy() -> nn.Module:
    """h = (x1 + x2, x1 - x2), logits (relu h1, relu h2)."""
    return nn.Sequential(linear([[1, 1], [1, -1]]), nn.ReLU()).double()


TOY = {
    "clipped": (box([0.3, 0.0], [0.9, 0.5]), [0.3, -0.2], [1.4, 0.9], -0.6, 0.0),
    "not clipped": (box([0.3, -0.1], [0.9, 0.5]), [0.2, -0.2], [1.4, 1.0], -0.8, -0.2),
    "clipped to the image's own range": (box([0.3, 0.2], [0.6, 0.5]), [0.5, -0.2], [1.1, 0.4], 0.1, 0.4),
}


@pytest.mark.parametrize("name", TOY)
def test_toy_table_of_ibp_and_brute_force(name: str) -> None:
    ball, lower, upper, ibp, truth = TOY[name]
    hidden = ibp_logits(toy()[:1], ball)
    torch.testing.assert_close(hidden.lower, torch.tensor([lower], dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(hidden.upper, torch.tensor([upper], dtype=torch.float64), atol=1e-6, rtol=0)
    assert ibp_margins(toy(), ball, torch.tensor([0]))[0].tolist() == pytest.approx([0, ibp], abs=1e-6)
    axes = [torch.linspace(float(low), float(high), 61, dtype=torch.float64) for low, high in zip(ball.lower[0], ball.upper[0])]
    grid = torch.cartesian_prod(*axes)
    assert margins_at(toy(), grid, torch.zeros(len(grid), dtype=torch.int64)).min().item() == pytest.approx(truth, abs=1e-6)


def test_the_region_of_the_toy_image_is_the_clipped_box() -> None:
    x, expected = torch.tensor([[0.6, 0.2]], dtype=torch.float64), TOY["clipped"][0]
    torch.testing.assert_close(region(x, "linf", Fraction(3, 10)), expected, atol=1e-12, rtol=0)
    margins = ibp_margins(toy(), region(x, "linf", Fraction(3, 10)), torch.tensor([0]))
    assert margins[0, 1].item() == pytest.approx(-0.6, abs=1e-6)


def test_linear_and_relu_by_hand() -> None:
    """Weights of one: 1 + 2 .. 2 + 4, then minus 4 through the ReLU."""
    ball = box([1, 2], [2, 4])
    bounds = ibp_logits(nn.Sequential(linear([[1, 1], [1, -1], [1, 1]], [0, 0, -4]), nn.ReLU()).double(), ball)
    assert bounds.lower.tolist() == [[3, 0, 0]]
    assert bounds.upper.tolist() == [[6, 0, 2]]


def test_convolution_pooling_and_sum_by_hand() -> None:
    """A 2x2 convolution of ones on 3x3 pixels of [1, 2] gives [4, 8]; padding adds zeros; pooling keeps or averages."""
    conv = nn.Conv2d(1, 1, 2, bias=False).double()
    padded = nn.Conv2d(1, 1, 2, padding=1, bias=False).double()
    for layer in (conv, padded):
        nn.init.ones_(layer.weight)
    ball = Interval(torch.ones(1, 1, 3, 3, dtype=torch.float64), torch.full((1, 1, 3, 3), 2.0, dtype=torch.float64))
    assert {name: (b.lower.unique().tolist(), b.upper.unique().tolist()) for name, b in {
        "conv": ibp_logits(nn.Sequential(conv), ball),
        "padded": ibp_logits(nn.Sequential(padded), ball),
        "max": ibp_logits(nn.Sequential(padded, nn.MaxPool2d(4)), ball),
        "avg": ibp_logits(nn.Sequential(padded, nn.AvgPool2d(4)), ball),
        "sum": ibp_logits(Forward(lambda s, x: s.conv(x) + s.conv(x), conv=conv), ball),
    }.items()} == {
        "conv": ([4], [8]),
        "padded": ([1, 2, 4], [2, 4, 8]),
        "max": ([4], [8]),
        "avg": ([(4 * 1 + 8 * 2 + 4 * 4) / 16], [(4 * 2 + 8 * 4 + 4 * 8) / 16]),
        "sum": ([8], [16]),
    }


def test_batchnorm_and_normalisation_by_hand() -> None:
    """(x - 1) / 2 * (-3) + 5 on [1, 3] is [2, 5]; (x - 0.5) / 0.25 on [0, 1] is [-2, 2]."""
    batchnorm = nn.BatchNorm2d(1, eps=0).double().eval()
    for tensor, value in ((batchnorm.running_mean, 1), (batchnorm.running_var, 4), (batchnorm.weight, -3), (batchnorm.bias, 5)):
        nn.init.constant_(tensor, value)
    wide = Interval(torch.full((1, 1, 1, 1), 1.0, dtype=torch.float64), torch.full((1, 1, 1, 1), 3.0, dtype=torch.float64))
    unit = Interval(torch.zeros(1, 1, 1, 1, dtype=torch.float64), torch.ones(1, 1, 1, 1, dtype=torch.float64))
    assert [part.item() for part in ibp_logits(nn.Sequential(batchnorm), wide)] == [2, 5]
    assert [part.item() for part in ibp_logits(nn.Sequential(Normalize([0.5], [0.25]).double()), unit)] == [-2, 2]


def affine(norm_first: bool) -> nn.Module:
    first = [Normalize([0.4, 0.6], [0.5, 0.25])] if norm_first else []
    return randomised(nn.Sequential(*first, nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.Flatten(), nn.Linear(27, 4)), seed=1)


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("layers", [3, 2])
def test_l2_bounds_of_one_affine_layer_are_its_dual_norm_where_the_box_is_inactive(normalised: bool, layers: int) -> None:
    """eps * ||w||_2 around the centre, for a convolution and, flattened, for a merged linear head."""
    first = [Normalize([0.4, 0.6], [0.5, 0.25])] if normalised else []
    last = [nn.Conv2d(2, 3, 3, padding=1), nn.Flatten()] if layers == 3 else [nn.Flatten(), nn.Linear(72, 4)]
    net = exact(randomised(nn.Sequential(*first, *last), seed=2))
    x, eps = 0.4 + 0.2 * images(3, dtype=torch.float64), Fraction(1, 5)
    jacobian = torch.func.jacrev(lambda pixels: net(pixels[None])[0])(x[0]).detach().flatten(1)
    reach = float(eps) * jacobian.norm(dim=1)
    bounds = ibp_logits(net, region(x, "l2", eps))
    torch.testing.assert_close(bounds.upper.flatten(1), net(x).flatten(1) + reach, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(bounds.lower.flatten(1), net(x).flatten(1) - reach, atol=1e-9, rtol=1e-9)
    if layers == 2:
        y = labels(net, x)
        rows = jacobian[y].unsqueeze(1) - jacobian
        clean = net(x).gather(1, y[:, None]) - net(x)
        torch.testing.assert_close(ibp_margins(net, region(x, "l2", eps), y), clean - float(eps) * rows.norm(dim=2))


def test_l2_bounds_of_one_affine_layer_hold_for_a_ball_cut_by_the_box_and_use_the_box() -> None:
    """Brute force: many points of the cut ball stay inside, and where the box is active the bound beats eps * ||w||_2."""
    net = exact(randomised(nn.Sequential(nn.Flatten(), nn.Linear(3, 4)), seed=3))
    x, eps = torch.tensor([[[[0.02, 0.98, 0.5]]]], dtype=torch.float64), Fraction(6, 5)
    bounds = ibp_logits(net, region(x, "l2", eps))
    grid = torch.cartesian_prod(*[torch.linspace(0, 1, 60, dtype=torch.float64)] * 3)
    inside = grid[(grid - x.flatten()).norm(dim=1) <= float(eps)]
    logits = net(inside.view(-1, 1, 1, 3))
    assert (logits >= bounds.lower).all()
    assert (logits <= bounds.upper).all()
    assert (bounds.upper - logits.amax(0) < 0.35 * float(eps) * net[1].weight.norm(dim=1)).all()
    assert (bounds.upper < net(x) + float(eps) * net[1].weight.norm(dim=1)).all()


@pytest.mark.parametrize("normalised", [False, True])
def test_linf_bounds_of_an_affine_layer_are_reached_at_a_corner(normalised: bool) -> None:
    net = exact(affine(normalised))[:-2]
    x, eps = images(4, dtype=torch.float64), Fraction(1, 10)
    ball, bounds = region(x, "linf", eps), ibp_logits(net, region(x, "linf", eps))
    jacobian = torch.func.jacrev(lambda pixels: net(pixels[None])[0])(x[0]).detach().flatten(0, 2)
    for row, unit in enumerate(jacobian):
        corner = torch.where(unit > 0, ball.lower, ball.upper)
        torch.testing.assert_close(net(corner).flatten(1)[:, row], bounds.lower.flatten(1)[:, row])


@pytest.mark.parametrize("norm, eps", NORMS)
@pytest.mark.parametrize("name", PLAIN)
def test_merging_the_last_layer_is_never_looser_than_subtracting_logits(name: str, norm: str, eps: Fraction) -> None:
    net = randomised(build_model(name, (1, SIDES[name], SIDES[name]), 5, (0.3,), (0.4,)), kept=0.3)
    x = images(3, (1, SIDES[name], SIDES[name]))
    y, ball = labels(net, x), region(x, norm, eps)
    logits = ibp_logits(net, ball)
    subtracted = logits.lower.gather(1, y[:, None]) - logits.upper
    merged = ibp_margins(net, ball, y)
    other = torch.ones_like(merged).scatter(1, y[:, None], 0).bool()
    assert (merged >= subtracted - 1e-5 * subtracted.abs())[other].all()
    assert (merged > subtracted + 1e-3 * subtracted.abs())[other].any()
    assert (merged[~other] == 0).all()


@pytest.mark.parametrize("norm, eps", NORMS)
@pytest.mark.parametrize("name", PLAIN)
def test_no_reached_margin_is_below_the_ibp_margin(name: str, norm: str, eps: Fraction) -> None:
    shape = (3, SIDES[name], SIDES[name])
    net = randomised(build_model(name, shape, 5, (0.3, 0.5, 0.6), (0.4, 0.2, 0.3)), kept=0.3)
    x = images(3, shape)
    y = labels(net, x)
    bound = smallest_margin(ibp_margins(exact(net), region(x.double(), norm, eps), y), y)
    assert (bound <= lowest_reached(net, x, y, norm, eps) + 1e-9).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", PLAIN)
def test_at_eps_zero_the_bounds_are_the_logits(name: str, norm: str) -> None:
    net = exact(randomised(build_model(name, (1, SIDES[name], SIDES[name]), 5, (0.3,), (0.4,))))
    x = images(3, (1, SIDES[name], SIDES[name]), dtype=torch.float64)
    y, logits = labels(net, x), net(x)
    for part in ibp_logits(net, region(x, norm, Fraction(0))):
        torch.testing.assert_close(part, logits, atol=1e-7, rtol=1e-7)
    torch.testing.assert_close(
        ibp_margins(net, region(x, norm, Fraction(0)), y), logits.gather(1, y[:, None]) - logits, atol=1e-7, rtol=1e-7
    )


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_larger_ball_never_has_larger_margins_and_margins_fall(norm: str) -> None:
    net = randomised(build_model("cnn_small", (1, 8, 8), 5, (0.3,), (0.4,)))
    x = images(4, (1, 8, 8))
    y = labels(net, x)
    radii = [Fraction(k, 100) for k in (0, 1, 2, 5, 10, 30, 100)]
    margins = torch.stack([smallest_margin(ibp_margins(net, region(x, norm, eps), y), y) for eps in radii])
    assert (margins.diff(dim=0) <= 1e-5).all()
    assert (margins[-1] < margins[0]).all()


@pytest.mark.parametrize("norm, eps", NORMS)
def test_a_scaled_ball_of_points_stays_inside_the_l2_and_linf_logit_bounds(norm: str, eps: Fraction) -> None:
    net = exact(affine(True))
    x = images(2)
    bounds = ibp_logits(net, region(x.double(), norm, eps))
    for point in points_of_ball(x, norm, eps, 64):
        logits = net(point)
        assert ((bounds.lower <= logits) & (logits <= bounds.upper)).all()


def with_scores(net: nn.Module, density: Fraction) -> nn.Module:
    """TopKScores with random scores on every layer."""
    generator = torch.Generator().manual_seed(5)
    for layer in prunable(net).values():
        scores = torch.rand(layer.weight.shape, generator=generator)
        attach(layer, TopKScores(scores, kept_of(scores.numel(), density)))
    return net


@pytest.mark.parametrize("norm, eps", NORMS)
@pytest.mark.parametrize("name", PLAIN)
def test_gradients_of_the_margins_reach_every_score_and_weight(name: str, norm: str, eps: Fraction) -> None:
    shape = (1, SIDES[name], SIDES[name])
    net = with_scores(randomised(build_model(name, shape, 5, (0.3,), (0.4,))), Fraction(1, 2))
    x = images(4, shape)
    y = labels(net, x)
    ibp_margins(net, region(x, norm, eps), y).sum().backward()
    for layer in prunable(net).values():
        scores = layer.parametrizations.weight[0].scores
        assert scores.grad.abs().sum() > 0
        pruned = layer.parametrizations.weight[0].mask() == 0
        assert scores.grad[pruned].abs().sum() > 0, "straight through: pruned scores learn too"
        assert layer.parametrizations.weight.original.grad.abs().sum() > 0


def test_a_filter_without_weights_does_not_poison_the_l2_gradient() -> None:
    """The dual norm sqrt(sum w^2) of a pruned filter is at its kink; one NaN there would end a training run."""
    net = randomised(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)))
    with torch.no_grad():
        net[0].weight[1] = 0
    ibp_margins(net, region(images(2, (1, 4, 4)), "l2", Fraction(1, 5)), torch.tensor([0, 2])).sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in net.parameters())


def test_the_gradient_agrees_with_finite_differences() -> None:
    net = exact(randomised(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)), seed=4))
    x = images(2, (1, 4, 4), dtype=torch.float64)
    y, ball = torch.tensor([0, 2]), region(images(2, (1, 4, 4), dtype=torch.float64), "l2", Fraction(1, 5))
    assert torch.equal(ball.lower, region(x, "l2", Fraction(1, 5)).lower)

    def margins(weight: Tensor) -> Tensor:
        return torch.func.functional_call(Bounded(net, ball, y), {"net.0.weight": weight}, ())

    assert torch.autograd.gradcheck(margins, (net[0].weight.detach().clone().requires_grad_(),), eps=1e-7, atol=1e-5)


class Bounded(nn.Module):
    """The margins as a forward pass, so that torch can swap a weight."""

    def __init__(self, net: nn.Module, ball: Interval | Ellipsoid, y: Tensor) -> None:
        super().__init__()
        self.net, self.ball, self.y = net, ball, y

    def forward(self) -> Tensor:
        return ibp_margins(self.net, self.ball, self.y)


@pytest.mark.parametrize("name", PLAIN)
def test_parametrized_and_baked_networks_have_equal_margins_also_after_layers_changed(name: str) -> None:
    """The traced graph is remembered, the layers are not: attach, detach, attach again."""
    shape = (1, SIDES[name], SIDES[name])
    net = randomised(build_model(name, shape, 5, (0.3,), (0.4,)))
    x = images(3, shape)
    y, ball = labels(net, x), region(x, "linf", Fraction(1, 10))
    dense = ibp_margins(net, ball, y)

    for density in (Fraction(1, 2), Fraction(1, 5)):
        with_scores(net, density)
        plain = build_model(name, shape, 5, (0.3,), (0.4,), seed=1)
        plain.load_state_dict(effective_state(net))
        torch.testing.assert_close(ibp_margins(net, ball, y), ibp_margins(plain.eval(), ball, y), rtol=0, atol=0)
        assert not torch.equal(ibp_margins(net, ball, y), dense)

    for layer in prunable(net).values():
        torch.nn.utils.parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
    assert not is_attached(net)
    torch.testing.assert_close(ibp_margins(net, ball, y), dense, rtol=0, atol=0)


def test_the_verifier_answers_per_sample_and_certified_means_correct() -> None:
    """logits (h, -h) with h = x - 0.5: the margin at eps is 2 (x - 0.5 - eps), by hand."""
    net = nn.Sequential(nn.Flatten(), linear([[1], [-1]], [-0.5, 0.5]))
    x = torch.tensor([0.9, 0.75, 0.625, 0.5625, 0.25]).view(5, 1, 1, 1)
    proof = IBP(eps=Fraction(1, 8))(net, x, torch.tensor([0, 0, 0, 0, 0]))
    assert proof.margin.tolist() == pytest.approx([0.55, 0.25, 0.0, -0.125, -0.75], abs=1e-6)
    assert proof.radius.tolist() == [0.125, 0.125, 0, 0, 0]
    assert proof.status == ("proved", "proved", "open", "open", "open")
    assert proof.predicted.tolist() == [0, 0, 0, 0, 1]
    assert (proof.margin.dtype, proof.radius.dtype, proof.predicted.dtype) == (torch.float64, torch.float64, torch.int64)
    wrong = IBP(eps=Fraction(1, 8))(net, x, torch.tensor([1, 1, 1, 1, 1]))
    assert wrong.status == ("open", "open", "open", "open", "proved")
