"""Every interval rule on its own small network; what has no rule is refused by name."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.verifiers.small_nets import (
    RULE_NETS,
    SHAPE_NETS,
    Forward,
    exact,
    images,
    labels,
    lowest_reached,
    points_of_ball,
    randomised,
)
from verifiers import UnsupportedNetworkError
from verifiers.ball import region
from verifiers.bounds import INTERVAL_RULES, ibp_logits, ibp_margins, smallest_margin
from verifiers.graph import operation, trace

NORMS = [("linf", Fraction(1, 10)), ("l2", Fraction(1, 2))]
EPS = Fraction(1, 10)
NETS = {**RULE_NETS, **SHAPE_NETS}


def test_the_networks_below_use_every_rule() -> None:
    used: set[Any] = set()
    for build in NETS.values():
        net = build()
        modules = dict(net.named_modules())
        used |= {operation(node, modules) for node in trace(net).nodes if node.op not in ("placeholder", "output", "get_attr")}
    assert used == set(INTERVAL_RULES)


@pytest.mark.parametrize("norm, eps", NORMS)
@pytest.mark.parametrize("name", NETS)
def test_no_point_of_the_ball_leaves_the_bounds(name: str, norm: str, eps: Fraction) -> None:
    net, x = exact(randomised(NETS[name]())), images(3)
    y, ball = labels(net, x.double()), region(x.double(), norm, eps)
    bounds = ibp_logits(net, ball)
    logits = net(points_of_ball(x, norm, eps, 40).flatten(0, 1)).unflatten(0, (40, 3))
    assert (bounds.lower <= logits + 1e-12).all()
    assert (logits <= bounds.upper + 1e-12).all()
    reached = lowest_reached(net.float(), x, y, norm, eps)
    assert (smallest_margin(ibp_margins(exact(net), region(x.double(), norm, eps), y), y) <= reached + 1e-6).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", NETS)
def test_at_eps_zero_every_rule_is_the_layer_itself(name: str, norm: str) -> None:
    net, x = exact(randomised(NETS[name](), seed=1)), images(3, dtype=torch.float64)
    for part in ibp_logits(net, region(x, norm, Fraction(0))):
        torch.testing.assert_close(part, net(x), atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("norm, eps", NORMS)
def test_bounds_leave_the_image_untouched_even_if_layers_work_in_place(norm: str, eps: Fraction) -> None:
    net = nn.Sequential(nn.Hardtanh(0.3, 0.6, inplace=True), nn.Flatten(), nn.ReLU(inplace=True), nn.Linear(72, 5))
    x = images(2)
    before = x.clone()
    ibp_margins(net, region(x, norm, eps), torch.tensor([0, 1]))
    assert torch.equal(x, before)


# -- refusals ----------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[nn.Module, str]] = {
    "LeakyReLU": (nn.Sequential(nn.LeakyReLU(), nn.Flatten(), nn.Linear(72, 5)), "LeakyReLU"),
    "Softmax": (nn.Sequential(nn.Flatten(), nn.Linear(72, 5), nn.Softmax(1)), "Softmax"),
    "GELU": (nn.Sequential(nn.GELU(), nn.Flatten(), nn.Linear(72, 5)), "GELU"),
    "LayerNorm": (nn.Sequential(nn.Flatten(), nn.LayerNorm(72), nn.Linear(72, 5)), "LayerNorm"),
    "ConvTranspose2d": (nn.Sequential(nn.ConvTranspose2d(2, 2, 2), nn.Flatten(), nn.Linear(98, 5)), "ConvTranspose2d"),
    "subtraction": (Forward(lambda s, x: s.head((x - x).flatten(1)), head=nn.Linear(72, 5)), "sub"),
    "negation": (Forward(lambda s, x: s.head((-x).flatten(1)), head=nn.Linear(72, 5)), "neg"),
    "product": (Forward(lambda s, x: s.head((x * 2).flatten(1)), head=nn.Linear(72, 5)), "mul"),
    "view across images": (Forward(lambda s, x: s.head(x.view(-1, 36)), head=nn.Linear(36, 5)), "mixes the images"),
    "mean over images": (Forward(lambda s, x: s.head(x.mean((0, 2), keepdim=True).flatten(1)), head=nn.Linear(12, 5)), "mean"),
    "mean over everything": (Forward(lambda s, x: s.head(x.flatten(1)) + x.mean(), head=nn.Linear(72, 5)), "mean"),
    "one channel alone": (Forward(lambda s, x: s.head(x[:, 0].flatten(1)), head=nn.Linear(36, 5)), "getitem"),
    "transposed": (Forward(lambda s, x: s.head(x.T.flatten(1)), head=nn.Linear(72, 5)), "'T'"),
    "F.dropout in eval mode": (Forward(lambda s, x: s.head(F.dropout(x, 0.5).flatten(1)), head=nn.Linear(72, 5)), "dropout"),
    "constant": (Forward(lambda s, x: s.head(x.flatten(1) + 0.5), head=nn.Linear(72, 5)), "constant"),
    "parameter": (
        Forward(lambda s, x: F.linear(x.flatten(1), s.head.weight * (s.head.weight > 0)), head=nn.Linear(72, 5)), "head.weight"
    ),
    "reflected padding": (
        nn.Sequential(nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), nn.Flatten(), nn.Linear(72, 5)), "reflect"
    ),
    "branch on values": (
        Forward(lambda s, x: s.head(x.flatten(1)) if x.sum() > 0 else s.head(-x.flatten(1)), head=nn.Linear(72, 5)), "traced"
    ),
    "two outputs": (Forward(lambda s, x: (s.head(x.flatten(1)), x), head=nn.Linear(72, 5)), "one tensor"),
    "scaled sum": (Forward(lambda s, x: s.head(torch.add(x, x, alpha=-2).flatten(1)), head=nn.Linear(72, 5)), "add"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_sound_rule_is_refused_by_name(name: str) -> None:
    net, word = REFUSED[name]
    with pytest.raises(UnsupportedNetworkError, match=word):
        ibp_margins(net.eval(), region(images(2), "linf", EPS), torch.tensor([0, 1]))


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(2), nn.Dropout(0.1), nn.Dropout2d(0.1)])
def test_layers_in_training_mode_are_refused(layer: nn.Module) -> None:
    net = nn.Sequential(layer, nn.Flatten(), nn.Linear(72, 5)).train()
    with pytest.raises(UnsupportedNetworkError, match=f"{type(layer).__name__}.*eval mode"):
        ibp_margins(net, region(images(2), "linf", EPS), torch.tensor([0, 1]))


def test_batchnorm_without_running_statistics_is_refused() -> None:
    net = nn.Sequential(nn.BatchNorm2d(2, track_running_stats=False), nn.Flatten(), nn.Linear(72, 5)).eval()
    with pytest.raises(UnsupportedNetworkError, match="running statistics"):
        ibp_margins(net, region(images(2), "linf", EPS), torch.tensor([0, 1]))


def test_dropout_without_effect_is_accepted_in_training_mode() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Dropout(0.0), nn.Linear(72, 5)).train()
    assert ibp_margins(net, region(images(2), "linf", EPS), torch.tensor([0, 1])).shape == (2, 5)
