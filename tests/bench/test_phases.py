"""The phase store: what is finished is loaded, what was interrupted goes on, and nothing is shared that should not be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench import phases
from bench.data import Split
from bench.errors import UserError
from bench.methods import HYDRA, LWM, METHODS, Dense, RandomPruning
from bench.objectives import Benign, IBPTraining, StabilityTraining
from bench.phases import fit, phase_key
from bench.sparsity import mask_layers, prunable
from bench.train import Phase, Step, Training

Net = Callable[..., nn.Sequential]
Trainings = Callable[..., Training]
TENTH, THIRD = Fraction(1, 10), Fraction(1, 3)


@dataclass
class Fitted:
    """The plain state and the (phase, epoch) pairs that were really trained for it."""

    state: dict[str, Tensor]
    trained: list[tuple[str, int]] = field(default_factory=list)

    @property
    def phases(self) -> list[str]:
        return list(dict.fromkeys(name for name, _ in self.trained))


@pytest.fixture
def fitted(net_of: Net) -> Callable[..., Fitted]:
    def make(method: Any, training: Training, store: Path | None = None, density: Fraction = TENTH, net: int = 0) -> Fitted:
        out = Fitted({})
        report = lambda name, epoch, epochs, loss: out.trained.append((name, epoch))  # noqa: E731
        out.state = fit(net_of(net), method, density, training, store, report)
        return out

    return make


def same(a: Fitted, b: Fitted) -> bool:
    return a.state.keys() == b.state.keys() and all(torch.equal(a.state[name], b.state[name]) for name in a.state)


def finished(store: Path) -> list[Path]:
    return sorted(store.glob("*.safetensors"))


# ---- load instead of train -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_a_second_fit_trains_nothing_and_is_bit_identical(
    fitted: Callable[..., Fitted], training_of: Trainings, tmp_path: Path, name: str
) -> None:
    method, training = METHODS[name](), training_of(StabilityTraining(), augment="crop")
    stored = fitted(method, training, tmp_path / "new" / "folder", THIRD)
    again = fitted(method, training, tmp_path / "new" / "folder", THIRD)
    assert stored.trained != [] == again.trained
    assert same(stored, again)
    assert same(stored, fitted(method, training, density=THIRD))  # and the store itself changes nothing
    assert list((tmp_path / "new" / "folder").glob("*.partial*")) == []


def test_lwm_and_hydra_share_one_pretraining_with_dense_at_every_density(
    fitted: Callable[..., Fitted], training_of: Trainings, tmp_path: Path
) -> None:
    training = training_of()
    assert fitted(Dense(), training, tmp_path).phases == ["pretrain"]
    assert len(finished(tmp_path)) == 1
    for density in (TENTH, THIRD):
        assert fitted(LWM(), training, tmp_path, density).phases == ["finetune"]
        assert fitted(HYDRA(), training, tmp_path, density).phases == ["prune", "finetune"]
    assert len(finished(tmp_path)) == 1 + 2 + 4


@pytest.mark.parametrize("method", [LWM(), HYDRA(), HYDRA(init="kaiming-normal"), RandomPruning()], ids=repr)
def test_two_densities_never_share_what_comes_after_pruning(
    fitted: Callable[..., Fitted], training_of: Trainings, tmp_path: Path, method: Any
) -> None:
    """The trap of house.md 2.5: a score part's kept count is not in its state dict."""
    training = training_of(pretrain=0)
    for density in (TENTH, THIRD, Fraction(1, 20)):
        stored = fitted(method, training, tmp_path, density)
        assert stored.phases == fitted(method, training, None, density).phases != []
        assert same(stored, fitted(method, training, None, density))


def test_two_initialisations_never_share_a_prune_phase(
    fitted: Callable[..., Fitted], training_of: Trainings, tmp_path: Path
) -> None:
    training = training_of()
    for init in ("proposed", "kaiming-normal", "xavier-normal"):
        stored = fitted(HYDRA(init=init), training, tmp_path)
        assert stored.phases[-2:] == ["prune", "finetune"]
        assert same(stored, fitted(HYDRA(init=init), training))


# ---- what must differ and what may be shared --------------------------------------------------------------------------

CHANGES: dict[str, dict[str, Any]] = {
    "objective": {"objective": StabilityTraining()},
    "field of the objective": {"objective": StabilityTraining(sigma=0.5)},
    "seed": {"seed": 1},
    "augmentation": {"augment": "crop"},
    "pretrain epochs": {"pretrain": 3},
    "lr": {"lr": 0.05},
    "batch": {"batch": 20},
    "optimizer": {"optimizer": "adam"},
    "momentum": {"momentum": 0.5},
    "weight decay": {"weight_decay": 0.01},
    "ramp": {"ramp": 0.2, "objective": IBPTraining()},
}


def test_whatever_changes_the_result_is_never_shared(
    fitted: Callable[..., Fitted], training_of: Trainings, toy_of: Callable[..., Split], tmp_path: Path
) -> None:
    changes = {"nothing": {}, "data": {"data": toy_of(seed=9)}, **CHANGES}
    for name, change in changes.items():
        training = training_of(**change)
        stored = fitted(HYDRA(), training, tmp_path)
        assert stored.phases == ["pretrain", "prune", "finetune"], name
        assert same(stored, fitted(HYDRA(), training)), name
    assert fitted(HYDRA(), training_of(), tmp_path, net=1).phases == ["pretrain", "prune", "finetune"]
    assert len(finished(tmp_path)) == 3 * (len(changes) + 1)


@pytest.mark.parametrize(
    "change, again",
    [
        ({"finetune": 4}, ["finetune"]),
        ({"prune": 4}, ["prune", "finetune"]),
        ({"prune": 4, "finetune": 1}, ["prune", "finetune"]),
    ],
)
def test_epochs_of_later_phases_do_not_cost_another_pretraining(
    fitted: Callable[..., Fitted], training_of: Trainings, tmp_path: Path, change: dict[str, int], again: list[str]
) -> None:
    fitted(HYDRA(), training_of(prune_lr=10.0), tmp_path)
    changed = fitted(HYDRA(), training_of(prune_lr=10.0, **change), tmp_path)
    assert changed.phases == again
    assert same(changed, fitted(HYDRA(), training_of(prune_lr=10.0, **change)))


def test_edited_code_makes_every_stored_phase_stale(
    fitted: Callable[..., Fitted], training_of: Trainings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted(LWM(), training_of(), tmp_path)
    monkeypatch.setattr(phases, "code_digest", lambda: "another revision")
    assert fitted(LWM(), training_of(), tmp_path).phases == ["pretrain", "finetune"]


def test_another_thread_count_is_another_result(net_of: Net, training_of: Trainings, monkeypatch: pytest.MonkeyPatch) -> None:
    training = training_of()

    def key() -> str:
        return phase_key(net_of(), training.pretrain(), LWM(), TENTH, training)

    before = key()
    assert before == key()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert key() != before


def penalty(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return model[0].weight.square().sum()


def hook(step: Step) -> None: ...


def test_method_and_density_count_in_a_key_exactly_where_they_can_matter(net_of: Net, training_of: Trainings) -> None:
    training = training_of()

    def keys(phase: Phase, masked: bool = False) -> set[str]:
        found = set()
        for method, density in [(LWM(), TENTH), (LWM(), THIRD), (HYDRA(), TENTH)]:
            model = net_of()
            if masked:
                mask_layers(model, {name: torch.ones_like(layer.weight) for name, layer in prunable(model).items()})
            found.add(phase_key(model, phase, method, density, training))
        return found

    assert len(keys(Phase("p", 2, 0.1))) == 1
    assert len(keys(Phase("p", 2, 0.1), masked=True)) == 3
    for own in ({"penalty": penalty}, {"after_backward": hook}, {"after_step": hook}, {"after_epoch": hook}):
        assert len(keys(Phase("p", 2, 0.1, **own))) == 3


def test_which_parameters_train_is_part_of_the_key(net_of: Net, training_of: Trainings) -> None:
    choices = [{"0.weight"}, {"0.bias"}, {"0.weight", "0.bias"}]
    found = {
        phase_key(net_of(), Phase("p", 2, 0.1, trains=lambda model, c=chosen: c), LWM(), TENTH, training_of())
        for chosen in choices
    }
    assert len(found) == 3


def test_an_edited_plug_in_is_another_objective(training_of: Trainings, net_of: Net, tmp_path: Path) -> None:
    from bench.build import build

    source = "from dataclasses import dataclass\nimport torch.nn.functional as F\n\n@dataclass(frozen=True)\nclass Mine:\n" \
        "    def __call__(self, model, x, y, progress):\n        return {} * F.cross_entropy(model(x), y)\n"
    found = set()
    for factor in (1, 2):
        (tmp_path / "mine.py").write_text(source.format(factor))
        objective = build("objective", {"name": f"{tmp_path / 'mine.py'}:Mine"})
        training = training_of(objective)
        found.add(phase_key(net_of(), training.pretrain(), LWM(), TENTH, training))
    assert len(found) == 2


# ---- interruption ----------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """As abrupt as it gets without losing the test."""


def killed_at(fit_again: Callable[[Any], Any], moment: int) -> None:
    """Run until the `moment`-th epoch of all phases has been reported, then die inside the report."""
    count = 0

    def report(name: str, epoch: int, epochs: int, loss: float) -> None:
        nonlocal count
        count += 1
        if count == moment:
            raise Killed

    with pytest.raises(Killed):
        fit_again(report)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("moment", range(1, 10))
def test_an_interrupted_and_resumed_run_is_the_uninterrupted_one_to_the_bit(
    net_of: Net, training_of: Trainings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str, moment: int
) -> None:
    """Three epochs each of pretrain, prune and finetune, with noise and augmentation drawn in every step."""
    monkeypatch.setattr(phases, "SECONDS_BETWEEN_SNAPSHOTS", 0.0)
    training = training_of(
        StabilityTraining(), augment="crop-flip", optimizer=optimizer, lr=0.02, pretrain=3, prune=3, finetune=3
    )
    whole = fit(net_of(batchnorm=True), HYDRA(), TENTH, training)
    killed_at(lambda report: fit(net_of(batchnorm=True), HYDRA(), TENTH, training, tmp_path, report), moment)
    seen: list[tuple[str, int]] = []
    resumed = fit(
        net_of(batchnorm=True), HYDRA(), TENTH, training, tmp_path, lambda name, epoch, *_: seen.append((name, epoch))
    )
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    epochs = [(name, epoch) for name in ("pretrain", "prune", "finetune") for epoch in (1, 2, 3)]
    assert seen == epochs[moment - 1 :]  # the epoch under way is the only one that is repeated


def test_many_interruptions_in_a_row_end_where_none_would(
    net_of: Net, training_of: Trainings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(phases, "SECONDS_BETWEEN_SNAPSHOTS", 0.0)
    training = training_of(StabilityTraining(), optimizer="adam", lr=0.02, pretrain=3, prune=3, finetune=3)
    whole = fit(net_of(), HYDRA(), THIRD, training)
    for _ in range(6):
        killed_at(lambda report: fit(net_of(), HYDRA(), THIRD, training, tmp_path, report), 2)
    resumed = fit(net_of(), HYDRA(), THIRD, training, tmp_path)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_snapshots_within_the_interval_are_left_out_and_cost_repeated_epochs_only(
    net_of: Net, training_of: Trainings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(phases, "SECONDS_BETWEEN_SNAPSHOTS", 3600.0)
    training = training_of(StabilityTraining(), pretrain=3)
    whole = fit(net_of(), LWM(), TENTH, training)
    killed_at(lambda report: fit(net_of(), LWM(), TENTH, training, tmp_path, report), 3)
    assert list(tmp_path.glob("*.partial.pt")) == []
    resumed = fit(net_of(), LWM(), TENTH, training, tmp_path)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@dataclass(frozen=True)
class Rounds:
    """A method with a phase of the same name in every round and draws of its own between them."""

    rounds: int = 3

    def __call__(self, model: nn.Module, density: Fraction, training: Training) -> Iterator[Phase]:
        for _ in range(self.rounds):
            masks = {name: (torch.rand(layer.weight.shape) < 0.8).float() for name, layer in prunable(model).items()}
            mask_layers(model, masks)
            yield training.finetune()


def test_the_code_between_phases_draws_the_same_when_phases_are_loaded_as_when_they_are_trained(
    fitted: Callable[..., Fitted], training_of: Trainings, tmp_path: Path
) -> None:
    first = fitted(Rounds(2), training_of(), tmp_path)
    longer = fitted(Rounds(3), training_of(), tmp_path)
    again = fitted(Rounds(3), training_of(), tmp_path)
    assert same(longer, fitted(Rounds(3), training_of()))
    assert same(longer, again)
    assert not same(first, longer)


def test_a_store_that_is_a_file_is_a_user_error(net_of: Net, training_of: Trainings, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match=r"cannot write to the folder .*taken"):
        fit(net_of(), Dense(), TENTH, training_of(Benign()), tmp_path / "taken")
