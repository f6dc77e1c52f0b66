"""Exported files ask exactly what was certified: the same network, boxes that hold the ball, the same verdicts."""

from __future__ import annotations

import csv
import importlib.util
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bench.__main__ import main
from bench.data import load
from bench.errors import UserError
from bench.export import export
from bench.onnx_files import read_onnx
from bench.vnnlib_files import read_property
from verifiers.normalise import Normalize

onnx = pytest.importorskip("onnx")
pytest.importorskip("pysmt")
if importlib.util.find_spec("onnx2torch") is None:
    pytest.skip("onnx2torch is not installed", allow_module_level=True)
from onnx.reference import ReferenceEvaluator  # noqa: E402

EPS = Fraction(1, 12)  # no float
LIMIT = 8


class Small(nn.Module):
    """A normalisation inside, a convolution with BatchNorm, two linear layers: small enough for the complete verifier."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            Normalize([0.3], [0.4]), nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
            nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, data = Small(), load("digits")
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        x, y = data.train.pixels()[:300], data.train.labels[:300]
        for _ in range(50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def files(trained: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, data = tmp_path_factory.mktemp("export") / "files", load("digits")
    export(trained, data, data.test.first(LIMIT), EPS, folder, 12.5)
    return folder


def test_the_exported_network_is_the_network_layer_by_layer(trained: nn.Module, files: Path) -> None:
    x = load("digits").test.first(20).pixels()
    want = trained(x).numpy()
    kinds = [node.op_type for node in onnx.load(files / "net.onnx").graph.node]
    assert "BatchNormalization" in kinds  # nothing was folded: its rounding is that of the network
    assert np.allclose(read_onnx(files / "net.onnx").model(x).numpy(), want, atol=1e-5)
    whole = ReferenceEvaluator(onnx.version_converter.convert_version(onnx.load(files / "net.onnx"), 15))
    assert np.allclose(whole.run(None, {"X": x.numpy()})[0], want, atol=1e-4)  # opset 15: see bench.onnx_files on BatchNorm


def test_a_file_holds_the_exact_ball_and_hardly_more(files: Path) -> None:
    samples = load("digits").test.first(LIMIT)
    for at, (index, label) in enumerate(zip(samples.index.tolist(), samples.labels.tolist())):
        (region,) = read_property(files / f"prop_{index}.vnnlib").regions
        assert len(region.unsafe) == 9
        assert all(row.coefficients[label] == 1 for (row,) in region.unsafe)
        for x, low, high in zip(samples.pixels(torch.tensor([at])).flatten().tolist(), region.lower, region.upper, strict=True):
            exact_low, exact_high = max(Fraction(0), Fraction(x) - EPS), min(Fraction(1), Fraction(x) + EPS)
            assert exact_low - Fraction(1, 10**6) < low <= exact_low
            assert exact_high <= high < exact_high + Fraction(1, 10**6)
            assert np.float32(low) == low
            assert np.float32(high) == high


def test_the_index_lists_every_file_with_its_time_limit(files: Path) -> None:
    with open(files / "instances.csv", newline="") as handle:
        rows = list(csv.reader(handle))
    assert [row[1] for row in rows] == [f"prop_{index}.vnnlib" for index in load("digits").test.first(LIMIT).index.tolist()]
    assert all((files / row[0]).is_file() and (files / row[1]).is_file() and row[2] == "13" for row in rows)


def run(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    assert main(["certify", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_rows_of_certify_and_answers_to_the_files_agree(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The re-imported network is certified and exported anew; each of its files is answered as its row is."""
    words = ("--data", "digits", "--eps", EPS, "--limit", LIMIT, "--verifier", "exact", "--export", tmp_path / "again")
    rows = run(capsys, files / "net.onnx", *words)["rows"]
    means = {"certified": "unsat", "broken": "sat", "misclassified": "sat"}
    answers = []
    for row in rows:
        found = run(capsys, tmp_path / "again" / "net.onnx", "--vnnlib", files / f"prop_{row['index']}.vnnlib")
        assert found["answer"] == means[row["verdict"]]
        assert (found["counterexample"] is None) == (found["answer"] == "unsat")
        answers.append(found["answer"])
    assert {"sat", "unsat"} <= set(answers)
    for name in (path.name for path in files.glob("prop_*")):
        assert (files / name).read_text() == (tmp_path / "again" / name).read_text()


def test_a_counterexample_is_printed_as_the_competition_has_it(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = next(path.read_text() for path in sorted(files.glob("prop_*")))
    all_images = files.parent / "all.vnnlib"
    all_images.write_text(text.replace("(assert (or", "(assert (or (and (<= Y_0 1000000.0))"))
    assert main(["certify", str(files / "net.onnx"), "--vnnlib", str(all_images)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "sat"
    assert lines[1].startswith("((X_0 ")
    assert lines[-1].endswith("))")
    assert len(lines) == 1 + 64 + 10


@pytest.mark.parametrize("words, sentence", [
    (["net.onnx", "--vnnlib", "p.vnnlib", "--eps", "0.1"], "--eps says nothing"),
    (["net.onnx", "--vnnlib", "none.vnnlib"], "there is no file"),
    (["net.onnx", "--vnnlib", "p.vnnlib", "--time-limit", "0"], "--time-limit"),
    (["p.vnnlib", "--vnnlib", "p.vnnlib"], "asks about an .onnx network"),
    (["net.onnx", "--vnnlib", "p.vnnlib"], "the property is about 1 inputs and 1 outputs"),
])  # fmt: skip
def test_questions_that_make_no_sense_are_bad_input(
    words: list[str], sentence: str, files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(files)
    bounds = "(assert (<= X_0 1))(assert (>= X_0 0))(assert (<= Y_0 0))"
    Path("p.vnnlib").write_text(f"(declare-const X_0 Real)(declare-const Y_0 Real){bounds}")
    assert main(["certify", *words]) == 2
    told = capsys.readouterr().err
    assert sentence in told
    assert told.count("\n") == 1


class Strange(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.matrix_exp(x).flatten(1)


def test_a_network_that_onnx_cannot_express_is_refused(tmp_path: Path) -> None:
    data = load("digits")
    with pytest.raises(UserError, match="cannot be written as ONNX"):
        export(Strange(), data, data.test.first(1), EPS, tmp_path)
    assert not (tmp_path / "net.onnx").exists()
