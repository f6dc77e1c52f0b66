"""The bounded graph is the network's own: nothing stale, hidden or misread is ever certified."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

from tests.verifiers.small_nets import Forward, images, labels, linear, lowest_attacked, randomised
from verifiers import IBP, UnsupportedNetworkError
from verifiers.ball import region
from verifiers.bounds import ibp_margins
from verifiers.normalise import Normalize

NORMS = [("linf", Fraction(1, 10)), ("l2", Fraction(1, 2))]
EPS = Fraction(1, 10)


def sound_or_refused(net: nn.Module, norm: str = "linf", eps: Fraction = EPS, x: Tensor | None = None) -> None:
    """The verifier refuses the network or its margin is below what PGD reaches, and at eps 0 near the true margin."""
    x = images(6) if x is None else x
    y = labels(net, x)
    try:
        proof = IBP(norm=norm, eps=eps)(net, x, y)
    except UnsupportedNetworkError:
        return
    assert (proof.margin <= lowest_attacked(net, x, y, norm, eps) + 1e-5).all()


@pytest.mark.parametrize("norm, eps", NORMS)
def test_a_normalisation_with_negative_std_is_refused_or_sound(norm: str, eps: Fraction) -> None:
    def build() -> nn.Module:
        return randomised(nn.Sequential(Normalize([0.5, 0.5], [-0.5, 0.3]), nn.Flatten(), nn.Linear(72, 5)))

    try:
        net = build()
    except ValueError:
        return
    sound_or_refused(net, norm, eps)


def test_an_average_with_a_negative_divisor_is_refused_or_sound() -> None:
    conv, head = nn.Conv2d(2, 4, 3), nn.Linear(16, 5)
    sound_or_refused(randomised(nn.Sequential(conv, nn.AvgPool2d(2, divisor_override=-2), nn.Flatten(), head)))
    sound_or_refused(randomised(
        Forward(lambda s, x: s.head(F.avg_pool2d(s.conv(x), 2, divisor_override=-2).flatten(1)), conv=conv, head=head)
    ))


def test_a_layer_added_after_the_first_trace_is_seen() -> None:
    """The appended layer swaps the two classes: bounds of the old graph would certify the wrong one."""
    net = nn.Sequential(nn.Flatten(), linear([[1], [-1]], [-0.5, 0.5]))
    x = torch.full((1, 1, 1, 1), 0.9)
    assert IBP(eps=EPS)(net, x, torch.tensor([0])).status == ("proved",)
    net.append(linear([[0.25, 0], [0, 1]], [0.0, 0.3]))
    y = labels(net, x)
    assert y.tolist() == [0]
    sound_or_refused(net, x=x)


def test_a_layer_replaced_after_the_first_trace_is_seen() -> None:
    net = randomised(nn.Sequential(nn.Flatten(), nn.Linear(72, 8), nn.ReLU(), nn.Linear(8, 5)))
    sound_or_refused(net)
    net[2] = nn.Identity()
    sound_or_refused(net)


def test_a_forward_that_differs_in_training_is_bounded_as_it_is_in_eval_mode() -> None:
    def function(s: Any, x: Tensor) -> Tensor:
        h = s.head(x)
        return h if s.training else s.swap(h)

    head = nn.Sequential(nn.Flatten(), linear([[1], [-1]], [-0.5, 0.5]))
    net = Forward(function, head=head, swap=linear([[0.1, 0], [0, 1]], [0, 0.3]))
    x = torch.full((1, 1, 1, 1), 0.9)
    ibp_margins(net.train(), region(x, "linf", EPS), torch.tensor([0]))
    sound_or_refused(net.eval(), x=x)


def test_an_optional_second_input_is_not_mistaken_for_the_image() -> None:
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.side = nn.Sequential(nn.Flatten(), linear([[1], [-1]], [-0.8, 0.8])), linear([[9], [-9]])

        def forward(self, x: Tensor, hint: Tensor | None = None) -> Tensor:
            z = self.head(x)
            return z if hint is None else z + self.side(torch.flatten(hint, 1))

    sound_or_refused(Optional(), x=torch.full((1, 1, 1, 1), 0.85))


def test_masks_of_torch_prune_are_seen_after_the_weights_moved() -> None:
    """Its hook refreshes `weight` in forward only; bounds must not be those of the last forward."""
    net = randomised(nn.Sequential(nn.Flatten(), nn.Linear(72, 5)))
    prune.l1_unstructured(net[1], "weight", 0.5)
    y = torch.zeros(6, dtype=torch.int64)
    with torch.no_grad():
        net[1].weight_orig.copy_(-3 * net[1].weight_orig)
    x = images(6)
    try:
        margin = IBP(eps=EPS)(net, x, y).margin
    except UnsupportedNetworkError:
        return
    plain = nn.Sequential(nn.Flatten(), linear((net[1].weight_orig * net[1].weight_mask).tolist(), net[1].bias.tolist()))
    assert (margin <= lowest_attacked(plain, x, y, "linf", EPS) + 1e-5).all()


def test_a_hook_that_changes_an_output_is_refused_or_seen() -> None:
    net = nn.Sequential(nn.Flatten(), linear([[1], [-1]], [-0.5, 0.5]))
    net[1].register_forward_hook(lambda layer, inputs, output: 0.1 * output + torch.tensor([0.0, 0.07]))
    sound_or_refused(net, x=torch.full((1, 1, 1, 1), 0.9))


def test_a_flag_flipped_after_the_first_trace_is_seen() -> None:
    """The layers and modes stay the same, so only the network's own output tells that its graph is another one."""

    def function(s: Any, x: Tensor) -> Tensor:
        h = s.head(x)
        return s.swap(h) if s.flag else h

    head = nn.Sequential(nn.Flatten(), linear([[1], [-1]], [-0.5, 0.5]))
    net = Forward(function, head=head, swap=linear([[0.1, 0], [0, 1]], [0, 0.3]))
    x = torch.full((1, 1, 1, 1), 0.9)
    net.flag = False
    assert IBP(eps=EPS)(net, x, torch.tensor([0])).status == ("proved",)
    net.flag = True
    sound_or_refused(net, x=x)


def test_a_layer_whose_forward_was_replaced_is_refused_or_seen() -> None:
    net = nn.Sequential(nn.Flatten(), linear([[1], [-1]], [-0.5, 0.5]))
    net[1].forward = lambda x: 0.1 * F.linear(x, net[1].weight, net[1].bias) + torch.tensor([0.0, 0.07])
    sound_or_refused(net, x=torch.full((1, 1, 1, 1), 0.9))
