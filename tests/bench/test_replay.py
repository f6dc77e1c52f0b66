"""A record that holds replays; a forged one, with every digest made to fit again, does not."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from bench.__main__ import main
from bench.build import build
from bench.cells import Assignment, read_suite
from bench.certify import certify
from bench.checkpoints import Card, load_checkpoint, network, save_checkpoint
from bench.claims import Outside, _tool
from bench.data import load
from bench.evaluate import ContradictionError
from bench.question import Question
from bench.replay import Replay, chance, replay
from bench.run import Folders, keep_contradiction, run_cell
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
    (cell,) = read_suite(str(folder / "small.toml")).cells
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


def test_a_folder_of_certify_replays_and_a_flipped_verdict_in_it_does_not(run: Path, tmp_path: Path) -> None:
    checkpoint = next((run / "checkpoints").glob("*.safetensors"))
    question = Question(checkpoint, "linf", Fraction(1, 20), ("ibp", "crown"), ("pgd",), limit=40)
    certify(question, CPU, tmp_path)
    assert all_of(tmp_path).holds
    rows, answer = pd.read_csv(tmp_path / "rows.csv"), json.loads((tmp_path / "answer.json").read_text())
    at = rows.index[(rows["verdict"] == "broken")][0]
    row = answer["rows"][at]
    rows.loc[at, ["verdict", "by", "status:crown", "radius:crown", "survived:pgd"]] = ["certified", "crown", "proved", 0.05, True]
    row |= {"verdict": "certified", "by": "crown"}
    answer["summary"]["certified"] += 1
    answer["summary"]["broken"] -= 1
    rows.to_csv(tmp_path / "rows.csv", index=False)
    (tmp_path / "answer.json").write_text(json.dumps(answer))
    assert failures(tmp_path) == [("certificate", rows["index"][at])]


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
    assert failures(copy)


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


# ---- contradictions --------------------------------------------------------------------------------------------------


def test_a_contradiction_replays_and_one_without_a_witness_does_not(run: Path, tmp_path: Path) -> None:
    path = next((run / "records").glob("*.json"))
    rows, images = rows_of(path), load_file(path.with_suffix(".witnesses.safetensors"))
    state, card = load_checkpoint(next((run / "checkpoints").glob("*.safetensors")))
    assert isinstance(card, Card)
    index = int(images["index"][0])
    row = rows[rows["index"] == index].iloc[0]
    test = load("digits", None).test
    image = test.pixels()[test.index.tolist().index(index)]
    facts = {
        "index": index, "label": int(row["label"]), "verifier": "ibp", "norm": "linf", "radius": 0.05, "attack": "pgd",
        "distance": 0.05, "predicted": 3,
    }
    model = network(state, card, path)
    for name, witness, holds in (("true", images["images"][0], True), ("false", image.clone(), False)):
        found = keep_contradiction(ContradictionError(facts, image, witness), card, name, model, Folders(tmp_path))
        assert all_of(found).holds is holds
        assert main(["replay", str(found)]) == (0 if holds else 3)


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
    assert _tool(kind, stored, HERE) == tool


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


def test_the_command_says_what_it_did(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = next((run / "records").glob("*.json"))
    assert main(["replay", str(path), "--spot", "3"]) == 0
    assert "3 of" in capsys.readouterr().out
    assert main(["replay", str(path), "--spot", "3", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["holds"]
    assert set(shown["caught"]) == {"0.01", "0.05", "0.1"}
