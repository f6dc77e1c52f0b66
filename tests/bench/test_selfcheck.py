"""The calibration data tells the truth, and verifiers that do not are found before anything is recorded."""

from __future__ import annotations

import dataclasses
import json
import runpy
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attacks import ATTACKS, PGD
from bench import selfcheck
from bench.__main__ import main
from bench.selfcheck import CALIBRATION, Ball, Outcome, balls, gate, network, outcome_here, outcome_on, stamp
from leaderboard.canonical import digest
from tests.verifiers.brute_force import true_margin
from verifiers import IBP, VERIFIERS, Exact, Proof

CPU = torch.device("cpu")
DATA = json.loads(CALIBRATION.read_text())


@dataclasses.dataclass(frozen=True)
class Optimist(IBP):
    """ibp whose margins are half a unit too high."""

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Proof:
        proof = super().__call__(model, x, y)
        margin = proof.margin + 0.5
        proved = margin > 0
        status = tuple("proved" if yes else "open" for yes in proved.tolist())
        return dataclasses.replace(proof, margin=margin, radius=proved.double() * float(self.eps), status=status)


@dataclasses.dataclass(frozen=True)
class Flatterer(Exact):
    """A complete verifier that proves everything."""

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Proof:
        margin = torch.full((len(x),), float("nan"), dtype=torch.float64)
        radius = torch.full_like(margin, float(self.eps))
        return Proof(radius, margin, y.clone(), ("proved",) * len(x))


@dataclasses.dataclass(frozen=True)
class Shrugger(Exact):
    """A complete verifier that decides nothing."""

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Proof:
        margin = torch.full((len(x),), float("nan"), dtype=torch.float64)
        return Proof(torch.zeros_like(margin), margin, y.clone(), ("open",) * len(x))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Runaway(PGD):
    """PGD that goes a little too far."""

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return (x + 1.01 * float(self.eps)).clamp(0, 1)


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Any:
    """only(name, kind): the catalogue of verifiers holds this class under the name, exact and smoothing."""

    def set_(name: str, kind: type) -> None:
        for one in list(VERIFIERS):
            if one not in ("smoothing", "exact", name):
                monkeypatch.delitem(VERIFIERS, one)
        monkeypatch.setitem(VERIFIERS, name, kind)

    return set_


def failures(tool: str) -> list[str]:
    return [check.why for ball in balls(DATA, CPU) for check in selfcheck._verified(ball) if check.tool == tool and check.why]


# ---- this installation -----------------------------------------------------------------------------------------------


def test_every_known_answer_is_given_here_and_every_shipped_verifier_was_asked() -> None:
    found = outcome_on(CPU)
    assert found.failed == []
    assert {check.tool for check in found.checks} == {*VERIFIERS, "pgd", "fgsm"}
    assert "all" in found.sentence


def test_a_verifier_that_adds_half_a_unit_to_its_margins_is_found(only: Any) -> None:
    only("ibp", Optimist)
    assert any("is not robust" in why for why in failures("ibp"))
    assert any("above the exact margin" in why for why in failures("ibp"))


def test_a_complete_verifier_that_always_proves_is_found(only: Any) -> None:
    only("exact", Flatterer)
    assert any("is not robust" in why for why in failures("exact"))


def test_a_complete_verifier_that_leaves_everything_open_is_found(only: Any) -> None:
    only("exact", Shrugger)
    assert any("does not prove" in why for why in failures("exact"))
    assert any("does not break" in why for why in failures("exact"))


def test_an_attack_that_leaves_its_ball_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    ball = next(iter(balls(DATA, CPU)))
    assert all(check.holds for check in selfcheck._attacked(ball))
    monkeypatch.setitem(ATTACKS, "pgd", Runaway)
    assert [check.tool for check in selfcheck._attacked(ball) if "leaves the ball" in check.why] == ["pgd"]


# ---- the calibration data --------------------------------------------------------------------------------------------


def of(name: str) -> Ball:
    return next(ball for ball in balls(DATA, CPU) if ball.name.startswith(name))


@pytest.mark.parametrize("name", ["shared toy", "2-4-3", "3-4-3-3"])
def test_the_exact_margins_are_those_of_linear_programmes_over_all_activation_patterns(name: str) -> None:
    ball = of(name)
    eps, classes = float(ball.eps), ball.model(ball.x[:1]).shape[1]
    for x, y, margin in zip(ball.x.double(), ball.y.tolist(), ball.margins):
        lower, upper = (x - eps).clamp(0, 1)[None], (x + eps).clamp(0, 1)[None]
        net = selfcheck.in_float64(ball.model)
        assert isinstance(net, nn.Sequential)
        assert true_margin(net, lower, upper, y, classes) == pytest.approx(margin, abs=1e-7)


def test_both_robust_and_broken_images_are_asked_about() -> None:
    margins = [margin for spec in DATA["networks"] for ball in spec["balls"] for margin in ball["margins"]]
    assert sum(margin > 0 for margin in margins) > 10
    assert sum(margin <= 0 for margin in margins) > 10


def test_at_the_smallest_distance_the_margin_is_zero() -> None:
    (spec,) = [spec for spec in DATA["networks"] if "distances" in spec]
    ball = of(spec["name"])
    net = selfcheck.in_float64(ball.model)
    assert isinstance(net, nn.Sequential)
    for x, y, far in zip(ball.x.double(), ball.y.tolist(), spec["distances"]):
        if 0 < far < 1:
            lower, upper = (x - far).clamp(0, 1)[None], (x + far).clamp(0, 1)[None]
            assert true_margin(net, lower, upper, y, 3) == pytest.approx(0, abs=1e-7)


def test_float32_alone_would_certify_the_cancelling_network() -> None:
    """In exact arithmetic its margin is -1/128 wherever both ReLUs are open; float32 gives +1/128."""
    ball = of("cancelling")
    logits = ball.model(ball.x)
    assert (logits[:, 0] - logits[:, 1]).tolist() == [1 / 128] * len(ball.x)
    assert list(ball.margins) == [-1 / 128] * len(ball.x)
    double = selfcheck.in_float64(ball.model)(ball.x.double())
    assert (double[:, 0] - double[:, 1]).tolist() == [-1 / 128] * len(ball.x)


GENERATOR = Path(__file__).resolve().parents[2] / "benchmarks" / "calibration.py"


def test_the_generator_gives_the_shipped_answer_of_the_toy() -> None:
    made, toy = runpy.run_path(str(GENERATOR)), DATA["networks"][0]
    pixels = [Fraction(value) for value in torch.tensor(toy["images"][0], dtype=torch.float32).tolist()]
    assert made["smallest_margin"](made["affine_blocks"](toy), pixels, 0, Fraction("0.3")) == toy["balls"][0]["margins"][0] == 0


@pytest.mark.slow
def test_the_generator_makes_the_shipped_file(tmp_path: Path) -> None:
    runpy.run_path(str(GENERATOR))["main"](tmp_path / "made.json")
    assert (tmp_path / "made.json").read_bytes() == CALIBRATION.read_bytes()


def test_the_networks_are_built_as_they_are_written() -> None:
    net = network(DATA["networks"][0])
    assert net(torch.tensor([[[[0.6, 0.2]]]])).tolist()[0] == pytest.approx([0.4, 0.0])


# ---- the gate --------------------------------------------------------------------------------------------------------


def outcome(why: str = "") -> Outcome:
    return Outcome("0" * 64, (selfcheck.Check("a question", "ibp", why),))


def test_a_passed_selfcheck_is_stamped_and_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    monkeypatch.setattr(selfcheck, "outcome_here", lambda device: runs.append(device) or outcome())
    assert stamp(tmp_path, CPU) is None
    found = gate(tmp_path, CPU)
    assert found is not None
    assert gate(tmp_path, CPU) is None
    assert len(runs) == 1
    assert stamp(tmp_path, CPU) == found.digest == digest({"calibration": "0" * 64, "holds": True})
    monkeypatch.setattr(selfcheck, "code_digest", lambda: "other code")
    assert stamp(tmp_path, CPU) is None


def test_a_failed_selfcheck_leaves_no_stamp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selfcheck, "outcome_here", lambda device: outcome("is wrong"))
    assert gate(tmp_path, CPU).failed  # type: ignore[union-attr]
    assert stamp(tmp_path, CPU) is None


def test_a_run_with_a_broken_verifier_writes_no_record(
    tmp_path: Path, only: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.test_journeys import TINY

    path = tmp_path / "tiny.toml"
    path.write_text(TINY.replace('[[verifier]]\nname = "crown"\n', ""))
    only("ibp", Optimist)
    outcome_here.cache_clear()
    try:
        assert main(["run", str(path), "--out", str(tmp_path / "runs"), "--workers", "1"]) == 3
    finally:
        outcome_here.cache_clear()
    assert "selfcheck failed" in capsys.readouterr().err
    assert list((tmp_path / "runs" / "tiny@1" / "records").iterdir()) == []


def test_the_command_prints_what_fails_and_exits_with_3(only: Any, capsys: pytest.CaptureFixture[str]) -> None:
    only("ibp", Optimist)
    assert main(["selfcheck", "--json"]) == 3
    shown = json.loads(capsys.readouterr().out)
    assert not shown["holds"]
    assert any(not check["holds"] and check["tool"] == "ibp" for check in shown["checks"])
