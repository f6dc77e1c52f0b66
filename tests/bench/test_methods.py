"""Every pruning method under every objective, then the theorems of each method's own card (methods.md 1.1 to 1.4)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from math import sqrt
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bench.contracts.methods import attached_complaints, density_complaints, plain_complaints
from bench.data import Split
from bench.loop import run_phase
from bench.methods import HYDRA, LWM, METHODS, Dense, RandomPruning
from bench.methods.hydra import INITIALISATIONS, scores_and_batchnorm
from bench.objectives import OBJECTIVES, StabilityTraining
from bench.phases import fit
from bench.sparsity import TopKScores, density_of, keep_largest, kept_of, prunable, top_k
from bench.train import Phase, Training

Net = Callable[..., nn.Sequential]
Trainings = Callable[..., Training]
TENTH, THIRD = Fraction(1, 10), Fraction(1, 3)
PHASES = {
    "dense": ["pretrain"],
    "random": ["train"],
    "lwm": ["pretrain", "finetune"],
    "hydra": ["pretrain", "prune", "finetune"],
    "admm": ["pretrain", "admm", "finetune"],
    "snip": ["train"],
    "str": ["train", "finetune"],
    "rigl": ["train"],
    "nap": ["pretrain", "finetune"],
    "ap": ["pretrain", "finetune"],
    "al0": ["pretrain", "project"],
    "imp": [*(f"round-{at}" for at in range(1, 12)), "train"],  # 0.8^11 < 1/10 < 0.8^10, in eleven epochs or more
    "channel": ["pretrain", "finetune"],
    "harp": ["pretrain", "prune", "finetune"],
    "flyingbird": ["train"],
    "flyingbird+": ["train"],
    "twinrep": ["train"],
    "dnr": ["train"],
    "pwoa": ["pretrain", "admm", "finetune"],
    "mad": ["pretrain", "finetune"],
    "nrsloss": [*(f"round-{at}" for at in range(1, 12)), "train"],
}
SUPPORT_MOVES = {"al0", "twinrep", "dnr", "alr", "atmc", "atmc-8bit", "uniform-8bit"}  # in the last phase, with three epochs
RANK_ONE = Fraction(112, 1108)  # of every layer takes 13 + 80 + 19 entries, more than a tenth
QUICK = {"benign", "ibp", "free"}  # one of a kind; the other objectives meet every method in the slow tests


def pair(name: str, objective: str, density: Fraction) -> Any:
    quick = objective in QUICK or name in ("lwm", "hydra")
    return pytest.param(name, objective, density, marks=() if quick else pytest.mark.slow, id=f"{name}-{objective}-{density}")


GRID = [pair(name, objective, THIRD) for name in METHODS for objective in OBJECTIVES]
GRID += [pair(name, "benign", RANK_ONE if name == "alr" else TENTH) for name in METHODS]
GRID += [pair(name, "benign", Fraction(1)) for name in METHODS]


def effective(model: nn.Module) -> dict[str, Tensor]:
    return {name: layer.weight.detach().clone() for name, layer in prunable(model).items()}


def zeros(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight == 0 for name, weight in weights.items()}


@dataclass(frozen=True)
class Watched:
    """A method whose phases, and the network as each of them finds it, are written down."""

    method: Any
    phases: list[str] = field(default_factory=list)
    before: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def __call__(self, model: nn.Module, density: Fraction, training: Training) -> Iterator[Phase]:
        for phase in self.method(model, density, training):
            self.phases.append(phase.name)
            self.before[phase.name] = effective(model)
            yield phase


# ---- the grid --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, objective, density", GRID)
def test_a_method_meets_its_density_and_returns_the_network_it_trained(
    net_of: Net, training_of: Trainings, short: Callable[[type], Any], toy: Split, name: str, objective: str, density: Fraction
) -> None:
    model, method = net_of(), Watched(METHODS[name]())
    training = training_of(short(OBJECTIVES[objective]), data=toy.first(16), pretrain=1, prune=1, finetune=1)
    state = fit(model, method, density, training)
    plain = net_of(seed=1)
    assert [*attached_complaints(model, state, plain)] == []
    assert [*plain_complaints(model, state, plain, toy)] == []
    assert [*density_complaints(model, method.method, density)] == []
    last = method.phases[-1]
    if last != "pretrain" and name not in SUPPORT_MOVES:  # what was zero when the last phase began has stayed zero
        for layer, dead in zeros(method.before[last]).items():
            assert torch.equal(effective(plain)[layer] == 0, dead)
    assert len(set(method.phases)) == len(method.phases) > 0


@pytest.mark.parametrize("name", PHASES)
def test_phases_come_in_the_order_of_the_paper(net_of: Net, training_of: Trainings, name: str) -> None:
    method = Watched(METHODS[name]())
    fit(net_of(), method, TENTH, training_of(pretrain=10, prune=1, finetune=1))
    assert method.phases == PHASES[name]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", ["lwm", "hydra"])
def test_fine_tuning_moves_the_kept_weights_of_every_layer(
    net_of: Net, training_of: Trainings, short: Callable[[type], Any], name: str, objective: str
) -> None:
    method, model = Watched(METHODS[name]()), net_of()
    fit(model, method, THIRD, training_of(short(OBJECTIVES[objective]), pretrain=1, prune=1, finetune=1, weight_decay=0.0))
    for layer, weight in effective(model).items():
        assert not torch.equal(weight, method.before["finetune"][layer])


@pytest.mark.parametrize("name", METHODS)
def test_methods_learn_the_toy(net_of: Net, training_of: Trainings, toy: Split, name: str) -> None:
    model = net_of()
    fit(model, METHODS[name](), THIRD, training_of(pretrain=15, prune=5, finetune=15))
    assert float((model.eval()(toy.pixels()).argmax(1) == toy.labels).double().mean()) > 0.9


# ---- least weight magnitude ------------------------------------------------------------------------------------------


def magnitude_zeros(weight: Tensor, density: Fraction) -> Tensor:
    """What a stable sort by magnitude puts first, written with numpy."""
    flat = weight.abs().flatten().numpy()
    dead = np.zeros(flat.size, dtype=bool)
    dead[np.argsort(flat, kind="stable")[: flat.size - kept_of(flat.size, density)]] = True
    return torch.from_numpy(dead).view(weight.shape)


def surgery(method: Any, model: nn.Module, training: Training, phases: int, density: Fraction = TENTH) -> list[Phase]:
    """The method's first phases, none of them trained: the network afterwards stands at the start of the last one."""
    generator = method(model, density, training)
    return [next(generator) for _ in range(phases)]


def test_lwm_keeps_the_largest_magnitudes_of_the_pretrained_network_whatever_the_data(
    net_of: Net, training_of: Trainings, toy_of: Callable[..., Split]
) -> None:
    expected = {name: magnitude_zeros(weight, TENTH) for name, weight in effective(net_of()).items()}
    for training in (training_of(), training_of(StabilityTraining(), data=toy_of(seed=9), seed=4)):
        model = net_of()
        surgery(LWM(), model, training, 2)
        found = zeros(effective(model))
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("method", [LWM(), HYDRA()], ids=repr)
def test_scaling_a_layer_leaves_its_magnitude_mask_unchanged(net_of: Net, training_of: Trainings, method: Any) -> None:
    model, scaled = net_of(), net_of()
    with torch.no_grad():
        for factor, layer in zip((1e-3, 7.0, 300.0), prunable(scaled).values()):
            layer.weight.mul_(factor)
    for net in (model, scaled):
        surgery(method, net, training_of(), 2)
    found, other = zeros(effective(model)), zeros(effective(scaled))
    assert all(torch.equal(found[name], other[name]) for name in found)


# ---- HYDRA -----------------------------------------------------------------------------------------------------------


def test_hydras_first_mask_is_the_magnitude_mask(net_of: Net, training_of: Trainings) -> None:
    """methods.md 1.1, test 1."""
    model = net_of()
    expected = {name: magnitude_zeros(weight, TENTH) for name, weight in effective(model).items()}
    assert [phase.name for phase in surgery(HYDRA(), model, training_of(), 2)] == ["pretrain", "prune"]
    assert all(torch.equal(dead, expected[name]) for name, dead in zeros(effective(model)).items())


def test_the_largest_score_of_a_layer_is_the_kaiming_uniform_bound(net_of: Net, training_of: Trainings) -> None:
    """methods.md 1.1, test 3: sqrt(6 / fan_in), fan_in 9, 64 and 16."""
    model = net_of()
    surgery(HYDRA(), model, training_of(), 2)
    largest = [float(part.scores.detach().abs().max()) for part in model.modules() if isinstance(part, TopKScores)]
    assert largest == pytest.approx([sqrt(6 / 9), sqrt(6 / 64), sqrt(6 / 16)], rel=1e-6)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_weights_rest_while_scores_learn_and_masks_rest_while_weights_learn(
    net_of: Net, training_of: Trainings, optimizer: str
) -> None:
    """methods.md 1.1, test 4; BatchNorm is trained in the prune phase, as in the paper's code."""
    model = net_of(batchnorm=True)
    training = training_of(optimizer=optimizer, weight_decay=0.1, prune_lr=0.5)
    generator = HYDRA()(model, THIRD, training)
    run_phase(model, next(generator), training)
    prune = next(generator)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run_phase(model, prune, training)
    after = model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name for name in moved if "scores" in name} == {name for name in before if "scores" in name}
    assert {"1.weight", "1.bias", "1.running_mean"} <= moved
    assert not any(name.endswith(("original", "bias")) and not name.startswith("1.") for name in moved)
    learned = {name: part.mask() for name, part in model.named_modules() if isinstance(part, TopKScores)}
    finetune = next(generator)
    masked = zeros(effective(model))
    for (_, mask), dead in zip(sorted(learned.items()), (masked[name] for name in sorted(masked))):
        assert torch.equal(mask == 0, dead)
    start = effective(model)
    run_phase(model, finetune, training)
    assert all(torch.equal(dead, masked[name]) for name, dead in zeros(effective(model)).items())
    assert all(not torch.equal(weight, start[name]) for name, weight in effective(model).items())
    assert next(generator, None) is None


def test_the_prune_phase_trains_scores_and_batchnorm_only(net_of: Net, training_of: Trainings) -> None:
    model = net_of(batchnorm=True)
    surgery(HYDRA(), model, training_of(), 2)
    scores = {name for name, _ in model.named_parameters() if name.endswith("scores")}
    assert len(scores) == 3
    assert scores_and_batchnorm(model) == scores | {"1.weight", "1.bias"}


def test_the_prune_phase_trains_the_norm_layers_of_a_users_own_network_too() -> None:
    """Those that `decay_all = false` keeps from weight decay, too."""
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))
    assert scores_and_batchnorm(model) == {"1.weight", "1.bias"}
    assert scores_and_batchnorm(nn.Sequential(nn.InstanceNorm2d(3, affine=True))) == {"0.weight", "0.bias"}


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("still", [{"prune_lr": 0.0}, {"prune": 0}], ids=str)
def test_hydra_that_learns_nothing_is_lwm_bit_for_bit(
    net_of: Net, training_of: Trainings, optimizer: str, still: dict[str, Any]
) -> None:
    """methods.md 1.1, test 5 and 1.3: with prune lr 0 or zero prune epochs."""
    training = training_of(StabilityTraining(), optimizer=optimizer, lr=0.02, finetune_lr=0.01, **still)
    hydra, lwm = (fit(net_of(), method, TENTH, training) for method in (HYDRA(), LWM()))
    assert all(torch.equal(hydra[name], lwm[name]) for name in lwm)


def test_hydra_that_learns_ends_with_another_mask_than_lwm(net_of: Net, training_of: Trainings) -> None:
    training = training_of(prune=10, prune_lr=10.0)
    hydra, lwm = (fit(net_of(), method, TENTH, training) for method in (HYDRA(), LWM()))
    assert any(not torch.equal(hydra[name] == 0, lwm[name] == 0) for name in lwm if name.endswith("weight"))


# ---- score initialisations -------------------------------------------------------------------------------------------

SHAPES = [(160, 90), (48, 64, 3, 3)]  # 14,400 and 27,648 entries; fan_in 90 and 576, fan_out 160 and 432
FANS = {(160, 90): (90, 160), (48, 64, 3, 3): (576, 432)}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "name, variance",
    [
        ("kaiming-normal", lambda fan_in, fan_out: 2 / fan_in),
        ("kaiming-uniform", lambda fan_in, fan_out: 2 / fan_in),
        ("xavier-normal", lambda fan_in, fan_out: 4 / (fan_in + fan_out)),
        ("xavier-uniform", lambda fan_in, fan_out: 4 / (fan_in + fan_out)),
    ],
)
def test_drawn_scores_have_the_moments_of_their_definition(
    name: str, variance: Callable[[int, int], float], shape: tuple[int, ...]
) -> None:
    """methods.md 1.2, gain sqrt(2): a uniform law on [-b, b] has variance b^2 / 3."""
    torch.manual_seed(0)
    scores = INITIALISATIONS[name](torch.empty(shape)).double()
    std = sqrt(variance(*FANS[shape]))
    assert float(scores.std()) == pytest.approx(std, rel=0.02)
    assert abs(float(scores.mean())) < 4 * std / sqrt(scores.numel())
    bound = sqrt(3) * std
    if name.endswith("uniform"):
        assert 0.99 * bound < float(scores.abs().max()) <= bound * (1 + 1e-6)
    else:
        assert float((scores.abs() < std).double().mean()) == pytest.approx(0.6827, abs=0.02)


@pytest.mark.parametrize("shape", [(16, 40), (40, 16), (8, 4, 3, 3), (64, 4, 3, 3)], ids=str)
def test_orthogonal_scores_have_orthogonal_rows_or_columns_of_squared_length_two(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    matrix = INITIALISATIONS["orthogonal"](torch.empty(shape)).flatten(1).double()
    short_side = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    torch.testing.assert_close(short_side @ short_side.T, 2 * torch.eye(len(short_side)).double(), atol=1e-5, rtol=0)


def test_dirac_scores_are_one_at_the_kernel_centre_and_on_the_diagonal() -> None:
    kernel = INITIALISATIONS["dirac"](torch.empty(3, 2, 3, 3))
    assert kernel.nonzero().tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert kernel[kernel != 0].tolist() == [1.0, 1.0]
    assert torch.equal(INITIALISATIONS["dirac"](torch.empty(4, 6)), torch.eye(4, 6))
    x = torch.rand(1, 2, 5, 5)  # as a convolution it hands the first channels through
    assert torch.equal(nn.functional.conv2d(x, kernel, padding=1)[:, :2], x)


def test_jitter_gives_every_dirac_score_a_slope_and_nearly_no_size() -> None:
    torch.manual_seed(0)
    jittered = INITIALISATIONS["dirac-jitter"](torch.empty(100, 120))
    noise = (jittered - torch.eye(100, 120))[~torch.eye(100, 120, dtype=torch.bool)].double()
    assert float(noise.std()) == pytest.approx(1e-6, rel=0.02)
    assert int((jittered == 0).sum()) == 0


@pytest.mark.parametrize("init", INITIALISATIONS)
def test_only_the_proposed_initialisation_starts_at_the_magnitude_mask(
    net_of: Net, training_of: Trainings, init: Any
) -> None:
    model = net_of()
    expected = {name: magnitude_zeros(weight, TENTH) for name, weight in effective(model).items()}
    surgery(HYDRA(init=init), model, training_of(), 2)
    found = zeros(effective(model))
    assert all(torch.equal(found[name], expected[name]) for name in expected) is (init == "proposed")


@pytest.mark.parametrize("init", INITIALISATIONS)
def test_every_initialisation_trains_and_meets_the_density(net_of: Net, training_of: Trainings, init: Any) -> None:
    training = training_of(pretrain=1, prune=1, finetune=1)
    states = [fit(net_of(), HYDRA(init=init), TENTH, training) for _ in range(2)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    for name, layer in prunable(net_of()).items():
        assert int((states[0][f"{name}.weight"] != 0).sum()) == kept_of(layer.weight.numel(), TENTH)


def test_an_all_zero_layer_keeps_zero_scores() -> None:
    assert torch.equal(INITIALISATIONS["proposed"](torch.zeros(3, 4)), torch.zeros(3, 4))


# ---- random and dense ------------------------------------------------------------------------------------------------


def wide_net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 3))


def random_mask(training: Training, model: nn.Module, density: Fraction = THIRD) -> Tensor:
    return fit(model, RandomPruning(), density, training)["1.weight"] != 0


def test_a_random_mask_depends_on_the_seed_and_on_nothing_else(
    training_of: Trainings, toy_of: Callable[..., Split]
) -> None:
    budget = {"pretrain": 1, "prune": 0, "finetune": 0}
    first = random_mask(training_of(**budget), wide_net())
    other = random_mask(training_of(StabilityTraining(), data=toy_of(seed=9), **budget), wide_net(seed=5))
    assert torch.equal(first, other)
    assert not torch.equal(first, random_mask(training_of(seed=1, **budget), wide_net()))


@pytest.mark.parametrize("density", [THIRD, TENTH], ids=str)
def test_two_random_masks_overlap_in_the_square_of_the_density(training_of: Trainings, density: Fraction) -> None:
    n, k = 64 * 256, float(density)
    masks = [random_mask(training_of(seed=s, pretrain=0, prune=0, finetune=0), wide_net(), density) for s in range(4)]
    overlaps = [int((a & b).sum()) for at, a in enumerate(masks) for b in masks[:at]]
    deviation = sqrt(n) * k * (1 - k)  # hypergeometric
    assert all(abs(overlap - n * k * k) < 5 * deviation for overlap in overlaps)


@pytest.mark.parametrize("rescale", [True, False])
def test_random_pruning_rescales_what_it_keeps_once(net_of: Net, training_of: Trainings, rescale: bool) -> None:
    model = net_of()
    dense = effective(model)
    surgery(RandomPruning(rescale=rescale), model, training_of(), 1, Fraction(1, 4))
    for name, weight in effective(model).items():
        kept = weight != 0
        torch.testing.assert_close(weight[kept], dense[name][kept] * (2.0 if rescale else 1.0))


def test_random_pruning_spends_the_whole_budget_in_one_phase(net_of: Net, training_of: Trainings) -> None:
    (phase,) = surgery(RandomPruning(), net_of(), training_of(pretrain=5, prune=3, finetune=4), 1)
    assert phase.epochs == 12


def test_the_dense_reference_keeps_every_weight_at_any_density_and_is_the_pretraining_of_the_others(
    net_of: Net, training_of: Trainings
) -> None:
    model = net_of()
    state = fit(model, Dense(), TENTH, training_of(finetune=7))
    assert density_of(model) == 1
    lwm = fit(net_of(), LWM(), Fraction(1), training_of(finetune=0))
    assert all(torch.equal(state[name], lwm[name]) for name in state)


def test_masks_of_the_same_scores_are_nested_in_the_density(net_of: Net) -> None:
    scores = effective(net_of())
    sparse, denser = keep_largest(scores, TENTH), keep_largest(scores, THIRD)
    assert all(bool((sparse[name] <= denser[name]).all()) for name in scores)
    assert torch.equal(top_k(scores["3"], kept_of(1024, TENTH)), sparse["3"])


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_a_value_with_a_guarantee(name: str) -> None:
    kind = METHODS[name]
    assert kind() == kind()
    assert hash(kind()) == hash(kind())
    assert (kind.__doc__ or "").strip()
