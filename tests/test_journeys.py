"""The three walks, end to end, on the embedded data: run a suite, rank a method from outside, certify a checkpoint."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bench.__main__ import main
from leaderboard.canonical import digest

ROOT = Path(__file__).resolve().parent.parent

TINY = """
[suite]
name = "tiny"
version = 1
[data]
name = "digits"
[threat]
norm = "linf"
eps = "0.05"
[samples]
every = 6
[budget]
pretrain = 2
prune = 1
finetune = 2
batch = 128
lr = 0.1
[grid]
arch = ["mlp"]
density = ["0.2"]
seed = [0]
[[method]]
name = "dense"
[[method]]
name = "lwm"
[[method]]
name = "hydra"
[[objective]]
name = "ibp"
eps = "0.05"
[[objective]]
name = "stability"
headline = "certified.smoothing"
[[attack]]
name = "pgd"
steps = 5
[[verifier]]
name = "ibp"
[[verifier]]
name = "crown"
[[verifier]]
name = "smoothing"
norm = "l2"
eps = "0.1"
n = 200
objectives = ["stability"]
first = 20
"""


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


def command(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "bench", *map(str, words)]


def records_of(out: Path) -> dict[str, tuple[dict[str, Any], bytes]]:
    """Every record without its times, and its verdict rows byte for byte."""
    found = {}
    for path in sorted((out / "tiny@1" / "records").glob("*.json")):
        record = json.loads(path.read_text())
        assert record["digest"] == digest(record)
        record.pop("timing")
        found[path.stem] = (record, path.with_suffix(".parquet").read_bytes())
    return found


def test_a_suite_runs_draws_its_board_and_is_done_at_once_when_run_again(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs"
    assert main(["run", str(tiny), "--out", str(out), "--workers", "2", "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert (first["cells"], first["skipped"], first["failed"]) == (6, 0, {})
    page = Path(first["page"]).read_text()
    assert "hydra" in page
    assert "smoothing" in page
    before = records_of(out)
    assert len(before) == 6

    assert main(["run", str(tiny), "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["skipped"] == 6
    assert records_of(out) == before

    assert main(["board", "tiny@1", "--out", str(out)]) == 0
    assert "hydra" in capsys.readouterr().out


def test_two_suite_runs_in_different_folders_write_bit_identical_records(tiny: Path, tmp_path: Path) -> None:
    for name, workers in (("a", "1"), ("b", "2")):
        assert main(["run", str(tiny), "--out", str(tmp_path / name), "--workers", workers, "--json"]) == 0
    assert records_of(tmp_path / "a") == records_of(tmp_path / "b")


def test_a_suite_killed_again_and_again_ends_with_bit_identical_records(tiny: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main(["run", str(tiny), "--out", str(whole), "--workers", "1", "--json"]) == 0
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    kills = 0
    for wait in (4.0, 5.0, 5.5):
        words = command("run", tiny, "--out", killed, "--workers", "2", "--json")
        run = subprocess.Popen(words, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        try:
            run.wait(wait)
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()
            kills += 1
    assert kills > 0
    done = subprocess.run(command("run", tiny, "--out", killed, "--json"), env=env, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["failed"] == {}
    assert records_of(killed) == records_of(whole)
    assert not list(killed.rglob("*.part"))


ASLEEP = '''
import os, pathlib, time
from dataclasses import dataclass

@dataclass(frozen=True)
class Asleep:
    """Never reports anything."""

    scope = "per layer"

    def __call__(self, model, density, training):
        pathlib.Path(os.environ["SPARSECERT_TEST_MARK"], "asleep").touch()
        time.sleep(600)
        yield training.pretrain()
'''


def test_workers_stop_when_their_parent_is_killed_even_where_they_have_nothing_to_report(tiny: Path, tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "SPARSECERT_TEST_MARK": str(tmp_path)}
    (tmp_path / "asleep.py").write_text(ASLEEP)
    shipped = '[[method]]\nname = "dense"\n[[method]]\nname = "lwm"\n[[method]]\nname = "hydra"\n'
    assert shipped in TINY
    tiny.write_text(TINY.replace(shipped, f'[[method]]\nname = "{tmp_path / "asleep.py"}:Asleep"\n'))
    words = command("run", tiny, "--out", tmp_path / "o", "--workers", "1", "--json")
    run = subprocess.Popen(words, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 180
    while not (tmp_path / "asleep").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert _marked(str(tmp_path)) > 1
    run.kill()
    run.wait()
    while _marked(str(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert _marked(str(tmp_path)) == 0


def _marked(mark: str) -> int:
    """Living processes whose environment carries the mark."""
    count = 0
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            count += f"SPARSECERT_TEST_MARK={mark}".encode() in path.read_bytes()
        except OSError:
            continue
    return count


MINE = '''
from dataclasses import dataclass
from bench.sparsity import keep_largest, mask_layers, weights

@dataclass(frozen=True)
class Mine:
    """Keeps small weights."""

    def __call__(self, model, density, training):
        yield training.pretrain()
        mask_layers(model, keep_largest({n: -w.abs() for n, w in weights(model).items()}, density))
        yield training.finetune()

@dataclass(frozen=True)
class Broken:
    """Raises."""

    def __call__(self, model, density, training):
        yield training.pretrain()
        raise ValueError("no luck")
'''


def test_a_method_from_a_file_is_ranked_and_an_edited_file_runs_again(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plugin, out = tmp_path / "mine.py", tmp_path / "runs"
    plugin.write_text(MINE)
    words = ["run", str(tiny), "--method", f"{plugin}:Mine", "--out", str(out), "--workers", "1", "--json"]
    assert main(words) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["cells"] == 8
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["skipped"] == 8
    plugin.write_text(MINE.replace("Keeps small", "Still keeps small"))
    assert main(words) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["skipped"] == 6
    assert "run again" in shown.err
    superseding = [json.loads(p.read_text()) for p in (out / "tiny@1" / "records").glob("*Mine*.json")]
    assert all(record["supersedes"] for record in superseding)


def test_a_failing_cell_costs_exit_code_1_and_nothing_else(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plugin, out = tmp_path / "mine.py", tmp_path / "runs"
    plugin.write_text(MINE)
    words = ["run", str(tiny), "--method", f"{plugin}:Broken", "--out", str(out), "--workers", "1", "--json"]
    assert main(words) == 1
    shown = capsys.readouterr()
    report = json.loads(shown.out)
    assert len(report["failed"]) == 2
    assert all("no luck" in sentence for sentence in report["failed"].values())
    assert len(records_of(out)) == 6


WRONG = '''
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar
import torch
from verifiers.proof import fixed_radius_proof

@dataclass(frozen=True)
class Everything:
    """Certifies everything, wrongly."""

    norm: str = "linf"
    eps: Fraction = Fraction(1, 10)
    deterministic: ClassVar[bool] = True

    def __call__(self, model, x, y):
        ones = torch.ones(len(x))
        return fixed_radius_proof(float(self.eps), ones > 0, ones, model(x).argmax(1))
'''


def test_a_wrong_certificate_stops_the_record_with_exit_code_3_and_a_witness_that_runs_again(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from safetensors.torch import load_file

    from bench.models import build_model

    plugin, out = tmp_path / "wrong.py", tmp_path / "runs"
    plugin.write_text(WRONG)
    text = tiny.read_text().replace('name = "ibp"\neps = "0.05"\n[[objective]]', 'name = "benign"\n[[objective]]', 1)
    text = text.replace('[[method]]\nname = "lwm"\n', "").replace("pretrain = 2", "pretrain = 10")
    text = text.replace('eps = "0.05"', 'eps = "0.2"')
    tiny.write_text(text + f'\n[[verifier]]\nname = "{plugin}:Everything"\nlabel = "wrong"\nobjectives = ["benign"]\n')
    assert main(["run", str(tiny), "--out", str(out), "--workers", "1", "--json"]) == 3
    shown = capsys.readouterr()
    report = json.loads(shown.out)
    assert len(report["contradicted"]) == 2
    assert all("wrong certified linf radius 0.2, but pgd found" in sentence for sentence in report["contradicted"].values())
    assert not list((out / "tiny@1" / "records").glob("*-benign-*.json"))
    assert len(list((out / "tiny@1" / "contradictions").glob("*.json"))) == 2
    for path in (out / "tiny@1" / "contradictions").glob("*.json"):
        facts, tensors = json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))
        model = build_model("mlp", (1, 8, 8), 10)
        model.load_state_dict({k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")})
        witness, image = tensors["witness"].double(), tensors["image"].double()
        assert float((witness - image).abs().max()) <= 0.2
        assert int(model.double()(witness[None]).argmax()) != facts["label"] == int(model(image[None]).argmax())
        assert torch.all((witness >= 0) & (witness <= 1))


def test_a_checkpoint_of_a_run_is_certified_with_the_verdicts_of_its_record(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import pandas as pd

    out = tmp_path / "runs"
    tiny.write_text(tiny.read_text().replace("every = 6", "first = 50"))
    assert main(["run", str(tiny), "--out", str(out), "--workers", "1", "--json"]) == 0
    capsys.readouterr()
    (path,) = (out / "tiny@1" / "checkpoints").glob("*hydra-ibp*.safetensors")
    record = json.loads((out / "tiny@1" / "records" / f"{path.stem}.json").read_text())
    rows = pd.read_parquet(out / "tiny@1" / "records" / f"{path.stem}.parquet")
    assert main(["certify", str(path), "--eps", "1/20", "--limit", "50", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["summary"]["n"] == len(answer["rows"]) == 50
    assert answer["summary"]["clean"] == record["metrics"]["clean"]["hits"]
    assert answer["summary"]["certified_by"]["crown"] == record["metrics"]["certified"]["crown"]["hits"]
    assert [row["crown"]["radius"] for row in answer["rows"]] == rows["radius:crown"].tolist()
    assert answer["summary"]["density"] == pytest.approx(record["sparsity"]["kept"] / record["sparsity"]["total"])
    assert [row["index"] for row in answer["rows"]] == rows["index"].tolist()

    words = ["--norm", "l2", "--eps", "0.1", "--verifier", "smoothing", "--n", "200", "--limit", "10"]
    assert main(["certify", str(path), *words]) == 0
    shown = capsys.readouterr().out
    assert "density" in shown
