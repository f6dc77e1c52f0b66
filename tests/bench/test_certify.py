"""Certifying one checkpoint: the contract for machines, limits, and a kill that loses nothing."""

from __future__ import annotations

import hashlib
import inspect
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

import bench.certify
import bench.question
from bench.__main__ import main
from bench.build import plain
from bench.checkpoints import Card, save_checkpoint
from bench.commands.certify import _question, certify
from bench.commands.listing import catalogue
from bench.data import load
from bench.models import build_model
from bench.question import prepare
from verifiers.smoothing import certified_radius

VERDICTS = {"misclassified", "broken", "certified", "open", "abstain", "timeout", "error"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A briefly trained mlp on digits with half of its weights pruned away."""
    data, model = load("digits"), build_model("mlp", (1, 8, 8), 10)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    x, y = data.train.pixels(), data.train.labels
    for _ in range(40):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    with torch.no_grad():
        for layer in (model.fc1, model.fc2, model.fc3):
            layer.weight[layer.weight.abs() < layer.weight.abs().median()] = 0
    path = tmp_path_factory.mktemp("net") / "net.safetensors"
    save_checkpoint(path, model.state_dict(), Card("mlp", (1, 8, 8), 10, "digits"))
    return path


def answer(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    assert main(["certify", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_contract_for_machines(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--eps", "1/100", "--verifier", "ibp", "--verifier", "crown", "--attack", "pgd", "--limit", 60)
    found = answer(capsys, trained, *words)
    summary, rows = found["summary"], found["rows"]
    assert len(rows) == summary["n"] == 60
    assert {row["verdict"] for row in rows} <= VERDICTS
    assert [row["index"] for row in rows] == load("digits").test.index[:60].tolist()
    for verdict in VERDICTS:
        assert summary[verdict] == sum(row["verdict"] == verdict for row in rows)
    assert summary["certified"] > 0
    assert summary["clean"] == sum(row["predicted"] == row["label"] for row in rows)
    assert 0.49 < summary["density"] < 0.51
    for row in rows:
        assert row["margin"] == max((row[v]["margin"] for v in ("ibp", "crown") if row[v]["margin"] is not None), default=None)
        assert (row["verdict"] == "certified") == (row["radius"] == 0.01)
        assert row["verdict"] != "certified" or (row["by"] in ("ibp", "crown") and row["margin"] > 0)
        assert row["verdict"] != "broken" or row["by"] == "pgd"


def test_one_verifier_puts_its_facts_into_the_row_itself(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--norm", "l2", "--eps", "0.1", "--verifier", "smoothing", "--n", 300, "--n0", 50, "--limit", 8)
    found = answer(capsys, trained, *words)
    assert found["attacks"] == []
    for row in found["rows"]:
        assert (row["n0"], row["n"], row["alpha"], row["sigma"]) == (50, 300, 0.001, 0.25)
        radius = float(certified_radius([row["hits"]], 300, 0.25, 0.001)[0])
        assert row["radius"] == (radius if row["predicted"] == row["label"] else 0.0)
        assert (row["verdict"] == "certified") == (row["radius"] >= 0.1)
        assert (row["verdict"] == "abstain") == (row["predicted"] == -1)
    assert found["summary"]["average_certified_radius"] == pytest.approx(sum(r["radius"] for r in found["rows"]) / 8)


def test_verdicts_do_not_depend_on_the_batch_size(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Float kernels may round another batch size differently, so margins agree to rounding and verdicts exactly."""
    words = (trained, "--eps", "1/100", "--limit", 40)
    one, other = answer(capsys, *words), answer(capsys, *words, "--batch-size", 7)
    for a, b in zip(one["rows"], other["rows"], strict=True):
        assert (a["verdict"], a["by"], a["radius"]) == (b["verdict"], b["by"], b["radius"])
        assert a["margin"] == pytest.approx(b["margin"], rel=1e-4, abs=1e-5)


def test_what_was_judged_before_a_kill_is_not_judged_again(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["certify", str(trained), "--eps", "1/100", "--limit", "40", "--batch-size", "10", "--json"]
    judged: list[int] = []
    real = bench.certify.evaluate

    def watched(*args: Any, **kwargs: Any) -> Any:
        judged.append(int(args[3][0]))
        if len(judged) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(bench.certify, "evaluate", watched)
    assert main([*words, "--out", str(tmp_path)]) == 130
    assert main([*words, "--out", str(tmp_path)]) == 0
    assert len(judged) == 2 + 1 + 2
    monkeypatch.setattr(bench.certify, "evaluate", real)
    capsys.readouterr()
    whole = answer(capsys, *words[1:-1])
    resumed = json.loads((tmp_path / "answer.json").read_text())
    assert [{**row, "seconds": 0} for row in resumed["rows"]] == [{**row, "seconds": 0} for row in whole["rows"]]
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 41


def test_another_question_never_takes_the_kept_answers(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = [answer(capsys, trained, "--eps", eps, "--limit", 20, "--out", tmp_path) for eps in ("1/100", "1/10")]
    fresh = [answer(capsys, trained, "--eps", eps, "--limit", 20) for eps in ("1/100", "1/10")]
    assert [[row["verdict"] for row in one["rows"]] for one in kept] == [[row["verdict"] for row in one["rows"]] for one in fresh]
    assert kept[0]["summary"]["certified"] > kept[1]["summary"]["certified"]


def test_images_that_the_time_limit_does_not_reach_are_timeouts_not_answers(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = answer(capsys, trained, "--eps", "1/100", "--batch-size", 10, "--total-time-limit", 1e-9, "--limit", 30)
    assert found["summary"]["timeout"] == 30
    assert all((row["verdict"], row["radius"], row["margin"]) == ("timeout", 0.0, None) for row in found["rows"])


# ---- the cascade -----------------------------------------------------------------------------------------------------


def test_exact_decides_what_cheaper_verifiers_and_attacks_leave_open(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (trained, "--eps", "1/50", "--limit", 40, "--attack", "pgd")
    cheap = answer(capsys, *words, "--verifier", "ibp")
    whole = answer(capsys, *words, "--verifier", "ibp", "--verifier", "exact")
    assert cheap["summary"]["open"] > 0 == whole["summary"]["open"], "the question must leave something open"
    for before, after in zip(cheap["rows"], whole["rows"], strict=True):
        if before["verdict"] != "open":
            assert (before["verdict"], before["by"]) == (after["verdict"], after["by"])
        else:
            assert after["by"] == "exact"
            assert after["verdict"] == {"proved": "certified", "broken": "broken"}[after["exact"]["status"]]
    assert whole["summary"]["certified_by"]["exact"] == whole["summary"]["certified"]


def test_a_false_claim_is_exit_code_3_and_the_json_is_still_there(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["certify", str(trained), "--eps", "1/100", "--limit", "3", "--json"]
    assert main([*words, "--claim", "0.9"]) == 3
    shown = capsys.readouterr()
    assert json.loads(shown.out)["claim"]["holds"] is False
    assert "claimed pruned share 9/10 does not hold" in shown.err.splitlines()[-1]
    assert main([*words, "--claim", "0.49"]) == 0
    assert json.loads(capsys.readouterr().out)["claim"]["holds"] is True


def test_a_users_own_network_and_images_are_certified(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import numpy as np
    from safetensors.torch import load_file

    source, images, weights = tmp_path / "mine.py", tmp_path / "mine.npz", tmp_path / "mine.pt"
    source.write_text(
        "from torch import nn\n\ndef build():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), "
        "nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))\n"
    )
    names = {"fc1": "1", "fc2": "3", "fc3": "5"}
    state = {f"{names[k.split('.')[0]]}.{k.split('.')[1]}": v for k, v in load_file(trained).items()}
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, weights)
    test = load("digits").test.first(30)
    np.savez(images, x=test.pixels().numpy(), y=test.labels.numpy())
    own = answer(capsys, weights, "--arch", f"{source}:build", "--data", images, "--eps", "1/100")
    ours = answer(capsys, trained, "--eps", "1/100", "--limit", 30)
    assert [row["verdict"] for row in own["rows"]] == [row["verdict"] for row in ours["rows"]]
    assert "module." in own["layout"] + " ".join(own["notes"])


# ---- what is kept, and what is not -----------------------------------------------------------------------------------

OWN = """
from collections import OrderedDict
from torch import nn

class Net(nn.Sequential):
    def forward(self, x):
        return SIGN * super().forward(x)

def build():
    first, last = [("flat", nn.Flatten()), ("fc1", nn.Linear(64, 128)), ("a", nn.ReLU())], [("fc3", nn.Linear(128, 10))]
    return Net(OrderedDict([*first, ("fc2", nn.Linear(128, 128)), ("b", nn.ReLU()), *last]))
"""
PLUGIN = """
import math
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch

from verifiers import Proof, UnsupportedNetworkError

@dataclass(frozen=True)
class Cautious:
    norm: str = "linf"
    eps: Fraction = Fraction(1, 10)
    deterministic: ClassVar[bool] = True

    def __call__(self, model, x, y):
        radius = torch.full((len(x),), RADIUS, dtype=torch.float64)
        notes = (f"from image {float(x.sum()):.3f}",)
        return Proof(radius, radius + math.inf, y, ("proved" if RADIUS else "open",) * len(x), notes=notes)

class Refuses(Cautious):
    def __call__(self, model, x, y):
        raise UnsupportedNetworkError(f"no rule for image {float(x.sum()):.3f}")
"""


def test_an_edited_network_takes_no_kept_answers(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, found = tmp_path / "mine.py", []
    for sign in ("+1", "-1"):
        source.write_text(OWN.replace("SIGN", sign))
        words = ("--arch", f"{source}:build", "--verifier", "ibp", "--limit", 10, "--out", tmp_path / "out")
        found.append(answer(capsys, trained, *words))
        assert found[-1]["asked"]["arch_digest"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert found[0]["summary"]["clean"] > 5 > found[1]["summary"]["clean"]


def test_an_edited_plug_in_takes_no_kept_answers(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, found = tmp_path / "mine.py", []
    for radius in ("1e-9", "0.00"):
        source.write_text(PLUGIN.replace("RADIUS", radius))
        words = ("--eps", "1/1000000000", "--verifier", f"{source}:Cautious", "--limit", 10, "--out", tmp_path / "out")
        found.append(answer(capsys, trained, *words))
        digest = hashlib.sha256(source.read_bytes()).hexdigest()
        assert found[-1]["asked"]["plugins"] == {f"{source}:Cautious": digest}
    assert found[0]["summary"]["certified"] > 5
    assert found[1]["summary"]["certified"] == 0
    assert all(row["margin"] is None for row in found[0]["rows"]), "an infinite margin is no JSON number"


def test_other_packages_are_another_question(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (trained, "--verifier", "ibp", "--attack", "fgsm", "--limit", 2)
    before = [answer(capsys, *words)["asked"]["fingerprint"] for _ in range(2)]
    assert before[0] == before[1]
    monkeypatch.setattr(bench.question, "packages", lambda: {"torch": "another"})
    assert answer(capsys, *words)["asked"]["fingerprint"] != before[0]


def test_a_resumed_run_says_what_the_uninterrupted_one_said(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "mine.py"
    source.write_text(PLUGIN.replace("RADIUS", "0.0"))
    words = [trained, "--verifier", f"{source}:Cautious", "--verifier", f"{source}:Refuses", "--curve", "1/100", "--limit", 20]
    words += ["--batch-size", 10, "--out", tmp_path / "out"]
    whole = answer(capsys, *words)
    assert len(whole["lowering"]) == len(whole["warnings"]) == 2, "one of each batch"
    monkeypatch.setattr(bench.certify, "evaluate", None)
    monkeypatch.setattr(bench.certify, "measure", None)
    again = answer(capsys, *words, "--total-time-limit", 1e-9)
    assert again["summary"]["seconds"].pop("total") >= sum(again["summary"]["seconds"].values()) > 0
    whole["summary"]["seconds"].pop("total")
    assert {**again, "summary": again["summary"]} == whole


def test_time_that_ran_out_takes_nothing_from_what_is_kept(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of two batches the second one's files are lost; the first is taken whatever the clock says."""
    words = [trained, "--eps", "1/100", "--curve", "1/50", "--batch-size", 10, "--out", tmp_path]
    first = answer(capsys, *words, "--limit", 20)
    for path in (tmp_path / "batches").rglob("00000010.parquet"):
        path.unlink()
    later = answer(capsys, *words, "--limit", 20, "--total-time-limit", 1e-9)
    assert later["rows"][:10] == first["rows"][:10]
    assert [row["verdict"] for row in later["rows"][10:]] == ["timeout"] * 10
    assert {point["n"] for point in later["curve"]} == {10}


def test_beside_a_deterministic_verifier_the_radius_of_a_row_is_the_networks(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--norm", "l2", "--eps", "0.01", "--verifier", "smoothing", "--verifier", "ibp", "--n", 200, "--limit", 10)
    rows = answer(capsys, trained, *words, "--attack", "fgsm")["rows"]
    assert any(row["smoothing"]["radius"] > row["ibp"]["radius"] for row in rows)
    assert all(row["radius"] == row["ibp"]["radius"] for row in rows)


@pytest.mark.parametrize("words, complaint", [
    (("--mean", "nan"), "mean must be finite"), (("--std", "inf"), "std must be positive and finite"),
    (("--std", "1e-46"), "std must be positive and finite"), (("--eps", "\uff18/255"), "must be a fraction"),
    (("--verifier", "smoothing", "--norm", "l2", "--rule", "sequential", "--grid", "1/0"), "--grid must be a fraction"),
])  # fmt: skip
def test_numbers_that_are_none_are_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], complaint: str
) -> None:
    from safetensors.torch import load_file

    torch.save(load_file(trained), tmp_path / "net.pt")
    assert main(["certify", str(tmp_path / "net.pt"), "--data", "digits", *words]) == 2
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == 1
    assert complaint in shown[0]


def test_the_list_of_verifiers_says_what_certify_asks_with(trained: Path) -> None:
    options = {name: one.default for name, one in inspect.signature(certify).parameters.items()}
    for entry in catalogue("verifiers"):
        norm = entry["fields"]["norm"]
        asked = _question({**options, "checkpoint": trained, "limit": 1, "norm": norm, "verifier": [entry["name"]], "attack": []})
        (one,) = prepare(asked, torch.device("cpu")).verifiers
        said = {**entry["fields"], **entry["certify"]}
        assert {**plain(one.tool), "eps": Fraction(plain(one.tool)["eps"])} == {**said, "eps": Fraction(said["eps"])}
