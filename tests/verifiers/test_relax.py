"""The own backward relaxation: against auto-LiRPA, against samples, and split constraints against linear programmes."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

from tests.verifiers.brute_force import true_minimum
from tests.verifiers.small_nets import RULE_NETS, Forward, exact, images, labels, linear, points_of_ball, randomised
from tests.verifiers.test_lirpa import library_bounds
from verifiers import UnsupportedNetworkError
from verifiers.ascent import optimise
from verifiers.ball import Interval, outward_box
from verifiers.bounds import difference_rows
from verifiers.relax import Box, Choice, ReluNetwork, crown_choice

EPS = Fraction(1, 16)
MLP = lambda: nn.Sequential(nn.Flatten(), nn.Linear(72, 20), nn.ReLU(), nn.Linear(20, 15), nn.ReLU(), nn.Linear(15, 5))  # noqa: E731
CNN = lambda: nn.Sequential(  # noqa: E731
    nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 2), nn.ReLU(), nn.Flatten(), nn.Linear(24, 5)
)
RESIDUAL = lambda: Forward(  # noqa: E731
    lambda s, x: s.head(torch.relu(s.b(torch.relu(s.a(x))) + s.a(x))),
    a=nn.Conv2d(2, 3, 3, padding=1), b=nn.Conv2d(3, 3, 3, padding=1), head=nn.Sequential(nn.Flatten(), nn.Linear(108, 5)),
)
REFUSED = {
    "Tanh", "Sigmoid", "Linear",  # the net called Linear holds a Tanh
    "MaxPool2d", "MaxPool2d first", "MaxPool2d overlapping", "F.max_pool2d", "F.max_pool2d padded",
    "AvgPool2d without padding in the mean", "AdaptiveAvgPool2d to 4x4", "F.adaptive_avg_pool2d",
}
NETS = {name: net for name, net in RULE_NETS.items() if name not in REFUSED}


def rows_of(y: int, classes: int) -> Tensor:
    return difference_rows(torch.tensor([y]), classes, torch.float64)[0]


def margins(network: ReluNetwork, box: Box, rows: Tensor) -> Tensor:
    return network.lower_bounds(box, rows, crown_choice(box)).value


@pytest.mark.parametrize("name, net", [("mlp", MLP), ("cnn", CNN), ("residual", RESIDUAL)])
def test_plain_crown_bounds_equal_those_of_auto_lirpa(name: str, net: object) -> None:
    model = exact(randomised(net(), gain=1.2))  # type: ignore[operator]
    x = images(3, dtype=torch.float64)
    y, network = labels(model, x), ReluNetwork(model, x)
    for i in range(len(x)):
        ball = outward_box(x[i : i + 1], EPS)
        box = network.box(ball, intersect=False)
        assert len(box.lowers) > 5
        got = margins(network, box, rows_of(int(y[i]), 5))
        want = library_bounds(model, ball.lower, ball.upper, y[i : i + 1], "CROWN", 5)[0]
        torch.testing.assert_close(got, want, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("name", NETS)
def test_no_point_of_the_ball_leaves_the_bounds(name: str) -> None:
    """Every supported operation, several ways round: at ReLU inputs and at margins, with CROWN's and with any other slopes."""
    model = exact(randomised(NETS[name]()))
    x = images(1, dtype=torch.float64)
    network, y = ReluNetwork(model, x), int(labels(model, x))
    box = network.box(outward_box(x, EPS))
    points = points_of_ball(x, "linf", EPS, 64).flatten(0, 1)
    for relu, z in network.activity(points).items():
        layer = box.layers[relu]
        assert (z[:, layer.at] >= layer.lower).all()
        assert (z[:, layer.at] <= layer.upper).all()
        stable = torch.ones(z.shape[1], dtype=torch.bool).index_fill(0, layer.at, False)
        assert ((z > 0) == (layer.active > 0))[:, stable].all()
    rows = rows_of(y, 5)
    reached = (model(points) @ rows.mT).amin(0)
    assert (margins(network, box, rows) <= reached).all()
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        alpha = torch.rand(4, len(box.lowers), generator=generator, dtype=torch.float64)
        choice = Choice(alpha, torch.zeros_like(alpha), torch.zeros_like(alpha))
        assert (network.lower_bounds(box, rows, choice).value <= reached).all()


def test_optimised_slopes_raise_the_bound_and_stay_below_what_is_reached() -> None:
    model = exact(randomised(MLP(), gain=1.5))
    x = images(1, dtype=torch.float64)
    network, rows = ReluNetwork(model, x), rows_of(int(labels(model, x)), 5)
    box = network.box(outward_box(x, EPS))
    plain = margins(network, box, rows)
    better = optimise(network, box, rows, crown_choice(box, 4), 1e3, 30).bounded.value
    assert (better >= plain).all()
    assert (better > plain + 0.01).any()
    reached = (model(points_of_ball(x, "linf", EPS, 200).flatten(0, 1)) @ rows.mT).amin(0)
    assert (better <= reached).all()


@pytest.mark.parametrize("seed", range(6))
def test_bounds_under_split_constraints_never_exceed_the_true_constrained_minimum(seed: int) -> None:
    """Splits of up to three neurons, with random slopes and multipliers and with optimised ones, against linear programmes."""
    model = randomised(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), seed=seed).double()
    x = images(1, (3,), seed, torch.float64)
    ball = outward_box(x, Fraction(1, 4))
    network = ReluNetwork(model, x)
    box = network.box(ball)
    generator = torch.Generator().manual_seed(seed)
    row = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    k, checked = len(box.lowers), 0
    for _ in range(8):
        sign = torch.zeros(1, k, dtype=torch.float64)
        at = torch.randperm(k, generator=generator)[:3]
        sign[0, at] = torch.randint(0, 2, (len(at),), generator=generator).double() * 2 - 1
        truth = true_minimum(model, ball.lower, ball.upper, row[0], _all_signs(box, sign[0]))
        draw = torch.rand(2, 1, k, generator=generator, dtype=torch.float64)
        random = network.lower_bounds(box, row, Choice(draw[0], 2 * draw[1] * (sign != 0), sign)).value
        best = optimise(network, box, row, crown_choice(box)._replace(sign=sign), 1e3, 60).bounded.value
        assert random.item() <= truth + 1e-9
        assert best.item() <= truth + 1e-9
        checked += truth < float("inf")
    assert checked >= 2


def _all_signs(box: Box, sign: Tensor) -> list[int]:
    """The signs of the unstable neurons among those of all neurons, 0 for the stable ones."""
    found, rest = [], [int(one) for one in sign.tolist()]
    for layer in box.layers.values():
        whole = torch.zeros(len(layer.active), dtype=torch.int64)
        whole[layer.at] = torch.tensor(rest[: len(layer.at)], dtype=torch.int64)
        rest = rest[len(layer.at) :]
        found += whole.tolist()
    return found


def test_a_split_multiplier_makes_the_toy_exact() -> None:
    """relu(x1 + x2) - relu(x1 - x2) on [0.3, 0.9] x [0, 0.5]: where x1 >= x2 it is 2 x2 >= 0, elsewhere x1 + x2 >= 0.6."""
    net = nn.Sequential(linear([[1, 1], [1, -1]]), nn.ReLU()).double()
    x = torch.tensor([[0.6, 0.2]], dtype=torch.float64)
    network = ReluNetwork(net, x)
    box = network.box(Interval(torch.tensor([[0.3, 0.0]]).double(), torch.tensor([[0.9, 0.5]]).double()))
    row = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    assert margins(network, box, row).item() == pytest.approx(-0.109091, abs=1e-6)
    best = []
    for sign in (1.0, -1.0):
        choice = crown_choice(box)._replace(sign=torch.tensor([[sign]], dtype=torch.float64))
        best.append(optimise(network, box, row, choice, 1e3, 100).bounded.value.item())
    assert best == pytest.approx([0.0, 0.6], abs=0.02)


@pytest.mark.parametrize("name", ["Tanh", "Sigmoid", "MaxPool2d"])
def test_other_operations_are_refused_by_name(name: str) -> None:
    with pytest.raises(UnsupportedNetworkError, match=name):
        ReluNetwork(exact(randomised(RULE_NETS[name]())), images(1, dtype=torch.float64))
