"""Objectives against hand calculation and against each other where two of them must coincide."""

from __future__ import annotations

import contextlib
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, fields
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.build import build, construct
from bench.data import Split, load
from bench.loop import run_phase
from bench.methods.hydra import scores_and_batchnorm
from bench.models import build_model
from bench.modes import evaluating
from bench.objectives import (
    MTLIBP,
    OBJECTIVES,
    SABR,
    WRM,
    Benign,
    CrownIBPTraining,
    FastTraining,
    FreeTraining,
    IBPTraining,
    MixTrain,
    NoiseTraining,
    PGDTraining,
    StabilityTraining,
    Trades,
    empirical,
)
from bench.objectives.bounded import worst_case_loss
from bench.objectives.wrm import ascend_penalised
from bench.phases import own_randomness
from bench.sparsity import TopKScores, attach, kept_of, prunable
from bench.train import Budget, Phase, Progress, Step, Training

Net = Callable[..., nn.Sequential]
EPS = Fraction(1, 10)
FULL, START = Progress(0, 10), Progress(0, 10, 5)


@pytest.fixture
def batch(toy: Split) -> tuple[Tensor, Tensor]:
    return toy.pixels(slice(16)), toy.labels[:16]


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def assert_same_loss(model: nn.Module, batch: tuple[Tensor, Tensor], one: Any, other: Any, progress: Progress = FULL) -> None:
    """The two objectives agree in value and in every gradient."""
    first, second = (objective(model, *batch, progress) for objective in (one, other))
    torch.testing.assert_close(first, second, atol=1e-6, rtol=1e-5)
    for a, b in zip(gradients(model, first), gradients(model, second)):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


# ---- where one objective is another ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "objective",
    [
        Trades(eps=EPS, steps=2, beta=0.0),
        PGDTraining(eps=Fraction(0), steps=2),
        PGDTraining(norm="l2", eps=Fraction(0), steps=2),
        StabilityTraining(sigma=0.0),
        IBPTraining(eps=Fraction(0), kappa=0.0),
        IBPTraining(eps=Fraction(0), kappa=0.5),
        IBPTraining(eps=Fraction(0), kappa=1.0),
        IBPTraining(eps=EPS, kappa=1.0),
        PGDTraining(eps=EPS, steps=2, clean_share=1.0),
        FastTraining(eps=Fraction(0)),
        FreeTraining(eps=EPS),
        WRM(gamma=0.0),
        NoiseTraining(sigma=0.0),
        CrownIBPTraining(eps=Fraction(0)),
        CrownIBPTraining(eps=Fraction(0), fused=True, beta_end=1.0),
        CrownIBPTraining(eps=EPS, kappa_start=1.0, kappa_end=1.0, beta_end=1.0),
        SABR(eps=Fraction(0)),
        MTLIBP(eps=Fraction(0)),
        MixTrain(eps=EPS, share=0.0),
    ],
    ids=repr,
)
def test_without_its_perturbation_or_weight_an_objective_is_the_benign_one(
    net_of: Net, batch: tuple[Tensor, Tensor], objective: Any
) -> None:
    assert_same_loss(net_of(), batch, objective, Benign())


def test_benign_is_the_mean_cross_entropy_by_hand(net_of: Net, batch: tuple[Tensor, Tensor]) -> None:
    model, (x, y) = net_of(), batch
    likelihood = model(x).double().softmax(1)[torch.arange(16), y]
    torch.testing.assert_close(Benign()(model, x, y, FULL).double(), -likelihood.log().mean())


@pytest.mark.parametrize(
    "objective",
    [
        IBPTraining(eps=EPS, kappa=0.0), IBPTraining(eps=EPS, kappa=0.5), CrownIBPTraining(eps=EPS),
        CrownIBPTraining(eps=EPS, fused=True), SABR(eps=EPS), MTLIBP(eps=EPS), PGDTraining(eps=EPS, warmup=True),
    ],
    ids=repr,
)  # fmt: skip
def test_at_ramp_zero_an_objective_with_a_ramp_is_clean_cross_entropy(
    net_of: Net, batch: tuple[Tensor, Tensor], objective: Any
) -> None:
    assert START.ramp == 0
    assert_same_loss(net_of(), batch, objective, Benign(), START)


def test_half_clean_half_adversarial_is_the_mean_of_both(net_of: Net, batch: tuple[Tensor, Tensor]) -> None:
    model, losses = net_of(), []
    for share in (0.0, 0.5, 1.0):
        torch.manual_seed(0)
        losses.append(PGDTraining(eps=EPS, steps=2, clean_share=share)(model, *batch, FULL))
    torch.testing.assert_close(losses[1], (losses[0] + losses[2]) / 2)


# ---- interval training -----------------------------------------------------------------------------------------------


def test_the_worst_case_loss_by_hand() -> None:
    """Margins (0, 2, -1) of class 0 and (3, 0, 3) of class 1: -log of 1 / (1 + e^-2 + e^1) and of 1 / (1 + 2 e^-3)."""
    margins = torch.tensor([[0.0, 2.0, -1.0], [3.0, 0.0, 3.0]], dtype=torch.float64)
    e = torch.e
    by_hand = (torch.tensor(1 + e**-2 + e).log() + torch.tensor(1 + 2 * e**-3).log()) / 2
    torch.testing.assert_close(worst_case_loss(margins, torch.tensor([0, 1])), by_hand.double(), atol=1e-6, rtol=0)


def linear_worst_margins(weight: Tensor, bias: Tensor, x: Tensor, y: Tensor, eps: float) -> Tensor:
    """min over the box cut with [0,1] of (w_y - w_j) x' + b_y - b_j, pixel by pixel: [N, C]."""
    lower, upper = (x - eps).clamp(0, 1).flatten(1), (x + eps).clamp(0, 1).flatten(1)
    rows = weight[y][:, None] - weight[None]
    worst = torch.where(rows > 0, lower[:, None], upper[:, None])
    return (rows * worst).sum(2) + bias[y][:, None] - bias[None]


@pytest.mark.parametrize("step, ramp", [(0, 0.0), (1, 0.25), (3, 0.75), (4, 1.0), (9, 1.0)])
def test_interval_training_of_a_linear_network_by_hand_along_the_ramp(
    batch: tuple[Tensor, Tensor], step: int, ramp: float
) -> None:
    """eps grows from 0 and kappa falls from 1, in proportion to the ramp; pixels at 0 and 1 stay there."""
    x, y = (batch[0] * 2 - 0.5).clamp(0, 1), batch[1]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    progress = Progress(step, 10, 4)
    assert progress.ramp == ramp
    worst = linear_worst_margins(model[1].weight, model[1].bias, x, y, 0.1 * ramp)
    kappa = 1 - 0.75 * ramp
    by_hand = kappa * F.cross_entropy(model(x), y) + (1 - kappa) * F.cross_entropy(-worst, y)
    torch.testing.assert_close(IBPTraining(eps=EPS, kappa=0.25)(model, x, y, progress), by_hand)


def test_interval_training_never_asks_for_less_than_pgd_training(net_of: Net, batch: tuple[Tensor, Tensor]) -> None:
    """The worst logits by bounds are worse than those of any point of the ball."""
    model = net_of()
    bounded = IBPTraining(eps=EPS, kappa=0.0)(model, *batch, FULL)
    assert float(bounded.detach()) >= float(PGDTraining(eps=EPS, steps=5)(model, *batch, FULL).detach())


# ---- wrm, fast, noise ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 7, 16])
def test_wrm_reaches_x_plus_gamma_a_in_one_step_on_a_linear_loss_and_stays(steps: int) -> None:
    x, a = torch.rand(3, 1, 2, 2).double(), torch.randn(3, 1, 2, 2).double()
    moved = ascend_penalised(lambda z: (a * z).sum(), x, gamma=1.3, steps=steps, clip=False)
    torch.testing.assert_close(moved, x + 1.3 * a)
    inside = ascend_penalised(lambda z: (a * z).sum(), x, gamma=1.3, steps=steps, clip=True)
    torch.testing.assert_close(inside, (x + 1.3 * a).clamp(0, 1))


def test_wrm_of_a_small_gamma_moves_each_image_by_its_own_gradient(net_of: Net, batch: tuple[Tensor, Tensor]) -> None:
    model, (x, y) = net_of().double(), (batch[0].double(), batch[1])
    loss = lambda z: F.cross_entropy(model(z), y, reduction="sum")  # noqa: E731
    slope = torch.stack([
        torch.autograd.grad(F.cross_entropy(model(image[None]), label[None]), image)[0]
        for image, label in zip(x.clone().requires_grad_().unbind(), y)
    ])  # fmt: skip
    moved = ascend_penalised(loss, x, gamma=1e-3, steps=7, clip=False)
    torch.testing.assert_close(moved - x, 1e-3 * slope, atol=1e-7, rtol=1e-2)


def test_wrm_raises_what_it_maximises(net_of: Net, batch: tuple[Tensor, Tensor]) -> None:
    model, (x, y) = Watched(net_of()), batch
    WRM(gamma=2.0)(model, x, y, FULL)
    (x_adv,) = model.trained_on
    with torch.no_grad():
        gain = F.cross_entropy(model.network(x_adv), y, reduction="sum") - F.cross_entropy(model.network(x), y, reduction="sum")
    assert float(2.0 * gain - (x_adv - x).square().sum() / 2) > 0
    assert 0 <= float(x_adv.min()) <= float(x_adv.max()) <= 1


def test_fast_training_takes_one_step_from_a_random_start(net_of: Net, batch: tuple[Tensor, Tensor]) -> None:
    """1.25 eps along the sign of the gradient from a point of the ball, projected: most pixels end at the rim."""
    model, (x, y) = Watched(net_of()), batch
    FastTraining(eps=EPS)(model, x, y, FULL)
    assert [training for _, training in model.seen] == [False, True]
    start, x_adv = model.seen[0][0], model.trained_on[0]
    assert float((start - x).abs().max()) <= 0.1 + 1e-6
    assert float((x_adv - x).abs().max()) <= 0.1 + 1e-6
    inner = (x > 0.1) & (x < 0.9)
    moved = (x_adv - x)[inner]
    slope = torch.autograd.grad(F.cross_entropy(model.network(start.requires_grad_()), y), start)[0][inner]
    expected = ((start.detach() - x)[inner] + 0.125 * slope.sign()).clamp(-0.1, 0.1)
    torch.testing.assert_close(moved, expected, atol=1e-6, rtol=0)


def test_noise_training_by_hand(net_of: Net, batch: tuple[Tensor, Tensor]) -> None:
    model, (x, y) = Watched(net_of()), batch
    loss = NoiseTraining(sigma=0.5)(model, x, y, FULL)
    (noisy,) = model.trained_on
    assert float((noisy - x).std()) == pytest.approx(0.5, rel=0.1)
    torch.testing.assert_close(loss, F.cross_entropy(model.network(noisy), y))
    NoiseTraining(sigma=0.5)(model, x, y, FULL)
    assert not torch.equal(model.trained_on[1], noisy)


@pytest.mark.parametrize(
    "kind, wrong",
    [
        (WRM, {"gamma": -1.0}), (WRM, {"steps": 0}), (FastTraining, {"eps": Fraction(-1)}),
        (FastTraining, {"stretch": Fraction(-1)}), (FreeTraining, {"replays": 0}), (FreeTraining, {"eps": Fraction(-1)}),
        (NoiseTraining, {"sigma": -1.0}),
        (PGDTraining, {"clean_share": 1.5}),
    ],
)  # fmt: skip
def test_fields_that_make_no_sense_are_refused(kind: Any, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"needs|at least|between|radius|>= 0"):
        kind(**wrong)


# ---- free ------------------------------------------------------------------------------------------------------------


def test_free_trainings_perturbation_takes_a_step_of_eps_along_the_sign_and_stays_in_the_ball() -> None:
    free = FreeTraining(eps=EPS)
    before = torch.tensor([0.0, 0.05, -0.1, 0.1])
    after = free.moved(before, torch.tensor([1e-3, -2.0, -1.0, 0.0]))
    torch.testing.assert_close(after, torch.tensor([0.1, -0.05, -0.1, 0.1]))
    torch.testing.assert_close(
        FreeTraining(eps=EPS, step_size=Fraction(1, 50)).moved(before, torch.ones(4)), torch.tensor([0.02, 0.07, -0.08, 0.1])
    )


# ---- trades and stability --------------------------------------------------------------------------------------------


class Watched(nn.Module):
    """A network that remembers every input it is given and whether it stood in training mode."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.seen: list[tuple[Tensor, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append((x.detach().clone(), self.training))
        logits: Tensor = self.network(x)
        return logits

    @property
    def trained_on(self) -> list[Tensor]:
        return [x for x, training in self.seen if training]


def regularised(model: nn.Module, x: Tensor, other: Tensor, y: Tensor, beta: float) -> Tensor:
    """CE(x) + beta / N * sum over images and classes of p(x) (log p(x) - log p(other)), written out."""
    clean, moved = model(x).softmax(1), model(other).softmax(1)
    kl = (clean * (clean.log() - moved.log())).sum() / len(x)
    return F.cross_entropy(model(x), y) + beta * kl


@pytest.mark.parametrize("objective", [Trades(eps=EPS, steps=3, beta=6.0), StabilityTraining(beta=6.0)], ids=repr)
def test_the_kl_term_is_a_batch_mean_from_the_clean_distribution_differentiated_through_both(
    net_of: Net, batch: tuple[Tensor, Tensor], objective: Any
) -> None:
    model, (x, y) = Watched(net_of()), batch
    loss = objective(model, x, y, FULL)
    clean, other = model.trained_on
    assert torch.equal(clean, x)
    by_hand = regularised(model.network, x, other, y, 6.0)
    torch.testing.assert_close(loss, by_hand, atol=1e-5, rtol=1e-4)
    for a, b in zip(gradients(model, loss), gradients(model, by_hand)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


def kl_slopes(model: nn.Module, x: Tensor, noise: float, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The largest gradient entry of every ascent step of TRADES in float64, its start noise scaled by `noise`."""
    slopes: list[float] = []
    ascend, draw = empirical.lp.ascend, torch.randn_like

    def watched(x_adv: Tensor, gradient: Tensor, norm: str, step: float) -> Tensor:
        slopes.append(float(gradient.abs().max()))
        return ascend(x_adv, gradient, norm, step)

    with monkeypatch.context() as patch:
        patch.setattr(empirical.lp, "ascend", watched)
        patch.setattr(torch, "randn_like", lambda value: noise * draw(value))
        Trades(eps=EPS, steps=1)(model.double(), x.double(), torch.zeros(len(x), dtype=torch.int64), FULL)
    return slopes


def test_trades_needs_its_start_noise_since_the_kl_has_no_slope_at_x_itself(
    net_of: Net, batch: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    (at_x,), (near_x,) = (kl_slopes(net_of(), batch[0], noise, monkeypatch) for noise in (0.0, 1.0))
    assert at_x < 1e-14
    assert near_x > 1e-6


@pytest.mark.parametrize("norm, steps, expected", [("linf", 10, 0.025), ("linf", 40, 0.025), ("l2", 10, 0.02), ("l2", 40, 0.005)])
def test_trades_default_step_is_that_of_the_card(
    net_of: Net, batch: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch, norm: str, steps: int, expected: float
) -> None:
    """methods.md 4.3 at eps 1/10: HYDRA's eps/4 in linf, 2 eps / K in l2."""
    sizes: list[float] = []
    monkeypatch.setattr(empirical.lp, "ascend", lambda x_adv, gradient, norm, step: sizes.append(step) or x_adv)
    Trades(norm=norm, eps=EPS, steps=steps)(net_of(), *batch, FULL)
    assert sizes == pytest.approx([expected] * steps)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("kind", [PGDTraining, Trades])
def test_training_examples_lie_in_the_ball_and_reach_its_rim(
    net_of: Net, batch: tuple[Tensor, Tensor], kind: Any, norm: str
) -> None:
    model, (x, y) = Watched(net_of()), batch
    kind(norm=norm, eps=EPS, steps=10)(model, x, y, FULL)
    x_adv = model.trained_on[-1]
    moved = (x_adv - x).flatten(1).norm(p=torch.inf if norm == "linf" else 2, dim=1)
    assert float(moved.max()) <= 0.1 + 1e-6
    assert float(moved.max()) > 0.09
    assert 0 <= float(x_adv.min()) <= float(x_adv.max()) <= 1


@pytest.mark.parametrize("kind", [PGDTraining, Trades])
def test_crafted_examples_raise_the_loss_they_are_crafted_for(net_of: Net, batch: tuple[Tensor, Tensor], kind: Any) -> None:
    model, (x, y) = Watched(net_of()), batch
    kind(eps=EPS, steps=10)(model, x, y, FULL)
    x_adv = model.trained_on[-1]
    noise = (x + 0.1 * torch.randn_like(x).sign()).clamp(0, 1)
    clean = model.network(x).detach()

    @torch.no_grad()
    def harm(other: Tensor) -> float:
        logits = model.network(other)
        if kind is PGDTraining:
            return float(F.cross_entropy(logits, y))
        return float(F.kl_div(logits.log_softmax(1), clean.log_softmax(1), log_target=True, reduction="sum"))

    assert harm(x_adv) > harm(noise)


@pytest.mark.parametrize("clip", [False, True])
def test_noisy_images_leave_0_1_unless_clipping_is_asked_for(
    net_of: Net, batch: tuple[Tensor, Tensor], clip: bool
) -> None:
    model = Watched(net_of())
    StabilityTraining(sigma=0.5, clip=clip)(model, *batch, FULL)
    noisy = model.trained_on[-1]
    assert bool(((noisy >= 0) & (noisy <= 1)).all()) is clip
    if not clip:
        spread = float((noisy - batch[0]).std())
        assert spread == pytest.approx(0.5, rel=0.1)


# ---- what crafting must not touch ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, passes", [(PGDTraining, 1), (Trades, 2)])
def test_batchnorm_statistics_see_the_training_passes_only(
    net_of: Net, batch: tuple[Tensor, Tensor], kind: Any, passes: int
) -> None:
    model = Watched(net_of(batchnorm=True))
    twin = net_of(batchnorm=True)
    kind(eps=EPS, steps=3)(model, *batch, FULL)
    for x in model.trained_on:
        twin(x)
    assert int(model.network[1].num_batches_tracked) == passes
    torch.testing.assert_close(model.network[1].running_mean, twin[1].running_mean)
    torch.testing.assert_close(model.network[1].running_var, twin[1].running_var)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_leaves_modes_and_gradients_as_they_were(
    net_of: Net, batch: tuple[Tensor, Tensor], short: Callable[[type], Any], name: str
) -> None:
    model = net_of()
    model[3].eval()  # a frozen part inside a network in training mode
    before = [module.training for module in model.modules()]
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    short(OBJECTIVES[name])(model, *batch, FULL)
    assert [module.training for module in model.modules()] == before
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_modes_come_back_even_when_crafting_fails(net_of: Net) -> None:
    model = net_of()
    model[3].eval()
    before = [module.training for module in model.modules()]
    with contextlib.suppress(RuntimeError), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise RuntimeError
    assert [module.training for module in model.modules()] == before


# ---- the whole catalogue ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    train = load("digits").train
    return train.pixels(slice(32)), train.labels[:32]


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("progress", [START, Progress(3, 10, 5), FULL], ids=["ramp 0", "ramp 0.6", "ramp 1"])
def test_losses_and_gradients_are_finite_on_digits(
    digits: tuple[Tensor, Tensor], name: str, progress: Progress
) -> None:
    model = build_model("cnn_small", (1, 8, 8), 10)
    shorter = {"steps": 2} if hasattr(OBJECTIVES[name], "steps") else {}
    loss = OBJECTIVES[name](**shorter)(model, *digits, progress)
    assert loss.shape == ()
    assert 0 < float(loss.detach()) < 100
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients(model, loss))


def scored(model: nn.Module) -> dict[str, TopKScores]:
    """Scores on every layer, half of them kept; everything else is frozen, as in HYDRA's prune phase."""
    model.requires_grad_(False)
    parts = {}
    for name, layer in prunable(model).items():
        weight = layer.weight.detach()
        parts[name] = TopKScores(weight, kept_of(weight.numel(), Fraction(1, 2)))
        attach(layer, parts[name])
    return parts


@dataclass(frozen=True)
class Remembering:
    """An objective that keeps its batch and the noise it started from."""

    objective: Any
    calls: list[tuple[Tensor, Tensor, Tensor]]

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, progress: Progress) -> Tensor:
        self.calls.append((x, y, torch.get_rng_state()))
        loss: Tensor = self.objective(model, x, y, progress)
        return loss


def loop_gradients(model: nn.Module, objective: Any, data: Split) -> dict[str, Tensor]:
    """The gradients that the first step of the training loop works with."""
    found: dict[str, Tensor] = {}

    def keep(step: Step) -> None:
        found.update({n: p.grad.clone() for n, p in step.model.named_parameters() if p.grad is not None})

    phase = Phase("probe", 1, 0.0, trains=scores_and_batchnorm, after_backward=keep)
    with own_randomness():
        run_phase(model, phase, Training(objective, data, Budget(batch=len(data))))
    return found


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_gradient_reaches_every_score_the_pruned_ones_too(
    net_of: Net, batch: tuple[Tensor, Tensor], short: Callable[[type], Any], name: str
) -> None:
    model = net_of()
    parts = scored(model)
    for part in parts.values():
        part.requires_grad_(True)
    short(OBJECTIVES[name])(model, *batch, FULL).backward()
    for part in parts.values():
        assert float(part.scores.grad[part.mask() == 0].abs().sum()) > 0


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_training_loop_sees_the_objectives_own_gradient_of_the_scores(
    net_of: Net, toy: Split, short: Callable[[type], Any], name: str
) -> None:
    """The loop computes effective weights once per step; an objective that first looks without gradients must not matter."""
    model, objective = net_of(), Remembering(short(OBJECTIVES[name]), [])
    scored(model)
    looped = loop_gradients(model, objective, toy)
    twin, (x, y, noise) = net_of(), objective.calls[0]
    parts = scored(twin)
    for part in parts.values():
        part.requires_grad_(True)
    with own_randomness():
        torch.set_rng_state(noise)
        objective.objective(twin, x, y, FULL).backward()
    assert len(looped) == len(parts) == 3
    for layer, part in parts.items():
        torch.testing.assert_close(looped[f"{layer}.parametrizations.weight.0.scores"], part.scores.grad)


def test_the_settings_on_the_objectives_page_are_built_and_name_every_objective() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "objectives.md").read_text(encoding="utf-8")
    tables = [tomllib.loads(block.split("```")[0]) for block in page.split("```toml\n")[1:]]
    specs = [dict(spec) for table in tables for spec in table["objective"]]
    for spec in specs:
        assert construct(Budget, spec.pop("budget", {}), "budget")
        assert type(build("objective", spec)) is OBJECTIVES[spec["name"]]
    assert construct(Budget, tables[0]["budget"], "budget").batch == 128
    assert {spec["name"] for spec in specs} == set(OBJECTIVES)
    assert all(f"| `{name}` |" in page for name in OBJECTIVES)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_equal_fields_are_equal_objectives_and_the_repr_names_every_field(name: str) -> None:
    kind = OBJECTIVES[name]
    assert kind() == kind()
    assert all(f"{one.name}=" in repr(kind()) for one in fields(kind))
    with pytest.raises(AttributeError):
        kind().eps = 1
