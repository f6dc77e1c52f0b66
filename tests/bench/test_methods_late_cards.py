"""The theorems of the cards of Flying Bird+, MAD and NRSLoss (methods.md 3.2, 3.3 and 3.7), and what fixed losses may see."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from math import floor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.cells import read_suite
from bench.data import Split
from bench.loop import run_phase
from bench.methods import IMP, MAD, METHODS, FlyingBird, FlyingBirdPlus, NRSLoss
from bench.methods.flying_bird import mean_loss, rose, set_apart
from bench.methods.mad import ONE, inputs_and_slopes, keep_salient, masked_weights, ranks, saliency, soft_masks
from bench.methods.nrs_loss import instability, nrs
from bench.methods.rigl import opened
from bench.objectives import Benign, PGDTraining
from bench.phases import fit
from bench.run import Folders, run_cell
from bench.sparsity import prunable, weights
from bench.train import Training
from verifiers.ball import Interval
from verifiers.bounds import ibp_logits

Net = Callable[..., nn.Sequential]
Trainings = Callable[..., Training]
THIRD = Fraction(1, 3)


# ---- Flying Bird+ ----------------------------------------------------------------------------------------------------


def test_images_set_apart_are_a_tenth_and_are_not_trained_on(training_of: Trainings) -> None:
    rest, held = set_apart(training_of(augment="crop"), 0.1)
    assert (len(rest.data), len(held.data)) == (36, 4)
    assert sorted(rest.data.index.tolist() + held.data.index.tolist()) == list(range(40))
    assert held.augment == "none"
    assert set_apart(training_of(seed=1), 0.1)[1].data.index.tolist() != held.data.index.tolist()


def test_one_image_cannot_be_set_apart(training_of: Trainings, toy: Split) -> None:
    with pytest.raises(ValueError, match="out of 1 training images"):
        set_apart(training_of(data=toy.first(1)), 0.1)


def test_flying_bird_plus_trains_on_what_is_left_and_no_other_image(net_of: Net, training_of: Trainings, toy: Split) -> None:
    """The labels of held-out images are all wrong, and the weights come out the same."""
    training = training_of()
    held = set_apart(training, 0.1)[1].data.index
    labels = toy.labels.clone()
    labels[held] = (labels[held] + 1) % 3
    other = replace(training, data=replace(toy, labels=labels))
    method = FlyingBirdPlus(every=100)  # no rewiring, which may look at them
    states = [fit(net_of(), method, THIRD, one) for one in (training, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize(
    "values, expected",
    [([1, 2, 3, 2, 1], True), ([1, 2, 1, 0, 0], False), ([3, 2, 1, 2, 3], True), ([float("nan")] * 3 + [1.0, 2.0], False)],
    ids=str,
)
def test_a_curve_rose_if_half_of_its_last_steps_go_up(values: list[float], expected: bool) -> None:
    assert rose(torch.tensor(values, dtype=torch.float32)) is expected


FALLING, RISING = [5.0, 4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0, 5.0]


@pytest.mark.parametrize(
    "held, training_loss, at, dropped, grown",
    [
        (FALLING, FALLING, 0.5, 50, 50),  # the gap rests, nothing gets worse
        (FALLING, [5.0, 3.9, 2.8, 1.7, 0.6], 0.5, 70, 50),  # the gap grows: 0.4 times more is dropped
        (RISING, RISING, 0.5, 50, 50),  # it gets worse, but the layer holds all it may
        (RISING, [1.0, 1.9, 2.8, 3.7, 4.6], 0.5, 70, 55),  # both: the room is used
        (RISING, [1.0, 1.9, 2.8, 3.7, 4.6], 0.49, 50, 50),  # too early
    ],
)
def test_the_two_signals_move_the_counts_of_the_card(
    net_of: Net, training_of: Trainings, held: list[float], training_loss: list[float], at: float, dropped: int, grown: int
) -> None:
    """methods.md 3.2 on a layer of 100 weights, of which half would move."""
    model, method = net_of(), FlyingBirdPlus()
    next(method(model, THIRD, training_of()))
    parts: list[Any] = [part for part, _ in opened(model)]
    parts[0].losses.copy_(torch.tensor([held, training_loss]).T)
    part = parts[1]
    part.mask.zero_().view(-1)[:100] = 1
    part.quota.fill_(100)
    step: Any = type("At", (), {"model": model, "progress": type("P", (), {"fraction": at})})
    assert method.moves(step, part, 0.5) == (dropped, grown)


def test_flying_bird_plus_without_signals_is_flying_bird_on_the_images_left(net_of: Net, training_of: Trainings) -> None:
    training = training_of(pretrain=6)
    plus = fit(net_of(), FlyingBirdPlus("erk", every=4, pruned=0.0, grown=0.0), THIRD, training)
    plain = fit(net_of(), FlyingBird("erk", every=4), THIRD, set_apart(training, 0.1)[0])
    assert all(torch.equal(plus[name], plain[name]) for name in plain)


def test_the_budget_breathes_below_the_density_and_is_never_exceeded(net_of: Net, training_of: Trainings, toy: Split) -> None:
    """Random labels: the held-out loss rises while the training loss falls."""
    generator = torch.Generator().manual_seed(0)
    noise = replace(toy, labels=torch.randint(0, 3, (len(toy),), generator=generator))
    training, model, kept = training_of(data=noise, pretrain=40, lr=0.2), net_of(), []
    (phase,) = FlyingBirdPlus("erk", every=3, start=0.2, grown=0.3)(model, Fraction(1, 2), training)
    inner = phase.after_backward

    def counted(step: Any) -> None:
        inner(step)
        kept.append(sum(int(part.mask.sum()) for part, _ in opened(step.model)))

    run_phase(model, replace(phase, after_backward=counted), training)
    assert max(kept) == kept[0] == floor(Fraction(1, 2) * 1108)
    assert min(kept) < kept[0]
    assert any(after > before for before, after in itertools.pairwise(kept))


def test_looking_at_the_loss_leaves_the_network_and_the_random_numbers_as_they_were(
    net_of: Net, training_of: Trainings, toy: Split
) -> None:
    model = net_of(batchnorm=True).train()
    before, training = {name: value.clone() for name, value in model.state_dict().items()}, training_of(PGDTraining(steps=2))
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    assert mean_loss(model, training) == mean_loss(model, training)
    assert torch.equal(torch.rand(2), expected)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    clean = F.cross_entropy(model.eval()(toy.pixels()), toy.labels).item()
    assert mean_loss(model, training_of()) == pytest.approx(clean, rel=1e-5)


# ---- MAD -------------------------------------------------------------------------------------------------------------


def test_a_layer_whose_weight_does_not_change_has_no_saliency() -> None:
    layer = nn.Linear(3, 2)
    found = saliency(layer, torch.zeros(2, 3), torch.randn(5, 3), torch.randn(5, 2))
    assert torch.equal(found, torch.zeros(2, 3))


def test_with_uncorrelated_inputs_the_saliency_is_half_g_a_times_the_square_of_the_change() -> None:
    """methods.md 3.3: A diagonal. The inputs are scaled unit vectors, so A_jj is the mean square of input j."""
    layer, scales = nn.Linear(3, 2), torch.tensor([1.0, 2.0, 3.0])
    given, slope, change = torch.diag(scales), torch.randn(3, 2), torch.randn(2, 3)
    expected = 0.5 * slope.square().mean(0)[:, None] * (scales.square() / 3) * change.square()
    torch.testing.assert_close(saliency(layer, change, given, slope), expected)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(6, 4),
        nn.Conv2d(4, 6, 3, stride=2, padding=1),
        nn.Conv2d(4, 6, 3, groups=2, bias=False),
        nn.Conv2d(4, 6, 2, padding=1, dilation=2),
    ],
    ids=str,
)
def test_the_saliency_is_that_of_both_factors_written_out(layer: Any) -> None:
    """numpy on unfolded inputs: A = sum over places of E[a a^T], G = its mean over them."""
    torch.manual_seed(0)
    given = torch.randn(5, 6) if isinstance(layer, nn.Linear) else torch.randn(5, 4, 7, 7)
    out = layer(given)
    change, slope = torch.randn_like(layer.weight), torch.randn_like(out)
    groups = getattr(layer, "groups", 1)
    if isinstance(layer, nn.Linear):
        places = given[:, :, None].numpy()
    else:
        places = F.unfold(given, layer.kernel_size, layer.dilation, layer.padding, layer.stride).numpy()  # type: ignore[arg-type]
    a = places.reshape(5, groups, places.shape[1] // groups, -1).astype(np.float64)
    g = slope.flatten(2).numpy() if slope.dim() == 4 else slope[:, :, None].numpy()
    curvature = (g.astype(np.float64) ** 2).mean((0, 2))
    rows = change.flatten(1).numpy().astype(np.float64)
    expected = np.empty_like(rows)
    for i, row in enumerate(rows):
        own = a[:, i * groups // len(rows)]
        factor = np.einsum("njt,nkt->jk", own, own) / 5
        expected[i] = 0.5 * curvature[i] * row * (row @ factor)
    found = saliency(layer, change, given, slope).flatten(1)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-4)


def test_slopes_are_those_of_each_images_own_loss(net_of: Net, toy: Split) -> None:
    """On the last layer the gradient of the cross-entropy is softmax minus the label."""
    model = net_of().eval().requires_grad_(False)
    x, y = toy.pixels(slice(6)), toy.labels[:6]
    seen = inputs_and_slopes(model, {}, x, y)
    expected = model(x).softmax(1) - F.one_hot(y, 3)
    torch.testing.assert_close(seen["5"][1], expected)
    assert torch.equal(seen["0"][0], x)
    assert not any(layer._forward_hooks for layer in model.modules())


def test_soft_masks_lower_the_loss_and_stay_within_their_range(net_of: Net, toy: Split) -> None:
    model = net_of().eval().requires_grad_(False)
    x, y = toy.pixels(), toy.labels
    start = {name: torch.full_like(weight, ONE) for name, weight in weights(model).items()}
    raw = soft_masks(model, x, y, steps=20, lr=0.1)
    masks = torch.cat([F.softplus(one).flatten() for one in raw.values()])
    assert 1e-4 * (1 - 1e-3) < float(masks.min()) < 0.9 < float(masks.max()) <= 1 + 1e-6

    def loss(masks: dict[str, Tensor]) -> float:
        return float(F.cross_entropy(torch.func.functional_call(model, masked_weights(model, masks), x), y))

    assert loss(raw) < loss(start) == pytest.approx(float(F.cross_entropy(model(x), y)), rel=1e-5)


def test_the_last_layer_keeps_equally_many_of_each_row_and_the_others_share_the_rest() -> None:
    scores = {"a": torch.tensor([[5.0, 1.0], [2.0, 9.0]]), "b": torch.tensor([[3.0, 8.0]]), "c": torch.arange(8.0).view(2, 4)}
    masks = keep_salient(scores, Fraction(1, 2))  # 7 of 14: 2 of each row of c, 3 of a and b
    assert masks["a"].tolist() == [[1, 0], [0, 1]]
    assert masks["b"].tolist() == [[0, 1]]
    assert masks["c"].tolist() == [[0, 0, 1, 1], [0, 0, 1, 1]]
    with pytest.raises(ValueError, match="ask for a larger one"):
        keep_salient(scores, Fraction(1, 5))  # 2 of 14, and both rows of c want one


def test_of_equal_saliencies_the_larger_weight_goes_later() -> None:
    scores = {"a": torch.tensor([0.0, 0.0, -1.0]), "b": torch.tensor([[0.0, 2.0]])}
    found = ranks(scores, {"a": torch.tensor([-3.0, 1.0, 9.0]), "b": torch.tensor([[2.0, 0.1]])})
    assert found["a"].tolist() == [3, 1, 0]
    assert found["b"].tolist() == [[2, 4]]


def test_the_score_leaves_the_network_as_it_was_and_does_not_ask_the_objective(net_of: Net, training_of: Trainings) -> None:
    model = net_of(batchnorm=True).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    method, found = MAD(Fraction(1, 20), steps=2, mask_steps=3, batches=2), []
    for objective in (Benign(), PGDTraining(steps=2)):
        torch.manual_seed(0)
        found.append(method.scores(model, training_of(objective)))
    assert all(torch.equal(found[0][name], found[1][name]) for name in prunable(model))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


# ---- NRSLoss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lower, upper, expected", [(-1, 1, 0.0), (0.5, 1, -0.9051), (-2, 2, 0.9951)])
def test_a_neurons_instability_is_that_of_the_card(lower: float, upper: float, expected: float) -> None:
    """methods.md 3.7."""
    assert float(nrs(torch.tensor(float(lower)), torch.tensor(float(upper)))) == pytest.approx(expected, abs=1e-4)
    scaled = nrs(torch.tensor(3.0 * lower), torch.tensor(3.0 * upper), torch.tensor(-3.0))
    assert float(scaled) == pytest.approx(expected, abs=1e-4)


def test_the_mean_is_over_all_neurons_before_a_relu_with_the_scale_of_their_batchnorm(net_of: Net, toy: Split) -> None:
    """Against interval bounds of the network cut off before each ReLU."""
    model = net_of(batchnorm=True)
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([0.5, 1.0, -2.0, 3.0]))
        model[1].running_var.fill_(0.7)
    x = toy.pixels(slice(5))
    box = Interval((x - 0.05).clamp(0, 1), (x + 0.05).clamp(0, 1))
    model.eval()  # with the running statistics
    first, second = ibp_logits(model[:2], box), ibp_logits(model[:5], box)
    square = torch.tensor([0.25, 1.0, 4.0, 9.0]).view(1, 4, 1, 1)
    each = torch.cat([
        -torch.tanh(1 + first.lower * first.upper / square).flatten(), -torch.tanh(1 + second.lower * second.upper).flatten()
    ])
    assert len(each) == 5 * (64 + 16)
    found = instability(model, x, 0.05)
    torch.testing.assert_close(found, each.mean())
    found.backward()
    assert model[1].weight.grad is not None  # through the bounds; not through the scale it is divided by


def test_the_term_takes_the_clean_batchs_statistics_in_training_and_teaches_batchnorm_nothing(net_of: Net, toy: Split) -> None:
    """house.md 12.7. Of a network that rests with these very statistics the term is the same."""
    model, resting, x = net_of(batchnorm=True).train(), net_of(batchnorm=True).eval(), toy.pixels(slice(5))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = instability(model, x, 0.05).detach()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    given = resting[0](x).detach().transpose(0, 1).flatten(1)
    resting[1].running_mean.copy_(given.mean(1))
    resting[1].running_var.copy_(given.var(1, correction=0))
    torch.testing.assert_close(found, instability(resting, x, 0.05).detach())
    untrained = instability(net_of(batchnorm=True).eval(), x, 0.05).detach()
    assert float(found) != pytest.approx(float(untrained), abs=1e-3)


def test_looking_at_a_network_leaves_a_frozen_layer_frozen(net_of: Net, training_of: Trainings, toy: Split) -> None:
    model = net_of(batchnorm=True).train()
    model[1].eval()
    modes = [module.training for module in model.modules()]
    mean_loss(model, training_of())
    assert [module.training for module in model.modules()] == modes
    instability(model, toy.pixels(slice(5)), 0.05)
    assert [module.training for module in model.modules()] == modes


def test_the_term_without_weight_is_the_tickets_method(net_of: Net, training_of: Trainings) -> None:
    training = training_of(pretrain=3)
    states = [fit(net_of(), method, THIRD, training) for method in (NRSLoss(weight=0.0), IMP())]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_the_term_makes_neurons_stable(net_of: Net, training_of: Trainings, toy: Split) -> None:
    found = []
    for weight in (0.0, 1.0):
        model = net_of()
        fit(model, NRSLoss(one_shot=True, weight=weight, eps=Fraction(1, 20)), THIRD, training_of(pretrain=5, finetune=10))
        found.append(instability(model, toy.pixels(), 0.05).item())
    assert found[1] < found[0] - 0.05


# ---- losses that a method fixes itself -------------------------------------------------------------------------------

SUITE = """
suite = { name = "fixed", version = 1 }
data = { name = "digits" }
threat = { norm = "linf", eps = "0.02" }
samples = { first = 5 }
budget = { pretrain = 0, prune = 0, finetune = 0 }
grid = { arch = ["mlp"], density = ["0.3"], seed = [0] }
method = [{ name = "nap" }, { name = "lwm" }]
objective = [{ name = "benign" }, { name = "pgd", eps = "0.02", steps = 1 }]
attack = [{ name = "pgd", steps = 1 }]
"""


def test_a_record_is_marked_where_its_method_trains_with_another_loss_than_the_objective(tmp_path: Path) -> None:
    """house.md 12.20: NAP is benign whatever the objective, so with another one its pair does not quite apply."""
    (tmp_path / "fixed.toml").write_text(SUITE)
    marks = {}
    for cell in read_suite(str(tmp_path / "fixed.toml")).cells:
        if cell.method["name"] == "dense":
            continue
        record = run_cell(cell, Folders(tmp_path / "fixed@1"), torch.device("cpu"))
        marks[cell.method["name"], cell.objective["name"]] = "nap fixes a loss of its own: benign" in record["checks"]["warnings"]
    assert marks == {("nap", "benign"): False, ("nap", "pgd"): True, ("lwm", "benign"): False, ("lwm", "pgd"): False}


def test_methods_that_fix_a_loss_say_so() -> None:
    assert {name for name, kind in METHODS.items() if hasattr(kind, "fixes_loss")} == {"nap", "pwoa", "dnr", "mad", "nrsloss"}
