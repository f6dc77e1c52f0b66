"""Answers to properties: unsat where brute force finds no counterexample, sat with one that the formula itself accepts."""

from __future__ import annotations

import itertools
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import bench.properties
from bench.errors import UserError
from bench.properties import Answer, answer
from bench.vnnlib_files import Property, Region, Row, read_property
from verifiers.proof import SelfRefutedError
from verifiers.rounding import in_float64

pytest.importorskip("pysmt")
CUT = Fraction(1, 4)


def net(seed: int, inputs: int = 2, outputs: int = 3) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(inputs, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, outputs))
    return model.eval().requires_grad_(False)


def linear(weight: list[list[float]], bias: list[float]) -> nn.Sequential:
    """relu(x) - relu(-x), then a linear map: the map itself."""
    split, merge = nn.Linear(len(weight[0]), 2 * len(weight[0])), nn.Linear(2 * len(weight[0]), len(weight))
    one, matrix = torch.eye(len(weight[0])), torch.tensor(weight)
    split.weight.data, split.bias.data = torch.cat([one, -one]), torch.zeros(2 * len(one))
    merge.weight.data, merge.bias.data = torch.cat([matrix, -matrix], 1), torch.tensor(bias)
    return nn.Sequential(split, nn.ReLU(), merge).eval().requires_grad_(False)


def asked(unsafe: list[list[Row]], low: float = -1.0, high: float = 1.0, inputs: int = 2, outputs: int = 3) -> Property:
    box = (Fraction(low),) * inputs, (Fraction(high),) * inputs
    return Property(inputs, outputs, (Region(*box, tuple(map(tuple, unsafe))),))


def row(*coefficients: int, offset: Fraction | int = 0, strict: bool = False) -> Row:
    return Row({i: Fraction(by) for i, by in enumerate(coefficients) if by}, Fraction(offset), strict)


def grid(model: nn.Module, question: Property) -> bool:
    """Whether a counterexample lies on a fine grid of the boxes."""
    for region in question.regions:
        ends = zip(map(float, region.lower), map(float, region.upper))
        sides = [torch.linspace(low, high, 41, dtype=torch.float64) for low, high in ends]
        points = torch.cartesian_prod(*sides)
        outputs = in_float64(model)(points)
        if any(question.broken_by(x, y) for x, y in zip(points.tolist(), outputs.tolist())):
            return True
    return False


@pytest.mark.parametrize("seed", range(3))
def test_answers_agree_with_a_grid(seed: int) -> None:
    """A row per question, and both in one conjunction; offsets move the threshold through the outputs' range."""
    model, answers = net(seed), []
    for shift, together in itertools.product((-3, 0, 1, 3), (False, True)):
        rows = [row(1, -1, offset=shift * CUT), row(0, 1, -1, offset=shift * CUT)]
        question = asked([rows] if together else [[one] for one in rows])
        found = answer(model, (2,), question)
        answers.append(found.status)
        assert found.status in ("sat", "unsat", *(["unknown"] if together else []))
        if found.status == "unsat":
            assert not grid(model, question)
        if found.status == "sat":
            assert question.broken_by(found.x, found.y)
            again = in_float64(model)(torch.tensor(found.x, dtype=torch.float64)[None])[0]
            assert found.y == tuple(again.tolist())
        if grid(model, question):
            assert found.status == "sat"
    assert {"sat", "unsat"} <= set(answers)


def test_boxes_far_outside_of_images_are_taken_as_they_are(tmp_path: Path) -> None:
    """f(x) = (x0 + x1, x0 - x1) on two boxes: by hand, the sum lies in [30, 34] or in [-12, -8]."""
    model = linear([[1.0, 1.0], [1.0, -1.0]], [0.0, 0.0])
    names = "".join(f"(declare-const {name} Real)" for name in ("X_0", "X_1", "Y_0", "Y_1"))
    one, other = "(>= X_0 10) (<= X_0 12) (>= X_1 20) (<= X_1 22)", "(>= X_0 -6) (<= X_0 -4) (>= X_1 -6) (<= X_1 -4)"
    boxes = f"(assert (or (and {one}) (and {other})))"
    for formula, status in (
        ("(>= Y_0 34.5)", "unsat"), ("(<= Y_0 -12.5)", "unsat"), ("(and (>= Y_0 -7) (<= Y_0 29.5))", "unsat"),
        ("(>= Y_0 33.5)", "sat"), ("(<= Y_0 -11.5)", "sat"), ("(and (<= Y_0 -8) (>= Y_1 1.5))", "sat"),
    ):  # fmt: skip
        path = tmp_path / "p.vnnlib"
        path.write_text(f"{names}{boxes}(assert {formula})")
        found = answer(model, (2,), read_property(path))
        assert (formula, found.status) == (formula, status)


def test_a_counterexample_between_floats_is_not_excluded() -> None:
    """f(x) = x reaches 1/10 at x = 1/10 only, which no float is: neither unsat nor sat would be true of what is computed."""
    model = linear([[1.0]], [0.0])
    tenth = Fraction(1, 10)

    def ask(high: Fraction, least: Fraction) -> str:
        box = Region((Fraction(0),), (high,), ((row(-1, offset=least),),))
        return answer(model, (1,), Property(1, 1, (box,)), nodes=20).status

    assert ask(tenth, tenth) == "unknown"
    assert ask(tenth, tenth + Fraction(1, 10**6)) == "unsat"
    assert ask(tenth, tenth - Fraction(1, 10**6)) == "sat"
    assert ask(Fraction(1, 8), Fraction(1, 8)) == "sat"


def test_strict_constraints_do_not_hold_on_their_border() -> None:
    model = linear([[1.0]], [0.0])
    box = (Fraction(0),), (Fraction(1),)
    for strict, status in ((False, "sat"), (True, "unknown")):
        question = Property(1, 1, (Region(*box, ((row(1, strict=strict),),)),))
        assert answer(model, (1,), question, nodes=20).status == status


def test_a_fixed_input_between_floats_and_an_empty_box() -> None:
    model, always = linear([[1.0]], [0.0]), ((row(offset=-1),),)
    third = (Fraction(1, 3),)
    assert answer(model, (1,), Property(1, 1, (Region(third, third, always),)), nodes=5).status == "unknown"
    empty = Region((Fraction(1),), (Fraction(0),), always)
    assert answer(model, (1,), Property(1, 1, (empty,))).status == "unsat"
    assert answer(model, (1,), Property(1, 1, ())).status == "unsat"


def test_coefficients_that_are_no_floats_are_scaled_or_refused() -> None:
    """0.1 Y <= 0.05 is Y <= 0.5; a coefficient of forty digits is refused."""
    model = linear([[1.0]], [0.0])

    def ask(by: Fraction, offset: Fraction) -> Answer:
        return answer(model, (1,), asked([[Row({0: by}, offset)]], 0.6, 1.0, 1, 1))

    assert ask(Fraction(1, 10), Fraction(-1, 20)).status == "unsat"
    assert ask(Fraction(1, 10), Fraction(-7, 100)).status == "sat"
    with pytest.raises(UserError, match="too many digits"):
        ask(Fraction(10**39 + 1, 10**40), Fraction(-1, 20))


class Peak(nn.Module):
    """max(x0, x1) by pooling, which branch and bound does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.flat = nn.MaxPool2d((1, 3), stride=1, padding=(0, 1)), nn.Flatten()

    def forward(self, x: Tensor) -> Tensor:
        return self.flat(self.pool(x))


def test_max_pooling_is_answered_by_interval_bounds_and_descent() -> None:
    model = nn.Sequential(Peak(), nn.Linear(2, 1)).eval().requires_grad_(False)
    model[1].weight.data, model[1].bias.data = torch.ones(1, 2), torch.zeros(1)
    for least, status in ((21, "unsat"), (19, "sat")):
        found = answer(model, (1, 1, 2), asked([[row(-10, offset=least)]], -1, 1, 2, 1))
        assert found.status == status
        assert found.x == () or max(found.x) >= 0.95


def test_without_constraints_of_outputs_every_input_of_the_box_is_a_counterexample() -> None:
    assert answer(net(0), (2,), asked([[]])).status == "sat"


def test_a_property_of_another_network_is_refused() -> None:
    with pytest.raises(UserError, match="2 inputs and 3 outputs, the network has 4 and 3"):
        answer(net(0, inputs=4), (4,), asked([[row(1)]]))


def test_no_time_is_a_timeout_not_an_answer() -> None:
    assert answer(net(1), (2,), asked([[row(1, -1, offset=Fraction(-1, 4))]]), seconds=1e-9).status == "timeout"


def test_a_search_that_refuted_itself_is_not_replaced_by_weaker_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuted(*_: object, **__: object) -> None:
        raise SelfRefutedError("the bound 1 lies above the reached margin 0; please report this network")

    monkeypatch.setattr(bench.properties, "decide", refuted)
    with pytest.raises(UserError, match="please report"):
        answer(net(0), (2,), asked([[row(1, -1)]]))
