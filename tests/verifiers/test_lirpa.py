"""CROWN and CROWN-IBP through auto-LiRPA: by hand, against our IBP, and what happens when the library misbehaves."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.models import PLAIN, build_model
from tests.verifiers.small_nets import RULE_NETS, exact, images, labels, linear, lowest_reached, margins_at, randomised
from verifiers import IBP, Crown, CrownIBP, UnsupportedNetworkError, lirpa_compat
from verifiers.ball import region
from verifiers.bounds import difference_rows, ibp_margins
from verifiers.lirpa import Relaxation, default_dtype
from verifiers.lowering import lower
from verifiers.rounding import allowance

SIDES = {"mlp": 8, "cnn_small": 8, "cnn_large": 8, "lenet": 16}
EPS = Fraction(1, 50)


def library_bounds(net: nn.Module, lower_x: Tensor, upper_x: Tensor, y: Tensor, method: str, classes: int) -> Tensor:
    """auto-LiRPA's margins [N, C - 1] over a box of pixels, in float64."""
    with default_dtype(torch.float64), torch.no_grad():
        lowered = lower(net, lower_x)
        low, high = lowered.move(lower_x), lowered.move(upper_x)
        bounded = lirpa_compat.BoundedModule(lowered.network, low, bound_opts={"conv_mode": "matrix"}, verbose=False)
        bounded.eval()
        ball = lirpa_compat.PerturbationLpNorm(norm=float("inf"), x_L=low, x_U=high)
        rows = difference_rows(y, classes, torch.float64)
        perturbed = lirpa_compat.BoundedTensor((low + high) / 2, ball)
        bounds, _ = bounded.compute_bounds(x=(perturbed,), C=rows, method=method, bound_upper=False)
    return bounds


TOY = {
    "clipped": ([0.3, 0.0], [0.9, 0.5], -0.6, -0.109091),
    "not clipped": ([0.3, -0.1], [0.9, 0.5], -0.8, -0.3),
    "clipped to the image's own range": ([0.3, 0.2], [0.6, 0.5], 0.1, 0.3),
}


@pytest.mark.parametrize("name", TOY)
def test_toy_table_of_crown_ibp_and_its_mix_with_ibp(name: str) -> None:
    low, high, ibp, crown = TOY[name]
    net, y = nn.Sequential(linear([[1, 1], [1, -1]]), nn.ReLU()).double(), torch.tensor([0])
    box = torch.tensor([low], dtype=torch.float64), torch.tensor([high], dtype=torch.float64)
    got = {method: library_bounds(net, *box, y, method, 2).item() for method in ("IBP", "CROWN-IBP", "CROWN")}
    assert got == pytest.approx({"IBP": ibp, "CROWN-IBP": crown, "CROWN": crown}, abs=1e-6)
    assert 0.5 * got["CROWN-IBP"] + 0.5 * got["IBP"] == pytest.approx((ibp + crown) / 2, abs=1e-6)


@pytest.mark.parametrize("method", ["CROWN-IBP", "CROWN"])
def test_the_relaxation_of_the_toy_image_uses_the_clipped_box(method: str) -> None:
    net = nn.Sequential(linear([[1, 1], [1, -1]]), nn.ReLU()).double()
    x = torch.tensor([[0.6, 0.2]], dtype=torch.float64)
    with torch.no_grad():
        margin = Relaxation(net, x, "linf", Fraction(3, 10)).margins(x, torch.tensor([0]), method)
    assert margin.item() == pytest.approx(-0.109091, abs=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", PLAIN)
def test_ibp_margins_equal_those_of_auto_lirpa(name: str, channels: int) -> None:
    shape, mean, std = (channels, SIDES[name], SIDES[name]), (0.3, 0.5, 0.7)[:channels], (0.2, 0.5, 1.5)[:channels]
    net = exact(randomised(build_model(name, shape, 5, mean, std), kept=0.2))
    x = images(3, shape, dtype=torch.float64)
    y, ball = labels(net, x), region(x, "linf", EPS)
    ours = ibp_margins(net, ball, y)
    ours = ours[torch.ones_like(ours).scatter(1, y[:, None], 0).bool()].view(3, 4)
    torch.testing.assert_close(ours, library_bounds(net, ball.lower, ball.upper, y, "IBP", 5), rtol=1e-5, atol=0)


@pytest.mark.parametrize("norm, eps", [("linf", Fraction(1, 50)), ("l2", Fraction(1, 5))])
@pytest.mark.parametrize("verifier", [CrownIBP, Crown])
def test_one_linear_layer_is_bounded_exactly(verifier: Any, norm: str, eps: Fraction) -> None:
    """The margin falls by eps times the dual norm of w_y - w_j."""
    net = randomised(nn.Sequential(nn.Flatten(), nn.Linear(72, 4)))
    x = 0.3 + 0.4 * images(3)
    y = labels(net, x)
    rows = net[1].weight[y].unsqueeze(1) - net[1].weight
    fall = float(eps) * (rows.abs().sum(2) if norm == "linf" else rows.norm(dim=2))
    margins = net(x).gather(1, y[:, None]) - net(x) - fall
    expected = margins.scatter(1, y[:, None], torch.inf).amin(1)
    assert 0.1 * expected.abs().max() > 0
    box_holds_ball = norm == "linf" or ((x - float(eps)).min() > 0 and (x + float(eps)).max() < 1)
    assert box_holds_ball
    torch.testing.assert_close(verifier(norm=norm, eps=eps)(net, x, y).margin, expected.double(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("norm, eps", [("linf", Fraction(1, 50)), ("l2", Fraction(1, 10))])
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name == "cnn_large" else []) for name in PLAIN])
def test_models_of_the_suite_are_bounded_in_order_and_soundly(name: str, norm: str, eps: Fraction) -> None:
    """Radii and margins ibp <= crown-ibp <= crown <= what an attack reaches; at this eps some images are certified."""
    side = 4 if name == "cnn_large" else SIDES[name]  # CROWN through its four convolutions is slow at 8x8
    shape = (1, side, side)
    net = randomised(build_model(name, shape, 5, (0.4,), (0.5,)), gain=1.2, kept=0.5)
    x = images(4, shape)
    y = labels(net, x)
    proofs = [verifier(norm=norm, eps=eps)(net, x, y) for verifier in (IBP, CrownIBP, Crown)]
    for looser, tighter in itertools.pairwise(proofs):
        assert (looser.radius <= tighter.radius).all()
        assert (looser.margin <= tighter.margin + 1e-6).all()
    slack = allowance(net, region(x, norm, eps)).double()
    assert (proofs[2].margin <= lowest_reached(net, x, y, norm, eps) + slack).all()
    assert (proofs[2].margin > proofs[0].margin + 1e-3).any(), "crown is tighter somewhere, so the order says something"
    assert proofs[2].details["raw_margin"].shape == (4,)


def test_certified_points_are_those_whose_margin_is_positive_and_label_right() -> None:
    net = nn.Sequential(nn.Flatten(), linear([[1], [-1]], [-0.5, 0.5]))
    x = torch.tensor([0.9, 0.75, 0.5625, 0.25]).view(4, 1, 1, 1)
    for verifier in (CrownIBP, Crown):
        proof = verifier(eps=Fraction(1, 8))(net, x, torch.tensor([0, 0, 0, 0]))
        assert proof.status == ("proved", "proved", "open", "open")
        assert proof.margin.tolist() == pytest.approx([0.55, 0.25, -0.125, -0.75], abs=1e-6)
        assert any("auto-LiRPA 0.3" in note for note in proof.notes)


def test_a_batch_gives_the_margins_of_its_images_one_at_a_time() -> None:
    net, x = randomised(RULE_NETS["BatchNorm2d"]()), images(5)
    y = labels(net, x)
    for norm in ("linf", "l2"):
        whole = Crown(norm=norm, eps=EPS)(net, x, y).margin
        single = torch.cat([Crown(norm=norm, eps=EPS)(net, x[i : i + 1], y[i : i + 1]).margin for i in range(5)])
        torch.testing.assert_close(whole, single, atol=1e-4, rtol=1e-4)


def test_margins_do_not_depend_on_how_batches_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = randomised(RULE_NETS["ReLU"]()), images(5)
    y = labels(net, x)
    whole = Crown(eps=EPS)(net, x, y).margin
    monkeypatch.setattr("verifiers.lirpa.BATCH", 2)
    torch.testing.assert_close(Crown(eps=EPS)(net, x, y).margin, whole, atol=1e-5, rtol=1e-5)


def test_statistics_changed_between_calls_are_seen() -> None:
    """U9: the library keeps its own copy of buffers."""
    net, x = randomised(RULE_NETS["BatchNorm2d"]()), images(4)
    y = labels(net, x)
    before = Crown(eps=EPS)(net, x, y).margin
    with torch.no_grad():
        net[1].running_mean += 5
    after = Crown(eps=EPS)(net, x, y).margin
    assert not torch.allclose(before, after)
    assert (after <= lowest_reached(net, x, y, "linf", EPS) + 1e-4).all()


def test_the_network_and_torchs_settings_are_left_as_they_were() -> None:
    net, x = randomised(RULE_NETS["BatchNorm2d"]()), images(2)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    random_state = torch.get_rng_state()
    Crown(eps=EPS)(net, x, labels(net, x))
    assert torch.get_default_dtype() == torch.float32
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in net.parameters())


def test_difference_rows_by_hand() -> None:
    rows = difference_rows(torch.tensor([1, 0]), 3, torch.float32)
    assert rows.tolist() == [[[-1, 1, 0], [0, 1, -1]], [[1, -1, 0], [1, 0, -1]]]


# -- a library that is broken on purpose -------------------------------------------------------------------------------


def broken(change: Callable[[Tensor, float], Tensor]) -> type:
    """auto-LiRPA's module with its lower bounds changed; `change` also gets the radius that was asked for."""

    class Broken(lirpa_compat.BoundedModule):  # type: ignore[misc]
        def compute_bounds(self, x: Any = None, **options: Any) -> Any:
            low, high = super().compute_bounds(x=x, **options)
            return change(low, float(x[0].ptb.eps or 0)), high

    return Broken


class Scaled(lirpa_compat.BoundedModule):  # type: ignore[misc]
    """Another forward than the network's."""

    def forward(self, *inputs: Any, **options: Any) -> Any:
        return 1.01 * super().forward(*inputs, **options)


BROKEN: dict[str, type] = {
    "one too high": broken(lambda low, eps: low + 1),
    "one too high off the centre": broken(lambda low, eps: low + (eps > 0)),
    "slightly too high at the full radius": broken(lambda low, eps: low + 0.01 * (eps > 0.019)),
    "too low at the centre": broken(lambda low, eps: low - 0.01),
    "not a number": broken(lambda low, eps: low * torch.nan),
    "infinite": broken(lambda low, eps: low + torch.inf * (eps > 0)),
    "another forward": Scaled,
}


@pytest.mark.parametrize("verifier", [CrownIBP, Crown])
@pytest.mark.parametrize("name", BROKEN)
def test_wrong_bounds_are_caught_before_they_are_believed(monkeypatch: pytest.MonkeyPatch, name: str, verifier: Any) -> None:
    net, x = randomised(nn.Sequential(nn.Flatten(), nn.Linear(72, 4))), 0.3 + 0.4 * images(3)
    y = labels(net, x)
    assert verifier(eps=EPS)(net, x, y).status
    monkeypatch.setattr(lirpa_compat, "BoundedModule", BROKEN[name])
    with pytest.raises(UnsupportedNetworkError, match="failed the self-check"):
        verifier(eps=EPS)(net, x, y)


class Failing(lirpa_compat.BoundedModule):  # type: ignore[misc]
    """Built once and good for one batch; whatever is asked later raises."""

    built: list[Failing] = []  # noqa: RUF012
    fail = False

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.built.append(self)

    def compute_bounds(self, *args: Any, **options: Any) -> Any:
        if self.fail:
            raise KeyError("/25")
        return super().compute_bounds(*args, **options)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> type[Failing]:
    monkeypatch.setattr(Failing, "built", [])
    monkeypatch.setattr(lirpa_compat, "BoundedModule", Failing)
    return Failing


@torch.no_grad()
def test_an_exception_is_named_and_discards_the_wrapped_graph(failing: type[Failing], monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = randomised(RULE_NETS["ReLU"]()), images(3)
    y = labels(net, x)
    relaxation = Relaxation(net, x, "linf", EPS)
    before = relaxation.margins(x, y, "CROWN")
    monkeypatch.setattr(failing, "fail", True)
    with pytest.raises(UnsupportedNetworkError, match="cannot bound this network by CROWN"):
        relaxation.margins(x, y, "CROWN")
    monkeypatch.setattr(failing, "fail", False)
    assert torch.get_default_dtype() == torch.float32
    torch.testing.assert_close(relaxation.margins(x, y, "CROWN"), before)
    assert len(failing.built) == 2


@torch.no_grad()
def test_a_graph_wrapped_again_is_checked_again(failing: type[Failing], monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = randomised(RULE_NETS["ReLU"]()), images(3)
    y = labels(net, x)
    relaxation = Relaxation(net, x, "linf", EPS)
    relaxation.margins(x, y, "CROWN")
    monkeypatch.setattr(failing, "fail", True)
    with pytest.raises(UnsupportedNetworkError):
        relaxation.margins(x, y, "CROWN")
    monkeypatch.setattr(lirpa_compat, "BoundedModule", BROKEN["one too high"])
    with pytest.raises(UnsupportedNetworkError, match="failed the self-check"):
        relaxation.margins(x, y, "CROWN")


def test_importing_auto_lirpa_leaves_warnings_and_logging_alone() -> None:
    program = """
import logging, warnings
import torch, numpy, verifiers
warnings.simplefilter("error", ResourceWarning)
handler = logging.NullHandler()
logging.root.addHandler(handler)
logging.root.setLevel(35)
before = list(warnings.filters), torch.get_default_dtype(), torch.get_rng_state().tolist()
import verifiers.lirpa_compat
assert (list(warnings.filters), torch.get_default_dtype(), torch.get_rng_state().tolist()) == before
assert logging.root.handlers == [handler] and logging.root.level == 35
"""
    run_quietly(program)


def test_importing_auto_lirpa_leaves_the_recursion_limit_alone() -> None:
    """A limit of a million turns endless recursion into a crash of the interpreter."""
    run_quietly("""
import sys, torch, verifiers
before = sys.getrecursionlimit()
import verifiers.lirpa_compat
assert sys.getrecursionlimit() == before, sys.getrecursionlimit()
""")


def run_quietly(program: str) -> None:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_the_mended_library_multiplies_a_weight_by_its_mask_not_by_itself() -> None:
    """U1: without the mend, IBP of x * (w * mask) is that of x * (w * w)."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([[3.0, -2.0], [5.0, 1.0]]))
            self.register_buffer("mask", torch.tensor([[1.0, 1.0], [0.0, 1.0]]))

        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.linear(x, self.weight * self.mask)

    x, net = torch.tensor([[0.5, 0.5]]), Masked()
    bounded = lirpa_compat.BoundedModule(net, x, verbose=False)
    ball = lirpa_compat.PerturbationLpNorm(norm=float("inf"), eps=0.1)
    low, high = bounded.compute_bounds(x=(lirpa_compat.BoundedTensor(x, ball),), method="IBP")
    torch.testing.assert_close(low, torch.tensor([[0.0, 0.4]]))
    torch.testing.assert_close(high, torch.tensor([[1.0, 0.6]]))
    assert margins_at(net, x, torch.tensor([0])).item() == pytest.approx(0.0, abs=1e-6)
