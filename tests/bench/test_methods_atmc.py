"""The theorems of the cards of methods.md 2.4 to 2.7 and 6.3, each against a hand calculation or brute force."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from math import ceil, floor, log2
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn

from bench import phases
from bench.__main__ import main
from bench.cells import read_suite
from bench.checkpoints import read as read_checkpoint
from bench.claims import Outside, claims_of_record
from bench.factors import stored_forms, stored_state
from bench.loop import run_phase
from bench.methods import AL0, ALR, ATMC, ATMC8, METHODS, Uniform8Bit, atmc, code_books
from bench.methods.atmc import BookAnchor, Factored, book_anchors, factor_budget, factorised, factors
from bench.methods.code_books import even_levels, learned_book
from bench.methods.low_rank import LowRank, global_ranks
from bench.models import build_model
from bench.objectives import StabilityTraining
from bench.phases import fit
from bench.run import Folders, run_cell
from bench.sparsity import attach, prunable
from bench.train import Phase, Step, Training
from leaderboard.canonical import digest, sha256_file
from leaderboard.checks import check
from leaderboard.record import read

Net = Callable[..., nn.Sequential]
Trainings = Callable[..., Training]
THIRD = Fraction(1, 3)
K = 369  # a third of the small network's 1,108 weights
STORING = {
    "alr": ALR(), "atmc": ATMC(), "atmc-8bit": ATMC8(every=2),
    "uniform-al0": Uniform8Bit(), "uniform-atmc": Uniform8Bit("atmc", True),
}  # fmt: skip
SHAPES = [(3, 16), (6, 6), (16, 3), (4, 1, 3, 3), (9, 1, 3, 3), (20, 2, 2, 2)]  # matrices with m < n, m = n and m > n


def layer_of(shape: tuple[int, ...], seed: int = 0) -> Any:
    layer = nn.Linear(shape[1], shape[0]) if len(shape) == 2 else nn.Conv2d(shape[1], shape[0], shape[2:])
    layer.weight.data = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return layer


def until(method: Any, model: nn.Module, training: Training, phase: str) -> Phase:
    """Train up to the named phase, which is returned and not run."""
    for found in method(model, THIRD, training):
        if found.name == phase:
            return found
        run_phase(model, found, training)
    raise AssertionError(f"no phase {phase}")


def non_zeros(model: nn.Module) -> int:
    return sum(int((one != 0).sum()) for layer in prunable(model).values() for one in factors(layer).values())


def watched(phase: Phase, look: Callable[[Step], None]) -> Phase:
    def after_step(step: Step) -> None:
        phase.after_step(step)
        look(step)

    return replace(phase, after_step=after_step)


# ---- the parameterisation of ATMC ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_factors_start_as_exactly_the_weight_and_count_no_more(shape: tuple[int, ...]) -> None:
    layer = layer_of(shape)
    weight = layer.weight.detach().clone()
    attach(layer, Factored())
    assert torch.equal(layer.weight, weight)
    found, (m, n) = factors(layer), weight.flatten(1).shape
    r = min(m, n)
    assert [found[part].flatten(1).shape for part in "UVC"] == [(m, r), (r, n), (m, n)]
    assert sum(int((one != 0).sum()) for one in found.values()) == weight.numel()
    full = "U" if n <= m else "V"  # m = n is the first case, U (V + I)
    assert torch.equal(found[full].flatten(), weight.flatten())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_of_the_factors_are_those_of_the_card(shape: tuple[int, ...]) -> None:
    layer = layer_of(shape)
    attach(layer, Factored())
    generator = torch.Generator().manual_seed(1)
    own = factors(layer)
    for one in own.values():
        one.data = torch.randn(one.shape, generator=generator)
    gradient = torch.randn(shape, generator=generator)
    (layer.weight * gradient).sum().backward()
    u, v, g = own["U"].detach().flatten(1).numpy(), own["V"].detach().flatten(1).numpy(), gradient.flatten(1).numpy()
    one, other = (u, v + np.eye(len(v))) if v.shape[1] <= len(u) else (u + np.eye(len(u)), v)
    for part, expected in {"U": g @ other.T, "V": one.T @ g, "C": g}.items():
        found = own[part].grad
        assert found is not None
        np.testing.assert_allclose(found.flatten(1).numpy(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", [ATMC(), ATMC8(every=2)], ids=repr)
def test_the_budget_is_global_over_all_factors_and_exact_after_every_step(
    net_of: Net, training_of: Trainings, method: Any
) -> None:
    model, training, found = net_of(), training_of(finetune=4, finetune_lr=0.5), []
    for phase in method(model, THIRD, training):
        hooked = watched(phase, lambda step: found.append(non_zeros(step.model)))
        run_phase(model, hooked if phase.name in ("compress", "quantise") else phase, training)
    assert found == [K] * 12  # 4 epochs of 3 steps
    used = {part for form in stored_forms(model).values() for part, one in form.parts.items() if bool(one.any())}
    assert used == {"U", "V", "C"}, "all of them take part in the budget"


@pytest.mark.parametrize("arch, density, expected", [("lenet", "0.005", 2152), ("resnet34", "0.005", 106_325)])
def test_the_budget_is_counted_in_dense_weights(arch: str, density: str, expected: int) -> None:
    """Methods.md 2.5, test v: the factors have two to three times as many entries."""
    shape = (1, 28, 28) if arch == "lenet" else (3, 32, 32)
    with torch.device("meta"):
        assert factor_budget(build_model(arch, shape, 10), Fraction(density)) == expected


def test_with_one_factor_alone_trained_the_method_is_al0(net_of: Net, training_of: Trainings) -> None:
    """Methods.md 2.5, test iii: where the offset and C stay zero."""
    training, model, other = training_of(), net_of(), net_of()
    compress = until(ATMC(), model, training, "compress")
    full = {"0": 1, "3": 1, "5": 1}  # V: all three matrices are wide
    names = {f"{name}.parametrizations.weight.original{at}" for name, at in full.items()}
    plain = lambda net: {name for name, _ in net.named_parameters() if "parametrizations" not in name}  # noqa: E731
    run_phase(model, replace(compress, trains=lambda net: names | plain(net)), training)
    start = replace(training, budget=replace(training.budget, finetune=0))
    for phase in AL0()(other, THIRD, start):
        run_phase(other, phase, training)
    *_, project = AL0()(net_of(), THIRD, training)
    run_phase(other, replace(project, name="compress", epochs=compress.epochs), training)
    for (name, layer), twin in zip(prunable(model).items(), prunable(other).values(), strict=True):
        torch.testing.assert_close(layer.weight, twin.weight, msg=name)


def test_the_start_is_al0s_network_and_its_non_zeros(net_of: Net, training_of: Trainings) -> None:
    model, training = net_of(), training_of()
    for phase in factorised(model, THIRD, training):
        run_phase(model, phase, training)
    state = fit(net_of(), AL0(), THIRD, training_of(finetune=0))
    assert all(torch.equal(layer.weight, state[f"{name}.weight"]) for name, layer in prunable(model).items())
    assert non_zeros(model) == K


# ---- what every one of them stores -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STORING)
def test_the_plain_network_is_what_the_stored_form_merges_to(net_of: Net, training_of: Trainings, name: str) -> None:
    model = net_of()
    state = fit(model, STORING[name], THIRD, training_of())
    forms = stored_forms(model)
    assert set(forms) == {"0.weight", "3.weight", "5.weight"}
    for weight, form in forms.items():
        assert torch.equal(form.merged, state[weight])
    stored_state(state, forms)  # raises where a form is another network's or has too many values
    assert sum(int((one != 0).sum()) for form in forms.values() for one in form.parts.values()) <= K


@pytest.mark.parametrize(
    "name, expected",
    [
        ("alr", ["pretrain", "finetune"]),
        ("atmc", ["pretrain", "project", "compress"]),
        ("atmc-8bit", ["pretrain", "project", "compress", "quantise"]),
        ("uniform-8bit", ["pretrain", "project"]),
    ],
)
def test_phases_share_out_the_budget_of_the_suite(net_of: Net, training_of: Trainings, name: str, expected: list[str]) -> None:
    found = list(METHODS[name]()(net_of(), THIRD, training_of(pretrain=5, prune=3, finetune=7)))
    assert [phase.name for phase in found] == expected
    assert sum(phase.epochs for phase in found) == (12 if name == "alr" else 15)


class Killed(BaseException):
    """As abrupt as it gets without losing the test."""


def test_a_killed_run_keeps_copies_and_duals(
    net_of: Net, training_of: Trainings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(phases, "SECONDS_BETWEEN_SNAPSHOTS", 0.0)
    training, method, seen = training_of(StabilityTraining(), finetune=6), ATMC8(rho=1.0, every=2), set()

    def report(name: str, epoch: int, epochs: int, loss: float) -> None:
        if (name, epoch) not in seen:
            seen.add((name, epoch))
            raise Killed

    dense = Fraction(1)  # enough entries for the copies to differ from the factors
    while True:
        try:
            resumed = fit(net_of(), method, dense, training, tmp_path, report)
            break
        except Killed:
            continue
    assert len([name for name, _ in seen if name == "quantise"]) == 3
    straight = fit(net_of(), method, dense, training)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    other = fit(net_of(), replace(method, every=1000), dense, training)
    assert any(not torch.equal(straight[name], other[name]) for name in straight), "the copies take part"


# ---- learned code books ----------------------------------------------------------------------------------------------


def drawn(n: int, seed: int = 0, zeros: int = 0) -> Tensor:
    values = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.cat([values, torch.zeros(zeros, dtype=torch.float64)])


def error(values: Tensor, found: Tensor) -> float:
    return float((values - found).square().sum())


def best_error(values: Tensor, size: int) -> float:
    """Every assignment of the entries to the cell of 0 and `size` free cells."""
    array, least = values.numpy(), np.inf
    for cells in itertools.product(range(size + 1), repeat=len(array)):
        own = [array[np.array(cells) == cell] for cell in range(size + 1)]
        least = min(least, (own[0] ** 2).sum() + sum(((one - one.mean()) ** 2).sum() for one in own[1:] if len(one)))
    return float(least)


def programme(values: np.ndarray, size: int) -> float:
    """The same by the textbook dynamic programme over sorted values, in which any one cell may be the one of 0."""
    ordered = np.sort(values)
    best = np.full((size + 1, 2, len(ordered) + 1), np.inf)
    best[0, 0, 0] = 0
    for j in range(len(ordered) + 1):
        for k, used, i in itertools.product(range(size + 1), range(2), range(j)):
            cell = ordered[i:j]
            if k:
                best[k, used, j] = min(best[k, used, j], best[k - 1, used, i] + ((cell - cell.mean()) ** 2).sum())
            if used:
                best[k, 1, j] = min(best[k, 1, j], best[k, 0, i] + (cell**2).sum())
    return float(best[:, :, -1].min())


def test_the_cards_example_is_quantised_as_the_card_says() -> None:
    found = learned_book(torch.tensor([-1.1, -0.9, 0.02, 0.9, 1.1, 0.0]), 2)
    assert found.tolist() == pytest.approx([-1, -1, 0, 1, 1, 0])


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_small_books_are_the_best_of_all_assignments(size: int, seed: int) -> None:
    values = drawn(6, seed)
    assert error(values, learned_book(values, size)) == pytest.approx(best_error(values, size), rel=1e-9, abs=1e-12)


DRAWS = {"both signs": drawn(24, 5), "one sign": drawn(24, 6).abs(), "ties": (drawn(30, 7) * 2).round() + 0.25}


@pytest.mark.parametrize("values", DRAWS.values(), ids=DRAWS)
@pytest.mark.parametrize("size", [2, 5])
def test_books_are_the_optimum_of_the_dynamic_programme(values: Tensor, size: int) -> None:
    assert error(values, learned_book(values, size)) == pytest.approx(programme(values.numpy(), size), rel=1e-9)


def test_a_large_tensor_is_held_by_256_values_and_its_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    values = drawn(3000, zeros=500).float()
    found = learned_book(values)
    assert len(found[found != 0].unique()) <= 256
    assert bool((found[values == 0] == 0).all())
    assert error(values, found) < error(values, even_levels(values))
    errors = []
    for rounds in range(6):
        monkeypatch.setattr(code_books, "ROUNDS", rounds)
        errors.append(error(values, learned_book(values)))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > errors[-1]


@pytest.mark.parametrize("seed", range(5))
def test_of_many_values_the_book_is_near_the_optimum_and_never_better(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    values = drawn(24, seed)
    monkeypatch.setattr(code_books, "EXACT", 12)
    best = programme(values.numpy(), 5)
    assert best - 1e-12 <= error(values, learned_book(values, 5)) <= 1.5 * best


@pytest.mark.parametrize("n", [0, 1, 256])
def test_tensors_of_few_values_stay_as_they_are(n: int) -> None:
    values = drawn(n, zeros=300).float()
    assert torch.equal(learned_book(values), values)
    repeated = values.repeat(3)
    assert torch.equal(learned_book(repeated), repeated)


def test_a_book_without_values_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one value, got 0"):
        learned_book(torch.ones(3), 0)


def test_a_factor_that_is_quantised_already_leaves_the_dual_at_zero() -> None:
    factor = learned_book(drawn(700, zeros=100).float().view(20, 40))
    anchor = BookAnchor(factor, 0.1)
    anchor.update_dual(factor)
    assert torch.equal(anchor.z, factor)
    assert not bool(anchor.u.any())


def test_the_copy_never_leaves_the_support_of_its_factor() -> None:
    factor = drawn(700, zeros=100).float()
    anchor = BookAnchor(factor, 0.1)
    anchor.u.copy_(drawn(800, seed=1).float())
    assert bool((anchor.quantised(factor)[factor == 0] == 0).all())


def test_the_penalty_draws_factors_and_copies_together(
    net_of: Net, training_of: Trainings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a penalty that hardly pulls; with books of eight values, as 256 hold so small a network nearly exactly."""
    monkeypatch.setattr(atmc, "learned_book", lambda values: learned_book(values, 8))
    training, apart = training_of(finetune=40), {}
    for rho in (1e-4, 1):
        model = net_of()
        run_phase(model, until(ATMC8(rho=rho, every=2), model, training, "quantise"), training)
        pairs = [(factor.detach(), anchor.quantised(factor.detach())) for anchor, factor in book_anchors(model)]
        lost, size = (sum(error(one, other * by) for one, other in pairs) for by in (1, 0))
        apart[rho] = lost / size
    assert apart[1] < apart[1e-4] / 2


def test_each_factor_holds_256_values_at_most_and_the_trained_bias(net_of: Net, training_of: Trainings) -> None:
    model = net_of(batchnorm=True)
    state = fit(model, ATMC8(every=2), Fraction(1), training_of())
    forms = stored_forms(model)
    for form in forms.values():
        for part, one in form.parts.items():
            assert len(one[one != 0].unique()) <= 256
            assert (part in form.quantised) <= (one.numel() > 256)
    assert any(form.quantised for form in forms.values())
    assert torch.equal(state["1.running_mean"], model.state_dict()["1.running_mean"])
    assert bool(state["1.running_mean"].any())


# ---- even levels -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [False, True])
def test_even_levels_are_the_nearest_ones_and_rounding_again_changes_nothing(symmetric: bool) -> None:
    values = torch.cat([drawn(900) * 3 + 0.5, torch.zeros(50)]).float()
    found, kept = even_levels(values, symmetric), values != 0
    low, high = float(values[kept].min()), float(values[kept].max())
    largest = max(-low, high)
    levels = np.arange(-127, 128) * largest / 127 if symmetric else np.linspace(low, high, 256)
    nearest = levels[np.abs(values[kept].double().numpy()[:, None] - levels).argmin(1)]
    np.testing.assert_allclose(found[kept].numpy(), nearest, rtol=1e-6, atol=1e-7)
    assert float((found - values)[kept].abs().max()) <= (2 * largest / 508 if symmetric else (high - low) / 510) + 1e-6
    assert bool((found[~kept] == 0).all())
    assert len(found[found != 0].unique()) <= (254 if symmetric else 256)
    assert torch.equal(even_levels(found, symmetric), found)


def test_even_levels_of_one_value_or_none_are_these() -> None:
    for values in (torch.tensor([0.0, 0.3, 0.3]), torch.zeros(4)):
        assert torch.equal(even_levels(values), values)


def test_uniform_8bit_rounds_what_its_base_stores_and_nothing_else(net_of: Net, training_of: Trainings) -> None:
    plain, net = net_of(), net_of()
    before = fit(plain, AL0(), THIRD, training_of())
    after = fit(net, Uniform8Bit(), THIRD, training_of())
    for name in before:
        expected = even_levels(before[name]) if name.endswith("weight") else before[name]
        assert torch.equal(after[name], expected)
    factored, net = net_of(), net_of()
    fit(factored, ATMC(), THIRD, training_of())
    fit(net, Uniform8Bit("atmc"), THIRD, training_of())
    for form, own in zip(stored_forms(factored).values(), stored_forms(net).values(), strict=True):
        assert all(torch.equal(own.parts[part], even_levels(one)) for part, one in form.parts.items())


# ---- low rank --------------------------------------------------------------------------------------------------------


def test_ranks_are_those_of_the_lowest_threshold_that_fits() -> None:
    """Against every threshold there is, for every budget."""
    values = {"a": torch.tensor([5.0, 3.0, 0.5, 0.1]), "b": torch.tensor([4.0, 2.0, 1.0])}
    costs = {"a": 13, "b": 19}
    thresholds = sorted([one for own in values.values() for one in own.tolist()], reverse=True)
    at_threshold = [{n: max(1, int((own >= t).sum())) for n, own in values.items()} for t in thresholds]
    for keep in range(32, 120):
        fitting = [ranks for ranks in at_threshold if sum(costs[n] * rank for n, rank in ranks.items()) <= keep]
        assert global_ranks(values, costs, keep) == max(fitting, key=lambda ranks: sum(ranks.values()))


def test_a_density_below_rank_one_is_refused(net_of: Net, training_of: Trainings) -> None:
    with pytest.raises(ValueError, match="density 1/10 keeps 110 weights, factors of rank one take 112; ask for 112/1108"):
        next(ALR()(net_of(), Fraction(1, 10), training_of()))  # before any training


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_truncation_loses_the_dropped_singular_values_and_no_more(shape: tuple[int, ...]) -> None:
    """Eckart and Young."""
    weight = layer_of(shape).weight.detach()
    values = np.linalg.svd(weight.flatten(1).double().numpy(), compute_uv=False)
    for rank in range(1, len(values) + 1):
        layer = layer_of(shape)
        attach(layer, LowRank(rank))
        lost = float((layer.weight.detach() - weight).double().square().sum())
        assert lost == pytest.approx(float((values[rank:] ** 2).sum()), rel=1e-4, abs=1e-8)


def test_low_rank_stores_r_of_m_plus_n_and_stays_within_the_density(net_of: Net, training_of: Trainings) -> None:
    model = net_of()
    fit(model, ALR(), THIRD, training_of())
    forms = stored_forms(model)
    sizes = [sum(one.numel() for one in form.parts.values()) for form in forms.values()]
    ranks = [form.parts["U"].shape[1] for form in forms.values()]
    assert sizes == [rank * sum(form.merged.flatten(1).shape) for rank, form in zip(ranks, forms.values())]
    assert K - 80 < sum(sizes) <= K  # one more rank takes at most 80
    for form in forms.values():
        assert np.linalg.matrix_rank(form.merged.flatten(1).numpy(), tol=1e-4) <= form.parts["U"].shape[1]


# ---- the record ------------------------------------------------------------------------------------------------------

SUITE = """
suite = { name = "stored", version = 1 }
data = { name = "digits" }
threat = { norm = "linf", eps = "0.02" }
samples = { first = 30 }
budget = { pretrain = 3, prune = 1, finetune = 2, batch = 64, lr = 0.1 }
grid = { arch = ["mlp"], density = ["0.3"], seed = [0] }
method = [{ name = "lwm" }, { name = "atmc-8bit", every = 5 }, { name = "uniform-8bit", base = "atmc" }, { name = "alr" }]
objective = [{ name = "benign" }]
attack = [{ name = "pgd", steps = 3 }]
verifier = [{ name = "ibp" }]
"""


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The record of each method on digits."""
    folder = tmp_path_factory.mktemp("suite")
    (folder / "stored.toml").write_text(SUITE)
    out, folders = {}, Folders(folder / "stored@1")
    for cell in read_suite(str(folder / "stored.toml")).cells:
        run_cell(cell, folders, torch.device("cpu"))
        out[cell.method["name"]] = folders.record(cell)
    return out


def bits_by_hand(tensors: list[np.ndarray]) -> tuple[int, int]:
    """(non-zeros, bits) by methods.md 6.3."""
    kept, bits = 0, 0
    for one in tensors:
        nnz, q = int(np.count_nonzero(one)), len(np.unique(one[one != 0]))
        b = ceil(log2(q)) if q else 0
        kept += nnz
        booked = nnz * b + 32 * q
        bits += booked if q <= 256 and 2**b < nnz else 32 * nnz
    return kept, bits


@pytest.mark.parametrize("name", ["lwm", "atmc-8bit", "uniform-8bit", "alr"])
def test_a_record_counts_what_is_stored_over_the_dense_network(measured: dict[str, Path], name: str) -> None:
    path = measured[name]
    record = read(path)
    assert check(record, path.parent) == []
    block, evidence = record.sparsity, record.evidence
    assert evidence.weights is not None
    loaded = read_checkpoint(path.parent / (evidence.stored or evidence.weights))
    plain = read_checkpoint(path.parent / evidence.weights)
    assert all(torch.equal(loaded.state[key], plain.state[key]) for key in plain.state)
    dense = [value.numpy() for key, value in plain.state.items() if key.endswith("weight")]
    stored = [one.numpy() for form in loaded.stored.values() for one in form.parts.values()] or dense
    kept, bits = bits_by_hand(stored)
    assert (block.kept, block.total) == (kept, sum(one.size for one in dense))
    assert block.bits is not None
    assert (block.bits.paper, block.bits.plain, block.bits.dense) == (bits, 32 * kept, 32 * block.total)
    assert block.bits.ratio.paper == bits / block.bits.dense
    assert block.bits.csr > bits or name == "alr"
    assert kept <= floor(Fraction("0.3") * block.total) or name == "lwm"  # which rounds up in each layer
    assert (block.merged is None) is (evidence.stored is None) is (name == "lwm")
    if block.merged is not None:
        assert block.merged.kept == sum(int(np.count_nonzero(one)) for one in dense)


@pytest.mark.parametrize("name", ["atmc-8bit", "alr"])
def test_certify_gives_the_stored_file_and_the_plain_one_equal_verdicts(
    measured: dict[str, Path], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    path = measured[name]
    evidence, found = read(path).evidence, []
    for file in (evidence.weights, evidence.stored):
        words = ["certify", str(path.parent / str(file)), "--eps", "1/50", "--limit", "20", "--verifier", "ibp", "--json"]
        assert main(words) == 0
        found.append(json.loads(capsys.readouterr().out))
    plain, stored = ([{**row, "seconds": 0} for row in one["rows"]] for one in found)
    assert plain == stored
    assert "certified" in {row["verdict"] for row in found[1]["rows"]}
    assert "stored" not in found[0]["passport"]
    assert found[1]["passport"]["stored"]["kept"] == read(path).sparsity.kept


def forged(path: Path, change: Callable[[dict[str, Any]], None]) -> list[str]:
    """What a check finds in the record after a change that is signed again."""
    document = json.loads(path.read_text())
    original = path.read_text()
    change(document)
    document["digest"] = digest(document)
    path.write_text(json.dumps(document))
    try:
        return check(read(path), path.parent)
    finally:
        path.write_text(original)


def test_a_record_that_lies_about_its_stored_form_is_found_out(measured: dict[str, Path]) -> None:
    path = measured["atmc-8bit"]
    file = path.parent / str(read(path).evidence.stored)

    def fewer(document: dict[str, Any]) -> None:
        block = document["sparsity"]
        block["kept"], block["layers"]["fc1"][0] = block["kept"] - 1, block["layers"]["fc1"][0] - 1

    def smaller(document: dict[str, Any]) -> None:
        document["sparsity"]["bits"]["ratio"]["paper"] /= 2

    def alone(document: dict[str, Any]) -> None:
        del document["evidence"]["stored"]

    def elsewhere(document: dict[str, Any]) -> None:
        document["evidence"]["stored"] = "../../elsewhere.safetensors"

    assert forged(path, lambda document: None) == []
    one, two = forged(path, fewer)
    assert "32 bits for each counted weight" in one
    assert f"{file.name} stores fc1.weight in" in two
    assert "sparsity.bits.ratio.paper is" in forged(path, smaller)[0]
    assert "go together" in forged(path, alone)[0]
    assert "points out of the run's folder" in forged(path, elsewhere)[0]
    kept = file.read_bytes()
    tensors = load_file(file)
    name = next(name for name in tensors if name.startswith("fc1") and name.endswith((".mask", ".U")))
    tensors[name] = np.ones_like(tensors[name])
    save_file(tensors, file)
    assert any("is not the stored file that was recorded" in problem for problem in check(read(path), path.parent))

    def signed(document: dict[str, Any]) -> None:
        document["evidence"]["stored_sha256"] = sha256_file(file)

    assert any("stores fc1.weight in" in problem for problem in forged(path, signed))
    file.write_bytes(kept)


def test_replay_finds_a_stored_form_that_merges_to_other_weights(measured: dict[str, Path]) -> None:
    path = measured["alr"]
    file, original = path.parent / str(read(path).evidence.stored), path.read_text()
    outside = Outside(torch.device("cpu"))
    assert [one.why for one in claims_of_record(path, outside).findings if one.what == "stored form"] == [""]
    kept = file.read_bytes()
    with safe_open(file, "numpy") as opened:
        about = opened.metadata()
    tensors = load_file(file)
    name = next(name for name in tensors if name.startswith("fc1") and name.endswith(".U"))
    tensors[name] = 2 * tensors[name]  # as many numbers as before, other ones
    save_file(tensors, file, about)
    document = json.loads(original)
    document["evidence"]["stored_sha256"] = sha256_file(file)
    document["digest"] = digest(document)
    path.write_text(json.dumps(document))
    try:
        assert check(read(path), path.parent) == []
        (found,) = [one.why for one in claims_of_record(path, outside).findings if one.what == "stored form"]
        assert "merges to other weights" in found
    finally:
        path.write_text(original)
        file.write_bytes(kept)
