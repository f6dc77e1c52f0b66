"""Properties of any box: verdicts are those of brute force over activation patterns, witnesses re-run, questions are checked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.verifiers.brute_force import true_minimum
from tests.verifiers.small_nets import RULE_NETS, exact, images, linear, randomised
from verifiers import UnsupportedNetworkError
from verifiers.branching import Verdict
from verifiers.properties import decide

NET = lambda: nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2))  # noqa: E731
ROWS = torch.tensor([[1.0, 0.0], [0.3, -2.0], [0.0, 5.0]], dtype=torch.float64)
BRANCHING = {"milp_below": 0}


def random_box(seed: int, width: float) -> tuple[Tensor, Tensor]:
    """Around points of [-2, 2], with an edge of width 0."""
    centre = 4 * images(1, (3,), seed, torch.float64) - 2
    radius = width * images(1, (3,), seed + 1, torch.float64)
    radius[0, seed % 3] = 0
    return centre - radius, centre + radius


def values(net: nn.Module, points: Tensor, rows: Tensor, offsets: Tensor) -> Tensor:
    with torch.no_grad():
        return exact(net)(points) @ rows.mT + offsets


@pytest.mark.parametrize("options", [{}, BRANCHING])
@pytest.mark.parametrize("seed", range(3))
def test_verdicts_equal_brute_force_on_boxes_outside_of_the_pixels(seed: int, options: dict[str, int]) -> None:
    """Offsets put the truth a little above and a little below zero, for one row and for three."""
    net = randomised(NET(), seed=seed)
    lower, upper = random_box(seed, 0.8)
    least = [true_minimum(randomised(NET(), seed=seed), lower, upper, row) for row in ROWS]  # type: ignore[arg-type]
    for count in (1, 3):
        for shift, status in ((1e-2, "proved"), (-1e-2, "broken")):
            rows, offsets = ROWS[:count], shift - torch.tensor(least[:count], dtype=torch.float64)
            found = decide(net, lower, upper, rows, offsets, **options)
            assert found.status == status
            if found.status == "proved":
                assert 0 < found.margin <= shift + 1e-6
                assert found.witness is None
            else:
                assert found.witness is not None
                assert found.witness.dtype == torch.float64
                assert ((lower <= found.witness) & (found.witness <= upper)).all()
                assert (values(net, found.witness, rows, offsets) <= 0).any()


def toy() -> nn.Module:
    """|x| as relu(x) + relu(-x)."""
    return nn.Sequential(linear([[1.0], [-1.0]]), nn.ReLU(), linear([[1.0, 1.0]]))


def ask(low: float, high: float, row: float, offset: float, **options: Any) -> Verdict:
    box = (torch.tensor([[end]], dtype=torch.float64) for end in (low, high))
    rows, offsets = torch.tensor([[row]], dtype=torch.float64), torch.tensor([offset], dtype=torch.float64)
    return decide(toy(), *box, rows, offsets, **options)


@pytest.mark.parametrize("options", [{}, BRANCHING])
def test_the_absolute_value_by_hand(options: dict[str, int]) -> None:
    """7 - |x| on [-3, 5] is at least 2, |x| - 1 reaches 0 at 1 and is positive beyond; 0 itself breaks, as at the corner 1."""
    assert ask(-3, 5, -1, 7, **options).status == "proved"
    assert ask(-3, 5, -1, 5, **options).status == "broken"
    assert ask(1.001, 50, 1, -1, **options).status == "proved"
    assert ask(1, 50, 1, -1, **options).status == "broken"
    assert ask(-30, 50, 1, 1e-3, **options).status == "proved"
    assert ask(-30, 50, 1, -1e-3, **options).status == "broken"


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_scale_of_a_row_does_not_matter(scale: float) -> None:
    assert ask(-3, 5, -scale, 5.01 * scale).status == "proved"
    assert ask(-3, 5, -scale, 4.99 * scale).status == "broken"


def test_a_value_inside_the_rounding_allowance_is_neither_proved_nor_broken() -> None:
    """1 - x + 1e-10 on [0.25, 1], written as a difference of numbers near 1e6."""
    net = nn.Sequential(linear([[-1.0], [0.0]], [1e6 + 1, 1e6]), nn.ReLU())
    box = torch.tensor([[0.25]], dtype=torch.float64), torch.tensor([[1.0]], dtype=torch.float64)
    for offset, status in ((1e-6, "open"), (1e-1, "proved"), (-1e-1, "broken")):
        found = decide(net, *box, torch.tensor([[1.0, -1.0]]), torch.tensor([offset], dtype=torch.float64))
        assert found.status == status


@pytest.mark.parametrize("name", ["residual", "torch.cat", "Normalize", "BatchNorm2d", "AvgPool2d"])
def test_every_kind_of_graph_gets_sound_answers(name: str) -> None:
    """Held against points of the box; a single row that no point of it brings below zero by much."""
    net, x = randomised(RULE_NETS[name]()), images(1, dtype=torch.float64)
    lower, upper = x - 0.03, x + 0.05
    points = lower + (upper - lower) * images(300, seed=5, dtype=torch.float64)
    rows = torch.eye(5, dtype=torch.float64)[:2] - torch.eye(5, dtype=torch.float64)[2:4]
    reached = values(net, points, rows, torch.zeros(2)).amin(0)
    for spare in (2.0, 0.0):
        found = decide(net, lower, upper, rows, spare - reached, nodes=20)
        assert found.status != "proved" or spare > 0
        assert found.margin <= spare + 1e-9 or found.status == "broken"


def test_limits_end_in_open_and_timeout() -> None:
    net = randomised(nn.Sequential(nn.Linear(20, 60), nn.ReLU(), nn.Linear(60, 60), nn.ReLU(), nn.Linear(60, 1)), gain=1.5)
    lower, upper = torch.zeros(1, 20, dtype=torch.float64), torch.ones(1, 20, dtype=torch.float64)
    lowest = values(net, images(5000, (20,), dtype=torch.float64), torch.ones(1, 1).double(), torch.zeros(1)).amin()
    question = net, lower, upper, torch.ones(1, 1).double(), 2.0 + lowest.abs().view(1)
    assert decide(*question, nodes=2, milp_below=0).status == "open"
    assert decide(*question, nodes=10**9, seconds=0.3, milp_below=0).status == "timeout"


GOOD: dict[str, Any] = {"lower": torch.zeros(1, 3), "upper": torch.ones(1, 3), "rows": ROWS, "offsets": torch.zeros(3)}


@pytest.mark.parametrize(
    "change, words",
    [
        ({"lower": torch.zeros(3)}, "one lower and one upper"),
        ({"upper": torch.full((1, 3), -1.0)}, "empty"),
        ({"upper": torch.full((1, 3), torch.inf)}, "finite"),
        ({"rows": ROWS[:0], "offsets": torch.zeros(0)}, "T >= 1"),
        ({"offsets": torch.zeros(2)}, "offsets"),
        ({"rows": torch.ones(3, 4)}, "2 outputs"),
        ({"nodes": 0}, "nodes"),
        ({"seconds": 0.0}, "positive"),
    ],
)
def test_senseless_questions_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        decide(randomised(NET()), **(GOOD | change))


def test_networks_other_than_relu_networks_are_refused_by_name() -> None:
    x = images(1, dtype=torch.float64)
    with pytest.raises(UnsupportedNetworkError, match="Tanh"):
        decide(randomised(RULE_NETS["Tanh"]()), x, x + 0.1, torch.ones(1, 5), torch.zeros(1))
