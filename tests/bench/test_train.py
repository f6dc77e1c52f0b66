"""The training loop: reproducible to the bit, moving what a phase names and nothing else, hooks in their order."""

from __future__ import annotations

import hashlib
import io
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from attacks.pgd import FGSM
from bench.data import Split, batches
from bench.loop import Snapshots, TrainingDivergedError, run_phase
from bench.methods import HYDRA
from bench.objectives import OBJECTIVES, Benign, FreeTraining, IBPTraining, PGDTraining, StabilityTraining
from bench.phases import fit, own_randomness
from bench.sparsity import keep_largest, mask_layers, weights
from bench.train import Budget, Phase, Progress, Step, Training, derived_seed

Net = Callable[..., nn.Sequential]
Trainings = Callable[..., Training]
THIRD = Fraction(1, 3)


@pytest.fixture(autouse=True)
def _own_generators() -> Any:
    with own_randomness():
        yield


def trained(model: nn.Module, phase: Phase, training: Training, **more: Any) -> dict[str, Tensor]:
    run_phase(model, phase, training, **more)
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- seeds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, optimizer", [*((name, "sgd") for name in OBJECTIVES), ("benign", "adam"), ("ibp", "adam")])
def test_equal_seeds_give_equal_weights_to_the_bit_and_other_seeds_others(
    net_of: Net, training_of: Trainings, short: Callable[[type], Any], name: str, optimizer: str
) -> None:
    def run(seed: int) -> dict[str, Tensor]:
        training = training_of(short(OBJECTIVES[name]), seed=seed, optimizer=optimizer, augment="crop-flip", pretrain=1)
        torch.rand(3)  # whatever was drawn before
        return trained(net_of(), training.pretrain(), training)

    assert equal(run(0), run(0))
    assert not equal(run(0), run(1))


def test_fitting_leaves_the_callers_generators_untouched(net_of: Net, training_of: Trainings) -> None:
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    fit(net_of(), HYDRA(init="kaiming-normal"), THIRD, training_of(StabilityTraining(), pretrain=1))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.array_equal(np.random.get_state()[1], before[2])  # noqa: NPY002


@dataclass(frozen=True)
class Watching:
    """An objective that writes down the labels and pixels of every batch it is asked about."""

    objective: Any
    seen: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    progress: list[Progress] = field(default_factory=list)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, progress: Progress) -> Tensor:
        self.seen.append((x.clone(), y.clone()))
        self.progress.append(progress)
        loss: Tensor = self.objective(model, x, y, progress)
        return loss


def test_batches_come_in_the_same_order_whatever_noise_the_objective_draws(net_of: Net, training_of: Trainings) -> None:
    runs = []
    for objective in (Benign(), StabilityTraining(), PGDTraining(steps=2)):
        watching = Watching(objective)
        training = training_of(watching, augment="crop-flip", seed=3)
        run_phase(net_of(), training.pretrain(), training)
        runs.append(watching.seen)
    for other in runs[1:]:
        assert all(torch.equal(x, x2) and torch.equal(y, y2) for (x, y), (x2, y2) in zip(runs[0], other, strict=True))


def test_two_phases_of_one_run_see_the_data_in_different_orders(net_of: Net, training_of: Trainings) -> None:
    orders = []
    for name in ("pretrain", "finetune"):
        watching = Watching(Benign())
        training = training_of(watching)
        run_phase(net_of(), getattr(training, name)(), training)
        orders.append(torch.cat([y for _, y in watching.seen]))
    assert not torch.equal(*orders)


def test_a_derived_seed_is_63_bits_of_a_sha256_and_differs_by_purpose() -> None:
    digest = hashlib.sha256(b"(3, 'pretrain', 'noise')").digest()
    assert derived_seed(3, "pretrain", "noise") == int.from_bytes(digest[:8], "big") // 2
    purposes = [(s, phase, use) for s in range(5) for phase in ("pretrain", "prune") for use in ("noise", "order")]
    purposes += [(s, "surgery", number) for s in range(5) for number in range(4)]
    purposes += [("a/b",), ("a", "b"), ("ab",)]
    seeds = [derived_seed(*purpose) for purpose in purposes]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


# ---- progress --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "progress, ramp",
    [
        (Progress(0, 10, 4), 0.0), (Progress(1, 10, 4), 0.25), (Progress(3, 10, 4), 0.75), (Progress(4, 10, 4), 1.0),
        (Progress(9, 10, 4), 1.0), (Progress(0, 10, 0), 1.0), (Progress(0, 10), 1.0), (Progress(9, 10, 10), 0.9),
        (Progress(2, 10, 4, 1, 2), 0.0), (Progress(3, 10, 4, 1, 2), 0.25), (Progress(6, 10, 4, 1, 2), 1.0),
        (Progress(1, 10, 0, 1, 2), 0.0), (Progress(2, 10, 0, 1, 2), 1.0),
    ],
)  # fmt: skip
def test_the_ramp_waits_then_goes_from_0_to_1_over_its_own_steps_and_stays(progress: Progress, ramp: float) -> None:
    assert progress.ramp == ramp


def test_the_fraction_of_a_phase_starts_at_0_and_an_empty_phase_divides_by_nothing() -> None:
    assert [Progress(step, 4).fraction for step in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert Progress(0, 0).fraction == 0


def test_steps_count_through_the_epochs_and_the_ramp_is_a_share_of_the_phase(net_of: Net, training_of: Trainings) -> None:
    watching = Watching(Benign())
    run_phase(net_of(), Phase("pretrain", 4, 0.1, ramp=0.5, wait=0.25), training_of(watching))  # 40 images in batches of 16
    assert watching.progress == [Progress(step, 12, 6, 4, 3) for step in range(12)]
    assert [one.ramp_epoch for one in watching.progress[::3]] == [0, 0, 1, 2]
    assert [one.epoch for one in watching.progress] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert watching.progress[0].ramp_epochs == 2


def test_phases_take_the_suites_budget(training_of: Trainings) -> None:
    training = training_of(
        pretrain=5, prune=3, finetune=4, lr=0.1, prune_lr=0.2, finetune_lr=0.3, ramp=0.25, wait=0.5
    )
    phases = (training.pretrain(), training.prune(), training.finetune(), training.train())
    assert [(p.name, p.epochs, p.lr, p.wait, p.ramp) for p in phases] == [
        ("pretrain", 5, 0.1, 0.5, 0.25), ("prune", 3, 0.2, 0.0, 0.0), ("finetune", 4, 0.3, 0.0, 0.0),
        ("train", 12, 0.1, 0.5, 0.25),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"optimizer": "lion"}, "optimizer is sgd or adam, got 'lion'"),
        ({"schedule": "linear"}, "schedule is cosine, step or one-cycle, got 'linear'"),
        ({"precision": "fp16"}, "precision is float32 or bf16, got 'fp16'"),
        ({"prune": -1}, "a budget needs"), ({"batch": 0}, "a budget needs"),
        ({"ramp": 1.5}, "at most 1"), ({"ramp": -0.1}, "at most 1"), ({"ramp": 0.6, "wait": 0.5}, "at most 1"),
        ({"init": "zeros"}, "init is torch, kaiming or ibp, got 'zeros'"),
        ({"nesterov": True, "momentum": 0.0}, "nesterov needs sgd with momentum"),
        ({"nesterov": True, "optimizer": "adam"}, "nesterov needs sgd with momentum"),
        ({"milestones": (0.5, 1.5)}, "milestones are shares"), ({"milestones": ("half",)}, "milestones are shares"),
        ({"gradient_clip": -1.0}, "gradient_clip is >= 0"), ({"lr_drop": 0.0}, "lr_drop > 0"),
    ],
)  # fmt: skip
def test_a_budget_that_cannot_be_spent_is_refused(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Budget(**wrong)


def test_the_benign_training_is_the_same_but_for_its_objective(training_of: Trainings) -> None:
    training = training_of(PGDTraining(steps=2), seed=3, augment="crop", lr=0.3)
    assert training.benign == replace(training, objective=Benign())
    assert training.benign.budget is training.budget


# ---- what moves ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("chosen", [{"3.weight"}, {"0.weight", "5.bias"}])
def test_only_the_named_parameters_move_even_under_weight_decay(
    net_of: Net, training_of: Trainings, optimizer: str, chosen: set[str]
) -> None:
    before = {name: value.clone() for name, value in net_of().state_dict().items()}
    training = training_of(optimizer=optimizer, weight_decay=0.5)
    after = trained(net_of(), Phase("part", 2, 0.1, trains=lambda model: chosen), training)
    assert {name for name in before if not torch.equal(before[name], after[name])} == chosen


def test_parameters_frozen_in_one_phase_move_again_in_the_next(net_of: Net, training_of: Trainings) -> None:
    model, training = net_of(), training_of()
    first = trained(model, Phase("part", 1, 0.1, trains=lambda model: {"5.bias"}), training)
    second = trained(model, Phase("all", 1, 0.1), training)
    assert all(not torch.equal(first[name], second[name]) for name in first)


@dataclass(frozen=True)
class LooksFirst:
    """An objective from outside that asks the network something without gradients before it computes its loss."""

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, progress: Progress) -> Tensor:
        with torch.no_grad():
            model(x)
        return nn.functional.cross_entropy(model(x), y)


def test_masked_weights_learn_even_if_the_objective_first_looks_without_gradients(
    net_of: Net, training_of: Trainings
) -> None:
    """Effective weights are cached for a step: the first look must not decide whether they carry gradients."""
    after = []
    for objective in (Benign(), LooksFirst()):
        model = net_of()
        mask_layers(model, keep_largest({n: w.abs() for n, w in weights(model).items()}, THIRD))
        after.append(trained(model, Phase("finetune", 1, 0.1), training_of(objective)))
    for name in after[0]:
        torch.testing.assert_close(after[0][name], after[1][name])


def test_a_phase_of_no_epochs_changes_nothing_and_reports_nothing(net_of: Net, training_of: Trainings) -> None:
    reports: list[Any] = []
    after = trained(net_of(), Phase("none", 0, 0.1), training_of(), report=lambda *words: reports.append(words))
    assert equal(after, net_of().state_dict())
    assert reports == []


# ---- hooks, penalty, schedule ----------------------------------------------------------------------------------------


def test_hooks_are_called_in_order_with_a_step_and_nothing_else(net_of: Net, training_of: Trainings) -> None:
    events: list[tuple[str, int]] = []
    weight: list[Tensor] = []

    def hook(name: str) -> Callable[..., None]:
        def called(*given: Any) -> None:
            (step,) = given
            assert isinstance(step, Step)
            assert {one.name for one in fields(step)} == {"model", "optimizer", "progress"}
            assert all(p.grad is not None for p in step.model.parameters())
            events.append((name, step.progress.step))
            weight.append(step.model[0].weight.detach().clone())

        return called

    phase = Phase("hooked", 2, 0.1, after_backward=hook("backward"), after_step=hook("step"), after_epoch=hook("epoch"))
    run_phase(net_of(), phase, training_of())
    per_epoch = [[(kind, step) for step in range(3 * e, 3 * e + 3) for kind in ("backward", "step")] for e in range(2)]
    assert events == [*per_epoch[0], ("epoch", 3), *per_epoch[1], ("epoch", 6)]
    for place, (name, _) in enumerate(events[1:], start=1):  # weights move between backward and step only
        assert torch.equal(weight[place], weight[place - 1]) is (name != "step")


def test_a_penalty_is_added_to_the_loss_and_to_its_gradient(net_of: Net, training_of: Trainings) -> None:
    losses: dict[str, float] = {}

    def penalty(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        assert len(x) == len(y)
        return 2 * model[5].bias.sum() + 3

    def run(name: str, **more: Any) -> dict[str, Tensor]:
        gradient: dict[str, Tensor] = {}

        def keep(step: Step) -> None:
            gradient.update({n: p.grad.clone() for n, p in step.model.named_parameters()})

        phase = Phase("penalised", 1, 0.0, after_backward=keep, **more)
        run_phase(net_of(), phase, training_of(), report=lambda *words: losses.update({name: words[3]}))
        return gradient

    plain, pulled = run("plain"), run("pulled", penalty=penalty)
    added = 2 * float(net_of()[5].bias.sum().detach()) + 3
    assert losses["pulled"] == pytest.approx(losses["plain"] + added, abs=1e-6)
    torch.testing.assert_close(pulled["5.bias"], plain["5.bias"] + 2)
    torch.testing.assert_close(pulled["0.weight"], plain["0.weight"])


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_the_learning_rate_is_a_cosine_of_the_step_from_lr_to_nearly_0(
    net_of: Net, training_of: Trainings, optimizer: str
) -> None:
    rates: list[float] = []
    keep = Phase("cosine", 3, 0.2, after_backward=lambda step: rates.append(step.optimizer.param_groups[0]["lr"]))
    run_phase(net_of(), keep, training_of(optimizer=optimizer))
    assert rates == pytest.approx([0.2 * (1 + math.cos(math.pi * step / 9)) / 2 for step in range(9)])


def test_plain_gradient_descent_by_hand(net_of: Net, training_of: Trainings, toy: Split) -> None:
    """One epoch of two steps with momentum and weight decay, written out."""
    training = training_of(batch=20, momentum=0.9, weight_decay=0.01, seed=5)
    order = torch.Generator().manual_seed(derived_seed(5, "one", "order"))
    twin, velocity = net_of(), None
    for step, (x, y) in enumerate(batches(toy, 20, order)):
        loss = nn.functional.cross_entropy(twin(x), y)
        slopes = [g + 0.01 * p.detach() for g, p in zip(torch.autograd.grad(loss, list(twin.parameters())), twin.parameters())]
        velocity = slopes if velocity is None else [0.9 * v + g for v, g in zip(velocity, slopes)]
        with torch.no_grad():
            for parameter, v in zip(twin.parameters(), velocity):
                parameter -= 0.1 * (1 + math.cos(math.pi * step / 2)) / 2 * v
    after = trained(net_of(), Phase("one", 1, 0.1), training)
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(after[name], value, atol=1e-6, rtol=1e-5)


# ---- optimizers and schedules ----------------------------------------------------------------------------------------


def rates_of(model: nn.Module, training: Training, epochs: int) -> list[float]:
    rates: list[float] = []
    keep = Phase("rates", epochs, 0.2, after_backward=lambda step: rates.append(step.optimizer.param_groups[0]["lr"]))
    run_phase(model, keep, training)
    return rates


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_the_step_schedule_drops_after_each_milestone(net_of: Net, training_of: Trainings, optimizer: str) -> None:
    training = training_of(schedule="step", milestones=(0.25, 0.75), lr_drop=0.5, optimizer=optimizer)  # 3 steps per epoch
    assert rates_of(net_of(), training, 4) == pytest.approx([0.2] * 3 + [0.1] * 6 + [0.05] * 3)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_one_cycle_rises_to_the_learning_rate_and_falls_to_almost_nothing(
    net_of: Net, training_of: Trainings, optimizer: str
) -> None:
    rates = rates_of(net_of(), training_of(schedule="one-cycle", optimizer=optimizer), 10)
    top = rates.index(max(rates))
    assert max(rates) == pytest.approx(0.2)
    assert 6 <= top <= 10, "about 30 % of 30 steps"
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[-1] < 0.2 / 1000


def test_nesterov_by_hand(net_of: Net, training_of: Trainings, toy: Split) -> None:
    """One step from rest with momentum 0.9: the weights move by lr (1 + 0.9) times the gradient."""
    training = training_of(batch=len(toy), nesterov=True, weight_decay=0.0)
    twin = net_of()
    loss = nn.functional.cross_entropy(twin(toy.pixels()), toy.labels)
    slopes = torch.autograd.grad(loss, list(twin.parameters()))
    after = trained(net_of(), Phase("one", 1, 0.1), training)
    for (name, value), slope in zip(twin.state_dict().items(), slopes):
        torch.testing.assert_close(after[name], value - 0.19 * slope, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("decay_all", [True, False])
def test_batchnorm_and_biases_have_no_weight_decay_where_that_is_asked_for(
    net_of: Net, training_of: Trainings, optimizer: str, decay_all: bool
) -> None:
    """At learning rates where only decay matters: gradients are zeroed, so whatever moves was decayed."""
    model = net_of(batchnorm=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}

    def zero(step: Step) -> None:
        for parameter in step.model.parameters():
            parameter.grad.zero_()

    training = training_of(optimizer=optimizer, weight_decay=0.5, decay_all=decay_all)
    run_phase(model, Phase("decay", 1, 0.1, after_backward=zero), training)
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    weights_of_layers = {"0.weight", "4.weight", "6.weight"}
    assert moved == (set(before) if decay_all else weights_of_layers)


def test_gradients_are_clipped_to_the_norm_asked_for(net_of: Net, training_of: Trainings) -> None:
    seen: list[tuple[float, float]] = []

    def norm(step: Step) -> float:
        return float(torch.stack([p.grad.norm() for p in step.model.parameters()]).norm())

    before: list[float] = []
    phase = Phase(
        "clipped", 1, 0.1, after_backward=lambda step: before.append(norm(step)),
        after_step=lambda step: seen.append((before[-1], norm(step))),
    )  # fmt: skip
    run_phase(net_of(), phase, training_of(gradient_clip=0.05))
    assert all(first > 0.05 for first, _ in seen)
    assert [after for _, after in seen] == pytest.approx([0.05] * 3, rel=1e-3)


# ---- speed -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fast, tolerance", [({"precision": "bf16"}, 0.03), ({"channels_last": True}, 1e-4)])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_faster_arithmetic_trains_masked_networks_to_nearly_the_same_weights(
    net_of: Net, training_of: Trainings, short: Callable[[type], Any], name: str, fast: dict[str, Any], tolerance: float
) -> None:
    def run(**budget: Any) -> dict[str, Tensor]:
        model = net_of(batchnorm=True)
        mask_layers(model, keep_largest({n: w.abs() for n, w in weights(model).items()}, THIRD))
        training = training_of(short(OBJECTIVES[name]), pretrain=1, **budget)
        return trained(model, training.pretrain(), training)

    exact, near = run(), run(**fast)
    for key in exact:
        assert near[key].dtype == exact[key].dtype
        torch.testing.assert_close(near[key], exact[key], atol=tolerance, rtol=tolerance)
    if "precision" in fast:
        assert not equal(exact, near), "bf16 rounds"


def compiled_weights(net_of: Net, training_of: Trainings, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """Weights agree, the network was really compiled, and it is as before afterwards."""
    used: list[str] = []
    real = torch.compile

    def watched(function: Any) -> Any:
        used.append(backend)
        return real(function, backend=backend)

    monkeypatch.setattr(torch, "compile", watched)
    for objective in (PGDTraining(steps=2), IBPTraining(eps=Fraction(1, 20))):
        models = net_of(batchnorm=True), net_of(batchnorm=True)
        after = [
            trained(model, Phase("pretrain", 1, 0.1), training_of(objective, compile=fast, batch=20))
            for model, fast in zip(models, (False, True))
        ]
        for key in after[0]:
            torch.testing.assert_close(after[1][key], after[0][key], atol=1e-4, rtol=1e-4)
        assert models[1]._compiled_call_impl is None
    assert used == [backend] * 2


def test_a_compiled_network_trains_to_the_same_weights(
    net_of: Net, training_of: Trainings, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled_weights(net_of, training_of, monkeypatch, "eager")


@pytest.mark.slow
def test_a_network_compiled_to_machine_code_trains_to_the_same_weights(
    net_of: Net, training_of: Trainings, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled_weights(net_of, training_of, monkeypatch, "inductor")


# ---- replays ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epochs, replays, passes", [(4, 4, 1), (9, 4, 3), (3, 1, 3), (2, 3, 1)])
def test_replays_share_the_epochs_and_the_schedule_ends_with_the_last_real_step(
    net_of: Net, training_of: Trainings, epochs: int, replays: int, passes: int
) -> None:
    """ceil(epochs / m) passes of m steps per batch: 90 epochs at m = 4 are 23 passes."""
    rates: list[float] = []
    told: list[Progress] = []
    reports: list[Any] = []

    def keep(step: Step) -> None:
        rates.append(step.optimizer.param_groups[0]["lr"])
        told.append(step.progress)

    training = training_of(FreeTraining(eps=Fraction(1, 20), replays=replays))
    phase = Phase("free", epochs, 0.2, ramp=0.5, after_backward=keep)
    run_phase(net_of(), phase, training, report=lambda *w: reports.append(w[:3]))
    steps = passes * replays * 3
    assert told == [Progress(step, steps, round(0.5 * steps), passes) for step in range(steps)]
    assert rates == pytest.approx([0.2 * (1 + math.cos(math.pi * step / steps)) / 2 for step in range(steps)])
    assert reports == [("free", epoch + 1, passes) for epoch in range(passes)]


@dataclass(frozen=True)
class WatchingFree(FreeTraining):
    """Free training that writes down the images it is given."""

    seen: list[Tensor] = field(default_factory=list)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, progress: Progress) -> Tensor:
        self.seen.append(x.detach().clone())
        return super().__call__(model, x, y, progress)


def test_free_training_renewed_in_every_epoch_is_clean_and_fgsm_training_in_turn(
    net_of: Net, training_of: Trainings, toy: Split
) -> None:
    """One batch per epoch, m = 2: a step on x, then one on x + eps sign of the gradient that the first step met."""
    eps = Fraction(1, 20)
    free = WatchingFree(eps=eps, replays=2, renewed=True)
    training = training_of(free, batch=len(toy), momentum=0.0, weight_decay=0.0)
    after = trained(net_of(), Phase("free", 4, 0.1), training)
    order = torch.Generator().manual_seed(derived_seed(0, "free", "order"))
    twin = net_of()
    for epoch in range(2):
        ((x, y),) = batches(toy, len(toy), order)
        fgsm = FGSM(norm="linf", eps=eps)(twin, x, y)
        for half, image in enumerate((x, fgsm)):
            torch.testing.assert_close(free.seen[2 * epoch + half], image, atol=1e-6, rtol=0)
            lr = 0.1 * (1 + math.cos(math.pi * (2 * epoch + half) / 4)) / 2
            slopes = torch.autograd.grad(nn.functional.cross_entropy(twin(image), y), list(twin.parameters()))
            with torch.no_grad():
                for parameter, slope in zip(twin.parameters(), slopes):
                    parameter -= lr * slope
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(after[name], value, atol=1e-5, rtol=1e-4)


def test_the_perturbation_is_carried_from_batch_to_batch_and_epoch_to_epoch_within_its_ball(
    net_of: Net, training_of: Trainings
) -> None:
    shown = []
    for renewed in (False, True):
        free, clean = WatchingFree(eps=Fraction(1, 20), replays=2, renewed=renewed), Watching(Benign())
        run_phase(net_of(), Phase("free", 4, 0.1), training_of(free))
        run_phase(net_of(), Phase("free", 2, 0.1), training_of(clean))
        moved = [seen - x for seen, (x, _) in zip(free.seen, (one for one in clean.seen for _ in range(2)))]
        assert max(float(one.abs().max()) for one in moved) == pytest.approx(0.05, abs=1e-6)
        shown.append([float(one.abs().max()) > 0.04 for one in moved])
    assert shown[0] == [False] + [True] * 11
    assert shown[1] == [False] + [True] * 5 + [False] + [True] * 5


# ---- killed and resumed ----------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


class KillingSnapshots(Snapshots):
    """Keeps every state as bytes, as a file would, and kills the run at one of them."""

    def __init__(self, at: int) -> None:
        self.at, self.kept = at, b""

    def load(self) -> dict[str, Any] | None:
        return torch.load(io.BytesIO(self.kept), weights_only=True) if self.kept else None

    def save(self, state: Callable[[], dict[str, Any]]) -> None:
        buffer = io.BytesIO()
        torch.save(state(), buffer)
        self.kept, self.at = buffer.getvalue(), self.at - 1
        if self.at == 0:
            raise Killed


def resumes(net_of: Net, training: Training, at: int) -> None:
    phase = Phase("pretrain", 4 * training.replays, 0.1, ramp=0.5)
    whole = trained(net_of(batchnorm=True), phase, training)
    snapshots = KillingSnapshots(at)
    with pytest.raises(Killed):
        run_phase(net_of(batchnorm=True), phase, training, snapshots)
    torch.manual_seed(99)  # another process
    assert equal(whole, trained(net_of(seed=7, batchnorm=True), phase, training, snapshots=snapshots))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_killed_phase_goes_on_to_the_bit_under_every_objective(
    net_of: Net, training_of: Trainings, short: Callable[[type], Any], name: str
) -> None:
    resumes(net_of, training_of(short(OBJECTIVES[name]), augment="crop-flip"), at=2)


@pytest.mark.parametrize(
    "budget",
    [
        {"schedule": "step"}, {"schedule": "one-cycle"}, {"schedule": "one-cycle", "optimizer": "adam"}, {"nesterov": True},
        {"decay_all": False}, {"gradient_clip": 0.1}, {"precision": "bf16"}, {"channels_last": True},
    ],
    ids=str,
)  # fmt: skip
def test_a_killed_phase_goes_on_to_the_bit_under_every_optimizer_and_schedule(
    net_of: Net, training_of: Trainings, budget: dict[str, Any]
) -> None:
    resumes(net_of, training_of(FreeTraining(replays=2), **budget), at=3)


# ---- reports and failure ---------------------------------------------------------------------------------------------


def test_every_epoch_reports_the_phase_its_number_and_the_mean_loss(net_of: Net, training_of: Trainings, toy: Split) -> None:
    reports: list[Any] = []
    run_phase(net_of(), Phase("still", 2, 0.0), training_of(batch=20), report=lambda *words: reports.append(words))
    with torch.no_grad():
        loss = float(nn.functional.cross_entropy(net_of()(toy.pixels()), toy.labels))
    assert [words[:3] for words in reports] == [("still", 1, 2), ("still", 2, 2)]
    assert [words[3] for words in reports] == pytest.approx([loss, loss], abs=1e-5)


@dataclass(frozen=True)
class Breaks:
    """Cross-entropy whose value turns into `value` from the fourth step on."""

    value: float

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, progress: Progress) -> Tensor:
        loss = nn.functional.cross_entropy(model(x), y)
        return loss * self.value if progress.step >= 3 else loss


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_the_phase_and_says_where(
    net_of: Net, training_of: Trainings, value: float
) -> None:
    with pytest.raises(TrainingDivergedError, match=r"in epoch 2 of phase 'pretrain'; lower its learning rate \(0.1\)"):
        run_phase(net_of(), Phase("pretrain", 3, 0.1), training_of(Breaks(value)))


def test_a_learning_rate_far_too_high_is_reported_as_divergence(net_of: Net, training_of: Trainings) -> None:
    with pytest.raises(TrainingDivergedError):
        run_phase(net_of(), Phase("pretrain", 20, 1e12), training_of())


def test_the_network_trains_in_training_mode(net_of: Net, training_of: Trainings) -> None:
    model = net_of(batchnorm=True).eval()
    run_phase(model, Phase("pretrain", 1, 0.1), training_of())
    assert int(model[1].num_batches_tracked) == 3
