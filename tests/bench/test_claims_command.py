"""From a suite to claims and curves: methods with seeds and objectives of their own, curves that survive a kill, the verbs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import astuple
from fractions import Fraction
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from bench.__main__ import main
from bench.cells import read_suite
from bench.data import DATASETS
from bench.errors import UserError
from bench.loop import Epoch, Snapshots, run_phase
from bench.methods import HYDRA
from bench.phases import fit
from bench.run import Folders, run_cell
from bench.train import Phase, Step
from leaderboard.paper_claims import HERE, _has, read_claims

DOCS = Path(__file__).resolve().parents[2] / "docs"
SUITE = """
[suite]
name = "tiny"
version = 1
[data]
name = "digits"
[samples]
first = 60
[threat]
norm = "linf"
eps = "0.05"
[budget]
pretrain = 2
prune = 1
finetune = 1
optimizer = "adam"
lr = 5e-3
prune_lr = 1e-2
finetune_lr = 5e-3
batch = 32
[grid]
arch = ["mlp"]
density = ["0.5"]
seed = [0, 1]
[[method]]
name = "hydra"
objectives = ["pgd"]
[[method]]
name = "lwm"
seeds = [1]
objectives = ["pgd"]
[[method]]
name = "nap"
seeds = [0]
objectives = ["benign"]
[[objective]]
name = "pgd"
eps = "0.05"
steps = 1
headline = "robust.pgd"
[[objective]]
name = "benign"
headline = "robust.pgd"
[[attack]]
name = "pgd"
steps = 2
"""


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("suite") / "tiny.toml"
    path.write_text(SUITE)
    return path


@pytest.fixture(scope="module")
def runs(suite: Path) -> Path:
    for cell in read_suite(str(suite)).cells:
        run_cell(cell, Folders(suite.parent / "runs" / "tiny@1"), torch.device("cpu"))
    return suite.parent / "runs"


# ---- suites ----------------------------------------------------------------------------------------------------------


def test_a_method_may_have_some_of_the_seeds_and_objectives_only(suite: Path) -> None:
    cells = {(one.method["name"], one.objective["name"], one.seed) for one in read_suite(str(suite)).cells}
    own = {("hydra", "pgd", 0), ("hydra", "pgd", 1), ("lwm", "pgd", 1), ("nap", "benign", 0)}
    assert cells == own | {("dense", "pgd", 0), ("dense", "pgd", 1), ("dense", "benign", 0)}
    assert all(set(one.method) == {"name"} for one in read_suite(str(suite)).cells)


@pytest.mark.parametrize(
    "new, complaint",
    [
        ("seeds = [2]", "unknown seed of method 'lwm' '2'"),
        ("seeds = [true]", "unknown seed of method 'lwm' 'True'"),
        ("seeds = 1", "`seeds` of method 'lwm' must be a list of some of the suite's seeds, got 1"),
        ("seeds = []", "`seeds` of method 'lwm' must be a list"),
        ('seeds = [1]\nobjectives = ["pdg"]', "did you mean 'pgd'"),
    ],
)
def test_a_seed_or_objective_that_the_suite_has_not_is_refused(tmp_path: Path, new: str, complaint: str) -> None:
    text = SUITE.replace('seeds = [1]\nobjectives = ["pgd"]', new)
    (tmp_path / "bad.toml").write_text(text)
    with pytest.raises(UserError) as caught:
        read_suite(str(tmp_path / "bad.toml"))
    assert complaint in str(caught.value)


@pytest.mark.parametrize("name", ["mnist-claims@1", "mnist-claims-lenet@1", "mnist-claims-large@1", "mnist-inits@1"])
def test_the_suites_measure_every_claim_at_six_seeds(name: str) -> None:
    """Every side of every claim is either in the suite with all six seeds or not in it at all."""
    cells, measured = [one.as_json() for one in read_suite(name).cells], set()
    for claim in read_claims().claims:
        seeds = [
            {
                one["seed"] for one in cells
                if claim.objective in (None, one["objective"]["name"]) and _has(one["budget"], claim.budget)
                and _has(one["method"], side)
            }
            for side in (claim.left, claim.right) if side is not None
        ]  # fmt: skip
        if all(seeds):
            measured.add(claim.id)
            assert all(one == {0, 1, 2, 3, 4, 5} for one in seeds), claim.id
    inits = {claim.id for claim in read_claims().claims if claim.id.startswith("init-")}
    everything = {claim.id for claim in read_claims().claims}
    assert measured == (inits if name == "mnist-inits@1" else everything - inits)


def test_the_names_of_data_sets_in_the_claims_are_those_of_the_catalogue() -> None:
    assert set(read_claims().names.values()) <= set(DATASETS)
    assert (HERE / "published_results.csv").read_text(encoding="utf-8").count("\n") > 500


def test_the_claim_of_the_page_is_one(tmp_path: Path) -> None:
    (text,) = re.findall(r"```toml\n(.*?)```", (DOCS / "claims.md").read_text(), re.S)
    (tmp_path / "claims.toml").write_text("[data]\n" + text)
    assert [one.id for one in read_claims(tmp_path / "claims.toml").claims] == ["hydra-above-lwm"]


# ---- curves ----------------------------------------------------------------------------------------------------------


def test_the_gradient_of_a_curve_is_the_mean_over_the_entries_that_are_trained(
    net_of: Callable[..., Any], training_of: Callable[..., Any]
) -> None:
    model, seen, losses = net_of(), [], []

    def watch(step: Step) -> None:
        entries = torch.cat([one.grad.flatten() for one in step.model.parameters() if one.requires_grad])
        seen.append(float(entries.abs().mean()))

    phase = Phase("some", 2, 0.05, trains=lambda net: {"0.weight", "5.bias"}, after_backward=watch)
    training = training_of()
    curve = run_phase(model, phase, training, report=lambda *words: losses.append(words[3]))
    half = len(seen) // 2
    assert [one.epoch for one in curve] == [1, 2]
    assert [one.loss for one in curve] == losses
    assert [one.gradient for one in curve] == pytest.approx([sum(seen[:half]) / half, sum(seen[half:]) / half], rel=1e-5)


class Stop(Exception):
    pass


class Memory(Snapshots):
    """Keeps every epoch's state and stops the training after the second."""

    def __init__(self) -> None:
        self.state: Any = None
        self.stops = True

    def load(self) -> Any:
        return self.state

    def save(self, state: Callable[[], dict[str, Any]]) -> None:
        self.state = state()
        self.state["model"] = {name: value.clone() for name, value in self.state["model"].items()}
        if self.stops and self.state["epoch"] == 2:
            raise Stop


def test_an_interrupted_phase_has_the_curve_of_an_uninterrupted_one(
    net_of: Callable[..., Any], training_of: Callable[..., Any]
) -> None:
    phase, snapshots, model = Phase("four", 4, 0.05), Memory(), net_of()
    straight = run_phase(net_of(), phase, training_of())
    with pytest.raises(Stop):
        run_phase(model, phase, training_of(), snapshots)
    snapshots.stops = False
    assert run_phase(net_of(), phase, training_of(), snapshots) == straight
    assert len(straight) == 4


def test_a_stored_phase_gives_its_curve_again(
    tmp_path: Path, net_of: Callable[..., Any], training_of: Callable[..., Any]
) -> None:
    def curves() -> list[tuple[str, list[Epoch]]]:
        found: list[tuple[str, list[Epoch]]] = []
        fit(net_of(), HYDRA(), Fraction(1, 3), training_of(), tmp_path, curve=lambda name, own: found.append((name, own)))
        return found

    trained = curves()
    files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    assert curves() == trained
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")} == files
    assert [(name, len(own)) for name, own in trained] == [("pretrain", 2), ("prune", 2), ("finetune", 2)]
    assert all(value > 0 for _, own in trained for one in own for value in astuple(one))


# ---- the verbs -------------------------------------------------------------------------------------------------------


def test_records_of_a_suite_flow_through_claims(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["claims", str(runs), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["records"] == 4 + 3  # and dense
    found = [one for one in told["claims"] if one["data"] == "digits"]
    lwm, nap = (next(one for one in found if one["claim"] == name) for name in ("hydra-above-lwm", "nap-near-zero"))
    assert (lwm["place"], lwm["budget"], lwm["setting"]["eps"]) == ("same ordering on digits", "all images, 2+1+1 epochs", "1/20")
    assert list(lwm["measured"]["by_seed"]) == ["1"]
    assert "one seed: the interval is about images only" in lwm["notes"]
    board = {one["record"]: one for one in json.loads(_board(runs, capsys))["entries"] for one["record"] in one["records"]}
    shares = {one["method"]: dict(zip(one["seeds"], one["robust.pgd:seeds"])) for one in board.values()}
    assert lwm["measured"]["mean"] == pytest.approx(shares["hydra"][1] - shares["lwm"][1])
    assert nap["measured"]["mean"] == pytest.approx(shares["nap"][0])
    assert all(one["verdict"] == "not measured" for one in told["claims"] if one["data"] != "digits")


def _board(runs: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["board", str(runs / "tiny@1"), "--json"]) == 0
    return capsys.readouterr().out


def test_claims_are_a_table_on_the_terminal_and_in_markdown(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["claims", str(runs)]) == 0
    assert "not measured" in capsys.readouterr().out
    assert main(["claims", str(runs), "--markdown"]) == 0
    text = capsys.readouterr().out
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {7}
    assert any("HYDRA above Adv-LWM | same ordering on digits" in line for line in lines)


def test_a_record_that_was_edited_carries_no_claim(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (runs / "tiny@1" / "records").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    one = sorted(tmp_path.glob("*.json"))[0]
    one.write_text(one.read_text().replace('"seed": 0', '"seed": 7').replace('"seed": 1', '"seed": 7'))
    assert main(["claims", str(tmp_path)]) == 3
    assert "it was edited after writing" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["claims", "nowhere"], "there is no folder nowhere"),
        (["claims", "--json", "--markdown"], "exclude each other"),
        (["curves", "nowhere"], "nowhere"),
        (["curves", "RUN", "--phase", "prun"], "has a curve of the phase 'prun'; phases with one: finetune, pretrain, prune"),
    ],
)
def test_bad_input_is_one_sentence(runs: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], complaint: str) -> None:
    assert main([str(runs / "tiny@1") if one == "RUN" else one for one in arguments]) == 2
    told = capsys.readouterr().err
    assert complaint in told
    assert told.count("\n") == 1


def test_curves_are_drawn_with_their_numbers(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["curves", str(runs / "tiny@1"), "--phase", "prune", "--out", str(tmp_path), "--json"]) == 0
    (made,) = json.loads(capsys.readouterr().out)["figures"]
    assert Path(made["png"]).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    table = pd.read_csv(made["csv"])
    assert list(zip(table["method"], table["seed"], table["epoch"])) == [("hydra", 0, 1), ("hydra", 1, 1)]
    stored = [pd.read_csv(path) for path in sorted((runs / "tiny@1" / "curves").glob("*hydra*.csv"))]
    assert table["gradient"].tolist() == [one[one["phase"] == "prune"]["gradient"].item() for one in stored]
