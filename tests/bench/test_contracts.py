"""Contracts hold for what ships and for new files; each plug-in that breaks one is caught with the sentence that says how."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from bench.__main__ import main
from bench.build import build
from bench.contracts import KINDS, findings, kind_of, methods, verifiers
from bench.contracts.attacks import attack_findings
from bench.contracts.methods import durable_complaints, resume_complaints
from bench.methods import METHODS
from bench.objectives import OBJECTIVES

HEAD = '''
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar
import torch
import torch.nn.functional as F
from attacks import PGD, lp
from bench.sparsity import keep_largest, mask_layers, prunable, weights
from verifiers import IBP
from verifiers.proof import fixed_radius_proof

@dataclass(frozen=True)
class Mine:
    """A plug-in of a test."""
'''
METHOD = """
    scope: ClassVar[str] = "per layer"

    def __call__(self, model, density, training):
        yield training.pretrain()
        mask_layers(model, keep_largest({name: weight.abs() for name, weight in weights(model).items()}, density))
        yield training.finetune()
"""
OBJECTIVE = """
    def __call__(self, model, x, y, progress):
        return F.cross_entropy(model(x), y, label_smoothing=0.1 * progress.ramp)
"""
ATTACK = """
    norm: str = "linf"
    eps: Fraction = Fraction(8, 255)

    def __call__(self, model, x, y):
        right = (model(x).argmax(1) == y).view(-1, 1, 1, 1)
        return torch.where(right, lp.project(x - 1, x, self.norm, self.eps), x)
"""
VERIFIER = """
    norm: str = "linf"
    eps: Fraction = Fraction(8, 255)
    deterministic: ClassVar[bool] = True

    def __call__(self, model, x, y):
        return IBP(norm=self.norm, eps=self.eps)(model, x, y)
"""


def failures(kind: str, path: Path, source: str) -> list[str]:
    path.write_text(HEAD + source)
    assert kind_of(f"{path}:Mine") == kind
    return [f"{one.contract}: it {one.why}" for one in findings(kind, f"{path}:Mine") if one.why]


# ---- what ships ------------------------------------------------------------------------------------------------------


def wrong(kind: str, name: str) -> list[Any]:
    return [one for one in findings(kind, name) if one.why]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_shipped_objectives_keep_their_contracts(name: str) -> None:
    assert wrong("objective", name) == []


@pytest.mark.parametrize(
    "name",
    ["pgd", "fgsm", "wrm", *(pytest.param(name, marks=pytest.mark.slow) for name in ("fmn", "ddn", "apgd", "pgdl2"))],
)
def test_shipped_attacks_keep_their_contracts(name: str) -> None:
    found = list(findings("attack", name))
    assert [one for one in found if one.why] == []
    assert any(one.holds for one in found)


@pytest.mark.slow
@pytest.mark.parametrize("fields", [
    {"name": "square", "n_queries": 60}, {"name": "fab", "steps": 5}, {"name": "autoattack", "steps": 5, "queries": 20},
])  # fmt: skip
def test_attacks_of_torchattacks_keep_their_contracts(fields: dict[str, Any]) -> None:
    found = list(attack_findings(lambda **ball: build("attack", {**fields, **ball})))
    assert [one for one in found if one.why or one.refused] == []


def test_an_attack_whose_loss_needs_more_classes_than_the_toy_has_is_refused_not_blamed() -> None:
    found = list(attack_findings(lambda **ball: build("attack", {"name": "apgdt", "steps": 2, **ball})))
    assert [one.why for one in found] == ["", ""]
    assert all("needs 4 classes" in one.refused for one in found)


@pytest.mark.parametrize(
    "name", ["ibp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mixtrain", "crown-ibp", "crown", "smoothing"))]
)
def test_shipped_verifiers_keep_their_contracts(name: str) -> None:
    assert wrong("verifier", name) == []


@pytest.mark.parametrize(
    "name", [name if name in ("hydra", "admm") else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]
)
def test_shipped_methods_survive_every_kill(name: str) -> None:
    assert [*durable_complaints(METHODS[name]), *resume_complaints(METHODS[name])] == []


# ---- new files -------------------------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind", [*KINDS[:3], pytest.param("verifier", marks=pytest.mark.slow)])
def test_a_new_file_is_short_and_keeps_every_contract_and_so_says_its_test(
    here: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    assert main(["new", kind, "my_first"]) == 0
    assert "sparsecert check-plugin my_first.py:MyFirst" in capsys.readouterr().out
    assert len((here / "my_first.py").read_text().splitlines()) <= 25
    assert main(["check-plugin", "my_first.py:MyFirst"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"my_first.py:MyFirst, a{'' if kind in ('method', 'verifier') else 'n'} {kind}")
    assert "keeps every contract" in out
    words = f"findings({kind!r}, f\"{{Path(__file__).with_name('my_first.py')}}:MyFirst\")".replace("'" + kind + "'", f'"{kind}"')
    assert words in (here / "test_my_first.py").read_text()


def test_the_test_of_a_new_file_passes_and_fails_when_the_file_is_broken(here: Path) -> None:
    assert main(["new", "objective", "mine"]) == 0
    space: dict[str, Any] = {"__file__": str(here / "test_mine.py")}
    exec((here / "test_mine.py").read_text(), space)
    test = space["test_mine_keeps_the_contracts_of_an_objective"]
    test()
    (here / "mine.py").write_text((here / "mine.py").read_text().replace("model(x)", "model(x).detach()"))
    with pytest.raises(AssertionError):
        test()


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["method", "my-method"], "try my_method"),
        (["method", "MyMethod"], "try my_method"),
        (["method", "../mine"], "is no name for a Python file"),
        (["method", "class"], "is no name for a Python file"),
        (["method", "torch"], "would hide the Python module 'torch'"),
        (["methods", "mine"], "did you mean 'method'?"),
    ],
)
def test_bad_names_and_kinds_are_one_sentence_and_write_nothing(
    here: Path, capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    assert main(["new", *words]) == 2
    shown = capsys.readouterr().err
    assert sentence in shown
    assert shown.count("\n") == 1
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("taken", ["mine.py", "test_mine.py"])
def test_a_file_that_is_there_is_never_overwritten(here: Path, capsys: pytest.CaptureFixture[str], taken: str) -> None:
    (here / taken).write_text("# precious\n")
    assert main(["new", "attack", "mine"]) == 2
    assert f"{taken} is there already" in capsys.readouterr().err
    assert [path.name for path in here.iterdir()] == [taken]
    assert (here / taken).read_text() == "# precious\n"


# ---- broken plug-ins -------------------------------------------------------------------------------------------------


LOCAL = """
    scope: ClassVar[str] = "per layer"

    def __call__(self, model, density, training):
        seen = {name: torch.zeros_like(weight) for name, weight in weights(model).items()}

        def remember(step):
            for name, weight in weights(step.model).items():
                seen[name] += weight.abs()

        from dataclasses import replace
        yield replace(training.pretrain(), after_step=remember)
        mask_layers(model, keep_largest(seen, density))
        yield training.finetune()
"""


@pytest.mark.parametrize(
    "source, sentence",
    [
        (METHOD.replace("yield training.finetune()", 'raise ValueError("no luck")'),
         "trains under every objective: it raises ValueError: no luck"),
        (METHOD.replace("keep_largest(", "more(") + """

def more(scores, density):
    from bench.sparsity import kept_of, top_k
    return {name: top_k(one, min(one.numel(), kept_of(one.numel(), density) + 1)) for name, one in scores.items()}
""", "meets its density exactly: it keeps 13 weights of layer 0, density 1/3 means exactly 12"),
        (METHOD + "        model[0].register_forward_hook(lambda *_: None)\n", "leaves nothing attached: it leaves a hook on 0"),
        (METHOD + "        model[0].register_buffer('mine', torch.zeros(1))\n",
         "leaves nothing attached: it leaves 0.mine in the result"),
        (METHOD + "        model[0].register_forward_hook(lambda layer, given, out: out + 1)\n",
         "the plain network equals the trained one: it gives a plain network whose logits differ"),
        (METHOD.replace("weight.abs()", "torch.rand(weight.shape, generator=fresh())") + """

def fresh():
    import time
    return torch.Generator().manual_seed(time.perf_counter_ns())
""", "the same seed gives the same weights: it two runs"),
        (METHOD.replace('    scope: ClassVar[str] = "per layer"\n', ""), "has no scope that its density can be held against"),
        (LOCAL, "its state is durable: finished phases can be loaded: it trains phase 'finetune' again although it is stored"),
        (LOCAL, "killed and resumed, it ends with bit-identical weights: it ends with another"),
    ],
    ids=["raises", "one too many", "hook", "buffer", "hook that changes", "clock", "scope", "loaded", "killed"],
)  # fmt: skip
def test_a_broken_method_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, sentence: str) -> None:
    monkeypatch.setattr(methods, "OBJECTIVES", {"benign": OBJECTIVES["benign"]})  # one is enough for a fault that shows in each
    assert [one for one in failures("method", tmp_path / "mine.py", source) if sentence in one]


@pytest.mark.parametrize(
    "change, sentence",
    [
        (("model(x)", "model(x).detach()"), "gradients reach every trainable tensor: it gives a loss without a gradient"),
        (("model(x)", "model[-1](model[:-1](x).detach())"), "it gives 0.weight no gradient"),
        (("0.1 * progress.ramp)", "0.1) / 0"), "raises"),
        (("0.1 * progress.ramp)", "0.1) * float('nan')"), "the loss is one finite number: it gives the loss nan"),
        (("0.1 * progress.ramp)", "0.1, reduction='none')"), "the loss is one finite number: it returns (16,)"),
        (("return", "model.eval()\n        return"), "it leaves layers in another mode"),
        (("return", "x.mul_(0.5)\n        return"), "writes into the images"),
        (("F.cross", "(2 - progress.ramp) * F.cross"), "respects progress.ramp: it is harder at ramp 0"),
        (("progress.ramp", "progress.fraction"), "respects progress.ramp: it changes while progress.ramp is 0"),
        (("F.cross", "id(object()) * __import__('time').perf_counter() * F.cross"), "the same seed gives the same loss"),
    ],
)
def test_a_broken_objective_is_caught(tmp_path: Path, change: tuple[str, str], sentence: str) -> None:
    assert change[0] in OBJECTIVE
    assert [one for one in failures("objective", tmp_path / "mine.py", OBJECTIVE.replace(*change)) if sentence in one]


@pytest.mark.parametrize(
    "change, sentence",
    [
        (("lp.project(x - 1, x, self.norm, self.eps)", "(x - 1.01 * float(self.eps)).clamp(0, 1)"),
         "stays in the ball and in [0,1]: it leaves the linf ball of radius 1/5"),
        (("lp.project(x - 1, x, self.norm, self.eps)", "x - float(self.eps) / 10"), "leaves [0,1]"),
        (("right = ", "torch.rand(()); right = "), "draws from torch's global random generator"),
        (("right = ", "model.train(); right = "), "leaves layers in another mode"),
        (("right = ", "model(x).sum().backward() if next(model.parameters()).requires_grad else None; right = "),
         "changes the gradients"),
        (("x - 1, x,", "x + 1, x,"), ""),
        (("right, lp.project(x - 1, x, self.norm, self.eps), x)", "right, x, lp.project(IMAGE.to(x), x, self.norm, 9))"),
         "never mends what was broken: it turns"),
        (("lp.project(x - 1, x, self.norm, self.eps)", "PGD(norm=self.norm, eps=self.eps)(model, x, y) if len(x) > 1 else x"),
         "the same answer for one image as in a batch: it breaks"),
        (("return ", "return x[:1], "), "raises TypeError: returned tuple"),
    ],
)  # fmt: skip
def test_a_broken_attack_is_caught(tmp_path: Path, change: tuple[str, str], sentence: str) -> None:
    assert change[0] in ATTACK
    images = "\nfrom bench.contracts.cases import toy_split\nIMAGE = toy_split(1, 24).pixels().roll(-1, 0)\n"
    source = ATTACK.replace(*change) + images
    found = failures("attack", tmp_path / "mine.py", source)
    assert [one for one in found if sentence in one] if sentence else found == []


LOOSE = """        proof = IBP(norm=self.norm, eps=self.eps)(model, x, y)
        return fixed_radius_proof(float(self.eps), proof.margin + 2 > 0, proof.margin + 2, proof.predicted)"""


@pytest.mark.parametrize(
    "body, sentences",
    [
        (LOOSE, ["no radius beyond the exact one: it certifies radius", "known answers: it"]),
        ("        return fixed_radius_proof(float(self.eps), y == y, torch.zeros(len(y)), y)",
         ["NaN proves nothing: it certifies 12 of 12 images", "a wrong answer is never certified: it certifies 12 of 12",
          "its certificates survive the shipped attacks: it certifies what an attack breaks"]),
        (LOOSE.replace("margin + 2 > 0", "margin > proof.margin.mean()"),
         ["the same answer for one image as in a batch: it says"]),
        (LOOSE.replace("proof.margin + 2 > 0, proof.margin + 2, proof.predicted)", "proof.margin > 0, proof.margin, y)")
         + "._replace()", ["answers every sample with a known status: it raises AttributeError"]),
        ("        from dataclasses import replace\n        proof = IBP(norm=self.norm, eps=self.eps)(model, x, y)\n"
         "        return replace(proof, status=('sure',) * len(y))", ["it says 'sure'; a status is one of"]),
        ("        return IBP(norm=self.norm, eps=self.eps)(model, x[1:], y[1:])", ["answers 11 samples of 12"]),
    ],
    ids=["too much", "always", "batch", "raises", "status", "one short"],
)  # fmt: skip
def test_a_broken_verifier_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, sentences: list[str]
) -> None:
    monkeypatch.setattr(verifiers, "EPS", (Fraction(1, 5),))
    source = VERIFIER.replace("        return IBP(norm=self.norm, eps=self.eps)(model, x, y)", body)
    found = failures("verifier", tmp_path / "mine.py", source)
    assert all(any(sentence in one for one in found) for sentence in sentences), found


# ---- the command -----------------------------------------------------------------------------------------------------


def test_what_does_not_hold_is_said_with_exit_code_3_for_people_and_machines(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "mine.py").write_text(HEAD + OBJECTIVE.replace("model(x)", "model(x).detach()"))
    assert main(["check-plugin", "mine.py:Mine"]) == 3
    out = capsys.readouterr().out
    assert "fails: gradients reach every trainable tensor (plain): it gives a loss without a gradient" in out
    assert "it does not keep its contracts" in out
    assert main(["check-plugin", "mine.py:Mine", "--json"]) == 3
    found = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["holds"]) == ("objective", False)


def test_what_cannot_be_checked_is_refused_in_one_sentence(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "mine.py").write_text(HEAD + "    def __call__(self, x):\n        return x\n")
    needs_one = HEAD + "    share: float\n" + OBJECTIVE
    (here / "open.py").write_text(needs_one)
    for words, sentence in (
        (["mine.py:Mine"], "cannot tell what 'mine.py:Mine' is"),
        (["open.py:Mine"], "share"),
        (["none.py:Mine"], "there is no file none.py"),
        (["mine.py:Mien"], "did you mean 'Mine'?"),
        (["pgd"], "say which with --kind"),
        (["mine.py:Mine", "--kind", "atack"], "did you mean 'attack'?"),
    ):
        assert main(["check-plugin", *words]) == 2
        shown = capsys.readouterr().err
        assert sentence in shown, shown
        assert shown.count("\n") == 1
