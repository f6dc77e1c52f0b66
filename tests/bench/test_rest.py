"""Attacks that are run on the rest only: verdicts are those of running everything, and rows that pretend so are refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from attacks import FGSM, FMN, PGD, AutoAttack, Library
from bench.__main__ import main
from bench.cells import Assignment, read_suite
from bench.contracts.cases import toy_split, trained_net
from bench.errors import UserError
from bench.evaluate import ContradictionError, Evaluation, evaluate, in_order
from bench.masking import PAGE, masking_suspected
from bench.run import Folders, run_cell
from bench.threat import Threat
from bench.witnesses import witnesses
from leaderboard.row_checks import problems
from leaderboard.stats import metrics_of
from verifiers import IBP, Proof

EPS = Fraction(1, 5)
THREAT = Threat("linf", EPS)
CHEAP = {"steps": 10, "targets": 1, "queries": 30}


def of(tool: Any, label: str, rest: bool = False) -> Assignment:
    return Assignment(label, {"name": "stub"}, tool, rest=rest)


@dataclass(frozen=True)
class Moves:
    """Moves every pixel by `by`, and notes how many images it was given."""

    by: float
    norm: str = "linf"
    eps: Fraction = EPS
    seen: list[int] | None = None
    cost: float = 1.0

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if self.seen is not None:
            self.seen.append(len(x))
        return (x + self.by).clamp(0, 1)


def bright() -> nn.Module:
    """Class 0 where the mean pixel is above 1/2, else class 1: an image at m falls to a move of 1/2 - m and no smaller one."""
    layer = nn.Linear(4, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.stack([torch.full((4,), 0.25), torch.zeros(4)]))
        layer.bias.copy_(torch.tensor([0.0, 0.5]))
    return nn.Sequential(nn.Flatten(), layer).eval()


def grey(*levels: float) -> Tensor:
    return torch.tensor(levels).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).clone()


def judged(attacks: Sequence[Assignment], levels: Sequence[float] = (0.55, 0.65, 0.9, 0.3), verifiers: Any = ()) -> Evaluation:
    x = grey(*levels)
    return evaluate(bright(), x, torch.zeros(len(x), dtype=torch.int64), range(len(x)), THREAT, attacks, verifiers)


def cell_of(attacks: Sequence[Assignment], verifiers: Sequence[Assignment] = ()) -> dict[str, Any]:
    tools = {"attacks": [one.as_json() for one in attacks], "verifiers": [one.as_json() for one in verifiers]}
    cell: dict[str, Any] = json.loads(json.dumps({**tools, "threat": {"norm": "linf", "eps": "1/5"}}))
    return cell


WEAK = of(Moves(-0.1), "weak")
STRONG = of(Moves(-0.2), "strong", rest=True)


# ---- the same verdicts -----------------------------------------------------------------------------------------------


def test_verdicts_and_the_worst_case_are_the_same_whether_or_not_broken_images_are_dropped() -> None:
    model, split = trained_net(), toy_split(seed=1, n=24)
    ball: dict[str, Any] = {"norm": "linf", "eps": EPS}
    tools = [
        of(AutoAttack(**ball, **CHEAP), "autoattack", rest=True), of(PGD(**ball, steps=10, restarts=3), "pgd", rest=True),
        of(FMN(**ball, steps=20), "fmn", rest=True), of(FGSM(**ball), "fgsm"),
        of(PGD(norm="l2", eps=Fraction(1, 2), steps=5), "l2"), of(PGD(norm="linf", eps=EPS / 2, steps=5), "half"),
    ]  # fmt: skip
    everything, bound = [replace(one, rest=False) for one in tools], [of(IBP(**ball), "ibp")]
    x, y = split.pixels(), split.labels
    dropped, full = (evaluate(model, x, y, range(len(x)), THREAT, given, bound) for given in (tools, everything))
    assert 0 < (full.rows["verdict"] == "broken").sum() < len(x)
    assert dropped.rows["verdict"].tolist() == full.rows["verdict"].tolist()
    metrics = [metrics_of(cell_of(given), out.rows) for given, out in ((tools, dropped), (everything, full))]
    assert metrics[0]["robust"]["worst"] == metrics[1]["robust"]["worst"]
    spared = dropped.rows["distance:autoattack"].isna() & (dropped.rows["predicted"] == dropped.rows["label"])
    assert spared.any()
    for given, out in ((tools, dropped), (everything, full)):
        assert problems(cell_of(given, bound), out.rows) == []
        assert set(witnesses(out)) == set(out.rows["index"][out.rows["verdict"] == "broken"])


def test_a_rest_attack_sees_only_what_stands_and_counts_the_others_as_broken_without_a_distance() -> None:
    seen: list[int] = []
    out = judged([WEAK, of(Moves(-0.2, seen=seen), "strong", rest=True)])
    assert seen == [2], "0.55 is broken by the weak one, 0.3 is misclassified"
    assert out.rows["survived:strong"].tolist() == [False, False, True, False]
    assert np.isnan(out.rows["distance:strong"]).tolist() == [True, False, False, True]
    assert out.rows["by"].tolist() == ["weak", "strong", "", ""]
    assert metrics_of(cell_of([WEAK, STRONG]), out.rows)["robust"] == {
        "weak": {"hits": 2, "n": 4}, "strong": {"hits": 1, "n": 4}, "worst": {"hits": 1, "n": 4},
    }  # fmt: skip


@pytest.mark.parametrize("norm, eps", [("l2", EPS), ("linf", EPS * 2)])
def test_what_is_broken_in_a_ball_that_does_not_lie_in_its_own_is_attacked_all_the_same(norm: str, eps: Fraction) -> None:
    seen: list[int] = []
    judged([of(Moves(-0.1, norm, eps), "other"), of(Moves(-0.2, seen=seen), "rest", rest=True)])
    assert seen == [3]
    smaller: list[int] = []
    judged([of(Moves(-0.1, eps=EPS / 2), "other"), of(Moves(-0.2, seen=smaller), "rest", rest=True)])
    assert smaller == [2]


def test_a_rest_attack_that_stands_first_is_run_last_and_by_names_whoever_has_the_witness() -> None:
    out = judged([STRONG, WEAK])
    assert out.rows["by"].tolist() == ["weak", "strong", "", ""]
    assert set(witnesses(out)) == {0, 1}
    assert problems(cell_of([STRONG, WEAK]), out.rows) == []


def test_cheap_attacks_go_first_and_those_for_the_rest_last() -> None:
    tools = {
        "auto": AutoAttack(eps=EPS), "square": Library(eps=EPS, attack="square"), "pgd": PGD(eps=EPS), "fgsm": FGSM(eps=EPS),
        "many": PGD(eps=EPS, restarts=20), "quick": AutoAttack(eps=EPS, **CHEAP),
    }  # fmt: skip
    given = [of(tool, name, rest=isinstance(tool, AutoAttack)) for name, tool in tools.items()]
    assert [one.label for one in in_order(given)] == ["fgsm", "pgd", "many", "square", "quick", "auto"]

    @dataclass(frozen=True)
    class Plain:
        norm: str = "linf"
        eps: Fraction = EPS

    unknown = [of(Plain(), "first"), of(Plain(), "second"), of(FGSM(eps=EPS), "fgsm")]
    assert [one.label for one in in_order(unknown)] == ["fgsm", "first", "second"]


# ---- rows that pretend -----------------------------------------------------------------------------------------------


def forged(column: str, row: int, value: Any) -> list[str]:
    out = judged([WEAK, STRONG])
    assert problems(cell_of([WEAK, STRONG]), out.rows) == []
    rows: pd.DataFrame = out.rows.copy()
    rows.loc[row, column] = value
    return problems(cell_of([WEAK, STRONG]), rows)


@pytest.mark.parametrize("column, row, value, message", [
    ("distance:strong", 1, np.nan, "broken by strong, but the distance of the witness is outside its ball of 1/5: sample 1"),
    ("distance:strong", 0, 0.1, "strong is for what no other attack has broken, but was run: sample 0"),
    ("survived:strong", 0, True, "said to survive strong, but never attacked: sample 0"),
    ("distance:strong", 2, np.nan, "said to survive strong, but never attacked: sample 2"),
    ("distance:weak", 0, np.nan, "broken by weak, but the distance of the witness is outside its ball of 1/5: sample 0"),
    ("by", 0, "strong", "verdict broken, but not by the attack named: sample 0"),
    ("survived:weak", 0, True, "broken by strong, but the distance of the witness is outside its ball of 1/5: sample 0"),
])  # fmt: skip
def test_rows_of_a_rest_attack_hold_together_in_exactly_one_way(column: str, row: int, value: Any, message: str) -> None:
    assert message in forged(column, row, value)


def test_two_rest_attacks_cannot_vouch_for_each_other() -> None:
    tools = [replace(WEAK, rest=True), STRONG]
    out = judged(tools)
    assert problems(cell_of(tools), out.rows) == []
    out.rows.loc[0, ["distance:weak", "distance:strong"]] = np.nan
    assert any("broken by weak" in one for one in problems(cell_of(tools), out.rows))


def test_without_rest_an_attack_may_leave_out_nothing() -> None:
    out = judged([WEAK, STRONG])
    assert any("broken by strong" in one for one in problems(cell_of([WEAK, replace(STRONG, rest=False)]), out.rows))


def test_rest_is_kept_in_the_cell_only_where_it_is_asked_for() -> None:
    assert "rest" not in WEAK.as_json()
    assert STRONG.as_json()["rest"] is True


# ---- certified samples -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Liar:
    """Certifies every sample."""

    norm: str = "linf"
    eps: Fraction = EPS
    deterministic: ClassVar[bool] = True

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Proof:
        radius = torch.full((len(x),), 0.2, dtype=torch.float64)
        return Proof(radius, radius, y.clone(), ("proved",) * len(x))


def test_rest_attacks_are_run_on_certified_samples_too_and_contradict_them_with_a_witness_in_float64() -> None:
    seen: list[int] = []
    judged([of(Moves(-0.01, seen=seen), "rest", rest=True)], verifiers=[of(Liar(), "liar")])
    assert seen == [3], "every correct sample is certified, and attacked"
    with pytest.raises(ContradictionError) as caught:
        judged([of(Moves(-0.05 + 1e-3), "weak"), STRONG], levels=(0.9, 0.65), verifiers=[of(Liar(), "liar")])
    assert (caught.value.facts["attack"], caught.value.facts["index"]) == ("strong", 1)
    assert int(bright().double()(caught.value.witness[None].double()).argmax()) == caught.value.facts["predicted"] == 1


SUITE = """
[suite]
name = "rest"
version = 1
[data]
name = "digits"
[threat]
norm = "linf"
eps = "0.2"
[samples]
first = 20
[budget]
pretrain = 3
batch = 128
lr = 0.1
[grid]
arch = ["mlp"]
density = ["1"]
seed = [0]
[[method]]
name = "dense"
[[objective]]
name = "benign"
[[attack]]
name = "autoattack"
steps = 10
targets = 2
queries = 10
"""
LIAR = '''
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar
import torch
from verifiers.proof import fixed_radius_proof

@dataclass(frozen=True)
class Liar:
    """Certifies everything, wrongly."""

    norm: str = "linf"
    eps: Fraction = Fraction(1, 5)
    deterministic: ClassVar[bool] = True

    def __call__(self, model, x, y):
        ones = torch.ones(len(x))
        return fixed_radius_proof(float(self.eps), ones > 0, ones, model(x).argmax(1))
'''


@pytest.fixture
def lying(tmp_path: Path) -> Path:
    plugin, suite = tmp_path / "liar.py", tmp_path / "rest.toml"
    plugin.write_text(LIAR)
    suite.write_text(f'{SUITE}\n[[verifier]]\nname = "{plugin}:Liar"\nlabel = "liar"\n')
    return suite


def frozen(out: Path) -> bool:
    """No record, but the contradiction with its witness."""
    (facts,) = (out / "rest@1" / "contradictions").glob("*.json")
    return facts.with_suffix(".safetensors").is_file() and not list((out / "rest@1" / "records").glob("*.json"))


def test_a_rest_attack_that_breaks_a_certified_sample_leaves_a_contradiction_and_no_record(lying: Path, tmp_path: Path) -> None:
    suite = read_suite(str(lying))
    with pytest.raises(ContradictionError, match=r"liar certified linf radius 0\.2, but autoattack \(steps 10.* found"):
        run_cell(suite.cells[0], Folders(tmp_path / suite.title), torch.device("cpu"))
    assert frozen(tmp_path)


@pytest.mark.slow
def test_a_contradiction_by_a_rest_attack_has_exit_code_3(
    lying: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(lying), "--out", str(tmp_path / "runs"), "--workers", "1", "--json"]) == 3
    (sentence,) = json.loads(capsys.readouterr().out)["contradicted"].values()
    assert "liar certified linf radius 0.2, but autoattack (steps 10, targets 2, queries 10) found" in sentence
    assert frozen(tmp_path / "runs")


# ---- suites ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def attack_of(tmp_path: Path) -> Callable[[str], Assignment]:
    def read(words: str) -> Assignment:
        path = tmp_path / "suite.toml"
        path.write_text(SUITE[: SUITE.index("[[attack]]")] + words)
        return read_suite(str(path)).cells[0].attacks[0]

    return read


def test_a_suites_autoattack_is_for_the_rest_and_says_when_it_is_not_the_standard_one(
    attack_of: Callable[[str], Assignment],
) -> None:
    standard = attack_of('[[attack]]\nname = "autoattack"\n')
    assert (standard.label, standard.rest) == ("autoattack", True)
    assert standard.as_json() == {
        "name": "autoattack", "label": "autoattack", "norm": "linf", "eps": "1/5", "steps": 100, "targets": 9, "queries": 5000,
        "seed": 0, "rest": True,
    }  # fmt: skip
    everywhere = attack_of('[[attack]]\nname = "autoattack"\nrest = false\nqueries = 50\n')
    assert (everywhere.label, everywhere.rest) == ("autoattack (queries 50)", False)
    assert attack_of('[[attack]]\nname = "pgd"\nrest = true\n').rest
    assert not attack_of('[[attack]]\nname = "pgd"\n').rest


@pytest.mark.parametrize("words, message", [
    ('[[attack]]\nname = "pgd"\nrest = "yes"\n', "`rest` of attack 'pgd' must be true or false, got 'yes'"),
    ('[[attack]]\nname = "pgd"\n[[verifier]]\nname = "ibp"\nrest = true\n', "`rest` is for attacks; verifier 'ibp'"),
])  # fmt: skip
def test_rest_is_true_or_false_and_for_attacks(attack_of: Callable[[str], Assignment], words: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        attack_of(words)


def test_an_attack_whose_loss_does_not_fit_the_network_is_one_sentence() -> None:
    with pytest.raises(UserError, match="the attack 'dlr' does not fit this network: the loss dlr needs at least 3 classes"):
        judged([of(PGD(eps=EPS, loss="dlr"), "dlr")])


# ---- gradient masking ------------------------------------------------------------------------------------------------


class Stairs(nn.Module):
    """`bright`, of pixels rounded to 1/64: a network that does not depend smoothly on its images has no gradients at all."""

    def __init__(self) -> None:
        super().__init__()
        self.net = bright()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net((x * 64).round() / 64 + 0 * x)
        return logits


def warnings(model: nn.Module, attacks: Sequence[Assignment]) -> list[str]:
    x = grey(0.55, 0.6, 0.9)
    return evaluate(model, x, torch.zeros(3, dtype=torch.int64), range(3), THREAT, attacks, []).warnings


@pytest.mark.parametrize("rest", [False, True])
def test_square_that_breaks_what_pgd_cannot_is_a_warning_and_on_a_smooth_network_there_is_none(rest: bool) -> None:
    start = PGD(eps=EPS, steps=20, random_start=False)
    square = of(Library(eps=EPS, attack="square", params=(("n_queries", 50),)), "square", rest=rest)
    (found,) = warnings(Stairs(), [of(start, "pgd"), square])
    assert found.startswith("gradient masking suspected: square breaks images that pgd cannot break; see docs/health_flags.md#")
    assert warnings(bright(), [of(start, "pgd"), square]) == []


def test_single_steps_other_balls_and_bundles_show_no_masking() -> None:
    rows = pd.DataFrame({
        "predicted": [0], "label": [0], "survived:g": [True], "survived:square": [False], "survived:auto": [False],
        "distance:square": [0.01], "distance:auto": [0.01],
    })  # fmt: skip
    square = of(Library(eps=EPS, attack="square"), "square")
    auto = of(AutoAttack(eps=EPS), "auto")
    assert masking_suspected(rows, [of(PGD(eps=EPS), "g"), square]) != []
    assert masking_suspected(rows, [of(PGD(eps=EPS * 2), "g"), square]) != []
    another_was_first = rows.assign(**{"distance:square": np.nan})
    assert masking_suspected(another_was_first, [of(PGD(eps=EPS), "g"), square]) == []
    others = (FGSM(eps=EPS), PGD(eps=EPS / 2), PGD(norm="l2", eps=EPS), AutoAttack(eps=EPS))
    for other in (*others, Library(eps=EPS, attack="ffgsm"), Library(eps=EPS, attack="vanila")):
        assert masking_suspected(rows, [of(other, "g"), square]) == [], other
    assert masking_suspected(rows, [of(PGD(eps=EPS), "g"), auto]) == []
    assert masking_suspected(rows, [square, auto]) == []


def test_the_page_of_the_warning_has_such_a_section() -> None:
    page, _, anchor = PAGE.partition("#")
    text = (Path(__file__).resolve().parents[2] / page).read_text()
    assert f"### {anchor.replace('-', ' ').capitalize()}\n" in text
