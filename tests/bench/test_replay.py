"""A record that holds replays; a forged one, with every digest made to fit again, does not."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from bench.__main__ import main
from bench.answer import rows_of as json_rows
from bench.answer import summary
from bench.build import build
from bench.cells import Assignment, read_suite
from bench.certify import certify
from bench.checkpoints import Card, load_checkpoint, network, save_checkpoint
from bench.claims import Outside, _rows, claims_of_record, tool_of
from bench.data import load
from bench.errors import UserError
from bench.evaluate import ContradictionError
from bench.question import Question, prepare
from bench.replay import Replay, chance, replay
from bench.run import Folders, keep_contradiction, run_cell
from bench.spot import spot_check
from bench.together import in_batch_of_old
from leaderboard.canonical import digest, sha256_file
from leaderboard.checks import check
from leaderboard.record import read
from leaderboard.stats import metrics_of
from verifiers.binomial import certified_radius

CPU = torch.device("cpu")
HERE = Outside(CPU)
SUITE = """
suite = { name = "small", version = 1 }
data = { name = "digits" }
threat = { norm = "linf", eps = "0.05" }
samples = { every = 8 }
budget = { pretrain = 6, prune = 1, finetune = 4, batch = 64, lr = 0.1 }
grid = { arch = ["mlp"], density = ["0.3"], seed = [0] }
method = [{ name = "lwm" }]
objective = [{ name = "stability" }]
attack = [{ name = "pgd", steps = 5 }, { name = "square", n_queries = 20 }]
verifier = [
  { name = "ibp" }, { name = "crown" }, { name = "exact", nodes = 5 },
  { name = "smoothing", norm = "l2", eps = "0.1", n = 200, first = 10 },
]
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a suite of one cell, measured here."""
    folder = tmp_path_factory.mktemp("suite")
    (folder / "small.toml").write_text(SUITE)
    cell, _dense = read_suite(str(folder / "small.toml")).cells
    run_cell(cell, Folders(folder / "small@1"), CPU)
    return folder / "small@1"


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """The record of a copy that a test may forge."""
    shutil.copytree(run, tmp_path / "small@1")
    return next((tmp_path / "small@1" / "records").glob("*.json"))


def all_of(path: Path) -> Replay:
    return replay(path, 10_000, 0, HERE)


def failures(path: Path) -> list[tuple[str, int | None]]:
    return [(one.what, one.sample) for one in all_of(path).findings if not one.holds]


def rows_of(path: Path) -> pd.DataFrame:
    return pd.read_parquet(path.with_suffix(".parquet"))


def forged(path: Path, rows: pd.DataFrame | None = None, change: Callable[[dict[str, Any]], None] = lambda record: None) -> None:
    """Write the record anew as a forger would: rows, derived metrics and every digest fit each other."""
    record, table = json.loads(path.read_text()), path.with_suffix(".parquet")
    if rows is not None:
        rows.to_parquet(table, index=False)
        record["metrics"] = metrics_of(record["cell"], rows)
    evidence = record["evidence"]
    for name in ("verdicts", "weights", "witnesses"):
        if name in evidence:
            evidence[f"{name}_sha256"] = sha256_file(path.parent / evidence[name])
    change(record)
    record["digest"] = digest(record)
    path.write_text(json.dumps(record))
    assert check(read(path), path.parent) == [], "the forgery would be seen without replay"


# ---- what holds ------------------------------------------------------------------------------------------------------


def test_a_measured_record_replays_in_every_part(run: Path) -> None:
    path = next((run / "records").glob("*.json"))
    found, rows = all_of(path), rows_of(path)
    assert [one for one in found.findings if not one.holds] == []
    assert {one.what for one in found.findings} == {
        "record", "data digest", "samples digest", "clean predictions", "certificate", "witness",
    }
    claimed = sum(int((rows[name] > 0).sum()) for name in rows if name.startswith("radius:"))
    assert found.certificates == found.spot == claimed > 20
    assert {one.by for one in found.findings if one.what == "certificate"} == {"ibp", "crown", "exact", "smoothing"}
    assert sum(one.what == "witness" for one in found.findings) == (rows["verdict"] == "broken").sum() > 0


def test_the_seed_draws_the_spot_checks(run: Path) -> None:
    path = next((run / "records").glob("*.json"))

    def drawn(seed: int) -> list[tuple[str, int | None]]:
        return [(one.by, one.sample) for one in replay(path, 5, seed, HERE).findings if one.what == "certificate"]

    assert len(drawn(1)) == 5
    assert drawn(1) == drawn(1) != drawn(2)


def test_a_record_from_before_witnesses_were_kept_replays_by_attacking_again(copy: Path) -> None:
    def older(record: dict[str, Any]) -> None:
        for name in ("witnesses", "witnesses_sha256"):
            del record["evidence"][name]
        del record["provenance"]["selfcheck"]

    forged(copy, change=older)
    found = all_of(copy)
    assert found.holds
    assert sum(one.what == "attack" for one in found.findings) == (rows_of(copy)["verdict"] == "broken").sum()


def test_a_relaxation_has_its_recorded_margin_again_in_the_batch_that_it_had(run: Path) -> None:
    claims = claims_of_record(next((run / "records").glob("*.json")), HERE)
    (crown,) = [one for one in claims.verifiers if one.label == "crown"]
    rows = np.flatnonzero(claims.rows["predicted"] == claims.rows["label"]).tolist()
    found = list(in_batch_of_old(claims, [(crown, at) for at in rows]))
    assert [one.at for one in found] == rows
    recorded = claims.rows["margin:crown"].to_numpy()[rows]
    assert [one.found["margin:crown"] for one in found] == pytest.approx(recorded, rel=1e-5, abs=1e-5)


# ---- what does not ---------------------------------------------------------------------------------------------------


OWN = """
from torch import nn

def build(shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, classes))
"""


def test_a_folder_about_own_files_replays_from_anywhere_and_notices_that_one_of_them_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    home.mkdir()
    elsewhere.mkdir()
    monkeypatch.chdir(home)
    Path("net.py").write_text(OWN)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    torch.save(model.state_dict(), "net.pt")
    x = np.random.default_rng(0).random((12, 1, 2, 2), dtype=np.float32)
    np.savez("own.npz", x=x, y=model(torch.from_numpy(x)).argmax(1).numpy(), classes=3)
    words = ["net.pt", "--arch", "net.py:build", "--data", "own.npz", "--eps", "1/50", "--verifier", "ibp", "--out", "answer"]
    assert main(["certify", *words]) == 0
    monkeypatch.chdir(elsewhere)
    assert main(["replay", str(home / "answer"), "--plugins"]) == 0
    torch.save({name: 1.5 * value for name, value in model.state_dict().items()}, home / "net.pt")
    found = replay(home / "answer", 5, 0, Outside(torch.device("cpu"), plugins=True))
    assert any("checkpoint here is not the one" in one.why for one in found.findings)


def test_one_flipped_verdict_is_caught(copy: Path) -> None:
    rows = rows_of(copy)
    at = rows.index[rows["verdict"] == "broken"][0]
    survived = [name for name in rows if name.startswith("survived:")]
    rows.loc[at, survived] = True
    for label in ("crown", "exact"):
        rows.loc[at, [f"status:{label}", f"radius:{label}", f"margin:{label}"]] = ["proved", 0.05, 0.01]
    rows.loc[at, ["verdict", "by"]] = ["certified", "crown"]
    tensors = load_file(witnessed := copy.with_suffix(".witnesses.safetensors"))
    keep = tensors["index"] != int(rows["index"][at])
    save_file({name: value[keep].contiguous() for name, value in tensors.items()}, witnessed)
    forged(copy, rows)
    assert failures(copy) == [("certificate", rows["index"][at])] * 2


def test_one_changed_weight_is_caught(copy: Path) -> None:
    weights = next((copy.parent.parent / "checkpoints").glob("*.safetensors"))
    state, card = load_checkpoint(weights)
    name = [one for one in state if one.endswith("weight")][-1]
    state[name].flatten()[int(state[name].flatten().abs().argmax())] *= -1
    assert card is not None
    save_checkpoint(weights, state, card)
    assert ("record", None) in failures(copy)
    forged(copy)
    assert any(one.why for one in spot_check(copy, 10_000, 0, HERE).findings)  # by margins of ibp, which no batch changes


@pytest.mark.parametrize("far, why", [(0.0, "classifies it correctly"), (0.06, "outside the ball")])
def test_a_forged_witness_is_caught(copy: Path, far: float, why: str) -> None:
    path = copy.with_suffix(".witnesses.safetensors")
    tensors = load_file(path)
    index = tensors["index"].tolist()[0]
    test = load("digits", None).test
    image = test.pixels()[test.index.tolist().index(index)]
    tensors["images"][0] = image + far * (image <= 0.5) - far * (image > 0.5)
    save_file(tensors, path)
    forged(copy)
    wrong = [one for one in all_of(copy).findings if not one.holds]
    assert [(one.what, one.sample) for one in wrong] == [("witness", index)]
    assert why in wrong[0].why


def test_a_sample_said_to_be_broken_that_no_attack_breaks_is_caught(copy: Path) -> None:
    rows = rows_of(copy)
    at = rows.index[(rows["verdict"] == "certified") & (rows["radius:ibp"] > 0)][0]
    for label in ("ibp", "crown", "exact"):
        rows.loc[at, [f"status:{label}", f"radius:{label}"]] = ["open", 0.0]
    rows.loc[at, ["survived:pgd", "verdict", "by"]] = [False, "broken", "pgd"]
    forged(copy, rows)
    assert failures(copy) == [("attack", rows["index"][at])]


def test_changed_noise_counts_are_caught_with_their_difference(copy: Path) -> None:
    rows = rows_of(copy)
    at = rows.index[(rows["radius:smoothing"] > 0) & (rows["hits:smoothing"] < 190)][0]
    hits = int(rows.loc[at, "hits:smoothing"]) + 7
    radius = float(certified_radius(rows.loc[[at], "hits:smoothing"].to_numpy() + 7, 200, 0.25, 0.001)[0])
    rows.loc[at, ["hits:smoothing", "radius:smoothing"]] = [hits, radius]
    rows["hits:smoothing"] = rows["hits:smoothing"].astype("int64")
    if radius >= 0.1:
        rows.loc[at, "status:smoothing"] = "proved"
    forged(copy, rows)
    (wrong,) = [one for one in all_of(copy).findings if not one.holds]
    assert wrong.sample == rows["index"][at]
    assert f"{hits - 7} hits of 200 draws, recorded are {hits} of 200" in wrong.why


# ---- folders of certify ----------------------------------------------------------------------------------------------


TWENTIETH = Fraction(1, 20)
DRAWS = (("n", 200), ("n0", 20))
QUESTIONS: dict[str, dict[str, Any]] = {
    "bounds and an attack": {"verifiers": ("ibp", "crown"), "attacks": ("pgd",), "limit": 30, "claim": Fraction(1, 2)},
    "smoothing": {"verifiers": ("smoothing",), "eps": Fraction(1, 10), "limit": 25, "norm": "l2", "smoothing": DRAWS},
    "smoothing, a curve and an attack on the network itself": {
        "verifiers": ("smoothing",), "attacks": ("pgd",), "limit": 6, "norm": "l2", "curve": (Fraction(1, 4),),
        "smoothing": (*DRAWS, ("rule", "sequential")),
    },
    "smoothing beside a bound": {"verifiers": ("crown", "smoothing"), "norm": "l2", "limit": 4, "smoothing": DRAWS},
    "a curve of a bound": {"verifiers": ("ibp",), "attacks": ("pgd",), "limit": 6, "curve": (Fraction(1, 100),)},
    "distances": {"verifiers": ("exact",), "limit": 2, "tolerance": Fraction(1, 50), "exact": (("nodes", 20),)},
    "attacks alone": {"verifiers": (), "attacks": ("pgd",), "limit": 6},
}  # fmt: skip


def asked(run: Path, name: str) -> Question:
    checkpoint = next((run / "checkpoints").glob("*.safetensors"))
    return Question(checkpoint, **{"norm": "linf", "eps": TWENTIETH, "attacks": (), "batch": 20, **QUESTIONS[name]})


@pytest.fixture(scope="module")
def answered(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of the answer to a question, made once."""
    made: dict[str, Path] = {}

    def answer(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("answer")
            certify(asked(run, name), CPU, made[name])
        return made[name]

    return answer


@pytest.fixture
def forger(run: Path, answered: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """Writes a copy anew as a forger would: rows.csv changed, all of answer.json that follows from it made to fit."""

    def forge(name: str, change: Callable[[pd.DataFrame], object]) -> Path:
        shutil.copytree(answered(name), folder := tmp_path / "answer")
        rows = pd.read_parquet(folder / "rows.parquet")
        change(rows)
        rows.to_csv(folder / "rows.csv", index=False)
        answer, case = json.loads((folder / "answer.json").read_text()), prepare(asked(run, name), CPU)
        answer |= {"rows": json_rows(rows, case.verifiers), "summary": summary(case, rows)}
        answer["digests"]["samples"] = case.samples.first(len(rows)).digest
        (folder / "answer.json").write_text(json.dumps(answer))
        return folder

    return forge


def reasons(path: Path, spot: int = 0) -> list[str]:
    return [one.why for one in replay(path, spot, 0, HERE).findings if not one.holds]


@pytest.mark.parametrize("name", QUESTIONS)
def test_what_certify_answered_holds(name: str, answered: Callable[[str], Path]) -> None:
    found = all_of(answered(name))
    assert [one for one in found.findings if not one.holds] == []
    assert found.certificates > 0 or name == "attacks alone"
    (note,) = found.notes
    assert ("points of the curve" in note) == (name == "a curve of a bound")
    assert ("bracketed distances" in note) == (name == "distances")


@pytest.mark.parametrize("name", ["bounds and an attack", "smoothing"])
@pytest.mark.parametrize("seconds", [-1.0, 2.0])
def test_an_answer_whose_time_ran_out_holds(
    run: Path, name: str, seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count()
    monkeypatch.setattr("bench.certify.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    found = certify(replace(asked(run, name), total_seconds=seconds), CPU, tmp_path)["summary"]
    assert found["timeout"] == (found["n"] if seconds < 0 else found["n"] - 20)
    assert all_of(tmp_path).holds


def as_certified(rows: pd.DataFrame, at: Any, by: str) -> None:
    rows.loc[at, ["verdict", "by"]] = ["certified", by]


def test_verdicts_without_a_proof_do_not_pass_beside_a_timeout(forger: Callable[..., Path]) -> None:
    def forged_by(rows: pd.DataFrame) -> None:
        as_certified(rows, slice(None), "ibp")
        rows.loc[0, ["verdict", "by"]] = ["timeout", ""]

    assert any("'verdict' is not what follows" in why for why in reasons(forger("bounds and an attack", forged_by)))


def test_a_verdict_does_not_pass_in_a_row_that_was_never_reached(forger: Callable[..., Path]) -> None:
    def forged_by(rows: pd.DataFrame) -> None:
        for name in rows:
            if str(name).startswith(("status:", "radius:")):
                rows.loc[:5, name] = "timeout" if str(name).startswith("status:") else 0.05
        rows.loc[:5, ["predicted", "verdict", "by"]] = [-1, "timeout", "ibp"]

    found = reasons(forger("bounds and an attack", forged_by))
    assert any("never reached, yet something is said in 'by'" in why for why in found)
    assert any("never reached, yet something is said in 'radius:ibp'" in why for why in found)


def test_verdicts_about_the_smoothed_classifier_follow_from_its_radii(forger: Callable[..., Path]) -> None:
    folder = forger("smoothing", lambda rows: as_certified(rows, slice(23), "smoothing"))
    assert any("'verdict' is not what follows" in why for why in reasons(folder))


def test_a_selection_of_the_images_does_not_pass(forger: Callable[..., Path]) -> None:
    folder = forger("bounds and an attack", lambda rows: rows.drop(rows.index[rows["verdict"] != "certified"], inplace=True))
    assert ("samples", None) in failures(folder)


def test_a_flipped_verdict_with_everything_made_to_fit_is_proven_again(forger: Callable[..., Path]) -> None:
    flipped = []

    def forged_by(rows: pd.DataFrame) -> None:
        at = rows.index[rows["verdict"] == "broken"][0]
        names = ["verdict", "by", "status:crown", "radius:crown", "survived:pgd", "margin:crown"]
        rows.loc[at, names] = ["certified", "crown", "proved", 0.05, True, 0.01]
        flipped.append(("certificate", int(rows["index"][at])))

    assert failures(forger("bounds and an attack", forged_by)) == flipped


@pytest.mark.parametrize("distance", [-1.0, 1e300, 0.06])
def test_a_distance_outside_the_attacks_ball_does_not_pass(distance: float, forger: Callable[..., Path]) -> None:
    def forged_by(rows: pd.DataFrame) -> None:
        rows.loc[rows["survived:pgd"].idxmax(), "distance:pgd"] = distance

    (why,) = reasons(forger("bounds and an attack", forged_by))
    assert "'distance:pgd' is no distance that it can have" in why


def test_a_distance_outside_the_attacks_ball_does_not_pass_in_a_record_either(copy: Path) -> None:
    rows = rows_of(copy)
    rows.loc[rows["survived:pgd"].idxmax(), "distance:pgd"] = 1e300
    forged(copy, rows)
    (why,) = reasons(copy)
    assert "'distance:pgd' is no distance that it can have" in why


def test_a_certificate_without_its_margin_does_not_pass(forger: Callable[..., Path]) -> None:
    def forged_by(rows: pd.DataFrame) -> None:
        rows.loc[rows["radius:crown"].idxmax(), "margin:crown"] = np.nan

    (why,) = reasons(forger("bounds and an attack", forged_by), spot=10_000)
    assert "its margin is" in why


PLACES = [
    "rows.3.radius", "rows.3.margin", "rows.3.ibp.status", "rows.3.crown.radius", "rows.3.seconds", "rows.3.label",
    "summary.n", "summary.clean", "summary.certified", "summary.survived.pgd", "summary.certified_by.crown", "summary.density",
    "passport.density", "passport.kept", "passport.bits.csr", "claim.holds", "claim.sentence", "layout", "data", "notes",
    "health", "verifiers", "asked.arch_digest", "more",
]  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_nothing_that_follows_from_rows_and_network_can_be_told_otherwise(
    place: str, answered: Callable[[str], Path], tmp_path: Path
) -> None:
    shutil.copytree(answered("bounds and an attack"), folder := tmp_path / "answer")
    answer = json.loads((folder / "answer.json").read_text())
    *way, last = [int(word) if word.isdigit() else word for word in place.split(".")]
    inside = answer
    for word in way:
        inside = inside[word]
    was = inside.get(last)
    inside[last] = {
        bool: not was, int: 7, float: 0.015625, str: "proved" if last == "status" else "another", type(None): 7,
        list: [{"name": "softmax outputs"}] if last in ("health", "notes") else [],
    }[type(was)]  # fmt: skip
    assert inside[last] != was
    (folder / "answer.json").write_text(json.dumps(answer))
    try:
        assert not replay(folder, 0, 0, HERE).holds
    except UserError:
        assert place == "verifiers"


def test_the_curve_of_a_smoothed_classifier_follows_from_its_radii(answered: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(answered("smoothing, a curve and an attack on the network itself"), folder := tmp_path / "answer")
    answer = json.loads((folder / "answer.json").read_text())
    answer["curve"][0]["share"] = 0.99
    (folder / "answer.json").write_text(json.dumps(answer))
    assert any("curve[0].share" in why for why in reasons(folder))


# ---- contradictions --------------------------------------------------------------------------------------------------


LIAR = """
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from verifiers import Proof


@dataclass(frozen=True)
class Liar:
    norm: str = "linf"
    eps: Fraction = Fraction(1, 20)
    deterministic: ClassVar[bool] = True

    def __call__(self, model, x, y):
        radius = torch.full((len(x),), float(self.eps), dtype=torch.float64)
        return Proof(radius, radius, y, ("proved",) * len(x))
"""


@pytest.fixture
def contradiction(run: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes one about a sample that an attack broke; by a verifier that claims whatever it is asked, unless told otherwise."""
    path = next((run / "records").glob("*.json"))
    rows, images = rows_of(path), load_file(path.with_suffix(".witnesses.safetensors"))
    state, card = load_checkpoint(next((run / "checkpoints").glob("*.safetensors")))
    assert isinstance(card, Card)
    index, test = int(images["index"][0]), load("digits", None).test
    (tmp_path / "liar.py").write_text(LIAR)

    def make(image: torch.Tensor | None = None, witness: torch.Tensor | None = None, **changed: Any) -> Path:
        facts = {
            "index": index, "label": int(rows.set_index("index")["label"][index]), "verifier": f"{tmp_path / 'liar.py'}:Liar",
            "norm": "linf", "radius": 0.05, "attack": "pgd", "distance": 0.05, "predicted": 3,
        }  # fmt: skip
        image = test.pixels()[test.index.tolist().index(index)] if image is None else image
        witness = images["images"][0] if witness is None else witness
        found = ContradictionError(facts, image, witness.clone())
        where = keep_contradiction(found, card, "found", network(state, card, path), Folders(tmp_path))
        where.write_text(json.dumps(facts | changed))
        return where

    return make


def test_a_contradiction_replays_with_the_verifier_that_claims_it(contradiction: Callable[..., Path]) -> None:
    found = replay(contradiction(), 0, 0, Outside(CPU, plugins=True))
    assert found.holds
    assert [one.what for one in found.findings] == ["contradiction", "certificate"]


@pytest.mark.parametrize("verifier", ["liar.py:Liar", "a label of some suite"])
def test_a_contradiction_of_a_verifier_that_is_not_at_hand_says_that_the_certificate_was_not_made_again(
    verifier: str, contradiction: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", str(contradiction(verifier=verifier))]) == 0
    assert "note: the certificate itself was not made again" in capsys.readouterr().out


def test_a_contradiction_needs_an_image_of_its_label_a_broken_witness_in_the_ball_and_a_certificate(
    run: Path, contradiction: Callable[..., Path]
) -> None:
    rows, test = rows_of(next((run / "records").glob("*.json"))), load("digits", None).test
    wrong = rows[rows["verdict"] == "misclassified"].iloc[0]
    missed = test.pixels()[test.index.tolist().index(int(wrong["index"]))]
    right = rows[rows["verdict"] == "certified"].iloc[0]
    kept = test.pixels()[test.index.tolist().index(int(right["index"]))]
    forgeries: dict[str, dict[str, Any]] = {
        "the image has a pixel that is not in [0,1]": {"image": torch.full((1, 8, 8), 5.0), "radius": 99.0},
        "the network classifies the image itself as": {"image": missed, "witness": missed, "label": int(wrong["label"])},
        "the witness is classified correctly": {"image": kept, "witness": kept, "label": int(right["label"])},
        "outside the certified radius": {"radius": 0.01},
        "but ibp answers open with 0": {"verifier": "ibp"},
        "but crown answers open with 0": {"verifier": "crown", "radius": 99.0},
        "certifies another classifier": {"verifier": "smoothing", "norm": "l2", "radius": 0.5},
    }
    for words, forgery in forgeries.items():
        found = reasons(contradiction(**forgery))
        assert any(words in why for why in found), (words, found)


@pytest.mark.parametrize("radius", [0.0, -0.1, float("inf"), float("nan"), 1e400, "wide", None])
def test_a_contradiction_is_of_a_finite_radius_above_0(
    radius: Any, contradiction: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    image = torch.zeros(1, 8, 8)
    assert main(["replay", str(contradiction(image=image, witness=image, radius=radius))]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize("fact", ["index", "label"])
def test_a_contradiction_without_a_number_is_refused_in_one_sentence(
    fact: str, contradiction: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", str(contradiction(**{fact: None}))]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


# ---- numbers, tools, refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("certificates, spot, share", [(8, 3, 0.25), (9, 4, 0.1), (6, 6, 0.01), (5, 0, 0.5)])
def test_the_chance_of_meeting_a_false_certificate_is_counted_over_all_draws(certificates: int, spot: int, share: float) -> None:
    false = max(1, -int(-share * certificates // 1))
    draws = list(itertools.combinations(range(certificates), spot))
    met = sum(any(one < false for one in draw) for draw in draws)
    assert chance(certificates, spot, share) == pytest.approx(met / len(draws))


@pytest.mark.parametrize(
    "kind, spec",
    [
        ("attack", {"name": "pgd", "norm": "linf", "eps": "8/255", "step_size": "2/255", "restarts": 3}),
        ("attack", {"name": "square", "norm": "l2", "eps": "1/2", "n_queries": 77}),
        ("verifier", {"name": "exact", "eps": "1/10", "nodes": 7}),
        ("verifier", {"name": "alpha-crown", "norm": "l2", "eps": "1/10"}),
        ("verifier", {"name": "smoothing", "rule": "sequential", "eps": "1/4", "grid": ["1/8", "1/2"]}),
    ],
)
def test_a_tool_is_built_again_from_what_the_record_says_of_it(kind: str, spec: dict[str, Any]) -> None:
    tool = build(kind, spec)
    stored = json.loads(json.dumps(Assignment("some label", spec, tool, first=3).as_json()))
    assert tool_of(kind, stored, HERE) == tool


def test_code_that_a_record_names_is_not_run_unasked(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.py").write_text("raise SystemExit('it ran')")
    record = json.loads(copy.read_text())
    record["cell"]["attacks"][0]["name"] = f"{tmp_path / 'mine.py'}:Mine"
    copy.write_text(json.dumps(record))
    assert main(["replay", str(copy)]) == 2
    assert "only with --plugins" in capsys.readouterr().err


def test_what_is_no_record_is_refused_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "half.json").write_text('{"schema": 1')
    (tmp_path / "old.json").write_text('{"schema": 1, "id": "old"}')
    (tmp_path / "answer.json").write_text('{"arch": "mlp"}')
    (tmp_path / "c.json").write_text('{"verifier": "ibp", "attack": "pgd", "radius": 1}')
    for name in ("list.json", "half.json", "old.json", "answer.json", "c.json", "nothing.json", "."):
        assert main(["replay", str(tmp_path / name)]) == 2, name
        shown = capsys.readouterr()
        assert len(shown.err.strip().splitlines()) == 1, shown.err
        assert shown.out == ""
    assert main(["replay", str(tmp_path), "--spot", "-1"]) == 2


@pytest.mark.parametrize("batch", [0, -1, True, 2.5, "20", None])
def test_an_answer_in_batches_of_no_size_is_refused_in_one_sentence(
    batch: Any, answered: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(answered("attacks alone"), folder := tmp_path / "answer")
    answer = json.loads((folder / "answer.json").read_text())
    answer["asked"]["batch"] = batch
    (folder / "answer.json").write_text(json.dumps(answer))
    assert main(["replay", str(folder)]) == 2
    assert "a whole number from 1" in capsys.readouterr().err


@pytest.mark.parametrize("column", ["index", "predicted", "margin:ibp", "survived:pgd", "distance:pgd", "seconds"])
def test_a_cell_of_another_kind_is_refused_in_one_sentence(
    column: str, answered: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(answered("bounds and an attack"), folder := tmp_path / "answer")
    rows = pd.read_csv(folder / "rows.csv", dtype=str, keep_default_na=False)
    rows.loc[3, column] = "many"
    rows.to_csv(folder / "rows.csv", index=False)
    assert main(["replay", str(folder)]) == 2
    shown = capsys.readouterr()
    assert len(shown.err.strip().splitlines()) == 1
    assert f"{column!r} must hold only" in shown.err


def test_a_table_is_read_exactly(tmp_path: Path) -> None:
    bits = np.random.default_rng(0).integers(0, 2**63, 2000).view(np.float64)
    numbers = np.array([*bits[np.isfinite(bits)], np.nan, np.inf, -0.0, 5e-324])
    table = pd.DataFrame({"radius:ibp": numbers, "margin:ibp": numbers, "status:ibp": "NA", "verdict": "", "by": "null"})
    table = table.assign(index=2**62 + 1, label=0, predicted=-1)
    table.to_csv(tmp_path / "rows.csv", index=False)
    found = _rows(tmp_path / "rows.csv", {"attacks": [], "verifiers": [{"label": "ibp"}]})
    assert np.array_equal(found["radius:ibp"].to_numpy().view(np.int64)[:-4], numbers.view(np.int64)[:-4])
    assert np.array_equal(found["margin:ibp"], numbers, equal_nan=True)
    for name in ("status:ibp", "verdict", "by", "index"):
        assert found[name].tolist() == table[name].tolist()


def test_spot_checks_are_drawn_anew_each_time_and_again_with_the_seed_that_was_printed(
    answered: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(answered("bounds and an attack"))

    def shown(*words: str) -> dict[str, Any]:
        assert main(["replay", path, "--spot", "4", "--json", *words]) == 0
        return dict(json.loads(capsys.readouterr().out))

    first, second = shown(), shown()
    assert first["seed"] != second["seed"]
    assert shown("--seed", str(first["seed"])) == first
    assert main(["replay", path, "--spot", "4"]) == 0
    assert "--seed" in capsys.readouterr().out.splitlines()[0]


def test_the_command_says_what_it_did(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = next((run / "records").glob("*.json"))
    assert main(["replay", str(path), "--spot", "3"]) == 0
    assert "3 of" in capsys.readouterr().out
    assert main(["replay", str(path), "--spot", "3", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["holds"]
    assert set(shown["caught"]) == {"0.01", "0.05", "0.1"}
