"""The network as sparse matrices: the same function, only what matters, and bounds of what rounding adds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.verifiers.small_nets import RULE_NETS, Forward, exact, images, linear, randomised
from tests.verifiers.test_relax import NETS
from verifiers import UnsupportedNetworkError, memory
from verifiers.ball import Interval
from verifiers.relax import relax
from verifiers.unrolled import Unrolled


@pytest.mark.parametrize("kept", [1.0, 0.2])
@pytest.mark.parametrize("name", NETS)
def test_outputs_are_those_of_the_network_far_outside_of_the_pixels_too(name: str, kept: float) -> None:
    net, x = exact(randomised(NETS[name](), kept=kept)), images(1, dtype=torch.float64)
    points = 20 * (images(9, seed=4, dtype=torch.float64) - 0.5)
    got = torch.from_numpy(Unrolled(net, x).inputs(points)[-1].T.copy())
    torch.testing.assert_close(got, net(points).detach(), atol=1e-8, rtol=1e-9)


def test_neurons_that_no_output_depends_on_and_zero_weights_take_no_room() -> None:
    """Of four neurons, the second reaches no output, the third only a neuron that reaches none."""
    first, second = linear([[1, 2], [3, 4], [5, 0], [0, 7]], [1, 1, 1, 1]), linear([[1, 0, 0, 2], [0, 0, 3, 0]])
    net = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), linear([[1, 0], [-1, 0]])).double().requires_grad_(False)
    steps = Unrolled(net, torch.zeros(1, 2, dtype=torch.float64)).steps
    assert steps[0].parts[0].toarray().tolist() == [[1, 2], [0, 7]]
    assert steps[0].parts[0].nnz == 3
    assert steps[1].parts[1].toarray().tolist() == [[1, 2]]
    assert steps[2].parts[2].toarray().tolist() == [[1], [-1]]


def test_what_cancels_between_two_affine_layers_is_allowed_for() -> None:
    """(1e9 x) - (1e9 x) as two layers: every coefficient is 0, the sums behind them are 2e9."""
    net = nn.Sequential(linear([[1e9], [1e9]]), linear([[1, -1]], [1.0])).double().requires_grad_(False)
    one = torch.ones(1, 1, dtype=torch.float64)
    box = relax(Unrolled(net, one), Interval(one, one))
    assert (box.outputs.matrix == 0).all()
    assert box.allowed.item() >= 2e9 * torch.finfo(torch.float64).eps


def test_the_forward_pass_on_a_box_lies_within_the_allowance_of_exact_arithmetic() -> None:
    """Weights of many magnitudes, in rational numbers against what the box computes."""
    from fractions import Fraction

    generator = torch.Generator().manual_seed(0)
    layers = [linear((10 ** (8 * torch.rand(4, 4, generator=generator) - 4) * torch.randn(4, 4, generator=generator)).tolist())
              for _ in range(3)]
    net = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2]).double().requires_grad_(False)
    x = images(1, (4,), dtype=torch.float64)
    box = relax(Unrolled(net, x), Interval(x, x))
    values = [Fraction(one) for one in x[0].tolist()]
    for i, layer in enumerate(layers):
        values = [sum((Fraction(w) * v for w, v in zip(row, values)), Fraction(0)) for row in layer.weight.tolist()]
        values = values if i == 2 else [max(v, Fraction(0)) for v in values]
    got = box.neurons(box.lower[None]) @ box.outputs.matrix.mT + box.outputs.constant
    for value, want, allowed in zip(got[0].tolist(), values, box.allowed.tolist()):
        assert abs(Fraction(value) - want) <= Fraction(allowed)
        assert allowed <= 1e-6 * float(np.abs([float(v) for v in values]).max())


@pytest.mark.parametrize("name", ["Tanh", "Sigmoid"])
def test_other_operations_are_refused_by_name(name: str) -> None:
    with pytest.raises(UnsupportedNetworkError, match=name):
        Unrolled(exact(randomised(RULE_NETS[name]())), images(1, dtype=torch.float64))


def test_a_network_too_large_to_unroll_is_refused_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = exact(randomised(RULE_NETS["ReLU"]())), images(1, dtype=torch.float64)
    Unrolled(net, x)
    monkeypatch.setattr(memory, "LIMIT", 40 * 100)
    with pytest.raises(UnsupportedNetworkError, match="prune the network"):
        Unrolled(net, x)


def test_a_relu_in_place_that_spoils_another_reader_is_refused() -> None:
    """y + relu_(y) computes 2 relu(y); as a graph it reads y + relu(y)."""
    net = Forward(
        lambda s, x: s.head(torch.add(*(lambda z: (z, F.relu(z, inplace=True)))(s.a(x)))), a=nn.Linear(4, 4), head=nn.Linear(4, 3)
    )
    with pytest.raises(UnsupportedNetworkError):
        Unrolled(exact(randomised(net)).requires_grad_(False), images(1, (4,), dtype=torch.float64))
