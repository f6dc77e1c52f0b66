"""Interval bounds and CROWN-IBP through every architecture of the suite, as a certificate and as what is trained on."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import nn

from bench.models import ARCHITECTURES, build_model
from bench.objectives import CrownIBPTraining, IBPTraining
from bench.train import Progress
from tests.verifiers.small_nets import exact, images, labels, points_of_ball, randomised
from verifiers import IBP
from verifiers.backward import crown_ibp_margins
from verifiers.ball import Interval, region
from verifiers.bounds import ibp_margins
from verifiers.rounding import allowance

EPS = Fraction(1, 1000)
SHAPE = (3, 32, 32)
QUICK = {"resnet18", "vgg16", "mobilenet_v2", "wrn_28_2"}
ALL = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in sorted(ARCHITECTURES)]
TRAINED = [one for one in ALL if one.values[0] != "resnet101"]  # untrained, its intervals overflow float32 in training mode


def thin(name: str) -> nn.Module:
    """The architecture at a sixteenth of its width."""
    return build_model(f"{name}@1/16", SHAPE, 5, (0.4, 0.5, 0.6), (0.2, 0.3, 0.3), seed=1)


@pytest.mark.parametrize("name", ALL)
def test_no_point_of_the_ball_goes_below_the_margins_of_any_architecture(name: str) -> None:
    net = exact(randomised(thin(name), gain=1.0))
    x = images(2, SHAPE)
    y, eps = labels(net, x.double()), EPS
    box = region(x.double(), "linf", eps)
    logits = net(points_of_ball(x, "linf", eps, 6).flatten(0, 1)).unflatten(0, (6, 2))
    differences = (logits.gather(2, y.view(1, -1, 1).expand(6, -1, 1)) - logits).amin(0)
    intervals, relaxed = ibp_margins(net, box, y), crown_ibp_margins(net, box, y, fused=True)
    assert (intervals <= differences + 1e-9).all()
    assert (relaxed <= differences + 1e-9).all()
    clean = net(x.double())
    point = Interval(x.double(), x.double())
    for margins in (ibp_margins(net, point, y), crown_ibp_margins(net, point, y, fused=True)):
        torch.testing.assert_close(margins, clean.gather(1, y[:, None]) - clean, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("name", ALL)
def test_the_certificate_answers_for_every_architecture_within_its_allowance(name: str) -> None:
    net, x = randomised(thin(name), gain=1.0), images(2, SHAPE)
    y, ball = labels(net, x), region(x, "linf", Fraction(1, 10**7))
    assert IBP(eps=Fraction(1, 10**7))(net, x, y).predicted.tolist() == y.tolist()
    wide = Interval(ball.lower.double(), ball.upper.double())
    difference = (ibp_margins(net, ball, y).double() - ibp_margins(exact(net), wide, y)).abs().amax(1)
    assert (difference <= allowance(net, ball)).all()


@pytest.mark.parametrize("name", TRAINED)
def test_every_architecture_trains_on_its_bounds(name: str) -> None:
    """Gradients reach every weight, through BatchNorm in training mode too."""
    model, x, y = thin(name), images(3, SHAPE), torch.tensor([0, 1, 4])
    for objective in (IBPTraining(EPS), CrownIBPTraining(EPS, kappa_start=0.5, kappa_end=0.5, fused=True)):
        model.zero_grad()
        loss = objective(model, x, y, Progress(1, 20, 10))
        loss.backward()
        assert torch.isfinite(loss)
        for key, parameter in model.named_parameters():
            assert parameter.grad is not None, key
            assert torch.isfinite(parameter.grad).all(), key
    assert model.training
