"""The backward linear relaxation that training uses: auto-LiRPA's CROWN-IBP, the toy of all verifiers, samples, gradients."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.models import build_model
from bench.sparsity import TopKScores, attach, kept_of, prunable
from tests.verifiers.small_nets import (
    RULE_NETS,
    SHAPE_NETS,
    Forward,
    exact,
    images,
    labels,
    linear,
    points_of_ball,
    randomised,
)
from verifiers.backward import bounded, crown_ibp_margins, interval_rows, relaxed_rows
from verifiers.ball import Interval, region
from verifiers.bounds import difference_rows, ibp_margins
from verifiers.lirpa import Relaxation
from verifiers.proof import UnsupportedNetworkError

EPS = Fraction(1, 10)
NETS = {**RULE_NETS, **SHAPE_NETS}
CURVED = {"Linear", "Tanh", "Sigmoid"}  # the network "Linear" holds a Tanh
RELAXED = [name for name in NETS if name not in CURVED]


def worst(margins: Tensor, y: Tensor) -> Tensor:
    return margins.scatter(1, y[:, None], torch.inf).amin(1)


# ---- against auto-LiRPA --------------------------------------------------------------------------------------------------

COMPARED = [
    "Conv2d", "Conv2d grouped", "Conv2d dilated", "Conv2d rectangular", "Normalize", "BatchNorm2d", "BatchNorm1d", "ReLU6",
    "Hardtanh", "MaxPool2d", "AvgPool2d", "AvgPool2d padded", "AdaptiveAvgPool2d", "residual", "torch.cat", "view by size",
    "mean over the pixels",
]


@pytest.mark.parametrize("name", COMPARED)
def test_every_relaxation_is_auto_lirpas_crown_ibp(name: str) -> None:
    net, x = randomised(NETS[name]()), images(3)
    y = labels(net, x)
    ours = worst(crown_ibp_margins(net, region(x, "linf", EPS), y), y)
    torch.testing.assert_close(ours, Relaxation(net, x, "linf", EPS).margins(x, y, "CROWN-IBP"), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("arch", ["mlp", "cnn_small"])
def test_the_margins_of_a_pruned_network_are_auto_lirpas(arch: str) -> None:
    net = randomised(build_model(arch, (1, 12, 12), 10, (0.3,), (0.4,)), kept=0.2)
    x = images(8, (1, 12, 12))
    y = labels(net, x)
    ours = worst(crown_ibp_margins(net, region(x, "linf", EPS), y), y)
    torch.testing.assert_close(ours, Relaxation(net, x, "linf", EPS).margins(x, y, "CROWN-IBP"), atol=1e-5, rtol=1e-5)


# ---- by hand -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lower, upper, ibp, crown_ibp",
    [
        ([0.3, 0.0], [0.9, 0.5], -0.6, -0.109091), ([0.3, -0.1], [0.9, 0.5], -0.8, -0.3), ([0.3, 0.2], [0.6, 0.5], 0.1, 0.3),
    ],
)  # fmt: skip
def test_the_toy_of_all_verifiers(lower: list[float], upper: list[float], ibp: float, crown_ibp: float) -> None:
    """Margin relu(x1 + x2) - relu(x1 - x2): the table's interval, CROWN-IBP and half-half rows."""
    net = nn.Sequential(linear([[1, 1], [1, -1]]), nn.ReLU()).double()
    box = Interval(torch.tensor([lower], dtype=torch.float64), torch.tensor([upper], dtype=torch.float64))
    for beta, expected in ((0.0, ibp), (1.0, crown_ibp), (0.5, (ibp + crown_ibp) / 2)):
        for fused in (False, True):
            margins = crown_ibp_margins(net, box, torch.tensor([0]), beta, fused)
            assert margins[0].tolist() == pytest.approx([0, expected], abs=1e-6)


def test_a_single_linear_layer_is_bounded_exactly() -> None:
    net = exact(randomised(nn.Sequential(nn.Flatten(), nn.Linear(72, 5)), seed=1))
    x = images(4, dtype=torch.float64)
    y, box = labels(net, x), region(x, "linf", EPS)
    margins = crown_ibp_margins(net, box, y)
    torch.testing.assert_close(margins, ibp_margins(net, box, y))
    for n, j in ((0, 1), (2, 4)):
        row = net[1].weight[y[n]] - net[1].weight[j]
        corner = torch.where(row > 0, box.lower[n].flatten(), box.upper[n].flatten())
        logits = net(corner.view(1, 2, 6, 6))[0]
        torch.testing.assert_close(margins[n, j], logits[y[n]] - logits[j])


def test_a_maximum_among_points_and_wider_rivals_is_not_taken_for_the_point() -> None:
    """max(1, z) with z in [0, 3]: the entry of the largest lower bound is the constant 1, but the maximum reaches 3."""
    net = nn.Sequential(nn.MaxPool2d((1, 2)), nn.Flatten(), linear([[-1.0], [0.0]]))
    box = Interval(torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[1.0, 3.0]]]]))
    assert crown_ibp_margins(net, box, torch.tensor([0]))[0].tolist() == [0, -3]
    narrow = Interval(torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[2.0, 1.0]]]]))
    assert crown_ibp_margins(net, narrow, torch.tensor([0]))[0].tolist() == [0, -2]


# ---- soundness -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RELAXED)
def test_no_point_of_the_box_goes_below_the_relaxation(name: str) -> None:
    net, x = exact(randomised(NETS[name]())), images(3)
    y = labels(net, x.double())
    for eps in (Fraction(1, 50), Fraction(1, 4)):
        box = region(x.double(), "linf", eps)
        logits = net(points_of_ball(x, "linf", eps, 40).flatten(0, 1)).unflatten(0, (40, 3))
        differences = logits.gather(2, y.view(1, -1, 1).expand(40, -1, 1)) - logits
        for fused in (False, True):
            assert (crown_ibp_margins(net, box, y, fused=fused) <= differences.amin(0) + 1e-9).all()


@pytest.mark.parametrize("name", RELAXED)
def test_at_eps_zero_the_relaxation_is_the_network(name: str) -> None:
    net, x = exact(randomised(NETS[name](), seed=1)), images(3, dtype=torch.float64)
    y, logits = labels(net, x), net(x)
    margins = crown_ibp_margins(net, Interval(x, x), y)
    torch.testing.assert_close(margins, logits.gather(1, y[:, None]) - logits, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", sorted(CURVED))
def test_an_operation_without_a_relaxation_is_refused_by_name(name: str) -> None:
    net = NETS[name]().eval()
    with pytest.raises(UnsupportedNetworkError, match=r"Tanh|Sigmoid"):
        crown_ibp_margins(net, region(images(2), "linf", EPS), torch.tensor([0, 1]))


REFUSED: dict[str, tuple[nn.Module, str]] = {
    "ceil_mode": (nn.Sequential(nn.MaxPool2d(4, ceil_mode=True), nn.Flatten(), nn.Linear(8, 5)), "ceil_mode"),
    "broadcast sum": (
        Forward(lambda s, x: s.head((x + x.mean((2, 3), keepdim=True)).flatten(1)), head=nn.Linear(72, 5)), "one shape"
    ),
    "sum with a factor": (Forward(lambda s, x: s.head(torch.add(x, x, alpha=2).flatten(1)), head=nn.Linear(72, 5)), "sums"),
    "cat of images": (Forward(lambda s, x: s.head(torch.cat([x, x]).flatten(1)), head=nn.Linear(72, 5)), "images of a batch"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_relaxed_rightly_is_refused(name: str) -> None:
    net, words = REFUSED[name]
    with pytest.raises(UnsupportedNetworkError, match=words):
        crown_ibp_margins(net.eval(), region(images(2), "linf", EPS), torch.tensor([0, 1]))


# ---- mixing and the fused form -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Conv2d grouped", "residual", "MaxPool2d"])
def test_the_fused_form_relaxes_the_worst_class_by_intervals_and_keeps_the_intervals_of_others(name: str) -> None:
    net, x = exact(randomised(NETS[name]())), images(6, dtype=torch.float64)
    y, box = labels(net, x), region(x, "linf", EPS)
    intervals, relaxed = ibp_margins(net, box, y), crown_ibp_margins(net, box, y)
    fused = crown_ibp_margins(net, box, y, fused=True)
    chosen = F.one_hot(intervals.scatter(1, y[:, None], torch.inf).argmin(1), 5).bool()
    torch.testing.assert_close(fused, torch.where(chosen, relaxed, intervals))
    assert (fused[chosen] > intervals[chosen] + 1e-3).any(), "else nothing was relaxed"


def test_beta_mixes_and_zero_is_interval_bounds() -> None:
    net, x = randomised(NETS["residual"]()), images(4)
    y, box = labels(net, x), region(x, "linf", EPS)
    rows = difference_rows(y, 5, x.dtype)
    value = bounded(net, box)
    kept = F.one_hot(y, 5) == 0
    torch.testing.assert_close(crown_ibp_margins(net, box, y, beta=0.0), ibp_margins(net, box, y), rtol=0, atol=0)
    torch.testing.assert_close(interval_rows(value, rows).flatten(), ibp_margins(net, box, y)[kept], atol=1e-4, rtol=1e-5)
    mixed = 0.3 * relaxed_rows(value, rows) + 0.7 * interval_rows(value, rows)
    torch.testing.assert_close(crown_ibp_margins(net, box, y, beta=0.3)[kept], mixed.flatten())


# ---- gradients -----------------------------------------------------------------------------------------------------------

TRAINED: dict[str, Callable[[], nn.Module]] = {
    "convolution": lambda: nn.Sequential(nn.Conv2d(1, 2, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)),
    "BatchNorm": lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)),
    "maximum": lambda: nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)),
    "average": lambda: nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8, 3)),
}


@pytest.mark.parametrize("name, fused", [*((name, False) for name in TRAINED), ("convolution", True)])
def test_the_gradient_agrees_with_finite_differences(name: str, fused: bool) -> None:
    net = exact(randomised(TRAINED[name](), seed=4))
    box, y = region(images(2, (1, 4, 4), dtype=torch.float64), "linf", EPS), torch.tensor([0, 2])

    class Bounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self) -> Tensor:
            return crown_ibp_margins(self.net, box, y, 0.6, fused)

    holder = Bounded()
    for weight in ("net.0.weight", "net.0.bias"):
        start = dict(holder.named_parameters())[weight].detach().clone().requires_grad_()
        assert torch.autograd.gradcheck(
            lambda value, at=weight: torch.func.functional_call(holder, {at: value}, ()), (start,), eps=1e-7, atol=1e-5
        )


@pytest.mark.parametrize("fused", [False, True])
def test_the_gradient_reaches_every_score_the_pruned_ones_too(fused: bool) -> None:
    net = randomised(build_model("cnn_small", (1, 8, 8), 5, (0.3,), (0.4,)))
    parts = []
    for layer in prunable(net).values():
        parts.append(TopKScores(torch.rand(layer.weight.shape), kept_of(layer.weight.numel(), Fraction(1, 2))))
        attach(layer, parts[-1])
    x = images(4, (1, 8, 8))
    crown_ibp_margins(net, region(x, "linf", EPS), labels(net, x), fused=fused).sum().backward()
    for part in parts:
        assert part.scores.grad is not None
        assert float(part.scores.grad[part.mask() == 0].abs().sum()) > 0
