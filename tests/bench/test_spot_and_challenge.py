"""Random samples of an honest record are as recorded; a falsified one and a witness against a claim are both found out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bench.__main__ import main
from bench.cells import Assignment, read_suite
from bench.challenge import _judged, challenge
from bench.claims import Claims, Outside, claims_of_record
from bench.data import load as data_set
from bench.errors import UserError
from bench.evaluate import evaluate
from bench.replay import _proven_again, drawn
from bench.run import Folders, run_cell
from bench.spot import Spot, _whole, spot_check, spot_checks
from bench.together import OTHER_ALONE, OTHER_MARGIN, in_batch_of_old
from leaderboard.board import load, ranked
from leaderboard.canonical import digest, sha256_file
from leaderboard.challenges import Effect, notes
from leaderboard.checks import check
from leaderboard.entering import adopt
from leaderboard.errors import RecordError
from leaderboard.ledger import NAME, entries, problems
from leaderboard.record import read
from leaderboard.stats import metrics_of
from verifiers import AlphaCrown, Crown, Proof
from verifiers.proof import fixed_radius_proof

HERE = Outside(torch.device("cpu"))
EVERYTHING = 10_000
SUITE = """
suite = { name = "small", version = 1 }
data = { name = "digits", train = 500 }
threat = { norm = "linf", eps = "0.06" }
samples = { every = 12 }
budget = { pretrain = 6, prune = 1, finetune = 1, batch = 50, lr = 0.1 }
grid = { arch = ["mlp"], density = ["0.3"], seed = [0] }
method = [{ name = "lwm" }]
objective = [{ name = "ibp" }]
attack = [{ name = "pgd", steps = 5 }, { name = "square", n_queries = 20 }]
verifier = [{ name = "ibp" }, { name = "mixtrain" }, { name = "smoothing", norm = "l2", eps = "0.1", n = 200, first = 5 }]
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a suite of one cell, measured here."""
    folder = tmp_path_factory.mktemp("suite")
    (folder / "small.toml").write_text(SUITE)
    cell, _dense = read_suite(str(folder / "small.toml")).cells
    run_cell(cell, Folders(folder / "small@1"), HERE.device)
    return folder / "small@1"


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """The record of a copy that a test may forge."""
    shutil.copytree(run, tmp_path / "small@1")
    return next((tmp_path / "small@1" / "records").glob("*.json"))


def rows_of(path: Path) -> pd.DataFrame:
    return pd.read_parquet(path.with_suffix(".parquet"))


def forged(path: Path, rows: pd.DataFrame, change: Callable[[dict[str, Any]], None] = lambda record: None) -> None:
    """Write the record anew as a forger would: rows, derived metrics, every digest and the ledger fit each other."""
    record, table = json.loads(path.read_text()), path.with_suffix(".parquet")
    rows.to_parquet(table, index=False)
    record["metrics"] = metrics_of(record["cell"], rows)
    for name in ("verdicts", "witnesses"):
        record["evidence"][f"{name}_sha256"] = sha256_file(path.parent / record["evidence"][name])
    change(record)
    record["digest"] = digest(record)
    path.write_text(json.dumps(record))
    (path.parent / NAME).unlink()
    adopt(path.parent)
    assert check(read(path), path.parent) == [], "the forgery would be seen without running anything"


def broken_of(path: Path, by: str = "pgd") -> int:
    """The row of a sample that both attacks broke, or the named one where there is none."""
    rows = rows_of(path)
    both = ~rows["survived:pgd"] & ~rows["survived:square"] & (rows["by"] == by)
    return int(rows.index[both if both.any() else rows["by"] == by][0])


def as_survivor(path: Path, at: int) -> Tensor:
    """Forges the broken row into one that survived every attack; the witness that broke it."""
    rows, stored = rows_of(path), path.with_suffix(".witnesses.safetensors")
    tensors = load_file(stored)
    own = tensors["index"] == int(rows["index"][at])
    save_file({name: value[~own].contiguous() for name, value in tensors.items()}, stored)
    rows.loc[at, ["survived:pgd", "survived:square", "verdict", "by"]] = [True, True, "open", ""]
    forged(path, rows)
    return tensors["images"][own][0]


def as_certified(rows: pd.DataFrame, at: int) -> None:
    rows.loc[at, ["status:mixtrain", "radius:mixtrain", "margin:mixtrain"]] = ["proved", 0.06, 0.01]
    rows.loc[at, ["verdict", "by"]] = ["certified", "mixtrain"]


def written(path: Path, images: dict[int, Tensor]) -> Path:
    save_file({"index": torch.tensor(list(images)), "images": torch.stack(list(images.values()))}, path)
    return path


# ---- spot checks -----------------------------------------------------------------------------------------------------


def failures(path: Path, count: int = EVERYTHING) -> list[tuple[str, str, int | None]]:
    return [(one.what, one.by, one.sample) for one in spot_check(path, count, 0, HERE).findings if one.why]


def test_every_sample_of_an_honest_record_comes_out_as_recorded(run: Path) -> None:
    (path,) = (run / "records").glob("*.json")
    found = spot_check(path, EVERYTHING, 0, HERE)
    assert [one for one in found.findings if one.why] == []
    assert found.drawn == rows_of(path)["index"].tolist()
    assert set(found.caught.values()) == {1.0}
    answers = pd.Series([one.by for one in found.findings if one.what == "answer"]).value_counts().to_dict()
    assert answers == {"ibp": found.samples, "mixtrain": found.samples, "smoothing": 5}


def test_a_survivor_that_was_broken_is_found_out(copy: Path) -> None:
    at = broken_of(copy)
    as_survivor(copy, at)
    number = int(rows_of(copy)["index"][at])
    assert ("attack", "pgd", number) in failures(copy)
    assert {sample for _, _, sample in failures(copy)} == {number}


def test_an_attack_of_the_library_is_asked_again_in_the_batch_it_had(copy: Path) -> None:
    rows = rows_of(copy)
    at = rows.index[(rows["verdict"] == "broken") & rows["survived:square"]][0]
    rows.loc[at, "survived:square"] = False
    forged(copy, rows)
    assert failures(copy) == [("attack", "square", int(rows["index"][at]))]


def test_a_certificate_that_nobody_gave_is_found_out(copy: Path) -> None:
    rows = rows_of(copy)
    at = rows.index[rows["verdict"] == "open"][0]
    as_certified(rows, at)
    forged(copy, rows)
    assert failures(copy) == [("answer", "mixtrain", int(rows["index"][at]))]


@pytest.mark.slow
@pytest.mark.parametrize("status, radius", [("open", 0.0), ("proved", 0.03)])
def test_a_certificate_that_was_withheld_is_found_out(copy: Path, status: str, radius: float) -> None:
    rows = rows_of(copy)
    at = rows.index[(rows["radius:ibp"] > 0) & (rows["radius:mixtrain"] > 0)][0]
    rows.loc[at, ["status:ibp", "radius:ibp", "by"]] = [status, radius, "mixtrain"]
    forged(copy, rows)
    assert failures(copy) == [("answer", "ibp", int(rows["index"][at]))]


@pytest.mark.slow
def test_changed_counts_of_noise_are_found_out(copy: Path) -> None:
    rows = rows_of(copy)
    at = rows.index[(rows["hits:smoothing"] > 60) & (rows["hits:smoothing"] <= 200) & (rows["radius:smoothing"] == 0)]
    rows.loc[(at := at[0]), "hits:smoothing"] -= 20
    forged(copy, rows)
    assert failures(copy) == [("answer", "smoothing", int(rows["index"][at]))]


@pytest.mark.slow
def test_a_prediction_that_was_changed_is_found_out(copy: Path) -> None:
    rows = rows_of(copy)
    at = rows.index[rows["verdict"] == "misclassified"][0]
    rows.loc[at, "predicted"] = next(c for c in range(10) if c not in (rows["label"][at], rows["predicted"][at]))
    forged(copy, rows)
    assert failures(copy) == [("clean prediction", "", int(rows["index"][at]))]


def test_the_same_seed_draws_the_same_samples_and_another_seed_others(run: Path) -> None:
    (path,) = (run / "records").glob("*.json")
    found = {seed: spot_check(path, 3, seed, HERE) for seed in (1, 2)}
    assert found[1].drawn == spot_check(path, 3, 1, HERE).drawn != found[2].drawn
    assert len(found[1].drawn) == 3
    (words,) = [one for one in found[1].sentences() if "--seed 1" in one]
    assert f"3 of {found[1].samples} samples were run again" in words


def test_check_runs_samples_again_and_says_how_likely_it_would_have_caught_a_false_record(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["leaderboard", "check", str(copy.parent.parent), "--spot", "30"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "30 of 30 samples were run again" in out
    assert "100.0% if 1% were false" in out
    rows = rows_of(copy)
    as_certified(rows, rows.index[rows["verdict"] == "open"][0])
    forged(copy, rows)
    assert main(words[:3]) == 0
    assert main([*words, "--json"]) == 3
    found = json.loads(capsys.readouterr().out.partition("\n{")[2].join(("{", "")))["spot"]
    assert [one["by"] for one in found["records"][0]["failed"]] == ["mixtrain"]


def test_the_probability_that_is_stated_is_how_often_a_false_row_is_drawn() -> None:
    stated = Spot("", [], 100, list(range(20)), 0, []).caught[0.05]
    hits = [bool(set(drawn(np.random.default_rng(seed), range(100), 20)) & {3, 30, 50, 77, 99}) for seed in range(4000)]
    assert stated == pytest.approx(np.mean(hits), abs=4 * (0.25 / 4000) ** 0.5)
    assert stated == pytest.approx(1 - np.prod([(80 - k) / (100 - k) for k in range(5)]))


def test_what_cannot_be_run_is_named_and_nothing_runs_without_any_checkpoint(copy: Path) -> None:
    for path in (copy.parent.parent / "checkpoints").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"no record could be run again.*needs its weights"):
        spot_checks([copy], 3, 0, HERE)
    with pytest.raises(UserError, match="--spot must be a whole number from 1"):
        spot_checks([copy], 0, 0, HERE)


def test_check_says_that_records_were_not_run_again(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    left = ["other: not run again: needs its weights"]
    monkeypatch.setattr("bench.spot.spot_checks", lambda *_: ([Spot("one", [], 3, [1], 0, [])], left))
    words = ["leaderboard", "check", str(run), "--spot", "1"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["spot"]
    assert (found["holds"], found["all_run"], found["not_run"]) == (True, False, left)
    assert main(words) == 0
    assert "NOT RUN AGAIN: 1 of 1 records" in capsys.readouterr().out


@pytest.mark.slow
def test_a_cell_measured_again_supersedes_its_record_which_stays_readable(copy: Path) -> None:
    old = read(copy)
    (copy.parent.parent.parent / "small.toml").write_text(SUITE)
    cell, _dense = read_suite(str(copy.parent.parent.parent / "small.toml")).cells
    run_cell(cell, Folders(copy.parent.parent), HERE.device)
    new = read(copy)
    assert new.supersedes == old.digest
    kept = copy.parent.parent / "superseded" / f"{copy.stem}-{old.digest[:8]}.json"
    assert json.loads(kept.read_text()) == old.original
    assert [(one.event, one.digest) for one in entries(copy.parent)] == [
        ("entered", old.digest), ("superseded", old.digest), ("entered", new.digest),
    ]
    assert problems(copy.parent) == []
    assert load(copy.parent.parent)["record"].tolist() == [copy.stem]


# ---- bounds that depend on the batch ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class InCompany(Crown):
    """As auto-LiRPA's bounds may: proves what is given with `least` images or more, by a margin that says how many there are."""

    least: int = 1

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Proof:
        margin = torch.full((len(x),), float(len(x))) * (1 if len(x) >= self.least else -1)
        return fixed_radius_proof(float(self.eps), margin > 0, margin, y)


@dataclass(frozen=True)
class Hopeless(AlphaCrown):
    """Proves nothing by itself."""

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Proof:
        nothing = torch.full((len(x),), -1.0)
        return fixed_radius_proof(float(self.eps), nothing > 0, nothing, y, details={"raw_margin": nothing})


def judged_by(run: Path, *tools: Crown | AlphaCrown) -> tuple[Claims, int]:
    """The claims of a record of these verifiers alone, and a row that is classified correctly."""
    (path,) = (run / "records").glob("*.json")
    claims = claims_of_record(path, HERE)
    verifiers = [Assignment(type(one).__name__, {"name": "crown"}, replace(one, eps=claims.threat.eps)) for one in tools]
    split = claims.samples
    rows = evaluate(claims.model, split.pixels(), split.labels, split.index.tolist(), claims.threat, [], verifiers).rows
    (at, *_) = np.flatnonzero(rows["predicted"] == rows["label"]).tolist()
    return replace(claims, rows=rows, attacks=[], verifiers=verifiers), at


def test_an_honest_margin_that_depends_on_the_batch_accuses_nobody(run: Path) -> None:
    claims, at = judged_by(run, InCompany())
    for found in (_whole(claims, [at]), _proven_again(claims, [(0, at)])):
        (own,) = [one for one in found if one.by]
        assert (own.why, own.note) == ("", OTHER_MARGIN)


def test_a_proof_that_needs_its_batch_is_made_again_in_it(run: Path) -> None:
    claims, at = judged_by(run, InCompany(least=2), Hopeless())
    assert claims.rows["status:Hopeless"][at] == "proved", "taken over from the other"
    for found in (_whole(claims, [at]), _proven_again(claims, [(0, at), (1, at)])):
        assert [(one.by, one.why, one.note) for one in found if one.by] == [
            ("InCompany", "", OTHER_ALONE), ("Hopeless", "", OTHER_ALONE),
        ]
    ((made),) = in_batch_of_old(claims, [(claims.verifiers[0], at)])
    assert made.found["margin:InCompany"] == claims.rows["margin:InCompany"][at]


@pytest.mark.parametrize("least", [1, 2, EVERYTHING])
def test_a_status_that_is_another_one_in_the_batch_of_old_too_is_found_out(run: Path, least: int) -> None:
    claims, at = judged_by(run, InCompany(least=least))
    false = ["proved", 0.06] if least == EVERYTHING else ["open", 0.0]
    claims.rows.loc[at, ["status:InCompany", "radius:InCompany"]] = false
    claims.rows.loc[at, "margin:InCompany"] = 1.0 if least == EVERYTHING else -1.0
    if least == 2:
        assert [one.why for one in _whole(claims, [at]) if one.why] == [], "open alone, as it says"
        return
    assert [one.by for one in _whole(claims, [at]) if one.why] == ["InCompany"]


# ---- challenges ------------------------------------------------------------------------------------------------------


def test_a_witness_of_a_survivor_lowers_the_record_and_is_credited(copy: Path, tmp_path: Path) -> None:
    before = load(copy.parent.parent).iloc[0]
    at = broken_of(copy)
    witness, number = as_survivor(copy, at), int(rows_of(copy)["index"][at])
    claimed = load(copy.parent.parent).iloc[0]
    assert claimed["robust.worst"] > before["robust.worst"]
    found = challenge(copy, written(tmp_path / "mine.safetensors", {number: witness}), "A. Name", HERE)
    assert [one.index for one in found.challenged] == [number]
    assert found.path == copy.parent / "challenges" / f"{copy.stem}.1.json"
    after = load(copy.parent.parent).iloc[0]
    for metric in ("robust.worst", "robust.pgd"):
        assert after[metric] == before[metric] < claimed[metric]
    assert after["clean"] == before["clean"]
    assert not after["outcome"][number]
    assert (after["status"], after["challenged"], after["credit"]) == ("challenged", 1, "A. Name")
    (entry,) = ranked(load(copy.parent.parent)).to_dict("records")
    assert (entry["status"], entry["rank"], entry["value"]) == ("challenged", "1", before["robust.worst"])
    (note,) = notes(ranked(load(copy.parent.parent)))
    assert "1 sample refuted by A. Name" in note
    last = entries(copy.parent)[-1]
    assert (last.event, last.record, last.digest) == ("challenged", copy.stem, read(copy).digest)
    kept = (found.path, found.path.with_suffix(".safetensors"))
    assert last.files == {f"challenges/{path.name}": sha256_file(path) for path in kept}
    assert problems(copy.parent) == []


def test_the_same_witness_counts_only_once(copy: Path, tmp_path: Path) -> None:
    at = broken_of(copy)
    witness, number = as_survivor(copy, at), int(rows_of(copy)["index"][at])
    mine = written(tmp_path / "mine.safetensors", {number: witness})
    assert challenge(copy, mine, "first", HERE).path is not None
    (again,) = challenge(copy, mine, "second", HERE).judged
    assert again.why == "the sample has been challenged already"
    assert load(copy.parent.parent).iloc[0]["credit"] == "first"


def test_a_witness_inside_a_certificate_contradicts_the_record_and_the_exit_code_is_3(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at = broken_of(copy)
    witness = as_survivor(copy, at)
    rows = rows_of(copy)
    as_certified(rows, at)
    forged(copy, rows)
    mine = written(tmp_path / "mine.safetensors", {int(rows["index"][at]): witness})
    assert main(["challenge", str(copy), str(mine), "--by", "A. Name"]) == 3
    assert "CONTRADICTED" in capsys.readouterr().out
    assert entries(copy.parent)[-1].event == "contradicted"
    (entry,) = ranked(load(copy.parent.parent)).to_dict("records")
    assert (entry["status"], entry["rank"], entry["ranks"]) == ("contradicted", "–", "–")
    assert main(["leaderboard", "check", str(copy.parent)]) == 3
    assert f"{copy.stem}: a witness contradicts one of its certificates" in capsys.readouterr().err
    assert entry["certified.mixtrain"] == (rows["radius:mixtrain"] > 0).sum() / len(rows) - 1 / len(rows)


def test_what_refutes_nothing_is_told_apart_and_nothing_is_written(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (path,) = (run / "records").glob("*.json")
    rows, files = rows_of(path), sorted(run.rglob("*"))
    test = data_set("digits", None).test
    images = dict(zip(test.index.tolist(), test.pixels()))
    first = {name: int(rows["index"][rows["verdict"] == name].iloc[0]) for name in ("misclassified", "broken", "certified")}
    spare = iter(rows["index"][rows["verdict"] == "certified"].tolist()[1:])
    bright, wrong, far = next(spare), first["broken"], next(spare)
    target = next(images[n] for n, at in zip(rows["index"], rows.index) if rows["verdict"][at] == "certified"
                  and rows["label"][at] != rows["label"][rows["index"] == far].iloc[0])  # fmt: skip
    found = load_file(path.with_suffix(".witnesses.safetensors"))
    witness = found["images"][found["index"].tolist().index(wrong)]
    mine = written(tmp_path / "mine.safetensors", {
        first["misclassified"]: images[first["misclassified"]], wrong: witness, first["certified"]: images[first["certified"]],
        bright: images[bright] + 1.0, far: target, 7: images[far],
    })  # fmt: skip
    judged = {one.index: one.why for one in challenge(path, mine, "A. Name", HERE).judged}
    assert judged[first["misclassified"]] == "the sample is misclassified without any attack"
    assert judged[wrong] == "the sample is recorded as broken already, by pgd"
    assert "classifies the witness correctly" in judged[first["certified"]]
    assert judged[bright] == "a pixel is not in [0,1]"
    assert "outside the ball of 3/50 and of every certificate" in judged[far]
    assert judged[7] == "the record has no such sample"
    assert main(["challenge", str(path), str(mine), "--by", "A. Name"]) == 2
    assert "none of the 6 witnesses refutes" in capsys.readouterr().err
    assert sorted(run.rglob("*")) == files


def test_a_smoothing_certificate_is_never_contradicted_and_a_larger_l2_ball_counts_by_its_own_norm(run: Path) -> None:
    (path,) = (run / "records").glob("*.json")
    claims = claims_of_record(path, HERE)
    at = claims.rows.index[claims.rows["verdict"] == "broken"][0]
    number = int(claims.rows["index"][at])
    claims.rows.loc[at, "radius:smoothing"] = 100.0
    witness = {number: claims.witnesses[number]}
    assert [one.sample for one in _judged(claims, witness, Effect())] == [None]
    claims.rows.loc[at, "radius:ibp"] = float(claims.rows["distance:pgd"][at])
    (judged,) = _judged(claims, witness, Effect())
    assert judged.sample is not None
    assert (judged.sample.was, judged.sample.refutes) == ("certified", ["ibp"])
    claims.rows.loc[at, "radius:ibp"] = np.nextafter(claims.rows["distance:pgd"][at], 0)
    assert [one.sample for one in _judged(claims, witness, Effect())] == [None]


def test_an_attack_that_reached_less_far_than_the_witness_is_not_refuted(run: Path) -> None:
    (path,) = (run / "records").glob("*.json")
    claims = claims_of_record(path, HERE)
    at = claims.rows.index[claims.rows["verdict"] == "broken"][0]
    claims.rows.loc[at, ["verdict", "survived:pgd", "survived:square"]] = ["open", True, True]
    tools = {one.label: one for one in claims.attacks}
    object.__setattr__(tools["square"].tool, "eps", Fraction("0.05"))
    number = int(claims.rows["index"][at])
    (judged,) = _judged(claims, {number: claims.witnesses[number]}, Effect())
    assert judged.sample is not None
    assert judged.sample.refutes == ["pgd"]


def test_a_challenge_of_which_one_byte_was_changed_is_refused(copy: Path, tmp_path: Path) -> None:
    at = broken_of(copy)
    witness = as_survivor(copy, at)
    mine = written(tmp_path / "mine.safetensors", {int(rows_of(copy)["index"][at]): witness})
    made = challenge(copy, mine, "A. Name", HERE).path
    assert made is not None
    for path in (made, made.with_suffix(".safetensors")):
        whole = path.read_bytes()
        path.write_bytes(whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:])
        with pytest.raises(RecordError, match=f"{path.name}: not the file of the challenge"):
            load(copy.parent.parent)
        path.write_bytes(whole)
    load(copy.parent.parent)


def test_a_record_without_its_checkpoint_or_with_another_one_cannot_be_challenged(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = written(tmp_path / "mine.safetensors", {0: torch.zeros(1, 8, 8)})
    (weights,) = (copy.parent.parent / "checkpoints").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    assert main(["challenge", str(copy), str(mine), "--by", "A. Name"]) == 2
    assert "does not hold by itself" in capsys.readouterr().err
    weights.unlink()
    assert main(["challenge", str(copy), str(mine), "--by", "A. Name"]) == 2
    assert "needs its weights" in capsys.readouterr().err
    assert main(["challenge", str(copy), str(mine), "--by", " \n"]) == 2
    assert "--by is the name that gets the credit" in capsys.readouterr().err
