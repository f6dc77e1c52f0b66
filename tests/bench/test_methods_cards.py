"""The theorems of the cards of methods.md 1.5 to 1.8, 2.1 to 2.3 and 3, each against a hand calculation or brute force."""

from __future__ import annotations

import itertools
import re
import tomllib
from collections.abc import Callable
from fractions import Fraction
from math import floor, log, sqrt
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from torch import Tensor, nn

from bench import phases
from bench.build import build
from bench.data import Split
from bench.errors import UserError
from bench.loop import run_phase
from bench.methods import (
    ADMM,
    AL0,
    AP,
    DNR,
    HARP,
    HYDRA,
    IMP,
    METHODS,
    NAP,
    SNIP,
    STR,
    ChannelPruning,
    FlyingBird,
    FlyingBirdPlus,
    NRSLoss,
    PwoA,
    RigL,
    TwinRep,
)
from bench.methods.admm import Anchor, anchor_penalty, anchored
from bench.methods.al0 import project_
from bench.methods.allocation import ALLOCATIONS, allocate, erk_densities
from bench.methods.dnr import momentum, regrowth
from bench.methods.harp import RatedScores, excess, final_counts, rated
from bench.methods.pwoa import Distillation, gaussian_kernel, hsic, normalised
from bench.methods.rigl import drop_and_grow_, opened
from bench.methods.snip import sensitivity
from bench.methods.soft_threshold import SoftThreshold, trim_
from bench.methods.twin_rep import Twin
from bench.models import build_model
from bench.objectives import Benign, PGDTraining, StabilityTraining
from bench.phases import fit
from bench.run import sparsity_of
from bench.sparsity import OpenMask, attach, budget_of, density_of, effective_state, keep_largest_of_all, prunable, weights
from bench.train import Phase, Progress, Training

Net = Callable[..., nn.Sequential]
Trainings = Callable[..., Training]
TENTH, THIRD = Fraction(1, 10), Fraction(1, 3)


def until(method: Any, model: nn.Module, training: Training, phase: str, density: Fraction = THIRD) -> Phase:
    """Train up to the named phase, which is returned and not run."""
    for found in method(model, density, training):
        if found.name == phase:
            return found
        run_phase(model, found, training)
    raise AssertionError(f"no phase {phase}")


def supports(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight != 0 for name, weight in weights(model).items()}


def counts(model: nn.Module) -> dict[str, int]:
    return {name: int(alive.sum()) for name, alive in supports(model).items()}


def one_layer(values: list[list[float]], part: nn.Module | None = None) -> nn.Sequential:
    layer = nn.Linear(len(values[0]), len(values), bias=False)
    layer.weight.data = torch.tensor(values)
    if part is not None:
        attach(layer, part)
    return nn.Sequential(layer)


# ---- a killed run ----------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """As abrupt as it gets without losing the test."""


OTHERS = [METHODS[name]() for name in METHODS if name not in ("dense", "random", "lwm", "hydra", "rigl", "imp")]


@pytest.mark.parametrize(
    "method, optimizer",
    [*((one, "sgd") for one in OTHERS), (RigL(every=2), "sgd"), (RigL(every=2), "adam"), (IMP(Fraction(1, 2), rewind=1), "sgd")],
    ids=repr,
)
def test_a_run_killed_after_every_single_epoch_ends_where_an_uninterrupted_one_does(
    net_of: Net, training_of: Trainings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: Any, optimizer: str
) -> None:
    """What a method remembers is durable: masks, duals, thresholds, projected weights."""
    monkeypatch.setattr(phases, "SECONDS_BETWEEN_SNAPSHOTS", 0.0)
    training = training_of(StabilityTraining(), optimizer=optimizer, lr=0.02)
    seen: set[tuple[str, int]] = set()

    def report(name: str, epoch: int, epochs: int, loss: float) -> None:
        if (name, epoch) not in seen:
            seen.add((name, epoch))
            raise Killed

    while True:
        try:
            resumed = fit(net_of(), method, THIRD, training, tmp_path, report)
            break
        except Killed:
            continue
    assert len(seen) > 3
    straight = fit(net_of(), method, THIRD, training)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


# ---- global budgets --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 5, 11, 12])
def test_a_global_mask_holds_what_a_stable_sort_over_all_layers_puts_last(keep: int) -> None:
    generator = torch.Generator().manual_seed(keep)
    scores = {name: torch.randint(0, 4, shape, generator=generator).float() for name, shape in {"a": (2, 3), "b": (6,)}.items()}
    flat = np.concatenate([score.flatten().numpy() for score in scores.values()])
    expected = np.zeros(12)
    expected[np.argsort(flat, kind="stable")[12 - keep :]] = 1
    masks = keep_largest_of_all(scores, keep)
    assert torch.cat([mask.flatten() for mask in masks.values()]).tolist() == expected.tolist()
    assert {name: mask.shape for name, mask in masks.items()} == {name: score.shape for name, score in scores.items()}


@pytest.mark.parametrize(
    "arch, density, expected",
    [("lenet", "0.0015", 645), ("lenet", "0.005", 2152), ("lenet", "0.01", 4305)],
)
def test_global_budgets_are_those_of_the_paper(arch: str, density: str, expected: int) -> None:
    """methods.md 6.1, kept-weight checks."""
    total = sum(weight.numel() for weight in weights(build_model(arch, (1, 28, 28), 10)).values())
    assert budget_of(total, Fraction(density)) == expected


def test_a_density_that_keeps_nothing_is_refused(net_of: Net, training_of: Trainings) -> None:
    with pytest.raises(ValueError, match=r"density 1/2000 keeps none of the network's 1108 weights; ask for at least 1/1108"):
        fit(net_of(), AP(), Fraction(1, 2000), training_of(pretrain=0, finetune=0))


# ---- ADMM ------------------------------------------------------------------------------------------------------------


def test_admms_duplicate_and_its_pull_are_those_of_the_card() -> None:
    """methods.md 1.5 (i): W = (3, 1, -2, 0.5), half kept."""
    model = one_layer([[3.0, 1.0, -2.0, 0.5]])
    attach(model[0], Anchor(model[0].weight, 2, rho=0.25))
    ((anchor, _),) = anchored(model)
    assert anchor.z.tolist() == [[3.0, 0.0, -2.0, 0.0]]
    anchor_penalty(model, torch.empty(0), torch.empty(0)).backward()
    assert model[0].parametrizations.weight.original.grad.tolist() == [[0.0, 0.25, 0.0, 0.125]]


def test_a_dual_update_is_the_one_of_boyd_et_al_and_keeps_no_history() -> None:
    """rho grows, z projects w + u, u adds w - z; by hand for two updates at resting weights."""
    weight = torch.tensor([[3.0, 1.0, -2.0, 0.5]], requires_grad=True)
    anchor = Anchor(weight, 2, rho=1.0)
    anchor.update_dual(weight, 1.5)
    assert (anchor.rho.item(), anchor.z.tolist(), anchor.u.tolist()) == (1.5, [[3.0, 0.0, -2.0, 0.0]], [[0.0, 1.0, 0.0, 0.5]])
    anchor.update_dual(weight, 1.5)  # w + u = (3, 2, -2, 1): of the tied twos the later stays
    assert (anchor.rho.item(), anchor.z.tolist(), anchor.u.tolist()) == (2.25, [[3.0, 0.0, -2.0, 0.0]], [[0.0, 2.0, 0.0, 1.0]])
    assert not anchor.u.requires_grad


def test_weights_that_are_sparse_already_are_not_pulled() -> None:
    """methods.md 1.5 (ii): Z = W and U = 0 for ever, and the method is its objective alone."""
    model = one_layer([[3.0, 0.0, -2.0, 0.0]])
    attach(model[0], Anchor(model[0].weight, 2, rho=1.0))
    ((anchor, weight),) = anchored(model)
    for _ in range(3):
        anchor.update_dual(weight, 1.3)
        assert torch.equal(anchor.z, weight)
        assert not anchor.u.any()
    anchor_penalty(model, torch.empty(0), torch.empty(0)).backward()
    assert not model[0].parametrizations.weight.original.grad.any()


def test_a_large_rho_pulls_weights_onto_their_duplicate_monotonically() -> None:
    """methods.md 1.5 (iii): gradient descent on a quadratic loss plus the penalty, between two dual updates."""
    torch.manual_seed(0)
    model = one_layer(torch.randn(3, 8).tolist())
    attach(model[0], Anchor(model[0].weight, 6, rho=50.0))
    ((anchor, _),) = anchored(model)
    weight, target = model[0].parametrizations.weight.original, torch.randn(3, 8)
    optimizer, distances = torch.optim.SGD([weight], 0.005), []
    for _ in range(20):
        optimizer.zero_grad()
        ((weight - target).square().sum() / 2 + anchor_penalty(model, torch.empty(0), torch.empty(0))).backward()
        optimizer.step()
        distances.append(float((weight - anchor.z).norm().detach()))
    assert all(later <= earlier + 1e-6 for earlier, later in itertools.pairwise(distances))
    assert distances[-1] < 0.2 * distances[0]


@pytest.mark.parametrize(
    "epochs, updates, expected",
    [(200, 9, 9), (199, 9, 9), (29, 9, 9), (20, 9, 9), (19, 9, 9), (15, 9, 9), (7, 2, 2), (3, 9, 2), (5, 0, 0), (1, 9, 0)],
)
def test_the_dual_is_updated_evenly_and_never_at_the_end(epochs: int, updates: int, expected: int) -> None:
    """The card's 200 epochs with T = 20 make 9 updates; rho then is 1e-3 * 1.3^9 = 0.0106."""
    model = one_layer([[3.0, 1.0]])
    attach(model[0], Anchor(model[0].weight, 1, rho=1e-3))
    ((anchor, _),) = anchored(model)
    at = [0]
    for epoch in range(1, epochs + 1):
        before = float(anchor.rho)
        ADMM(updates=updates)._update(SimpleNamespace(model=model, progress=Progress(4 * epoch, 4 * epochs, 0, epochs)))
        at += [epoch] * (float(anchor.rho) > before)
    assert float(anchor.rho) == pytest.approx(1e-3 * 1.3**expected, rel=1e-5)
    gaps = {later - earlier for earlier, later in itertools.pairwise([*at, epochs])}
    assert max(gaps) - min(gaps) <= 1


# ---- SNIP ------------------------------------------------------------------------------------------------------------


class Product:
    """L = (sum of the logits)^2 / 2, whose gradient by w_i is x_i times that sum."""

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, progress: Progress) -> Tensor:
        return model(x).sum().square() / 2


def test_snip_scores_are_weight_times_gradient_by_hand() -> None:
    """methods.md 1.6: L = (sum_i w_i x_i)^2 / 2 gives |w_i x_i y|; here y = 0.5 - 0.5 + 0.75 = 0.75."""
    data = Split(torch.tensor([[[[51, 102, 153]]]], dtype=torch.uint8), torch.zeros(1, dtype=torch.long), torch.arange(1), 255.0)
    training = SimpleNamespace(objective=Product(), batches=lambda generator: iter([(data.pixels(), data.labels)]))
    model = nn.Sequential(nn.Flatten(), *one_layer([[2.5, -1.25, 1.25]]))
    (scores,) = sensitivity(model, training, 1).values()
    torch.testing.assert_close(scores, torch.tensor([[0.375, 0.375, 0.5625]]))
    assert model[1].weight.grad is None


def test_snip_does_not_see_the_scale_of_consecutive_relu_layers(net_of: Net, training_of: Trainings) -> None:
    model, scaled = net_of(), net_of()
    with torch.no_grad():
        for tensor, factor in ((scaled[3].weight, 4.0), (scaled[3].bias, 4.0), (scaled[5].weight, 0.25)):
            tensor.mul_(factor)
    torch.manual_seed(3)
    found = sensitivity(model, training_of(), 2)
    torch.manual_seed(3)
    other = sensitivity(scaled, training_of(), 2)
    assert all(torch.allclose(found[name], other[name], rtol=1e-4, atol=1e-7) for name in found)


def test_scoring_leaves_batchnorm_as_it_was(net_of: Net, training_of: Trainings) -> None:
    model = net_of(batchnorm=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sensitivity(model, training_of(), 2)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("scope", ["per layer", "global"])
@pytest.mark.parametrize("loss", ["benign", "objective"])
def test_snip_keeps_the_most_sensitive_weights_of_its_scope(
    net_of: Net, training_of: Trainings, scope: Any, loss: Any
) -> None:
    training = training_of(PGDTraining(eps=Fraction(1, 5), steps=2), pretrain=0, prune=0, finetune=0)
    model = net_of()
    torch.manual_seed(5)
    scores = sensitivity(model, training.benign if loss == "benign" else training, 1)
    torch.manual_seed(5)
    next(iter(SNIP(scope, loss, rescale=False)(model, TENTH, training)))
    alive = supports(model)
    if scope == "global":
        assert sum(counts(model).values()) == 110
        weakest = min(float(scores[name][alive[name]].min()) for name in scores if alive[name].any())
        assert weakest >= max(float(scores[name][~alive[name]].max()) for name in scores)
    else:
        assert counts(model) == {"0": 4, "3": 103, "5": 5}
        assert all(scores[name][alive[name]].min() >= scores[name][~alive[name]].max() for name in scores)


# ---- STR -------------------------------------------------------------------------------------------------------------


def test_the_soft_threshold_and_its_slope_are_those_of_the_card() -> None:
    """methods.md 1.7: W = (0.5, -0.3, 0.05), g = 0.2, L = sum of i * W_i; g' = 0.2 * 0.8."""
    weight = torch.tensor([0.5, -0.3, 0.05], requires_grad=True)
    part = SoftThreshold(0.2, weight)
    effective = part(weight)
    torch.testing.assert_close(effective, torch.tensor([0.3, -0.1, 0.0]))
    (effective * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert float(part.s.grad) == pytest.approx(-0.16 * 1 + 0.16 * 2, rel=1e-5)
    assert weight.grad.tolist() == [1.0, 2.0, 0.0]


def test_trimming_multiplies_all_thresholds_by_one_factor() -> None:
    """By hand: |w|/g = (5, 3, 2) and (4, 1); two survive at the factor 3, so weights 0.1 and 0.2 less than three thresholds."""
    model = nn.Sequential(*one_layer([[0.5, -0.3, 0.2]]), *one_layer([[0.8], [-0.2]]))
    for layer, threshold in zip(model, (0.1, 0.2), strict=True):
        attach(layer, SoftThreshold(threshold, layer.weight))
    trim_(model, 2)
    torch.testing.assert_close(model[0].weight.detach(), torch.tensor([[0.2, 0.0, 0.0]]))
    torch.testing.assert_close(model[1].weight.detach(), torch.tensor([[0.2], [0.0]]))


def test_thresholds_drive_the_network_to_its_density_before_the_trim(net_of: Net, training_of: Trainings) -> None:
    training, model = training_of(pretrain=25, prune=10, lr=0.05), net_of()
    phase = until(STR(), model, training, "train", TENTH)
    run_phase(model, phase, training)
    assert 0.05 < float(density_of(model)) < 0.15
    thresholds = [float(part.s.detach().sigmoid()) for part in model.modules() if isinstance(part, SoftThreshold)]
    assert len({round(one, 6) for one in thresholds}) == 3  # each layer has learned its own


def test_at_density_one_nothing_drives_the_thresholds(net_of: Net, training_of: Trainings) -> None:
    model, training = net_of(), training_of(weight_decay=0.0, lr=0.0)
    run_phase(model, until(STR(start=1e-6), model, training, "train", Fraction(1)), training)
    starts = [float(part.s.detach()) for part in model.modules() if isinstance(part, SoftThreshold)]
    assert starts == pytest.approx([log(1e-6 / (1 - 1e-6))] * 3)


# ---- RigL ------------------------------------------------------------------------------------------------------------

CARD_SHAPES = {"a": (64, 3, 3, 3), "b": (128, 64, 3, 3), "c": (256, 128, 3, 3), "d": (10, 256)}


@pytest.mark.parametrize(
    "density, expected", [("0.1", (1, 0.15074, 0.07423, 1)), ("0.02", (0.33990, 0.02161, 0.01064, 0.83602))]
)
def test_erk_densities_are_those_of_the_card(density: str, expected: tuple[float, ...]) -> None:
    shapes = {name: torch.Size(shape) for name, shape in CARD_SHAPES.items()}
    total = sum(shape.numel() for shape in shapes.values())
    found = erk_densities(shapes, floor(Fraction(density) * total))
    assert [float(one) for one in found.values()] == pytest.approx(expected, rel=2e-4)  # the card does not round the budget


@pytest.mark.parametrize("rule", ALLOCATIONS)
@pytest.mark.parametrize("density", ["0.9", "0.3", "0.02", "0.0001"])
def test_an_allocation_spends_the_budget_and_overfills_no_layer(rule: str, density: str) -> None:
    shapes = {name: torch.Size(shape) for name, shape in CARD_SHAPES.items()}
    total = sum(shape.numel() for shape in shapes.values())
    keep = budget_of(total, Fraction(density))
    found = allocate(rule, shapes, keep)
    assert sum(found.values()) == keep
    assert all(1 <= found[name] <= shape.numel() for name, shape in shapes.items())
    exact = ALLOCATIONS[rule](shapes, keep)
    assert all(abs(found[name] - exact[name] * shape.numel()) <= 2 for name, shape in shapes.items())
    assert allocate(rule, shapes, total) == {name: shape.numel() for name, shape in shapes.items()}


def test_uniform_keeps_the_first_layer_dense_and_the_others_equally() -> None:
    shapes = {name: torch.Size(shape) for name, shape in CARD_SHAPES.items()}
    found = ALLOCATIONS["uniform"](shapes, 20000)
    assert found["a"] == 1
    assert len({found[name] for name in "bcd"}) == 1


def test_ideal_gas_quotas_lie_on_one_curve() -> None:
    """density = 1 / (1 + F size): (1 / density - 1) / size is the same force in every layer."""
    shapes = {name: torch.Size(shape) for name, shape in CARD_SHAPES.items()}
    found = ALLOCATIONS["igq"](shapes, 20000)
    forces = [float((1 / found[name] - 1) / shape.numel()) for name, shape in shapes.items()]
    assert forces == pytest.approx([forces[0]] * 4, rel=1e-6)


def test_a_budget_smaller_than_the_number_of_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="3 weights cannot be shared by 4 layers; ask for a larger density"):
        allocate("erk", {name: torch.Size(shape) for name, shape in CARD_SHAPES.items()}, 3)


def test_an_open_mask_hides_weights_and_shows_their_gradient() -> None:
    model = one_layer([[2.0, 3.0]], OpenMask(torch.tensor([[1.0, 0.0]])))
    out = model(torch.tensor([[5.0, 7.0]]))
    out.sum().backward()
    assert out.item() == 10.0
    assert model[0].parametrizations.weight.original.grad.tolist() == [[5.0, 7.0]]


def test_dropping_and_growing_by_hand() -> None:
    """The two smallest go; of what is then empty the two of the largest gradient come, one of them back with its value."""
    model = one_layer([[0.5, -0.1, 0.2, 0.0, 0.0]], OpenMask(torch.tensor([[1.0, 1.0, 1.0, 0.0, 0.0]])))
    ((part, weight),) = opened(model)
    new = drop_and_grow_(part, weight, 2, 2, torch.tensor([[9.0, 3.0, 1.0, 2.0, 5.0]]))
    assert part.mask.tolist() == [[1, 1, 0, 0, 1]]
    assert new.tolist() == [[False, False, False, False, True]]
    torch.testing.assert_close(weight.detach(), torch.tensor([[0.5, -0.1, 0.0, 0.0, 0.0]]))


def test_the_share_that_moves_falls_from_alpha_to_nothing() -> None:
    method = RigL(alpha=0.3, every=10, until=0.75)
    shares = {step: method.share(Progress(step, 1000, 0, 10)) for step in range(1000)}
    assert shares[10] == pytest.approx(0.3, abs=1e-3)
    assert shares[740] == pytest.approx(0.0, abs=1e-3)
    assert {step for step, share in shares.items() if share > 0} == set(range(10, 750, 10))


@pytest.mark.parametrize("kind", [FlyingBird, FlyingBirdPlus])
def test_whatever_is_grown_is_still_trained_so_the_count_is_exact(net_of: Net, training_of: Trainings, kind: Any) -> None:
    """Step 17 would be a rewiring, and is the last of 18: what grew there would stay 0."""
    model, training = net_of(), training_of()
    assert training.progress(training.train(), 0).steps == 18
    fit(model, kind("erk", every=17), THIRD, training)
    assert sum(counts(model).values()) == 369


@pytest.mark.parametrize("method", [FlyingBird(every=3), RigL(every=3, until=1.0)], ids=repr)
@pytest.mark.parametrize("epochs, rewired", [(4, {3, 6, 9, 12}), (3, {3, 6, 9}), (2, {3}), (1, set())])
def test_the_last_epoch_rewires_nothing(method: Any, epochs: int, rewired: set[int]) -> None:
    """Five steps to an epoch."""
    assert {step for step in range(5 * epochs) if method.share(Progress(step, 5 * epochs, 0, epochs)) > 0} == rewired


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_rigl_keeps_its_count_at_every_step_and_new_weights_start_at_rest(
    net_of: Net, training_of: Trainings, optimizer: str
) -> None:
    model, training = net_of(batchnorm=True), training_of(optimizer=optimizer, lr=0.02, weight_decay=0.1)
    phase = until(RigL(every=3), model, training, "train")
    start = {name: int(part.mask.sum()) for name, (part, _) in enumerate(opened(model))}
    moved = 0

    def watched(step: Any) -> None:
        nonlocal moved
        before = [(part.mask.clone(), weight.detach().clone()) for part, weight in opened(model)]
        norm = model[1].weight.detach().clone()
        phase.after_backward(step)
        for (part, weight), (mask, old) in zip(opened(model), before, strict=True):
            new, gone = (part.mask > mask), (part.mask < mask)
            moved += int(new.sum())
            assert not weight[new].any()
            assert not weight[gone].any()
            assert torch.equal(weight * mask * part.mask, old * mask * part.mask)
            for state in step.optimizer.state[weight].values():
                if isinstance(state, Tensor) and state.shape == weight.shape:
                    assert not state[new | (part.mask == 0)].any()
        if step.progress.step and step.progress.step % 3 == 0 and step.progress.step < 13:
            step.optimizer.step()  # the rewiring takes the place of the step: nothing moves
            assert torch.equal(norm, model[1].weight)

    def counted(step: Any) -> None:
        assert {name: int(part.mask.sum()) for name, (part, _) in enumerate(opened(model))} == start
        assert all(not weight[part.mask == 0].any() for part, weight in opened(model))

    run_phase(model, Phase("train", phase.epochs, phase.lr, after_backward=watched, after_step=counted), training)
    assert sum(start.values()) == 369
    assert moved > 10


def test_rigl_grows_under_attack_where_the_attacked_gradient_is_large(net_of: Net, training_of: Trainings) -> None:
    """Its scores come from the suite's loss: two objectives, two supports."""
    masks = []
    for objective in (Benign(), PGDTraining(eps=Fraction(3, 10), steps=2)):
        model, training = net_of(), training_of(objective, lr=1e-6)
        torch.manual_seed(0)
        run_phase(model, until(RigL(every=4), model, training, "train"), training)
        masks.append(torch.cat([part.mask.flatten() for part, _ in opened(model)]))
    assert not torch.equal(*masks)


# ---- NAP, AP and Al0 -------------------------------------------------------------------------------------------------


def test_nap_is_ap_without_the_objective_and_the_objective_changes_nothing(net_of: Net, training_of: Trainings) -> None:
    attacked, plain = training_of(PGDTraining(eps=Fraction(1, 5), steps=2)), training_of()
    nap, ap = fit(net_of(), NAP(), THIRD, attacked), fit(net_of(), AP(), THIRD, plain)
    assert all(torch.equal(nap[name], ap[name]) for name in ap)
    robust = fit(net_of(), AP(), THIRD, attacked)
    assert any(not torch.equal(nap[name], robust[name]) for name in ap)


def test_nap_and_a_benign_ap_share_their_stored_phases(net_of: Net, training_of: Trainings, tmp_path: Path) -> None:
    trained: list[str] = []
    report = lambda name, epoch, epochs, loss: trained.append(name)  # noqa: E731
    fit(net_of(), AP(), THIRD, training_of(), tmp_path, report)
    trained.clear()
    fit(net_of(), NAP(), THIRD, training_of(StabilityTraining()), tmp_path, report)
    assert set(trained) == {"finetune"}  # after pruning, the method counts


def test_ap_keeps_the_largest_weights_of_the_whole_network(net_of: Net, training_of: Trainings) -> None:
    model, training = net_of(), training_of()
    dense = net_of()
    run_phase(dense, training.pretrain(), training)
    until(AP(), model, training, "finetune", TENTH)
    alive, magnitude = supports(model), {name: weight.abs() for name, weight in weights(dense).items()}
    assert sum(counts(model).values()) == 110
    weakest = min(float(magnitude[name][alive[name]].min()) for name in alive)
    assert weakest >= max(float(magnitude[name][~alive[name]].max()) for name in alive)


@pytest.mark.parametrize("keep", range(1, 9))
def test_the_projection_is_the_closest_sparse_vector(keep: int) -> None:
    """Against all supports of `keep` among 8 weights in two layers; a second projection changes nothing."""
    torch.manual_seed(keep)
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(1, 2, bias=False))
    start = torch.cat([layer.weight.detach().flatten() for layer in model])
    best = min(
        float((start - start * torch.tensor([float(at in chosen) for at in range(8)])).square().sum())
        for chosen in itertools.combinations(range(8), keep)
    )
    project_(model, keep)
    found = torch.cat([layer.weight.detach().flatten() for layer in model])
    assert int((found != 0).sum()) == keep
    assert float((start - found).square().sum()) == pytest.approx(best, rel=1e-6, abs=1e-9)
    project_(model, keep)
    assert torch.equal(found, torch.cat([layer.weight.detach().flatten() for layer in model]))


@pytest.mark.parametrize("schedule", ["constant", "exp"])
def test_al0_holds_its_budget_after_every_step_while_its_support_moves(
    net_of: Net, training_of: Trainings, schedule: Any
) -> None:
    model, training = net_of(), training_of(finetune=4, finetune_lr=0.5)
    phase = until(AL0(schedule), model, training, "project")
    kept, before, changes = [], supports(model), 0

    def project(step: Any) -> None:
        nonlocal before, changes
        phase.after_step(step)
        kept.append(sum(counts(model).values()))
        after = supports(model)
        changes += sum(int((after[name] & ~before[name]).sum()) for name in after)
        before = after

    run_phase(model, Phase("project", phase.epochs, phase.lr, after_step=project), training)
    assert len(kept) == 18
    if schedule == "constant":
        assert set(kept) == {369}
        assert changes > 0
    else:
        assert kept == [max(369, floor(1108 * (1 / 3) ** ((at + 1) / 18))) for at in range(18)]
        assert kept[-1] == 369


# ---- lottery tickets -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["magnitude", "layer-normalised"])
@pytest.mark.parametrize("rewind", [0, 1])
def test_tickets_are_nested_and_rewound_to_their_start(
    net_of: Net, training_of: Trainings, score: Any, rewind: int
) -> None:
    training, model = training_of(pretrain=3, prune=2), net_of(batchnorm=True)
    start = net_of(batchnorm=True).state_dict()
    larger = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights(model).items()}
    rounds = 0
    for phase in IMP(score=score, rewind=rewind)(model, THIRD, training):
        state, alive = effective_state(model), supports(model)
        if phase.name == "round-1":
            start = state
        for name, value in state.items():
            masked = alive.get(name.removesuffix(".weight"), torch.ones(1)) if name.endswith("weight") else torch.ones(1)
            assert torch.equal(value, start[name] * masked if masked.shape == value.shape else start[name])
        assert all(bool((alive[name] <= larger[name]).all()) for name in alive)
        larger, rounds = alive, rounds + phase.name.startswith("round")
        run_phase(model, phase, training)
    assert rounds == 5  # 0.8^5 < 1/3 < 0.8^4
    assert sum(int(alive.sum()) for alive in larger.values()) == 369


def test_a_round_drops_its_share_and_99_percent_takes_21_rounds() -> None:
    """methods.md 3.8: 0.8^21 = 0.0092."""
    plan = IMP().kept(100_000, Fraction(1, 100))
    assert plan[:3] == [80_000, 64_000, 51_200]
    assert len(plan) == 21
    assert plan[-1] == 1000
    assert IMP(one_shot=True).kept(100_000, Fraction(1, 100)) == [1000]
    assert IMP().kept(100, Fraction(1)) == [100]


@pytest.mark.parametrize("method", [IMP(), NRSLoss(weight=0.0)], ids=repr)
def test_no_round_is_without_an_epoch_of_training(net_of: Net, training_of: Trainings, method: Any) -> None:
    """21 rounds do not fit into 6 epochs: 6 rounds of one epoch each, of which each keeps the same share of what was left."""
    model, kept = net_of(), []
    hundredth = Fraction(1, 100)
    for phase in method(model, hundredth, training_of(pretrain=4, prune=2)):
        kept.append(sum(counts(model).values()))
        if phase.name.startswith("round"):
            assert phase.epochs == 1
    assert kept == pytest.approx([1108 * (11 / 1108) ** (at / 6) for at in range(7)], abs=1)
    assert kept[-1] == 11
    assert method.kept(1108, hundredth, most=0) == [11]
    assert method.kept(1108, hundredth, most=100) == method.kept(1108, hundredth)


def test_tickets_spend_the_budget_of_the_others_unless_they_are_to_be_searched_in_full(
    net_of: Net, training_of: Trainings
) -> None:
    training = training_of(pretrain=5, prune=2, finetune=3)
    shared = [phase.epochs for phase in IMP()(net_of(), THIRD, training)]
    assert (sum(shared), shared[-1], max(shared[:-1]) - min(shared[:-1])) == (10, 3, 1)
    assert [phase.epochs for phase in IMP(full=True)(net_of(), THIRD, training)] == [5, 5, 5, 5, 5, 10]


# ---- channels --------------------------------------------------------------------------------------------------------


def test_channel_pruning_keeps_the_longest_filters_whole(net_of: Net, training_of: Trainings) -> None:
    training, model, dense = training_of(), net_of(batchnorm=True), net_of(batchnorm=True)
    run_phase(dense, training.pretrain(), training)
    until(ChannelPruning(), model, training, "finetune")
    found, whole = weights(model), weights(dense)
    for name, size, kept in (("0", 4, 2), ("4", 16, 6)):  # C - floor(2/3 C)
        rows = (found[name].flatten(1) != 0).sum(1)
        assert set(rows.tolist()) == {0, whole[name][0].numel()}
        norms = whole[name].flatten(1).norm(dim=1).numpy()
        assert set(np.flatnonzero(rows.numpy())) == set(np.argsort(norms)[size - kept :])
    assert int((found["6"] != 0).sum()) == 16  # the classes stay: single weights


def test_every_layer_of_a_residual_group_keeps_the_same_share_of_filters(training_of: Trainings) -> None:
    model = build_model("resnet18@1/16", (1, 8, 8), 3, seed=0)
    until(ChannelPruning(), model, training_of(pretrain=0), "finetune", Fraction(1, 4))
    for name, layer in prunable(model).items():
        if isinstance(layer, nn.Conv2d):
            alive = int((layer.weight.flatten(1) != 0).any(1).sum())
            assert alive == len(layer.weight) // 4, name


def test_the_kept_share_of_a_layer_scales_its_start(net_of: Net, training_of: Trainings) -> None:
    """RigL's and SNIP's sparse layers start with a dense layer's variance, each by its own share."""
    model, dense = net_of(), weights(net_of())
    next(iter(RigL()(model, TENTH, training_of())))
    for name, weight in weights(model).items():
        alive = weight != 0
        share = float(alive.double().mean())
        torch.testing.assert_close(weight[alive], dense[name][alive] / sqrt(share), rtol=1e-5, atol=0)


# ---- HARP ------------------------------------------------------------------------------------------------------------


def test_harps_first_rate_is_the_inverse_of_the_sigmoid() -> None:
    """methods.md 3.1: start 0.1, target 0.01, so the least share is 0.001 and r = -2.2073."""
    part = RatedScores(torch.randn(10, 10), 0.1, 0.1 * 0.01, 0.01)
    assert float(part.r.detach()) == pytest.approx(-2.2073, abs=1e-4)
    assert float(part.rate.detach()) == pytest.approx(0.1, rel=1e-5)


def test_a_rate_receives_the_sum_of_the_masks_gradient_through_its_sigmoid() -> None:
    """By hand: L = sum of W_eff, so the mask's gradient is W; sigma(0) = 1/2 and dk/dr = (1 - least) / 4."""
    weight = torch.tensor([[2.0, -1.0, 0.5, 4.0]])
    part = RatedScores(torch.tensor([[1.0, -3.0, 2.0, 0.5]]), 0.5 + 0.5 * 0.2, 0.2, 0.0)
    effective = part(weight)
    assert effective.tolist() == [[0.0, -1.0, 0.5, 0.0]] or effective.tolist() == [[2.0, -1.0, 0.5, 0.0]]
    effective.sum().backward()
    assert float(part.r.grad) == pytest.approx((2 - 1 + 0.5 + 4) * 0.8 / 4, rel=1e-5)
    assert part.scores.grad.tolist() == [[2.0, 1.0, 0.5, 4.0]]


def test_the_penalty_and_its_slope_are_zero_once_the_network_is_small_enough(net_of: Net, training_of: Trainings) -> None:
    model = net_of()
    until(HARP(start=0.1), model, training_of(pretrain=0), "prune", TENTH)
    within, above = excess(model, 0.1001), excess(model, 0.05)
    within.backward()
    assert float(within.detach()) == 0.0
    assert all(not part.r.grad for part in rated(model).values())
    assert float(above.detach()) == pytest.approx(1.0, rel=1e-4)


def test_the_penalty_grows_each_epoch_until_the_network_is_small_enough(net_of: Net, training_of: Trainings) -> None:
    for start, expected in ((0.5, 0.04), (0.1, 0.01)):  # three epochs too large, and never
        model, training = net_of(), training_of(pretrain=0, prune=3, prune_lr=0.0)
        run_phase(model, until(HARP(start=start), model, training, "prune", Fraction(1001, 10000)), training)
        assert [float(part.gamma) for part in rated(model).values()] == pytest.approx([expected] * 3)


def test_harp_at_resting_rates_learns_what_hydra_learns(net_of: Net, training_of: Trainings) -> None:
    """methods.md 3.1: rates frozen at the target. Their gradients are thrown away; the masks then are HYDRA's."""
    training, scores = training_of(prune=4, prune_lr=1.0), []
    for method in (HYDRA(), HARP(gamma=0.0, start=0.25, least=0.1)):
        model = net_of()
        phase = until(method, model, training, "prune", Fraction(1, 4))
        trains = lambda net: {name for name, _ in net.named_parameters() if name.endswith("scores")}  # noqa: E731
        run_phase(model, Phase("prune", phase.epochs, phase.lr, trains=trains), training)
        scores.append(torch.cat([part.scores.detach().flatten() for part in model.modules() if hasattr(part, "scores")]))
    assert torch.equal(*scores)


def test_learned_shares_become_exact_counts() -> None:
    parts = {name: RatedScores(torch.randn(size, 10), rate, 0.01, 0.0) for name, size, rate in (("a", 10, 0.5), ("b", 30, 0.1))}
    assert final_counts(parts, 80) == {"a": 50, "b": 30}
    assert final_counts(parts, 40) == {"a": 25, "b": 15}
    assert final_counts(parts, 280) == {"a": 100, "b": 180}  # a is full


# ---- Flying Bird -----------------------------------------------------------------------------------------------------


def test_flying_bird_with_a_fixed_share_is_rigl_with_its_shares(net_of: Net, training_of: Trainings) -> None:
    """methods.md 3.2: with gradient growth and fixed d; RigL's cosine is flat where it ends far beyond the training."""

    class Flat(RigL):
        def share(self, progress: Progress) -> float:
            return 0.3 if progress.step in (4, 8, 12) else 0.0

    training = training_of()
    bird = fit(net_of(), FlyingBird("erk", first=0.3, last=0.3, every=4), THIRD, training)
    rigl = fit(net_of(), Flat(), THIRD, training)
    assert all(torch.equal(bird[name], rigl[name]) for name in rigl)


def test_flying_birds_share_falls_from_half_to_almost_nothing() -> None:
    method = FlyingBird(every=1)
    assert method.share(Progress(1, 10_000, 0, 100)) == pytest.approx(0.5, abs=1e-4)
    assert method.share(Progress(5000, 10_000, 0, 100)) == pytest.approx(0.2525)
    assert method.share(Progress(9899, 10_000, 0, 100)) == pytest.approx(0.005, abs=2e-4)


# ---- TwinRep ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rescale", [True, False])
def test_a_twin_is_the_product_of_its_factors_and_folds_into_one(toy: Split, net_of: Net, rescale: bool) -> None:
    model, plain = net_of(), net_of(seed=1)
    norms = {name: float(weight.norm()) for name, weight in weights(model).items()}
    for layer in prunable(model).values():
        attach(layer, Twin(layer.weight, rescale))
    plain.load_state_dict(effective_state(model))
    torch.testing.assert_close(plain(toy.pixels()), model(toy.pixels()), atol=1e-6, rtol=0)
    for name, layer in prunable(model).items():
        own = layer.parametrizations.weight
        assert torch.equal(plain.get_submodule(name).weight, own.original * own[0].a)
        assert (float(layer.weight.detach().norm()) == pytest.approx(norms[name], rel=1e-5)) is rescale


def test_decay_of_two_factors_is_an_l1_penalty_on_their_product() -> None:
    """methods.md 3.4: the least of (w^2 + a^2) / 2 over w a = c is |c|, found on a grid."""
    for c in (-3.0, -0.2, 0.7):
        w = np.linspace(0.01, 20, 200_000)
        assert ((w**2 + (c / w) ** 2) / 2).min() == pytest.approx(abs(c), rel=1e-4)


@pytest.mark.parametrize("at, first", [(0.5, 3), (0.0, 1), (1.0, 6)])
def test_products_are_masked_once_at_their_epoch_by_global_size(
    net_of: Net, training_of: Trainings, at: float, first: int
) -> None:
    training, model, kept = training_of(), net_of(), []
    phase = until(TwinRep(at), model, training, "train")

    def watched(step: Any) -> None:
        products = {name: weight.abs() for name, weight in weights(model).items()}
        phase.after_epoch(step)
        alive = supports(model)
        kept.append(sum(counts(model).values()))
        if step.progress.epoch == first:
            weakest = min(float(products[name][alive[name]].min()) for name in alive)
            assert weakest >= max(float(products[name][~alive[name]].max()) for name in alive)

    run_phase(model, Phase("train", phase.epochs, phase.lr, after_epoch=watched), training)
    assert kept == [1108] * (first - 1) + [369] * (7 - first)


# ---- DNR -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_dnr_keeps_its_count_at_every_step_and_moves_weights_between_layers(
    net_of: Net, training_of: Trainings, optimizer: str
) -> None:
    model, training, shares = net_of(), training_of(optimizer=optimizer, lr=0.02), []
    phase = until(DNR(rate=0.4), model, training, "train", TENTH)

    def masked(step: Any) -> None:
        phase.after_step(step)
        assert sum(int(part.mask.sum()) for part, _ in opened(model)) == 110
        assert all(not weight[part.mask == 0].any() for part, weight in opened(model))

    def rewired(step: Any) -> None:
        before = [part.mask.clone() for part, _ in opened(model)]
        phase.after_epoch(step)
        for (part, weight), mask in zip(opened(model), before, strict=True):
            assert not weight[part.mask > mask].any()
            assert not momentum(step.optimizer, weight)[part.mask > mask].any()
        shares.append(tuple(int(part.mask.sum()) for part, _ in opened(model)))

    own = {"penalty": phase.penalty, "after_step": masked, "after_epoch": rewired}
    run_phase(model, Phase("train", phase.epochs, phase.lr, **own), training)
    assert len(set(shares)) > 1
    assert shares[-1] == shares[-2]  # the last rate is 0: whatever grew has been trained


def test_new_weights_go_where_momentum_is_and_where_there_is_room() -> None:
    """By hand: 12 in the proportion 3 : 1, then 40 where the first layer has room for 20 only, and none into dead layers."""
    assert regrowth([100, 100], [3.0, 1.0], 12) == {"0": 9, "1": 3}
    assert regrowth([20, 100], [3.0, 1.0], 40) == {"0": 20, "1": 20}
    assert regrowth([50, 50, 0], [0.0, 2.0, 5.0], 10) == {"1": 10}


def test_dnr_adds_the_clean_loss(net_of: Net, training_of: Trainings, toy: Split) -> None:
    """Against torch's own cross-entropy; at weight 0 a benign DNR is sparse momentum alone."""
    model, x, y = net_of(), toy.pixels(), toy.labels
    assert float(DNR(clean=0.5)._clean(model, x, y).detach()) == pytest.approx(
        0.5 * float(nn.CrossEntropyLoss()(model(x), y).detach()), rel=1e-6
    )


def test_dnr_without_momentum_is_refused(net_of: Net, training_of: Trainings) -> None:
    with pytest.raises(ValueError, match="DNR ranks by momentum, and the budget's is 0; set it above 0 or use adam"):
        fit(net_of(), DNR(), THIRD, training_of(momentum=0.0))


# ---- PwoA ------------------------------------------------------------------------------------------------------------


def test_a_student_that_is_its_teacher_has_no_loss_and_another_has_the_kl(net_of: Net, toy: Split) -> None:
    """Against scipy's relative entropy, over B C numbers, times alpha T^2."""
    model, teacher, x, y = net_of(), net_of(seed=1), toy.pixels(), toy.labels
    assert float(Distillation(model, 10.0, 30.0)(model, x, y, Progress(0, 1)).detach()) == pytest.approx(0.0, abs=1e-3)
    found = float(Distillation(teacher, 2.0, 0.5)(model, x, y, Progress(0, 1)).detach())
    p, q = ((net(x).detach().double() / 0.5).softmax(1).numpy() for net in (teacher, model))
    assert found == pytest.approx(2 * 0.25 * entropy(p, q, axis=1).sum() / p.size, rel=1e-4)


def test_hsic_of_a_constant_is_zero_and_of_two_variables_obeys_cauchy_schwarz() -> None:
    torch.manual_seed(0)
    x, z = torch.randn(30, 4).double(), torch.randn(30, 4).double()
    of_x, of_z, of_one = (normalised(gaussian_kernel(one, 1.0)) for one in (x, z, torch.ones(30, 4).double()))
    assert float(hsic(of_x, of_one)) == pytest.approx(0.0, abs=1e-9)
    assert 0 < float(hsic(of_x, of_z)) ** 2 < float(hsic(of_x, of_x) * hsic(of_z, of_z)) < 30**2


def test_normalised_hsic_is_its_definition_by_matrix_inverses() -> None:
    """tr(Kx (Kx + r)^-1 Ky (Ky + r)^-1) of the kernels centred by H = I - 1/n, written with numpy."""
    torch.manual_seed(1)
    x, z = torch.randn(12, 3).double(), torch.randn(12, 5).double()
    centre = np.eye(12) - 1 / 12

    def reference(values: np.ndarray) -> np.ndarray:
        squares = ((values[:, None] - values[None]) ** 2).sum(2)
        kernel = centre @ np.exp(-squares / (2 * 25 * values.shape[1])) @ centre
        return kernel @ np.linalg.inv(kernel + 1e-5 * 12 * np.eye(12))

    expected = np.trace(reference(x.numpy()) @ reference(z.numpy()))
    found = hsic(normalised(gaussian_kernel(x, 5.0)), normalised(gaussian_kernel(z, 5.0)))
    assert float(found) == pytest.approx(expected, rel=1e-6)


def test_pwoa_meets_the_objective_in_its_pretraining_only(net_of: Net, training_of: Trainings) -> None:
    robust = training_of(PGDTraining(eps=Fraction(1, 5), steps=2))
    first, *later = [phase.objective for phase in PwoA()(net_of(), THIRD, robust)]
    assert first == robust.objective
    assert all(isinstance(one, Distillation) for one in later)
    assert [(one.lambda_x, one.lambda_y) for one in later] == [(0.0, 0.0), (2e-5, 1e-4)]


# ---- the record and the page -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("zeros, outcome", [(2, "refused"), (3, "exact"), (4, "warned")])
def test_a_global_method_is_held_to_the_floor_of_its_budget(zeros: int, outcome: str) -> None:
    """Seven weights at density 2/3: floor(14/3) = 4 may stay."""
    values = torch.arange(1.0, 8.0)
    values[:zeros] = 0
    model = nn.Sequential(*one_layer([values[:3].tolist()]), *one_layer([values[3:].tolist()]))
    cell = SimpleNamespace(method={"name": "ap"}, density=Fraction(2, 3), id="a-cell")
    if outcome == "refused":
        with pytest.raises(UserError, match="a-cell: the method kept 5 of 7 weights, density 2/3 allows 4"):
            sparsity_of(model, cell)
        return
    block, warnings = sparsity_of(model, cell)
    assert block["kept"] == 7 - zeros
    assert warnings == ([] if outcome == "exact" else ["3 non-zero weights of the 4 that density 2/3 allows"])


def test_the_page_names_every_method_and_its_entries_are_built() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "methods.md").read_text()
    assert re.findall(r"^\| `([\w+-]+)` \|", page.partition("Fields choose")[0], re.M) == list(METHODS)
    (block,) = re.findall(r"```toml\n(.*?)```", page, re.S)
    built = [build("method", entry) for entry in tomllib.loads(block)["method"]]
    assert [type(one).__name__ for one in built] == ["SNIP", "RigL", "IMP", "IMP", "AL0", "Uniform8Bit"]
