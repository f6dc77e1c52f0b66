"""The integer programme: its optimum is the true minimum, its refusals are right, and it checks its own encoding."""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

from tests.verifiers.brute_force import true_minimum
from tests.verifiers.small_nets import RULE_NETS, exact, images, labels, points_of_ball, randomised
from verifiers import UnsupportedNetworkError
from verifiers.ball import outward_box
from verifiers.bounds import difference_rows
from verifiers.milp import TOLERANCE, Encoding
from verifiers.relax import Box, Rows, relax
from verifiers.unrolled import Unrolled

NETS = {
    "mlp": lambda: nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3)),
    "cnn": lambda: nn.Sequential(
        nn.Conv2d(1, 2, 2, 2, padding=1), nn.ReLU(), nn.Conv2d(2, 2, 2, bias=False), nn.Flatten(), nn.ReLU(), nn.Linear(2, 3)
    ),
}


def problem(name: str, seed: int) -> tuple[nn.Sequential, Tensor, Tensor, Tensor]:
    net = randomised(NETS[name](), seed=seed).double().requires_grad_(False)
    assert isinstance(net, nn.Sequential)
    x = images(1, (1, 2, 2), seed, torch.float64)
    return net, x, labels(net, x), difference_rows(labels(net, x), 3, torch.float64)[0]


def encoded(box: Box, rows: Tensor) -> Encoding:
    return Encoding(box, Rows(rows @ box.outputs.matrix, rows @ box.outputs.constant))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", NETS)
def test_its_optimum_is_the_true_minimum_and_it_refuses_only_what_lies_above_the_tolerance(name: str, seed: int) -> None:
    """Whatever the allowance, hence the threshold: feasible at or above the true minimum, infeasible below."""
    net, x, _, rows = problem(name, seed)
    ball = outward_box(x, Fraction(1, 4))
    network = Unrolled(net, x)
    encoding = encoded(relax(network, ball), rows)
    free = torch.zeros(len(encoding.low))
    for target, row in enumerate(rows):
        truth = true_minimum(net, ball.lower, ball.upper, row)
        tolerance = TOLERANCE * float(encoding.margins.size[target])
        least = encoding.solve(target, free, truth + 0.1, 1000, None, least=True)
        assert least.point is not None
        point = network.images(least.point)
        assert float(row @ net(point)[0]) == pytest.approx(truth, abs=2 * tolerance)
        assert ((point >= ball.lower - 1e-12) & (point <= ball.upper + 1e-12)).all()
        assert encoding.solve(target, free, truth + 2 * tolerance, 1000, None).kind == "found"
        assert encoding.solve(target, free, truth - 3 * tolerance, 1000, None).kind == "proved"


@pytest.mark.parametrize("seed", range(3))
def test_the_minimum_over_two_halves_of_a_split_is_the_whole_minimum(seed: int) -> None:
    net, x, _, rows = problem("mlp", seed)
    network = Unrolled(net, x)
    encoding = encoded(relax(network, outward_box(x, Fraction(3, 4))), rows)
    free = torch.zeros(len(encoding.low))

    def least(sign: Tensor) -> float:
        answer = encoding.solve(0, sign, 1e3, 1000, None, least=True)
        return float("inf") if answer.point is None else float(rows[0] @ net(network.images(answer.point))[0])

    whole = least(free)
    assert len(free) >= 2
    for k in range(len(free)):
        halves = [least(free.index_fill(0, torch.tensor([k]), sign)) for sign in (1.0, -1.0)]
        assert min(halves) == pytest.approx(whole, abs=1e-4)


GRAPHS = ["residual", "torch.cat", "+", "Conv2d grouped", "Normalize", "AvgPool2d", "BatchNorm2d", "F.relu"]


@pytest.mark.parametrize("name", GRAPHS)
def test_points_of_the_ball_fit_the_encoding_of_every_kind_of_graph(name: str) -> None:
    """The encoding checks itself at six points when built; its optimum must also lie below every sampled margin."""
    net = exact(randomised(RULE_NETS[name]())).requires_grad_(False)
    x = images(1, dtype=torch.float64)
    rows = difference_rows(labels(net, x), 5, torch.float64)[0][:1]
    network = Unrolled(net, x)
    encoding = encoded(relax(network, outward_box(x, Fraction(1, 50))), rows)
    answer = encoding.solve(0, torch.zeros(len(encoding.low)), 1e3, 10000, None, least=True)
    assert answer.point is not None
    reached = (net(points_of_ball(x, "linf", Fraction(1, 50), 100).flatten(0, 1)) @ rows.mT).amin()
    assert float(rows[0] @ net(network.images(answer.point))[0].detach()) <= float(reached) + 1e-6


def test_an_encoding_with_a_wrong_bound_is_refused() -> None:
    """A ReLU that is declared closed although points of the box open it."""
    net, x, _, rows = problem("mlp", 0)
    box = relax(Unrolled(net, x), outward_box(x, Fraction(1, 4)))
    encoded(box, rows)
    assert len(box.high)
    with pytest.raises(UnsupportedNetworkError, match="does not hold"):
        encoded(dataclasses.replace(box, high=box.high * 0.01), rows)


def test_a_limit_is_reported_as_such() -> None:
    """Is a margin below anything that was sampled possible? One node cannot tell, and 0.2 s cannot either."""
    net = nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 2))
    net = randomised(net, gain=1.5).double().requires_grad_(False)
    x = images(1, (20,), dtype=torch.float64)
    row = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    encoding = encoded(relax(Unrolled(net, x), outward_box(x, Fraction(1, 5))), row)
    free = torch.zeros(len(encoding.low))
    lowest = float((net(points_of_ball(x, "linf", Fraction(1, 5), 300).flatten(0, 1)) @ row.mT).amin())
    assert encoding.solve(0, free, lowest - 1, 1, None).kind == "limit"
    assert encoding.solve(0, free, lowest - 1, 10**6, 0.2).kind == "limit"
