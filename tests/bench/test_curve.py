"""Accuracy over eps, minimal distances, and what certify leaves in its folder: against single runs, closed forms and liars."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

import bench.certify
from bench.__main__ import main
from bench.build import build, load_file
from bench.cells import Assignment
from bench.checkpoints import Card, save_checkpoint
from bench.curve import measure
from bench.data import load
from bench.evaluate import ContradictionError, evaluate
from bench.models import build_model
from bench.radii import Ladder, MinimalDistance
from bench.threat import Threat
from verifiers import Proof
from verifiers.exact import Exact
from verifiers.interval import IBP

STEPS = ("1/100", "1/50", "1/25")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A briefly trained mlp on digits with half of its weights pruned away, under a name with markup in it."""
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
    path = tmp_path_factory.mktemp("net") / "<b>net&.safetensors"
    save_checkpoint(path, model.state_dict(), Card("mlp", (1, 8, 8), 10, "digits"))
    return path


@pytest.fixture
def linear(tmp_path: Path) -> tuple[list[str], Tensor, Tensor, Tensor]:
    """(words for certify, weight, x, y) of a linear classifier, whose minimal distances have a closed form."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(3, 4, generator=generator), 0.3 + 0.4 * torch.rand(12, 1, 2, 2, generator=generator)
    y = (x.flatten(1) @ weight.T).argmax(1)
    y[0] = (y[0] + 1) % 3  # one image that is classified wrongly
    build = "def build():\n    return nn.Sequential(nn.Flatten(), nn.Linear(4, 3, bias=False))\n"
    (tmp_path / "mine.py").write_text("from torch import nn\n\n" + build)
    torch.save({"1.weight": weight}, tmp_path / "net.pt")
    np.savez(tmp_path / "mine.npz", x=x.numpy(), y=y.numpy(), classes=3)
    words = ["--arch", f"{tmp_path / 'mine.py'}:build", "--data", str(tmp_path / "mine.npz")]
    return [str(tmp_path / "net.pt"), *words], weight, x, y


def answer(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    assert main(["certify", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main(["certify", *map(str, words), "--json"]) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]  # before it may stand what was being done


def counts(found: dict[str, Any], kind: str, by: str) -> list[int]:
    return [point["count"] for point in found["curve"] if (point["kind"], point["by"]) == (kind, by)]


# ---- the curve -------------------------------------------------------------------------------------------------------


def test_a_curve_is_what_single_runs_at_each_eps_certify_and_leaves_the_rows_alone(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (trained, "--verifier", "ibp", "--verifier", "crown", "--limit", 40)
    whole = answer(capsys, *words, "--eps", "1/50", "--curve", ", ".join(STEPS), "--batch-size", 25)
    single = {eps: answer(capsys, *words, "--eps", eps) for eps in STEPS}
    for name in ("ibp", "crown"):
        assert counts(whole, "certified", name) == [single[eps]["summary"]["certified_by"][name] for eps in STEPS]
    assert len(set(counts(whole, "certified", "crown"))) == 3, "the curve must fall"
    assert counts(whole, "certified", "union") == [single[eps]["summary"]["certified"] for eps in STEPS]
    attacked = counts(whole, "attacked", "worst")
    assert all(both <= alone["summary"]["survived"]["pgd"] for both, alone in zip(attacked, single.values(), strict=True))
    assert attacked == sorted(attacked, reverse=True)
    assert all(upper >= lower for upper, lower in zip(attacked, counts(whole, "certified", "union"), strict=True))
    same = ("index", "verdict", "by", "radius")
    assert [[row[key] for key in same] for row in whole["rows"]] == [[row[key] for key in same] for row in single["1/50"]["rows"]]
    assert whole["rows"][0].keys() == single["1/50"]["rows"][0].keys()


def test_a_ladder_asks_about_no_sample_that_a_larger_step_or_an_earlier_answer_settles() -> None:
    asked: list[tuple[Fraction, list[float]]] = []

    @dataclass(frozen=True)
    class UpTo:
        """Certifies an image up to the brightness of its one pixel."""

        norm: str = "linf"
        eps: Fraction = Fraction(1, 10)
        deterministic: ClassVar[bool] = True

        def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Proof:
            asked.append((self.eps, [round(one, 2) for one in x.flatten().tolist()]))
            radius = torch.where(x.flatten() >= float(self.eps), float(self.eps), 0.0).double()
            return Proof(radius, radius, y, tuple("proved" if far else "open" for far in radius.tolist()))

    steps = tuple(Fraction(k, 10) for k in (1, 3, 5))
    x, y = torch.tensor([0.05, 0.2, 0.4, 0.9]).view(4, 1, 1, 1), torch.zeros(4, dtype=torch.int64)
    proof = Ladder(UpTo(), steps, torch.tensor([0.0, 0.1, 0.0, 0.0]))(nn.Flatten(), x, y)
    assert proof.radius.tolist() == pytest.approx([0, 0.1, 0.3, 0.5])
    assert asked == [(steps[2], [0.05, 0.2, 0.4, 0.9]), (steps[1], [0.05, 0.2, 0.4]), (steps[0], [0.05])]


def test_a_kill_in_the_curve_loses_no_batch_and_a_finished_run_only_adds_its_curve(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["certify", str(trained), "--eps", "1/100", "--verifier", "ibp", "--limit", "30", "--batch-size", "10", "--json"]
    assert main([*words, "--out", str(tmp_path)]) == 0
    monkeypatch.setattr(bench.certify, "evaluate", None)  # the rows are not judged again
    measured: list[int] = []

    def watched(*args: Any) -> pd.DataFrame:
        measured.append(int(args[3]["index"].iloc[0]))
        if len(measured) == 2:
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(bench.certify, "measure", watched)
    assert main([*words, "--out", str(tmp_path), "--curve", "1/100,1/50"]) == 130
    assert main([*words, "--out", str(tmp_path), "--curve", "1/100,1/50"]) == 0
    assert len(measured) == 2 + 2
    monkeypatch.undo()
    capsys.readouterr()
    fresh = answer(capsys, *words[1:-1], "--curve", "1/100,1/50")
    assert json.loads((tmp_path / "answer.json").read_text())["curve"] == fresh["curve"]


LIAR = """
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar
import torch
from verifiers import Proof

@dataclass(frozen=True)
class Liar:
    norm: str = "linf"
    eps: Fraction = Fraction(1, 10)
    deterministic: ClassVar[bool] = True

    def __call__(self, model, x, y):
        radius = torch.full((len(x),), float(self.eps) if self.eps > Fraction(1, 10) else 0.0, dtype=torch.float64)
        return Proof(radius, radius, y, tuple("proved" if far else "open" for far in radius.tolist()))
"""


def test_a_certificate_of_the_curve_that_an_attack_breaks_is_exit_code_3(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The liar is honest at the eps of the rows and lies at a larger one, where a witness refutes it."""
    (tmp_path / "liar.py").write_text(LIAR)
    words = ["certify", str(trained), "--eps", "1/10", "--verifier", f"{tmp_path / 'liar.py'}:Liar", "--limit", "5", "--json"]
    assert main(words) == 0
    capsys.readouterr()
    assert main([*words, "--curve", "1/5"]) == 3
    assert json.loads(capsys.readouterr().out)["contradiction"]["radius"] == 0.2


class Lying(MinimalDistance):
    """Says 0.3 of every image."""

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Proof:
        return Proof(torch.full((len(x),), 0.3, dtype=torch.float64), torch.full((len(x),), torch.nan), y, ("proved",) * len(x))


def test_an_attack_of_the_curve_refutes_a_bracket_of_the_minimal_distance() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False)).eval()
    model[1].weight.data = torch.eye(2)
    x, y = torch.tensor([[0.55, 0.45]]).view(1, 1, 1, 2), torch.tensor([0])
    threat = Threat("linf", Fraction(1, 100))
    tools = [Assignment("distance", {}, Lying(Exact(eps=threat.eps)))]
    attack = [Assignment("pgd", {"name": "pgd"}, build("attack", {"name": "pgd", "norm": "linf", "eps": "1/100"}))]
    rows = evaluate(model, x, y, [7], threat, attack, tools).rows
    assert rows["radius:distance"].tolist() == [0.3]
    with pytest.raises(ContradictionError, match="distance certified"):
        measure(model, x, y, rows, threat, [Fraction(1, 10)], attack, tools)


def test_a_counterexample_of_exact_in_the_rows_refutes_a_certificate_of_the_curve(tmp_path: Path) -> None:
    (tmp_path / "liar.py").write_text(LIAR)
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False)).eval()
    model[1].weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    x, y = torch.tensor([[0.55, 0.45], [0.9, 0.1]]).view(2, 1, 1, 2), torch.tensor([0, 0])
    threat = Threat("linf", Fraction(1, 10))
    tools = [Assignment("liar", {}, load_file(tmp_path / "liar.py").Liar()), Assignment("exact", {}, Exact(eps=threat.eps))]
    rows = evaluate(model, x, y, [7, 8], threat, [], tools).rows
    assert rows["verdict"].tolist() == ["broken", "certified"]
    honest = measure(model, x, y, rows, threat, [Fraction(1, 20)], [], tools)
    assert honest["distance"].tolist() == [rows["distance:exact"][0], np.inf]
    with pytest.raises(ContradictionError) as caught:
        measure(model, x, y, rows, threat, [Fraction(1, 5)], [], tools)
    assert (caught.value.facts["index"], caught.value.facts["verifier"], caught.value.facts["predicted"]) == (7, "liar", 1)
    assert int(model(caught.value.witness[None]).argmax()) == 1


def test_the_whole_curve_of_smoothing_is_that_of_its_stored_radii(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--norm", "l2", "--eps", "0.1", "--verifier", "smoothing", "--n", 300, "--n0", 50, "--limit", 12, "--curve", "1/4")
    found = answer(capsys, trained, *words)
    radii = [row["radius"] for row in found["rows"]]
    assert {point["eps"] for point in found["curve"]} == {one for one in radii if one > 0} | {0.25}
    for point in found["curve"]:
        assert (point["kind"], point["by"]) == ("certified", "smoothing")
        assert point["count"] == sum(radius >= point["eps"] for radius in radii)
    assert len(found["curve"]) > 2


def test_images_that_the_time_limit_does_not_reach_have_no_part_in_a_curve(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert answer(capsys, trained, "--total-time-limit", 1e-9, "--limit", 10, "--curve", "1/100")["curve"] == []


@pytest.mark.parametrize("steps, words", [("0.1,x", "--curve"), ("0", "positive"), ("-1/5", "--curve"), ("8", "pixel")])
def test_a_curve_of_senseless_radii_is_refused(trained: Path, capsys: pytest.CaptureFixture[str], steps: str, words: str) -> None:
    assert words in refused(capsys, trained, f"--curve={steps}")


# ---- the minimal distance --------------------------------------------------------------------------------------------


def test_brackets_of_a_linear_network_hold_its_closed_form(
    linear: tuple[list[str], Tensor, Tensor, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """min over j of margin_j / |w_y - w_j|_1 is the linf distance where the image stays inside [0,1] on the way."""
    words, weight, x, y = linear
    words += ["--eps", "1/5", "--verifier", "exact", "--radius", "--tolerance", "1/500", "--batch-size", "5"]
    found = answer(capsys, *words, "--out", tmp_path / "out")
    rows, logits = found["rows"], x.double().flatten(1) @ weight.double().T
    for row, own, scores in zip(rows, y.tolist(), logits, strict=True):
        if row["verdict"] == "misclassified":
            assert (row["distance_lower"], row["distance_upper"]) == (None, None)
            continue
        others = [j for j in range(3) if j != own]
        wanted = min(float((scores[own] - scores[j]) / (weight[own] - weight[j]).double().abs().sum()) for j in others)
        if wanted > 0.2:
            assert row["distance_lower"] == pytest.approx(0.2)
            assert row["distance_upper"] is None
        else:
            assert row["distance_lower"] <= wanted <= row["distance_upper"] * (1 + 1e-6)
            assert row["distance_upper"] - row["distance_lower"] <= 1 / 500 + 1e-9
        assert (row["verdict"] == "certified") == (wanted > 0.2)
        assert (row["verdict"] == "broken") == (row["distance_upper"] is not None)
    correct, summary = [row for row in rows if row["verdict"] != "misclassified"], found["summary"]["distance"]
    assert 0 < summary["with_witness"] < summary["n"] == len(correct) == 11
    assert summary["mean_lower"] == pytest.approx(np.mean([row["distance_lower"] for row in correct]))
    assert summary["median_lower"] == pytest.approx(np.median([row["distance_lower"] for row in correct]))
    assert summary["mean_upper"] is None
    assert [one["label"] for one in found["verifiers"]] == ["exact"]
    table = pd.read_csv(tmp_path / "out" / "rows.csv")
    assert table["distance_lower"].dropna().tolist() == [row["distance_lower"] for row in correct]
    assert f"at least {summary['mean_lower']:.4g} on average" in (tmp_path / "out" / "report.html").read_text()


def test_a_distance_that_cannot_be_bracketed_is_refused_in_one_sentence(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "--verifier exact" in refused(capsys, trained, "--radius")
    assert "linf" in refused(capsys, trained, "--radius", "--verifier", "exact", "--norm", "l2")
    assert "--tolerance" in refused(capsys, trained, "--radius", "--verifier", "exact", "--tolerance", "0")
    assert "must be positive, got -1/9" in refused(capsys, trained, "--radius", "--verifier", "exact", "--tolerance=-1/9")
    assert "--radius" in refused(capsys, trained, "--verifier", "exact", "--tolerance", "0.1")
    (tmp_path / "soft.py").write_text(
        "from torch import nn\n\ndef build():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Sigmoid())\n"
    )
    torch.save({"1.weight": torch.randn(10, 64), "1.bias": torch.zeros(10)}, tmp_path / "soft.pt")
    words = (tmp_path / "soft.pt", "--arch", f"{tmp_path / 'soft.py'}:build", "--data", "digits", "--limit", 200)
    assert "--radius cannot treat this network" in refused(capsys, *words, "--verifier", "exact", "--radius")


# ---- what lies in the folder -----------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Every attribute that a browser would fetch, every tag, all text."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action", "data")]

    def handle_data(self, data: str) -> None:
        self.text += f" {data}"


def test_the_folder_holds_the_same_rows_twice_the_curve_a_picture_and_a_page_that_fetches_nothing(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--eps", "1/100", "--limit", 20, "--curve", "1/100,1/50", "--claim", "0.4", "--out", tmp_path)
    found = answer(capsys, trained, *words)
    rows = pd.read_parquet(tmp_path / "rows.parquet")
    text = pd.read_csv(tmp_path / "rows.csv").fillna({"by": ""})
    pd.testing.assert_frame_equal(rows, text, check_dtype=False)
    assert rows["verdict"].tolist() == [row["verdict"] for row in found["rows"]]
    assert pd.read_csv(tmp_path / "curve.csv").to_dict("records") == found["curve"]
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG\r\n")
    page = Page()
    page.feed((tmp_path / "report.html").read_text())
    assert all(one.startswith(("data:", "#")) for one in page.fetched)
    assert "script" not in page.tags
    assert "b" not in page.tags, "the checkpoint's name must be escaped"
    shown = " ".join(page.text.split())
    assert "<b>net&.safetensors" in shown
    for words in (found["claim"]["sentence"], "Sparsity passport", "certified by crown", "lowering", "12,9", "no health flag"):
        assert words.lower() in shown.lower()
    for point in found["curve"]:
        assert f"{point['exact']} " in shown


@pytest.mark.parametrize("words", [("--verifier", "ibp"), ("--norm", "l2", "--verifier", "smoothing", "--n", 100)])
def test_a_page_of_a_run_without_a_curve_option_is_whole_too(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[object, ...]
) -> None:
    found = answer(capsys, trained, *words, "--limit", 5, "--out", tmp_path)
    assert (tmp_path / "curve.png").exists() == bool(found["curve"]) == ("smoothing" in words)
    assert (tmp_path / "report.html").read_text().endswith("</html>")


def test_certify_counts_the_stored_form_of_a_quantised_checkpoint(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from bench.checkpoints import read
    from bench.factors import Stored, stored_state

    state = read(trained).state
    rounded: Callable[[Tensor], Tensor] = lambda w: (w * 16).round() / 16  # noqa: E731
    forms = {name: Stored("plain", {"W": rounded(value)}, frozenset("W")) for name, value in state.items() if value.dim() == 2}
    plain = {**state, **{name: form.merged for name, form in forms.items()}}
    save_checkpoint(tmp_path / "net.safetensors", stored_state(plain, forms), Card("mlp", (1, 8, 8), 10, "digits"))
    found = answer(capsys, tmp_path / "net.safetensors", "--eps", "1/100", "--limit", 5, "--verifier", "ibp", "--out", tmp_path)
    stored = found["passport"]["stored"]
    assert "codes into a book of 3 weights" in found["layout"]
    assert stored["kept"] == found["passport"]["kept"] == sum(int((form.merged != 0).sum()) for form in forms.values())
    assert stored["bits"]["paper"] < 32 * stored["kept"]
    assert "stored form" in (tmp_path / "report.html").read_text()


def test_ibp_at_the_largest_step_is_the_largest_radius_of_its_ladder(trained: Path) -> None:
    from bench.checkpoints import network, read

    loaded = read(trained)
    assert loaded.card is not None
    model, samples = network(loaded.state, loaded.card, trained), load("digits").test.first(40)
    x, y = samples.pixels(), samples.labels
    steps = [Fraction(one) for one in STEPS]
    proof = Ladder(IBP("linf", steps[0]), tuple(steps))(model, x, y)
    for step in steps:
        alone = IBP("linf", step)(model, x, y).radius > 0
        assert torch.equal(proof.radius >= float(step), alone)
