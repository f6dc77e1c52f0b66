"""Bad input is one sentence on stderr and exit code 2; lists and help tell what there is."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch

from bench.__main__ import main
from bench.checkpoints import Card, save_checkpoint
from bench.commands.listing import KINDS
from bench.models import build_model


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one sentence with which a command line is refused."""
    assert main([str(word) for word in words]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    lines = shown.err.strip().splitlines()
    assert len(lines) == 1, shown.err
    assert "Traceback" not in shown.err
    return lines[0]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "net.safetensors"
    model = build_model("mlp", (1, 8, 8), 10)
    save_checkpoint(path, model.state_dict(), Card("mlp", (1, 8, 8), 10, "digits"))
    return path


def suite(tmp_path: Path, text: str) -> Path:
    from tests.test_journeys import TINY

    path = tmp_path / "s.toml"
    old, new = text.split(" -> ")
    assert old in TINY
    path.write_text(TINY.replace(old, new))
    return path


@pytest.mark.parametrize(
    "change, words",
    [
        ('name = "hydra" -> name = "hydro"', "unknown method 'hydro'; did you mean 'hydra'?"),
        ('name = "crown" -> name = "crwn"', "unknown verifier 'crwn'; did you mean 'crown'?"),
        ('name = "pgd"\nsteps = 5 -> name = "pdg"', "unknown attack 'pdg'; did you mean 'pgd'?"),
        ('name = "stability" -> name = "stable"', "unknown objective 'stable'; did you mean 'stability'?"),
        ('name = "digits" -> name = "digit"', "unknown data set 'digit'; did you mean 'digits'?"),
        ('"mlp" -> "mpl"', "unknown model 'mpl'; did you mean 'mlp'?"),
        ("steps = 5 -> steps = \"five\"", "steps of attack 'pgd' must be int, got 'five'"),
        ("steps = 5 -> step = 5", "unknown field of attack 'pgd' 'step'; did you mean 'steps'?"),
        ('eps = "0.05"\n[samples] -> eps = "abc"\n[samples]', "eps of threat must be a fraction such as 8/255"),
        ('norm = "linf" -> norm = "l1"', "norm of threat must be one of linf, l2, got 'l1'"),
        ("pretrain = 2 -> pretrain = 2.5", "pretrain of budget of objective 'ibp' must be int, got 2.5"),
        ('density = ["0.2"] -> density = ["1.2"]', "density is the kept fraction, above 0 and at most 1, got '1.2'"),
        ("seed = [0] -> seed = [-1]", "seed must be a whole number from 0, got -1"),
        ("[suite] -> [suit]", "unknown table in"),
        ("[suite] -> [suite", "is not a readable TOML file"),
    ],
)
def test_a_wrong_suite_is_refused_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str, words: str
) -> None:
    assert words in refused(capsys, "run", suite(tmp_path, change), "--out", tmp_path / "o")


def test_unknown_suites_verbs_options_lists_and_devices_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean 'digits@1'" in refused(capsys, "run", "digits")
    assert "no suite file" in refused(capsys, "run", tmp_path / "no.toml")
    assert "did you mean 'verifiers'" in refused(capsys, "list", "verifier")
    assert "No such command" in refused(capsys, "certfy")
    assert "No such option" in refused(capsys, "demo", "--fast")
    assert "device must be cpu, cuda or auto" in refused(capsys, "run", "digits@1", "--device", "tpu", "--out", tmp_path)
    assert "--workers must be at least 1" in refused(capsys, "run", "digits@1", "--workers", 0, "--out", tmp_path)
    assert "run the suite first" in refused(capsys, "board", "digits@1", "--out", tmp_path)
    if not torch.cuda.is_available():
        assert "no CUDA device" in refused(capsys, "run", "digits@1", "--device", "cuda", "--out", tmp_path)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert "--out" in refused(capsys, "run", "digits@1", "--out", tmp_path / "file" / "runs")


def test_a_missing_data_file_is_named_with_the_way_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], checkpoint: Path
) -> None:
    sentence = refused(capsys, "certify", checkpoint, "--data", "mnist", "--data-dir", tmp_path)
    assert "train-images-idx3-ubyte" in sentence
    assert "--data-dir" in sentence


def test_wrong_checkpoints_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], checkpoint: Path) -> None:
    whole = checkpoint.read_bytes()
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(whole[: len(whole) // 2])
    assert "not a whole safetensors file" in refused(capsys, "certify", cut)
    objects = tmp_path / "objects.pt"
    torch.save(build_model("mlp", (1, 8, 8), 10), objects)
    assert "pickled objects" in refused(capsys, "certify", objects, "--data", "digits")
    bare = tmp_path / "bare.pkl"
    bare.write_bytes(pickle.dumps({"a": print}))
    assert "pickled objects" in refused(capsys, "certify", bare, "--data", "digits")
    assert "is not a checkpoint of cnn_small" in refused(capsys, "certify", checkpoint, "--arch", "cnn_small")
    assert "at least 16x16" in refused(capsys, "certify", checkpoint, "--arch", "lenet")
    assert "there is no checkpoint" in refused(capsys, "certify", tmp_path / "none.pt")


def test_wrong_questions_are_refused(capsys: pytest.CaptureFixture[str], checkpoint: Path) -> None:
    assert "fraction such as 8/255" in refused(capsys, "certify", checkpoint, "--eps", "abc")
    assert "fraction such as 8/255" in refused(capsys, "certify", checkpoint, "--eps", "8/0")
    assert "must not be negative" in refused(capsys, "certify", checkpoint, "--eps=-1/10")
    assert "--norm must be linf or l2" in refused(capsys, "certify", checkpoint, "--norm", "l1")
    assert "did you mean 'crown'" in refused(capsys, "certify", checkpoint, "--verifier", "crow")
    assert "did you mean 'pgd'" in refused(capsys, "certify", checkpoint, "--attack", "pgdd")
    assert "--limit must be at least 1" in refused(capsys, "certify", checkpoint, "--limit", 0)
    assert "l2 balls" in refused(capsys, "certify", checkpoint, "--verifier", "smoothing", "--limit", 1)


@pytest.mark.parametrize("kind", KINDS)
def test_every_list_names_its_entries_with_a_sentence(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", kind, "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)
    assert entries
    assert all(entry["name"] and entry["summary"] for entry in entries)
    assert main(["list", kind]) == 0
    shown = capsys.readouterr().out
    assert all(entry["name"] in shown for entry in entries)


def test_the_lists_hold_the_names_of_the_issue(capsys: pytest.CaptureFixture[str]) -> None:
    wanted = {
        "methods": {"dense", "random", "lwm", "hydra"},
        "objectives": {"benign", "pgd", "trades", "ibp", "stability"},
        "attacks": {"pgd", "apgd", "autoattack"},
        "verifiers": {"ibp", "crown-ibp", "crown", "smoothing"},
        "models": {"mlp", "cnn_small", "cnn_large", "lenet"},
        "data": {"digits", "mnist", "cifar10", "cifar10-jpeg"},
        "suites": {"digits@1"},
    }
    for kind, names in wanted.items():
        assert main(["list", kind, "--json"]) == 0
        assert names <= {entry["name"] for entry in json.loads(capsys.readouterr().out)}


@pytest.mark.parametrize("verb", ["demo", "run", "certify", "list", "board"])
def test_every_verb_shows_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    assert f"sparsecert {verb}" in capsys.readouterr().out
