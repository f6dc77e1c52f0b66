"""Bound training through BatchNorm, residual sums and pools; MixTrain's schedule and coin; SABR's and MTL-IBP's boxes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks.pgd import PGD
from bench.data import Split, load
from bench.methods import Dense
from bench.models import build_model, initialise_
from bench.modes import clean_pass, resting, statistics_of
from bench.objectives import MTLIBP, OBJECTIVES, SABR, CrownIBPTraining, IBPTraining, MixTrain, bounded, mixtrain
from bench.objectives.bounded import box_around, worst_case_loss
from bench.phases import fit
from bench.train import Budget, Progress, Training
from verifiers import UnsupportedNetworkError
from verifiers.ball import Interval
from verifiers.bounds import ibp_margins

Net = Callable[..., nn.Sequential]
EPS = Fraction(1, 10)
FULL = Progress(0, 10)
BOUND_OBJECTIVES = ["ibp", "crown-ibp", "sabr", "mtl-ibp"]


@pytest.fixture
def batch(toy: Split) -> tuple[Tensor, Tensor]:
    return toy.pixels(slice(16)), toy.labels[:16]


class Residual(nn.Module):
    """BatchNorm before and after a sum, a concatenation, a maximum and an average: what the larger networks are made of."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.inner, self.after = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.pool, self.drop, self.last = nn.MaxPool2d(3, 2, 1), nn.Dropout(0.5), nn.BatchNorm1d(8)
        self.head = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm(self.first(x)))
        h = F.relu(self.after(self.inner(h)) + h)
        h = torch.cat([self.pool(h), F.avg_pool2d(h, 2)], 1)
        h = self.last(F.adaptive_avg_pool2d(h, 1).view(h.size(0), -1))
        logits: Tensor = self.head(self.drop(h))
        return logits


def residual(seed: int = 0) -> Residual:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Residual()


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: build_model("mlp", (1, 8, 8), 3),
    "cnn_small": lambda: build_model("cnn_small", (1, 8, 8), 3),
    "BatchNorm and residual sum": residual,
}


PAIRS = [(name, network) for name in OBJECTIVES for network in NETWORKS if name != "mixtrain" or "sum" not in network]


@pytest.mark.parametrize("name, network", PAIRS)
def test_two_steps_have_finite_losses_and_gradients_that_reach_every_tensor(
    batch: tuple[Tensor, Tensor], short: Callable[[type], Any], name: str, network: str
) -> None:
    model, objective = NETWORKS[network](), short(OBJECTIVES[name])
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    reached: dict[str, float] = {}
    for step in (4, 5):
        optimizer.zero_grad()
        loss = objective(model, *batch, Progress(step, 10, 10))
        assert torch.isfinite(loss)
        loss.backward()
        for key, parameter in model.named_parameters():
            assert parameter.grad is not None
            assert torch.isfinite(parameter.grad).all()
            reached[key] = max(reached.get(key, 0.0), float(parameter.grad.abs().sum()))
        optimizer.step()
    assert model.training
    free = {"first.bias"} if "residual" in network else set()  # BatchNorm takes a bias before it away again
    assert {key for key, most in reached.items() if most == 0} <= free


# ---- BatchNorm -----------------------------------------------------------------------------------------------------------


def at_rest(model: nn.Module, x: Tensor) -> nn.Module:
    """A copy in eval mode whose running statistics are those of this batch, put there by torch itself."""
    twin = residual()
    twin.load_state_dict(model.state_dict())
    twin.drop.p = 0.0
    for layer in twin.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            layer.momentum = 1.0
    with torch.no_grad():
        twin(x)
    twin.eval()
    for layer in twin.modules():  # torch keeps the unbiased variance, and normalises a batch by the biased one
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            count = len(x) * (64 if isinstance(layer, nn.BatchNorm2d) else 1)
            layer.running_var *= (count - 1) / count
    return twin


@pytest.mark.parametrize("kind", [IBPTraining, CrownIBPTraining])
def test_bounds_are_those_of_the_network_with_the_clean_batchs_statistics(batch: tuple[Tensor, Tensor], kind: Any) -> None:
    model, (x, y) = residual(), batch
    twin = at_rest(model, x)
    fixed = {"kappa": 0.0} if kind is IBPTraining else {"beta_end": 1.0}
    ours = kind(eps=EPS, **fixed)(model, x, y, FULL)
    theirs = kind(eps=EPS, **fixed)(twin, x, y, FULL)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_the_gradient_flows_through_the_statistics(batch: tuple[Tensor, Tensor]) -> None:
    """At eps 0 the worst logits are the clean ones, so the gradients are those of plain training, statistics included."""
    model, twin, (x, y) = residual(), residual(), batch
    for net in (model, twin):
        net.drop.p = 0.0
    objective = IBPTraining(eps=Fraction(0), kappa=0.0)
    ours = torch.autograd.grad(objective(model, x, y, FULL), list(model.parameters()))
    theirs = torch.autograd.grad(F.cross_entropy(twin(x), y), list(twin.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("name", BOUND_OBJECTIVES)
def test_the_bound_pass_updates_no_running_statistics(
    batch: tuple[Tensor, Tensor], short: Callable[[type], Any], name: str
) -> None:
    """The clean pass counts, once; MTL-IBP trains on its adversarial batch too."""
    model, twin, (x, y) = residual(), residual(), batch
    modes = [module.training for module in model.modules()]
    short(OBJECTIVES[name])(model, x, y, FULL)
    assert [module.training for module in model.modules()] == modes
    assert int(model.norm.num_batches_tracked) == (2 if name == "mtl-ibp" else 1)
    if name != "mtl-ibp":
        twin(x)
        torch.testing.assert_close(model.norm.running_mean, twin.norm.running_mean)
        torch.testing.assert_close(model.norm.running_var, twin.norm.running_var)
    assert not model.norm.running_mean.requires_grad
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_frozen_batchnorm_keeps_its_running_statistics_in_bounds(batch: tuple[Tensor, Tensor]) -> None:
    model, (x, _) = residual(), batch
    model.after.eval()
    assert set(statistics_of(model, x)) == {model.norm, model.last}
    with resting(model, clean_pass(model, x)[1]):
        assert torch.equal(model.after.running_mean, torch.zeros(4))
        assert not torch.equal(model.norm.running_mean, torch.zeros(4))
        assert not any(module.training for module in model.modules())
    assert model.training
    assert not model.after.training


def test_statistics_come_back_even_when_a_bound_fails(batch: tuple[Tensor, Tensor]) -> None:
    model, (x, _) = residual(), batch
    statistics = statistics_of(model, x)
    before = model.norm.running_mean
    with pytest.raises(RuntimeError), resting(model, statistics):
        raise RuntimeError
    assert model.norm.running_mean is before


def test_a_batchnorm_used_twice_is_refused(batch: tuple[Tensor, Tensor]) -> None:
    norm = nn.BatchNorm2d(1)
    model = nn.Sequential(norm, nn.ReLU(), norm, nn.Flatten(), nn.Linear(64, 3))
    with pytest.raises(UnsupportedNetworkError, match="more than once"):
        IBPTraining(eps=EPS)(model, *batch, FULL)
    assert not norm._forward_pre_hooks


# ---- what becomes what ---------------------------------------------------------------------------------------------------


def test_crown_ibp_after_the_ramp_is_interval_training_by_default(net_of: Net, batch: tuple[Tensor, Tensor]) -> None:
    crown, ibp = CrownIBPTraining(eps=EPS), IBPTraining(eps=EPS, kappa=0.0)
    torch.testing.assert_close(crown(net_of(), *batch, FULL), ibp(net_of(), *batch, FULL))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("step, ramp", [(0, 0.0), (1, 0.25), (3, 0.75), (9, 1.0)])
def test_kappa_beta_and_eps_go_from_their_start_to_their_end_over_the_ramp(
    net_of: Net, batch: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch, step: int, ramp: float, fused: bool
) -> None:
    seen: list[Any] = []

    def watched(model: nn.Module, box: Interval, y: Tensor, beta: float, one: bool) -> Tensor:
        seen.append((float(box.radius.max()) * 2, beta, one))
        return ibp_margins(model, box, y)

    monkeypatch.setattr(bounded, "crown_ibp_margins", watched)
    objective = CrownIBPTraining(eps=EPS, kappa_start=1.0, kappa_end=0.5, beta_start=0.8, beta_end=0.2, fused=fused)
    model, (x, y) = net_of(), batch
    loss = objective(model, x, y, Progress(step, 10, 4))
    ((width, beta, one),) = seen
    assert width == pytest.approx(0.2 * ramp, abs=1e-6)
    assert beta == pytest.approx(0.8 - 0.6 * ramp)
    assert one is fused
    kappa = 1 - 0.5 * ramp
    worst = worst_case_loss(ibp_margins(model, box_around(x, 0.1 * ramp), y), y)
    torch.testing.assert_close(loss, kappa * F.cross_entropy(model(x), y) + (1 - kappa) * worst)


@pytest.mark.parametrize("fused", [False, True])
def test_the_loss_by_bounds_is_never_below_the_loss_at_any_attacked_point(
    net_of: Net, batch: tuple[Tensor, Tensor], fused: bool
) -> None:
    model, (x, y) = net_of(), batch
    bound = CrownIBPTraining(eps=EPS, beta_end=1.0, fused=fused)(model, x, y, FULL)
    x_adv = PGD(norm="linf", eps=EPS, steps=20)(model, x, y)
    assert float(bound.detach()) >= float(F.cross_entropy(model(x_adv), y).detach())


def test_the_quirk_cuts_the_box_with_the_range_of_the_images_given() -> None:
    x = torch.tensor([[0.2, 0.5], [0.4, 0.8]])
    torch.testing.assert_close(box_around(x, 0.5).lower, torch.tensor([[0.0, 0.0], [0.0, 0.3]]))
    torch.testing.assert_close(box_around(x, 0.5).upper, torch.tensor([[0.7, 1.0], [0.9, 1.0]]))
    torch.testing.assert_close(box_around(x, 0.5, "tensor").lower, torch.tensor([[0.2, 0.2], [0.2, 0.3]]))
    torch.testing.assert_close(box_around(x, 0.5, "tensor").upper, torch.tensor([[0.7, 0.8], [0.8, 0.8]]))


# ---- SABR and MTL-IBP ----------------------------------------------------------------------------------------------------


def bounds_seen(monkeypatch: pytest.MonkeyPatch) -> list[Interval]:
    boxes: list[Interval] = []

    def watched(model: nn.Module, box: Interval, y: Tensor) -> Tensor:
        boxes.append(box)
        return ibp_margins(model, box, y)

    monkeypatch.setattr(bounded, "ibp_margins", watched)
    return boxes


@pytest.mark.parametrize("ramp", [0.5, 1.0])
def test_sabrs_small_box_lies_in_the_ball_and_reaches_for_its_rim(
    net_of: Net, batch: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch, ramp: float
) -> None:
    boxes, (x, y) = bounds_seen(monkeypatch), batch
    SABR(eps=EPS, share=Fraction(1, 4))(net_of(), x, y, Progress(round(10 * ramp), 20, 10))
    (box,) = boxes
    eps = 0.1 * ramp
    assert float((box.upper - box.lower).max()) == pytest.approx(0.5 * eps, abs=1e-6)
    assert float(torch.maximum(box.upper - x, x - box.lower).max()) == pytest.approx(eps, abs=1e-6)
    assert float(box.lower.min()) >= 0
    assert float(box.upper.max()) <= 1


def test_sabr_of_the_whole_ball_is_interval_training_and_of_a_point_is_pgd_training(
    net_of: Net, batch: tuple[Tensor, Tensor]
) -> None:
    whole = SABR(eps=EPS, share=Fraction(1))(net_of(), *batch, FULL)
    torch.testing.assert_close(whole, IBPTraining(eps=EPS, kappa=0.0)(net_of(), *batch, FULL))
    torch.manual_seed(0)
    point = SABR(eps=EPS, share=Fraction(0))(net_of(), *batch, FULL)
    torch.manual_seed(0)
    x_adv = PGD(norm="linf", eps=EPS, steps=8, seed=None, last=True)(net_of(), *batch)
    torch.testing.assert_close(point, F.cross_entropy(net_of()(x_adv), batch[1]))


def test_mtl_ibp_mixes_the_adversarial_and_the_interval_loss(net_of: Net, batch: tuple[Tensor, Tensor]) -> None:
    model, (x, y) = net_of(), batch

    def loss(alpha: float) -> Tensor:
        torch.manual_seed(0)
        return MTLIBP(eps=EPS, alpha=alpha)(model, x, y, FULL)

    torch.testing.assert_close(loss(1.0), IBPTraining(eps=EPS, kappa=0.0)(model, x, y, FULL))
    torch.manual_seed(0)
    x_adv = PGD(norm="linf", eps=EPS, steps=8, seed=None, last=True)(model, x, y)
    torch.testing.assert_close(loss(0.0), F.cross_entropy(model(x_adv), y))
    torch.testing.assert_close(loss(0.3), 0.7 * loss(0.0) + 0.3 * loss(1.0))


# ---- what is learned -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "objective",
    [
        CrownIBPTraining(eps=Fraction(1, 20)),
        SABR(eps=Fraction(1, 20), share=Fraction(7, 10), steps=4),
        MTLIBP(eps=Fraction(1, 20), alpha=0.5, steps=4),
    ],
    ids=lambda objective: type(objective).__name__,
)
def test_a_network_trained_on_bounds_is_certified_on_digits_it_has_not_seen(objective: Any) -> None:
    """Not a constant one: from first weights that keep bounds small, after some epochs at eps 0. Dense, cnn_small, seed 0."""
    data, shape = load("digits"), (1, 8, 8)
    budget = Budget(25, 0, 0, lr=2e-3, batch=64, optimizer="adam", weight_decay=0.0, init="ibp", wait=0.1, ramp=0.6)
    model = initialise_(build_model("cnn_small", shape, 10), budget.init, seed=0)
    fit(model, Dense(), Fraction(1), Training(objective, data.train, budget))
    x, y = data.test.pixels(), data.test.labels
    with torch.no_grad():
        classes = model.eval()(x).argmax(1).unique()
        margins = ibp_margins(model, box_around(x, 0.05), y).scatter(1, y[:, None], torch.inf).amin(1)
    assert len(classes) > 5
    assert float((margins > 0).double().mean()) > 0.4


# ---- MixTrain ------------------------------------------------------------------------------------------------------------


def progress_of(epoch: int, ramp_epochs: int, epochs: int = 60, steps_per_epoch: int = 7) -> Progress:
    return Progress(epoch * steps_per_epoch + 3, epochs * steps_per_epoch, ramp_epochs * steps_per_epoch, epochs)


@pytest.mark.parametrize(
    "ramp, table",
    [
        (10, {0: 0.1, 14: 0.1, 15: 0.25, 20: 0.625, 30: 3.90625, 40: 24.4140625, 45: 50, 59: 50}),
        (0, {0: 0.1, 4: 0.1, 5: 0.25, 15: 1.5625}),
    ],
)
def test_mixtrains_weight_grows_by_the_table(ramp: int, table: dict[int, float]) -> None:
    assert {e: MixTrain().bound_weight(progress_of(e, ramp)) for e in table} == pytest.approx(table)
    held = MixTrain(weight=50.0, growth=1.0)
    assert {held.bound_weight(progress_of(e, ramp)) for e in table} == {50.0}


def test_mixtrains_eps_grows_once_per_epoch_from_zero() -> None:
    eps = [MixTrain(eps=EPS).radius(progress_of(e, 10)) for e in range(12)]
    assert eps == pytest.approx([0.01 * min(e, 10) for e in range(12)])
    assert MixTrain(eps=EPS).radius(progress_of(0, 0)) == 0.1
    assert [progress_of(e, 10).epoch for e in (0, 1, 59)] == [0, 1, 59]
    assert Progress(0, 60, 6, 60).ramp_epochs == 6


@dataclass
class Coins:
    """What MixTrain asked of its bound: the labels drawn, once per call."""

    drawn: list[Tensor]

    def __call__(self, model: nn.Module, box: Interval, y: Tensor) -> Tensor:
        self.drawn.append(y)
        return model(box.lower)


def test_mixtrains_coin_asks_for_the_bound_in_four_of_five_batches_on_images_drawn_with_replacement(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    coins = Coins([])
    monkeypatch.setattr(mixtrain, "symbolic_margins", coins)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 20))
    x, y = torch.rand(20, 1, 2, 2), torch.arange(20)
    torch.manual_seed(0)
    for _ in range(500):
        MixTrain(eps=EPS, k=5)(model, x, y, FULL)
    assert 0.75 < len(coins.drawn) / 500 < 0.85  # 0.8 within 2.8 standard deviations
    assert all(len(labels) == 5 for labels in coins.drawn)
    assert any(len(set(labels.tolist())) < 5 for labels in coins.drawn), "with replacement"
    assert set(torch.cat(coins.drawn).tolist()) == set(range(20))


def test_mixtrain_by_hand(net_of: Net, batch: tuple[Tensor, Tensor]) -> None:
    """Clean loss over the batch plus 0.1 times the worst-case loss of k images; a linear network is bounded exactly."""
    torch.manual_seed(1)
    model, (x, y) = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), batch
    torch.manual_seed(0)
    loss = MixTrain(eps=EPS, k=3, share=1.0)(model, x, y, FULL)
    torch.manual_seed(0)
    torch.rand(())
    at = torch.randint(len(x), (3,))
    worst = worst_case_loss(ibp_margins(model, box_around(x[at], 0.1), y[at]), y[at])
    torch.testing.assert_close(loss, F.cross_entropy(model(x), y) + 0.1 * worst)


# ---- mistakes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, wrong",
    [
        (CrownIBPTraining, {"eps": Fraction(-1)}), (CrownIBPTraining, {"beta_end": 1.5}), (CrownIBPTraining, {"clip": "no"}),
        (SABR, {"share": Fraction(3, 2)}), (SABR, {"steps": 0}), (MTLIBP, {"alpha": -0.1}), (MTLIBP, {"eps": Fraction(-1)}),
        (MixTrain, {"k": 0}), (MixTrain, {"share": 2.0}), (MixTrain, {"growth": -1.0}), (IBPTraining, {"kappa": 2.0}),
    ],
)  # fmt: skip
def test_fields_that_make_no_sense_are_refused(kind: Any, wrong: dict[str, Any]) -> None:
    assert set(wrong) <= {one.name for one in fields(kind)}
    with pytest.raises(ValueError, match=r"between|at least|clip|needs|>="):
        kind(**wrong)
