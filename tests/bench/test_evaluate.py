"""Verdicts on networks one can compute in the head, with attacks and verifiers that lie in every way worth guarding against."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from attacks import FGSM, PGD
from bench.cells import Assignment
from bench.data import Split
from bench.errors import UserError
from bench.evaluate import ContradictionError, Evaluation, evaluate, predict
from bench.loop import run_phase
from bench.threat import Threat, distance, within
from bench.train import Phase, Training
from leaderboard.row_checks import problems
from leaderboard.stats import metrics_of
from verifiers import IBP, Crown, Proof, Smoothing, UnsupportedNetworkError

EPS = Fraction(1, 10)
THREAT = Threat("linf", EPS)


def one_pixel() -> nn.Module:
    """Class 0 where the pixel is above 1/2, else class 1: x is robust exactly up to |x - 1/2|."""
    layer = nn.Linear(1, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0], [-1.0]]))
        layer.bias.copy_(torch.tensor([-0.5, 0.5]))
    return nn.Sequential(nn.Flatten(), layer).eval()


def two_pixels() -> nn.Module:
    """Class 0 where the pixels add up to more than 1."""
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 1.0], [-1.0, -1.0]]))
        layer.bias.copy_(torch.tensor([-1.0, 1.0]))
    return nn.Sequential(nn.Flatten(), layer).eval()


def images(*pixels: Any) -> Tensor:
    return torch.tensor(pixels, dtype=torch.float32).view(len(pixels), 1, 1, -1)


# ---- stubs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Proposes:
    """An attack that answers with whatever its function says."""

    change: Callable[[Tensor], Tensor]
    norm: str = "linf"
    eps: Fraction = EPS

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return self.change(x)


@dataclass(frozen=True)
class Claims:
    """A verifier that claims one radius for every sample it is asked about, true or not."""

    radius: float = 0.1
    status: str = "proved"
    norm: str = "linf"
    eps: Fraction = EPS
    deterministic: ClassVar[bool] = True

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Proof:
        n = len(x)
        radius = torch.full((n,), self.radius, dtype=torch.float64)
        return Proof(radius, radius - 0.05, y.clone(), (self.status,) * n, details=self.details(n), notes=("a note",))

    def details(self, n: int) -> dict[str, Tensor]:
        return {"nodes": torch.arange(n)}


@dataclass(frozen=True)
class ClaimsAboutG(Claims):
    """A smoothing verifier: its statement is not about the network under attack."""

    sigma: float = 0.25
    deterministic: ClassVar[bool] = False  # type: ignore[misc]

    def details(self, n: int) -> dict[str, Tensor]:
        return {"hits": torch.full((n,), 99), "n": torch.full((n,), 100)}


@dataclass(frozen=True)
class Knows:
    """The truth about `one_pixel`."""

    norm: str = "linf"
    eps: Fraction = EPS
    deterministic: ClassVar[bool] = True

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Proof:
        room = (x.flatten().double() - 0.5).abs()
        radius = (room > float(self.eps)).double() * float(self.eps)
        status = tuple("proved" if r > 0 else "open" for r in radius.tolist())
        return Proof(radius, room - float(self.eps), y.clone(), status)


@dataclass(frozen=True)
class Refuses(Claims):
    """A verifier without a rule for this network."""

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Proof:
        raise UnsupportedNetworkError("no bound rule for Softplus (act); known: ReLU")


def named(tool: Any, label: str = "", first: int | None = None) -> Assignment:
    return Assignment(label or type(tool).__name__.lower(), {"name": "stub"}, tool, None, first)


def judged(
    model: nn.Module, x: Tensor, y: Sequence[int], attacks: Sequence[Any] = (), verifiers: Sequence[Any] = (),
    threat: Threat = THREAT,
) -> Evaluation:
    given = [[one if isinstance(one, Assignment) else named(one) for one in tools] for tools in (attacks, verifiers)]
    return evaluate(model, x, torch.tensor(y), range(100, 100 + len(x)), threat, *given)


def verdicts(out: Evaluation) -> list[str]:
    return out.rows["verdict"].tolist()


DOWN = Proposes(lambda x: x - 1.0)


# ---- typed verdicts --------------------------------------------------------------------------------------------------


def test_every_kind_of_verdict_on_one_pixel() -> None:
    """At eps 0.1 the truth is: 0.9 and 0.8 are robust, 0.55 is not, 0.2 is misclassified to begin with."""
    out = judged(one_pixel(), images(0.9, 0.55, 0.2, 0.8), [0, 0, 0, 0], [DOWN], [Knows()])
    assert verdicts(out) == ["certified", "broken", "misclassified", "certified"]
    assert out.rows["by"].tolist() == ["knows", "proposes", "", "knows"]
    assert out.rows["index"].tolist() == [100, 101, 102, 103]
    assert out.rows["predicted"].tolist() == [0, 0, 1, 0]
    assert out.rows["status:knows"].tolist() == ["proved", "open", "misclassified", "proved"]
    assert out.rows["survived:proposes"].tolist() == [True, False, False, True]
    assert out.rows["radius:knows"].tolist() == [0.1, 0.0, 0.0, 0.1]
    margin = out.rows["margin:knows"].tolist()
    assert margin[:2] == pytest.approx([0.3, -0.05], abs=1e-6)
    assert math.isnan(margin[2])


class NoNumber(nn.Module):
    """`one_pixel`, but one logit of class 0 is `value` where the pixel is above 3/4."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value, self.net = value, one_pixel()

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x.flatten(1) > 0.75, torch.tensor([self.value, 0.0]).to(x), self.net(x))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_an_image_without_finite_logits_has_no_class_and_is_never_certified(value: float) -> None:
    out = judged(NoNumber(value), images(0.7, 0.8, 0.8), [0, 0, 1], [], [Claims()])
    assert out.rows["predicted"].tolist() == [0, -1, -1]
    assert verdicts(out) == ["certified", "misclassified", "misclassified"]
    assert out.rows["radius:claims"].tolist() == [0.1, 0, 0]


def test_an_attack_that_reaches_logits_without_a_number_has_broken_the_image() -> None:
    out = judged(NoNumber(float("nan")), images(0.7), [0], [Proposes(lambda x: x + 0.08)])
    assert verdicts(out) == ["broken"]
    with pytest.raises(ContradictionError):
        judged(NoNumber(float("nan")), images(0.7), [0], [Proposes(lambda x: x + 0.08)], [Claims()])


@pytest.mark.parametrize("radius", [float("nan"), float("inf"), -0.1])
def test_a_radius_that_is_no_finite_number_from_0_is_refused(radius: float) -> None:
    with pytest.raises(UserError, match="'claims' returned a radius that is no finite number"):
        judged(one_pixel(), images(0.9), [0], [], [Claims(radius)])


def test_neither_broken_nor_certified_is_open() -> None:
    out = judged(one_pixel(), images(0.55), [0], [Proposes(lambda x: x)], [Knows()])
    assert verdicts(out) == ["open"]
    assert out.rows["by"].tolist() == [""]
    assert verdicts(judged(one_pixel(), images(0.55, 0.2), [0, 0])) == ["open", "misclassified"]


def test_broken_beats_error_and_certified_beats_error_and_error_beats_open() -> None:
    x, y = images(0.9, 0.55, 0.3), [0, 0, 0]
    still = Proposes(lambda x: x)
    assert verdicts(judged(one_pixel(), x, y, [still], [Refuses()])) == ["error", "error", "misclassified"]
    assert verdicts(judged(one_pixel(), x, y, [DOWN], [Refuses()])) == ["error", "broken", "misclassified"]
    both = judged(one_pixel(), x, y, [DOWN], [Refuses(), Knows()])
    assert verdicts(both) == ["certified", "broken", "misclassified"]
    assert both.rows["by"].tolist() == ["knows", "proposes", ""]


def test_timed_out_is_a_verdict_of_its_own() -> None:
    out = judged(one_pixel(), images(0.55), [0], [], [Claims(radius=0.0, status="timeout")])
    assert verdicts(out) == ["timeout"]
    assert out.rows["by"].tolist() == ["claims"]


def test_by_names_the_first_attack_or_verifier_in_the_suites_order() -> None:
    attacks = [named(Proposes(lambda x: x), "idle"), named(DOWN, "second"), named(DOWN, "third")]
    verifiers = [named(Claims(radius=0.0, status="open"), "weak"), named(Knows(), "strong"), named(Knows(), "stronger")]
    out = judged(one_pixel(), images(0.55, 0.9), [0, 0], attacks, verifiers)
    assert out.rows["by"].tolist() == ["second", "strong"]


def test_a_certificate_below_the_threats_eps_certifies_nothing_and_one_above_does() -> None:
    x, y = images(0.9), [0]
    assert verdicts(judged(one_pixel(), x, y, [], [Claims(radius=0.0999)])) == ["open"]
    assert verdicts(judged(one_pixel(), x, y, [], [Claims(radius=0.1)])) == ["certified"]
    assert verdicts(judged(one_pixel(), x, y, [], [Claims(radius=0.3)])) == ["certified"]


@pytest.mark.parametrize("eps", ["1/50", "1/10", "3/10", "1/255", "2/255", "8/255", "0.031", "0.007", "1/3"])
@pytest.mark.parametrize("kind", [IBP, Crown])
def test_a_shipped_proof_at_eps_certifies_at_eps_whatever_its_rounding(kind: Any, eps: str) -> None:
    """The radius of a fixed-eps verifier is the float64 of eps: neither below it, which proves nothing, nor above."""
    exact = Fraction(eps)
    out = judged(one_pixel(), images(0.95, 0.05), [0, 1], [PGD(eps=exact)], [named(kind(eps=exact), "v")], Threat("linf", exact))
    assert out.rows["status:v"].tolist() == ["proved"] * 2
    assert out.rows["radius:v"].tolist() == [float(exact)] * 2
    assert verdicts(out) == ["certified"] * 2


def test_radius_zero_proves_nothing_even_at_eps_zero() -> None:
    assert verdicts(judged(one_pixel(), images(0.9), [0], [], [Claims(radius=0.0)], Threat("linf", Fraction(0)))) == ["open"]


def test_a_proof_or_an_attack_in_another_ball_does_not_decide_the_verdict() -> None:
    other = judged(one_pixel(), images(0.9), [0], [], [Claims(norm="l2")])
    assert verdicts(other) == ["open"]
    wider = Proposes(lambda x: x - 1.0, eps=Fraction(1, 2))
    out = judged(one_pixel(), images(0.7), [0], [wider])
    assert out.rows["survived:proposes"].tolist() == [False]  # it did break the sample in its own ball
    assert verdicts(out) == ["open"]


def test_details_notes_and_rechecks_of_a_proof_are_kept() -> None:
    out = judged(one_pixel(), images(0.9, 0.2, 0.8), [0, 0, 0], [], [Claims()])
    assert out.rows["nodes:claims"].tolist()[::2] == [0.0, 1.0]
    assert math.isnan(out.rows["nodes:claims"][1])
    assert out.lowering == ["claims: a note"]
    assert out.rechecked == {"claims": 0}


# ---- attacks propose -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x - 100.0,
        lambda x: x * -torch.inf,
        lambda x: torch.full_like(x, -1e30),
        lambda x: (x - 5.0).double(),
    ],
)
def test_a_proposal_outside_the_ball_is_projected_not_believed(change: Callable[[Tensor], Tensor]) -> None:
    """0.55 breaks 0.1 away, 0.7 does not, however far the attack says it went."""
    out = judged(one_pixel(), images(0.55, 0.7), [0, 0], [Proposes(change)])
    assert bool(out.rows["survived:proposes"][1])
    far = out.rows["distance:proposes"].to_numpy()
    assert all(Fraction(float(one)) <= EPS for one in far)
    witness = out.witnesses["proposes"]
    assert len(witness) == (~out.rows["survived:proposes"]).sum()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_pixel_without_a_number_is_the_clean_pixel(value: float) -> None:
    out = judged(one_pixel(), images(0.55), [0], [Proposes(lambda x: torch.full_like(x, value))])
    assert verdicts(out) == ["open"]
    assert out.rows["distance:proposes"].tolist() == [0.0]


def test_a_proposal_outside_0_1_is_clamped() -> None:
    """A network that breaks only on a negative pixel is never broken."""
    model = one_pixel()
    with torch.no_grad():
        model[1].bias.copy_(torch.tensor([0.01, -0.01]))  # class 0 where x > -0.01
    out = judged(model, images(0.02), [0], [Proposes(lambda x: x - 0.05)])
    assert verdicts(out) == ["open"]


def test_an_attack_that_moves_the_image_it_was_given_gains_nothing() -> None:
    """The ball is around the image under test, not around what an attack made of it in place."""
    out = judged(one_pixel(), images(0.7), [0], [Proposes(lambda x: x.sub_(0.3))])
    assert verdicts(out) == ["open"]
    assert out.rows["distance:proposes"].item() <= 0.1


def forgetful() -> nn.Module:
    """In float64 class 0 where the pixel is above 1/4; in float32 the pixel drowns in 1e8 and the class is always 1."""
    first, second = nn.Linear(1, 1), nn.Linear(1, 2)
    with torch.no_grad():
        first.weight.fill_(1.0)
        first.bias.fill_(1e8)
        second.weight.copy_(torch.tensor([[1.0], [0.0]]))
        second.bias.copy_(torch.tensor([-1e8, 0.25]))
    return nn.Sequential(nn.Flatten(), first, second).eval()


def test_a_witness_counts_by_what_the_network_says_in_float64() -> None:
    idle = Proposes(lambda x: x)
    assert predict(forgetful(), images(0.9, 0.1)).tolist() == [1, 1]
    out = judged(forgetful(), images(0.9, 0.1), [1, 1], [idle], [Claims(radius=0.0, status="open")])
    assert out.rows["survived:proposes"].tolist() == [False, True]
    assert verdicts(out) == ["broken", "open"]  # and where nothing was claimed, nothing is contradicted
    with pytest.raises(ContradictionError) as caught:
        judged(forgetful(), images(0.9), [1], [idle], [Claims()])
    assert caught.value.facts["distance"] == 0


@dataclass(frozen=True)
class Spy:
    """An attack that notes what it is given."""

    seen: list[int]
    norm: str = "linf"
    eps: Fraction = EPS

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())
        self.seen.append(len(x))
        return x


def test_attacks_see_correct_samples_only_and_none_is_called_for_nothing() -> None:
    seen: list[int] = []
    judged(one_pixel(), images(0.9, 0.2, 0.8), [0, 0, 0], [Spy(seen)])
    assert seen == [2]
    out = judged(one_pixel(), images(0.2, 0.3), [0, 0], [Spy(seen)], [Claims()])
    assert seen == [2]
    assert verdicts(out) == ["misclassified"] * 2


def test_no_samples_at_all_is_an_empty_table() -> None:
    out = judged(one_pixel(), torch.zeros(0, 1, 1, 1), [], [DOWN], [Knows()])
    assert len(out.rows) == 0
    assert {"verdict", "by", "survived:proposes", "radius:knows"} <= set(out.rows)


# ---- contradictions --------------------------------------------------------------------------------------------------


def test_an_unsound_verifier_is_contradicted_with_facts_and_a_witness_that_runs_again() -> None:
    model, x = one_pixel(), images(0.9, 0.55)
    attack = named(PGD(eps=EPS, steps=20), "pgd-20")
    with pytest.raises(ContradictionError) as caught:
        judged(model, x, [0, 0], [attack], [named(Knows(), "honest"), named(Claims(), "liar")])
    found = caught.value
    assert {key: found.facts[key] for key in ("index", "label", "verifier", "norm", "radius", "attack", "predicted")} == {
        "index": 101, "label": 0, "verifier": "liar", "norm": "linf", "radius": 0.1, "attack": "pgd-20", "predicted": 1,
    }  # fmt: skip
    assert torch.equal(found.image, x[1])
    witness = found.witness[None]
    assert bool(within(witness, x[1:], "linf", EPS))
    assert int(one_pixel().double()(witness.double()).argmax()) == 1
    assert found.facts["distance"] == float(distance(witness, x[1:], "linf"))
    for word in ("sample 101", "liar", "pgd-20", "0.1"):
        assert word in str(found)


def test_a_trained_network_that_pgd_breaks_contradicts_a_verifier_that_certifies_everything(
    net_of: Callable[..., nn.Sequential], training_of: Callable[..., Training], toy: Split
) -> None:
    model, training = net_of(), training_of()
    run_phase(model, Phase("pretrain", 20, 0.1), training)
    eps = Fraction(1, 4)
    with pytest.raises(ContradictionError):
        judged(model, toy.pixels(), toy.labels.tolist(), [PGD(eps=eps)], [Claims(radius=0.25, eps=eps)], Threat("linf", eps))


def test_sound_certificates_are_never_contradicted(
    net_of: Callable[..., nn.Sequential], training_of: Callable[..., Training], toy: Split
) -> None:
    model, training = net_of(), training_of()
    run_phase(model, Phase("pretrain", 20, 0.1), training)
    eps = Fraction(1, 50)
    out = judged(
        model, toy.pixels(), toy.labels.tolist(), [PGD(eps=eps), FGSM(eps=eps)], [IBP(eps=eps), Crown(eps=eps)],
        Threat("linf", eps),
    )  # fmt: skip
    rows = out.rows
    assert set(rows["verdict"]) <= {"certified", "broken", "open", "misclassified"}
    assert (rows["verdict"] == "certified").any()
    certified = (rows["radius:ibp"] > 0) | (rows["radius:crown"] > 0)
    assert rows.loc[certified, ["survived:pgd", "survived:fgsm"]].all(axis=None)


def test_an_l2_attack_contradicts_a_linf_certificate_only_by_its_own_linf_distance() -> None:
    """(0.6, 0.55) adds up to 1.15. One pixel moved by 0.2 breaks it, at linf distance 0.2; both by 0.08 break it at 0.08."""
    x = images((0.6, 0.55))
    one = Proposes(lambda x: x - torch.tensor([0.2, 0.0]), norm="l2", eps=Fraction(1, 2))
    out = judged(two_pixels(), x, [0], [one], [Claims()])
    assert out.rows["survived:proposes"].tolist() == [False]
    assert out.rows["distance:proposes"].item() == pytest.approx(0.2, abs=1e-6)
    assert verdicts(out) == ["certified"]
    both = Proposes(lambda x: x - 0.08, norm="l2", eps=Fraction(1, 2))
    with pytest.raises(ContradictionError) as caught:
        judged(two_pixels(), x, [0], [both], [Claims()])
    assert caught.value.facts["norm"] == "linf"
    assert caught.value.facts["distance"] == pytest.approx(0.08, abs=1e-6)


def test_a_stronger_attack_than_the_certificate_contradicts_only_inside_its_radius() -> None:
    strong = Proposes(lambda x: x - 0.2, eps=Fraction(1, 2))
    assert verdicts(judged(one_pixel(), images(0.65), [0], [strong], [Claims()])) == ["certified"]
    with pytest.raises(ContradictionError):
        judged(one_pixel(), images(0.65), [0], [strong], [Claims(radius=0.25)])


def test_attacks_on_f_never_contradict_a_certificate_about_g() -> None:
    smooth = named(ClaimsAboutG(radius=10.0, norm="linf"), "smoothing")
    out = judged(one_pixel(), images(0.55, 0.9, 0.2), [0, 0, 0], [DOWN], [smooth])
    assert verdicts(out) == ["broken", "open", "misclassified"]  # nor does it certify f
    assert out.rows["radius:smoothing"].tolist() == [10.0] * 3  # g is asked about every sample
    assert out.rows["status:smoothing"].tolist() == ["proved"] * 3
    assert out.rows["hits:smoothing"].tolist() == [99] * 3
    assert out.rows["n:smoothing"].dtype == "int64"


@pytest.mark.parametrize("fields", [
    {"rule": "sequential", "grid": (Fraction(1, 10), Fraction(1, 2))}, {"curtail": True}, {},
])
def test_smoothing_rows_hold_what_the_board_needs_to_derive_their_radii_again(fields: dict[str, Any]) -> None:
    smooth = named(Smoothing(sigma=0.5, n=2000, **fields), "g", first=4)
    out = judged(one_pixel(), images(0.5, 0.7, 0.9, 1.0, 1.0), [0, 0, 0, 1, 0], [], [smooth])
    assert out.rows["radius:g"].max() > 0
    assert out.rows["status:g"].tolist()[4] == "skipped"
    cell = json.loads(json.dumps({"attacks": [], "verifiers": [smooth.as_json()], "threat": {"norm": "linf", "eps": "1/10"}}))
    assert problems(cell, out.rows) == []
    if "rule" in fields:
        looks = out.rows["looks:g"].tolist()
        assert looks[4] == ""
        assert looks[2].startswith("100:")
        assert looks[2].endswith(f"{out.rows['n:g'][2]}:{out.rows['hits:g'][2]}")
    out.rows.loc[2, "radius:g"] = 0.75
    assert any("sample 102" in one for one in problems(cell, out.rows))


def test_a_sequential_verifier_that_nobody_asked_has_an_empty_column_of_looks() -> None:
    nobody = named(Smoothing(rule="sequential"), "g", first=0)
    assert judged(one_pixel(), images(0.9), [0], [], [nobody]).rows["looks:g"].tolist() == [""]


# ---- limits and errors -----------------------------------------------------------------------------------------------


def test_an_unsupported_network_is_an_error_with_a_warning_not_open() -> None:
    out = judged(one_pixel(), images(0.9, 0.2), [0, 0], [], [Refuses()])
    assert out.rows["status:refuses"].tolist() == ["error", "misclassified"]
    assert out.rows["radius:refuses"].tolist() == [0.0, 0.0]
    assert out.warnings == ["refuses: no bound rule for Softplus (act); known: ReLU"]


@pytest.mark.parametrize("verifier", [IBP(eps=EPS), Crown(eps=EPS)])
def test_a_layer_that_a_shipped_verifier_has_no_rule_for_is_such_an_error(verifier: Any) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 4), nn.Softplus(), nn.Linear(4, 2))
    y = model(images(0.9)).argmax(1).tolist()
    out = judged(model, images(0.9), y, [], [verifier])
    assert verdicts(out) == ["error"]
    assert "Softplus" in out.warnings[0]


def test_a_verifier_for_the_first_samples_only_skips_the_rest() -> None:
    x, y = images(0.2, 0.9, 0.8, 0.95), [0, 0, 0, 0]
    out = judged(one_pixel(), x, y, [], [named(Knows(), "few", first=2)])
    assert out.rows["status:few"].tolist() == ["misclassified", "proved", "skipped", "skipped"]
    assert verdicts(out) == ["misclassified", "certified", "open", "open"]
    smooth = judged(one_pixel(), x, y, [], [named(ClaimsAboutG(), "g", first=3)])
    assert smooth.rows["status:g"].tolist() == ["proved"] * 3 + ["skipped"]
    assert smooth.rows["hits:g"].tolist() == [99, 99, 99, 0]
    assert smooth.rows["predicted:g"].tolist() == [0, 0, 0, -1]
    cell = {
        "attacks": [], "threat": {"norm": "linf", "eps": "1/10"},
        "verifiers": [{"label": "few", "norm": "linf", "eps": "1/10"}],
    }  # fmt: skip
    assert metrics_of(cell, out.rows)["certified"]["few"] == {"hits": 1, "n": 2}


# ---- order relations -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(net_of: Callable[..., nn.Sequential], training_of: Callable[..., Training]) -> nn.Module:
    model = net_of()
    run_phase(model, Phase("pretrain", 12, 0.1), training_of())
    return model.eval()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_robust_accuracy_at_eps_zero_is_clean_accuracy(trained: nn.Module, toy: Split, norm: Any) -> None:
    zero = Fraction(0)
    attacks = [PGD(norm=norm, eps=zero), Proposes(lambda x: 1 - x, norm=norm, eps=zero)]
    out = judged(trained, toy.pixels(), toy.labels.tolist(), attacks, [], Threat(norm, zero))
    clean = out.rows["predicted"] == out.rows["label"]
    assert clean.sum() > 0
    assert (out.rows["survived:pgd"] == clean).all()
    assert (out.rows["survived:proposes"] == clean).all()


def test_the_worst_case_over_attacks_is_at_most_each_and_broken_is_its_complement(trained: nn.Module, toy: Split) -> None:
    eps = Fraction(1, 6)
    attacks = [
        named(PGD(eps=eps), "pgd"), named(FGSM(eps=eps), "fgsm"), named(PGD(eps=eps / 2), "half"),
        named(Proposes(lambda x: 1 - x, eps=eps), "invert"),
    ]  # fmt: skip
    rows = judged(trained, toy.pixels(), toy.labels.tolist(), attacks, [], Threat("linf", eps)).rows
    labels = [one.label for one in attacks]
    cell = {"attacks": [{"label": label} for label in labels], "threat": {"norm": "linf", "eps": str(eps)}, "verifiers": []}
    found = {name: share["hits"] for name, share in metrics_of(cell, rows)["robust"].items()}
    clean = int((rows["predicted"] == rows["label"]).sum())
    assert found["worst"] <= min(found[label] for label in labels)
    assert max(found.values()) <= clean
    assert found["worst"] < found["fgsm"] or found["worst"] < found["half"]  # the attacks do differ
    assert int((rows["verdict"] == "broken").sum()) == clean - found["worst"]
    assert found["half"] >= found["pgd"]


def test_a_verdict_depends_on_the_sample_and_not_on_its_batch(trained: nn.Module, toy: Split) -> None:
    eps = Fraction(1, 12)
    x, y = toy.pixels(slice(12)), toy.labels[:12].tolist()

    def table(order: list[int]) -> dict[int, list[Any]]:
        tools = [PGD(eps=eps, steps=10)], [IBP(eps=eps), Crown(eps=eps), Smoothing(n0=20, n=100)]
        rows = judged(trained, x[order], [y[at] for at in order], *tools, Threat("linf", eps)).rows
        keep = ["verdict", "by", "predicted", "survived:pgd", "status:ibp", "status:crown", "hits:smoothing", "radius:smoothing"]
        return {at: rows.loc[place, keep].tolist() for place, at in enumerate(order)}

    together = table(list(range(12)))
    assert table(list(range(12))[::-1]) == together
    alone: dict[int, list[Any]] = {}
    for at in range(12):
        alone |= table([at])
    assert alone == together
    assert len({row[0] for row in together.values()}) > 1


def test_progress_and_seconds_name_every_tool() -> None:
    told: list[str] = []
    evaluate(
        one_pixel(), images(0.9), torch.tensor([0]), [0], THREAT, [named(DOWN, "a")], [named(Knows(), "v")], report=told.append
    )
    assert told == ["v", "a"]
    out = judged(one_pixel(), images(0.9), [0], [DOWN], [Knows()])
    assert set(out.seconds) == {"verifier:knows", "attack:proposes"}


# ---- costly verifiers and their counterexamples ----------------------------------------------------------------------


@dataclass(frozen=True)
class Oracle:
    """Costly; proves the samples whose first pixel is above a half, claims a counterexample for the rest."""

    norm: str = "linf"
    eps: Fraction = Fraction(1, 10)
    shift: float = 0.0
    deterministic: ClassVar[bool] = True
    costly: ClassVar[bool] = True
    falsifies: ClassVar[bool] = True
    asked: ClassVar[list[int]] = []

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Proof:
        self.asked.append(len(x))
        proved = x.flatten(1)[:, 0] > 0.5
        witness = torch.where(proved.view(-1, 1, 1, 1), torch.nan, x + self.shift)
        status = tuple("proved" if yes else "broken" for yes in proved.tolist())
        return Proof(
            radius=proved.double() * float(self.eps), margin=torch.full((len(x),), torch.nan, dtype=torch.float64),
            predicted=model(x).argmax(1), status=status, witness=witness,
        )


def threshold_net() -> nn.Module:
    """Class 0 where the only pixel is above 0.4, else class 1."""
    head = nn.Linear(1, 2)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0], [0.0]]))
        head.bias.copy_(torch.tensor([-0.4, 0.0]))
    return nn.Sequential(nn.Flatten(), head)


@pytest.mark.parametrize("shift, verdict", [(-0.1, "broken"), (-5.0, "broken"), (0.0, "open"), (torch.nan, "open")])
def test_a_verifiers_counterexample_counts_only_if_it_runs_again_here(shift: float, verdict: str) -> None:
    x = torch.tensor([0.45, 0.9]).view(2, 1, 1, 1)
    y, oracle = torch.zeros(2, dtype=torch.int64), Oracle(shift=shift)
    one = Assignment("oracle", {"name": "oracle"}, oracle)
    out = evaluate(threshold_net(), x, y, [0, 1], Threat("linf", Fraction(1, 10)), [], [one])
    assert out.rows["verdict"].tolist() == [verdict, "certified"]
    assert out.rows["by"].tolist() == ["oracle" if verdict == "broken" else "", "oracle"]
    assert out.rows["status:oracle"].tolist() == [verdict, "proved"]


def test_a_costly_verifier_is_asked_only_about_what_is_open_and_takes_over_the_rest() -> None:
    x = torch.tensor([0.45, 0.9, 0.6, 0.1]).view(4, 1, 1, 1)
    y = torch.zeros(4, dtype=torch.int64)
    eps = Fraction(1, 10)
    tools = [Assignment("oracle", {"name": "o"}, Oracle()), Assignment("ibp", {"name": "ibp"}, IBP("linf", eps))]
    attack = Assignment("pgd", {"name": "pgd"}, PGD(norm="linf", eps=eps, steps=5))
    Oracle.asked.clear()
    out = evaluate(threshold_net(), x, y, range(4), Threat("linf", eps), [attack], tools)
    assert Oracle.asked == [], "pgd broke 0.45 and ibp proved the others: nothing was left to ask"
    assert out.rows["verdict"].tolist() == ["broken", "certified", "certified", "misclassified"]
    assert out.rows["status:oracle"].tolist() == ["broken", "proved", "proved", "misclassified"]
    assert out.rows["radius:oracle"].tolist() == [0.0, 0.1, 0.1, 0.0]


def test_a_cheap_verifier_with_counterexamples_leaves_every_attack_its_turn() -> None:
    @dataclass(frozen=True)
    class Eager(Oracle):
        costly: ClassVar[bool] = False

    x, y, eps = torch.tensor([0.45]).view(1, 1, 1, 1), torch.zeros(1, dtype=torch.int64), Fraction(1, 10)
    attack = Assignment("pgd", {"name": "pgd"}, PGD(norm="linf", eps=eps, steps=5))
    eager = Assignment("eager", {"name": "eager"}, Eager(shift=-0.1))
    out = evaluate(threshold_net(), x, y, [0], Threat("linf", eps), [attack], [eager])
    assert out.rows[["survived:pgd", "survived:eager"]].to_numpy().tolist() == [[False, False]]


def test_a_counterexample_of_one_verifier_contradicts_the_certificate_of_another() -> None:
    x, y = torch.tensor([0.45]).view(1, 1, 1, 1), torch.zeros(1, dtype=torch.int64)

    @dataclass(frozen=True)
    class Everything(IBP):
        def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Proof:
            ones = torch.ones(len(x), dtype=torch.float64)
            return Proof(0.2 * ones, ones, model(x).argmax(1), ("proved",) * len(x))

    wrong = Assignment("wrong", {"name": "wrong"}, Everything("linf", Fraction(1, 5)))
    right = Assignment("oracle", {"name": "oracle"}, Oracle(eps=Fraction(1, 4), shift=-0.15))
    with pytest.raises(ContradictionError, match=r"wrong certified linf radius 0\.2"):
        evaluate(threshold_net(), x, y, [0], Threat("linf", Fraction(1, 5)), [], [wrong, right])
