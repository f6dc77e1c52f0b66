"""The own backward relaxation: against auto-LiRPA, against samples, and split constraints against linear programmes."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.verifiers.brute_force import true_minimum
from tests.verifiers.small_nets import RULE_NETS, Forward, exact, images, labels, linear, points_of_ball, randomised
from tests.verifiers.test_lirpa import library_bounds
from verifiers import UnsupportedNetworkError
from verifiers.ascent import optimise, sharpened
from verifiers.ball import Interval, outward_box
from verifiers.bounds import difference_rows
from verifiers.relax import Box, Choice, Rows, crown_choice, lower_bounds, never, nothing, relax, require_that_true_points_fit
from verifiers.unrolled import Unrolled

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
    "MaxPool2d overlapping", "F.max_pool2d padded",  # padded where values may be negative
    "AvgPool2d without padding in the mean", "AdaptiveAvgPool2d to 4x4", "average over what is there", "F.relu6",
    "BatchNorm1d first", "BatchNorm1d of sequences", "mean over rows",
}
NETS = {name: net for name, net in RULE_NETS.items() if name not in REFUSED}


def rows_of(box: Box, y: int, classes: int) -> Rows:
    by = difference_rows(torch.tensor([y]), classes, torch.float64)[0]
    return Rows(by @ box.outputs.matrix, by @ box.outputs.constant)


def margins(box: Box, rows: Rows) -> Tensor:
    return lower_bounds(box, rows, crown_choice(box)).value


def reached_by(model: nn.Module, y: int, points: Tensor) -> Tensor:
    return (model(points) @ difference_rows(torch.tensor([y]), 5, torch.float64)[0].mT).amin(0)


@pytest.mark.parametrize("name, net", [("mlp", MLP), ("cnn", CNN), ("residual", RESIDUAL)])
def test_plain_crown_bounds_equal_those_of_auto_lirpa(name: str, net: object) -> None:
    model = exact(randomised(net(), gain=1.2))  # type: ignore[operator]
    x = images(3, dtype=torch.float64)
    y, network = labels(model, x), Unrolled(model, x)
    for i in range(len(x)):
        ball = outward_box(x[i : i + 1], EPS)
        box = relax(network, ball, intersect=False)
        assert len(box.low) > 5
        want = library_bounds(model, ball.lower, ball.upper, y[i : i + 1], "CROWN", 5)[0]
        torch.testing.assert_close(margins(box, rows_of(box, int(y[i]), 5)), want, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("name", NETS)
def test_no_point_of_the_ball_leaves_the_bounds(name: str) -> None:
    """Every supported operation, several ways round: at ReLU inputs and at margins, with CROWN's and with any other slopes."""
    model = exact(randomised(NETS[name](), kept=0.6))
    x = images(1, dtype=torch.float64)
    network, y = Unrolled(model, x), int(labels(model, x))
    box = relax(network, outward_box(x, EPS))
    points = points_of_ball(x, "linf", EPS, 64).flatten(0, 1)
    inputs = np.concatenate([np.zeros((0, len(points))), *(z[at] for z, at in zip(network.inputs(points), box.places))])
    assert (inputs >= box.low.numpy()[:, None]).all()
    assert (inputs <= box.high.numpy()[:, None]).all()
    torch.testing.assert_close(outputs_of(box, network, points), model(points), atol=1e-9, rtol=1e-9)  # stable ones are stable
    rows, reached = rows_of(box, y, 5), reached_by(model, y, points)
    assert (margins(box, rows) <= reached).all()
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        alpha = torch.rand(4, len(box.low), generator=generator, dtype=torch.float64)
        choice = Choice(alpha, torch.zeros_like(alpha), torch.zeros_like(alpha))
        assert (lower_bounds(box, rows, choice).value <= reached).all()


def outputs_of(box: Box, network: Unrolled, points: Tensor) -> Tensor:
    """The logits as the box computes them, from unstable neurons only."""
    return box.neurons(torch.from_numpy(network.pixels(points).T.copy())) @ box.outputs.matrix.mT + box.outputs.constant


def test_a_box_with_a_wrong_bound_or_a_wrong_output_is_refused() -> None:
    model = exact(randomised(MLP(), gain=1.5)).requires_grad_(False)
    x = images(1, dtype=torch.float64)
    network = Unrolled(model, x)
    box = relax(network, outward_box(x, EPS))
    require_that_true_points_fit(network, box)
    outputs = Rows(box.outputs.matrix, box.outputs.constant + 1e-3)
    for wrong in (replace(box, high=box.high * 0.01), replace(box, low=box.low * 0.01), replace(box, outputs=outputs)):
        with pytest.raises(UnsupportedNetworkError, match="does not hold"):
            require_that_true_points_fit(network, wrong)


@pytest.mark.parametrize("name, net", [("mlp", MLP), ("residual", RESIDUAL)])
def test_optimised_inner_bounds_are_tighter_and_hold_at_points(name: str, net: object) -> None:
    model = exact(randomised(net(), gain=1.5)).requires_grad_(False)  # type: ignore[operator]
    x = images(1, dtype=torch.float64)
    network, y = Unrolled(model, x), int(labels(model, x))
    plain, sharp = (relax(network, outward_box(x, EPS), bound=bound) for bound in (None, sharpened(nothing, never)))
    assert len(sharp.low) <= len(plain.low)
    assert (sharp.high - sharp.low).sum() < (plain.high - plain.low).sum() - 0.01
    points = points_of_ball(x, "linf", EPS, 200).flatten(0, 1)
    inputs = np.concatenate([z[at] for z, at in zip(network.inputs(points), sharp.places)])
    assert (inputs >= sharp.low.numpy()[:, None]).all()
    assert (inputs <= sharp.high.numpy()[:, None]).all()
    assert (margins(sharp, rows_of(sharp, y, 5)) <= reached_by(model, y, points)).all()


def test_optimised_slopes_raise_the_bound_and_stay_below_what_is_reached() -> None:
    model = exact(randomised(MLP(), gain=1.5))
    x = images(1, dtype=torch.float64)
    y = int(labels(model, x))
    box = relax(Unrolled(model, x), outward_box(x, EPS))
    rows = rows_of(box, y, 5)
    plain = margins(box, rows)
    better = optimise(box, rows, crown_choice(box, 4), 1e3, 30).bounded.value
    assert (better >= plain).all()
    assert (better > plain + 0.01).any()
    assert (better <= reached_by(model, y, points_of_ball(x, "linf", EPS, 200).flatten(0, 1))).all()


def test_rows_that_are_proved_are_left_alone() -> None:
    """The first bounds already exceed what is asked of two rows: only the other two move."""
    model = exact(randomised(MLP(), gain=1.5))
    x = images(1, dtype=torch.float64)
    box = relax(Unrolled(model, x), outward_box(x, EPS))
    rows = rows_of(box, int(labels(model, x)), 5)
    plain = margins(box, rows)
    above = plain + torch.tensor([-1.0, 1e3, -1.0, 1e3], dtype=torch.float64)
    found = optimise(box, rows, crown_choice(box, 4), above, 10)
    assert torch.equal(found.bounded.value[::2], plain[::2])
    assert (found.bounded.value[1::2] > plain[1::2]).any()
    assert (found.slack > 0).tolist() == [True, False, True, False]


@pytest.mark.parametrize("seed", range(6))
def test_bounds_under_split_constraints_never_exceed_the_true_constrained_minimum(seed: int) -> None:
    """Splits of up to three neurons, with random slopes and multipliers and with optimised ones, against linear programmes."""
    model = randomised(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), seed=seed).double()
    x = images(1, (3,), seed, torch.float64)
    ball = outward_box(x, Fraction(1, 4))
    box = relax(Unrolled(model.requires_grad_(False), x), ball)
    generator = torch.Generator().manual_seed(seed)
    row = torch.tensor([1.0, -1.0], dtype=torch.float64)
    rows = Rows(row[None] @ box.outputs.matrix, row[None] @ box.outputs.constant)
    k, checked = len(box.low), 0
    for _ in range(8):
        sign = torch.zeros(1, k, dtype=torch.float64)
        at = torch.randperm(k, generator=generator)[:3]
        sign[0, at] = torch.randint(0, 2, (len(at),), generator=generator).double() * 2 - 1
        truth = true_minimum(model, ball.lower, ball.upper, row, _all_signs(box, sign[0], [4, 3]))
        draw = torch.rand(2, 1, k, generator=generator, dtype=torch.float64)
        random = lower_bounds(box, rows, Choice(draw[0], 2 * draw[1] * (sign != 0), sign)).value
        best = optimise(box, rows, crown_choice(box)._replace(sign=sign), 1e3, 60).bounded.value
        assert random.item() <= truth + 1e-9
        assert best.item() <= truth + 1e-9
        checked += truth < float("inf")
    assert checked >= 2


def _all_signs(box: Box, sign: Tensor, sizes: list[int]) -> list[int]:
    """The signs of the unstable neurons among those of all neurons of layers of these sizes, 0 for the stable ones."""
    found, rest = [], [int(one) for one in sign.tolist()]
    for at, size in zip(box.places, sizes):
        whole = np.zeros(size, int)
        whole[at] = rest[: len(at)]
        rest = rest[len(at) :]
        found += whole.tolist()
    return found


def test_a_split_multiplier_makes_the_toy_exact() -> None:
    """relu(x1 + x2) - relu(x1 - x2) on [0.3, 0.9] x [0, 0.5]: where x1 >= x2 it is 2 x2 >= 0, elsewhere x1 + x2 >= 0.6."""
    net = nn.Sequential(linear([[1, 1], [1, -1]]), nn.ReLU()).double().requires_grad_(False)
    x = torch.tensor([[0.6, 0.2]], dtype=torch.float64)
    ball = Interval(torch.tensor([[0.3, 0.0]]).double(), torch.tensor([[0.9, 0.5]]).double())
    box = relax(Unrolled(net, x), ball)
    row = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    rows = Rows(row @ box.outputs.matrix, row @ box.outputs.constant)
    assert margins(box, rows).item() == pytest.approx(-0.109091, abs=1e-6)
    best = []
    for sign in (1.0, -1.0):
        choice = crown_choice(box)._replace(sign=torch.tensor([[sign]], dtype=torch.float64))
        best.append(optimise(box, rows, choice, 1e3, 100).bounded.value.item())
    assert best == pytest.approx([0.0, 0.6], abs=0.02)
