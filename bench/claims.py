"""What a record, or the folder of `certify --out`, claims: read with distrust, ready to be run again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from leaderboard.checks import check
from leaderboard.record import Record, columns_of, read
from leaderboard.row_checks import problems

from .build import build, construct
from .cells import Assignment
from .checkpoints import Card, load_checkpoint, network
from .checkpoints import read as read_any
from .data import Split
from .errors import UserError
from .outside import is_own
from .provenance import code_digest, device_name, source_digest
from .question import Question, prepare
from .run import chosen_samples, dataset
from .threat import Threat
from .witnesses import load_witnesses


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: what, by which tool, on which sample, and why it fails (empty: it holds)."""

    what: str
    by: str = ""
    sample: int | None = None
    why: str = ""
    note: str = ""

    @property
    def holds(self) -> bool:
        return not self.why


@dataclass
class Claims:
    """The network, its samples and what is said about them; `findings` is what reading alone has shown.

    rows: the verdict table, one row per sample, in the order of `samples`. batch: how many samples were judged together.
    witnesses: stored images by sample number. about_f: whether predictions and verdicts are the network's own.
    """

    name: str
    model: nn.Module
    samples: Split
    rows: pd.DataFrame
    threat: Threat
    attacks: list[Assignment]
    verifiers: list[Assignment]
    batch: int
    witnesses: dict[int, Tensor] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def about_f(self) -> bool:
        return not self.verifiers or any(one.tool.deterministic for one in self.verifiers) or bool(self.attacks)


@dataclass(frozen=True)
class Outside:
    """What a file cannot say for itself: where data lies, where to run, and whether code that it names may be loaded."""

    device: torch.device
    data_dir: str | None = None
    plugins: bool = False


def json_of(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError where there is none."""
    way_out = "name a record, a contradiction or a folder of certify"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as reason:
        raise UserError(f"{path} cannot be read ({reason.strerror}); {way_out}") from None
    except (ValueError, RecursionError) as reason:
        raise UserError(f"{path} is not JSON ({reason}); {way_out}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} holds a JSON {type(found).__name__}; {way_out}")
    return found


def _tools(kind: str, parts: list[dict[str, Any]], outside: Outside) -> list[Assignment]:
    """The attacks or verifiers as they were configured; code from outside only where that was allowed."""
    return [
        Assignment(part["label"], {"name": part["name"]}, _tool(kind, part, outside), None, part.get("first")) for part in parts
    ]


def _tool(kind: str, part: Mapping[str, Any], outside: Outside) -> Any:
    name = str(part["name"])
    if ":" in name:
        _allow(f"the {kind} {name!r}", outside)
    return build(kind, {key: value for key, value in part.items() if key not in ("label", "first")})


def _allow(what: str, outside: Outside) -> None:
    if not outside.plugins:
        raise UserError(f"{what} is code from outside, which replay runs only with --plugins; look at the file first")


# ---- a record --------------------------------------------------------------------------------------------------------


def claims_of_record(path: Path, outside: Outside) -> Claims:
    """The claims of runs/<suite>/records/<id>.json, all its digests and derived numbers checked.

    Raises UserError or RecordError for what cannot be read, is no record, or lies outside the run's folder.
    """
    record = read(path)
    try:
        return _claims_of_record(record, path, outside)
    except (KeyError, TypeError, ValueError, AttributeError) as reason:
        raise UserError(f"{path.name} describes no cell that can be built ({type(reason).__name__}: {reason})") from reason


def _claims_of_record(record: Record, path: Path, outside: Outside) -> Claims:
    document, evidence, folder = record.document, record.evidence, path.parent
    cell = document["cell"]
    findings = [Finding("record", why=sentence) for sentence in check(record, folder)] or [Finding("record")]
    data = dataset(cell["data"]["name"], outside.data_dir, outside.device, cell["data"].get("extra"))
    samples = chosen_samples(cell["samples"] or {"rule": "all"}, data.test)
    findings += [
        _same("data", document["provenance"]["data"], data.digest), _same("samples", record.samples.digest, samples.digest)
    ]
    card = Card(cell["arch"], data.shape, data.classes, data.name)
    weights = _inside(folder, evidence.weights, path)
    model = network(load_checkpoint(weights)[0], card, weights).to(outside.device)
    if evidence.stored is not None:
        findings.append(_merges(_inside(folder, evidence.stored, path), load_checkpoint(weights)[0]))
    attacks, verifiers = (_tools(kind, cell[f"{kind}s"], outside) for kind in ("attack", "verifier"))
    for one in (*attacks, *verifiers):
        if (source := source_digest(one.tool)) is not None:
            findings.append(_same(f"source of {one.label}", record.provenance.plugins.get(one.label), source))
    rows = record.verdicts(folder).reset_index(drop=True)
    threat = construct(Threat, cell["threat"], "the threat")
    claims = Claims(record.id, model, samples, rows, threat, attacks, verifiers, len(samples), {}, findings)
    claims.notes += _differences(document["provenance"], outside.device)
    _add_witnesses(claims, evidence.witnesses, folder, data.shape)
    return claims


def _same(what: str, recorded: str | None, found: str) -> Finding:
    why = "" if recorded == found else f"recorded {str(recorded)[:12]}..., but here it is {found[:12]}..."
    return Finding(f"{what} digest", why=why)


def _merges(stored: Path, plain: Mapping[str, Tensor]) -> Finding:
    """Whether the stored form (factors, codes) gives the very weights that were judged."""
    merged = read_any(stored).state
    same = set(merged) == set(plain) and all(torch.equal(merged[name], plain[name]) for name in plain)
    return Finding("stored form", why="" if same else f"{stored.name} merges to other weights than those that were judged")


def _inside(folder: Path, name: str | None, path: Path) -> Path:
    """The weights file, which must lie in the run's folder."""
    where = (folder / (name or "")).resolve()
    if name is None or not where.is_relative_to(folder.resolve().parent):
        raise UserError(f"{path.name} names no weights inside its run's folder ({name!r}), so nothing can be replayed")
    if not where.is_file():
        raise UserError(f"{path.name} needs its weights {name}; copy them to {where.parent}")
    return where


def _differences(provenance: Mapping[str, Any], device: torch.device) -> list[str]:
    found = []
    if provenance["code"] != code_digest():
        found.append("the record was written by other code than this; what holds here holds by this code")
    if provenance["device"] != device_name(device):
        found.append(f"the record was made on {provenance['device']}, this is {device_name(device)}: noise may differ")
    return found


def _add_witnesses(claims: Claims, name: str | None, folder: Path, shape: tuple[int, ...]) -> None:
    if name is None:
        return
    if (folder / name).is_file():
        claims.witnesses = load_witnesses(folder / name, shape)
    else:
        claims.notes.append(f"{name} is not here, so attacks are run again instead of executing the stored witnesses")


# ---- the folder of certify -------------------------------------------------------------------------------------------


def claims_of_folder(folder: Path, outside: Outside) -> Claims:
    """The claims of a folder that `sparsecert certify --out` wrote (answer.json and rows.csv). Raises UserError otherwise."""
    answer = json_of(folder / "answer.json")
    try:
        return _claims_of_answer(answer, folder, outside)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as reason:
        raise UserError(f"{folder} does not hold an answer of certify ({type(reason).__name__}: {reason})") from reason


def _claims_of_answer(answer: dict[str, Any], folder: Path, outside: Outside) -> Claims:
    asked = answer["asked"]
    if is_own(asked["arch"] or ""):
        _allow(f"the architecture {asked['arch']!r}", outside)
    threat: Threat = construct(Threat, answer["threat"], "the threat")
    density = None if asked["density"] is None else Fraction(asked["density"])
    question = Question(
        Path(asked["checkpoint"]), threat.norm, threat.eps, (), (), arch=asked["arch"], data=asked["data"],
        data_dir=outside.data_dir, mean=tuple(asked["mean"]), std=tuple(asked["std"]), density=density,
    )
    case = prepare(question, outside.device)
    attacks, verifiers = (_tools(kind, answer[f"{kind}s"], outside) for kind in ("attack", "verifier"))
    rows = _rows(folder / "rows.csv", answer)
    place = {number: at for at, number in enumerate(case.samples.index.tolist())}
    if not set(rows["index"]) <= set(place):
        raise UserError(f"{folder} speaks of samples that {answer['data']} does not have")
    at = torch.tensor([place[number] for number in rows["index"]], device=outside.device)
    samples = case.samples
    samples = replace(samples, images=samples.images[at], labels=samples.labels[at], index=samples.index[at])
    claims = Claims(str(folder), case.model, samples, rows, threat, attacks, verifiers, int(asked["batch"]))
    found = {"checkpoint": case.digests["checkpoint"], "samples": samples.digest}
    wrong = [f"the {what} here is not the one that was judged" for what in found if found[what] != answer["digests"][what]]
    wrong += _contradictory(answer, claims)
    claims.findings = [Finding("answer", why=sentence) for sentence in wrong] or [Finding("answer")]
    return claims


def _rows(path: Path, answer: dict[str, Any]) -> pd.DataFrame:
    """The table as it was before it became CSV: texts are texts, and an empty one is not a number."""
    try:
        rows = pd.read_csv(path, float_precision="round_trip")
    except (OSError, ValueError) as reason:
        raise UserError(f"{path} is not the table of an answer of certify: {reason}") from reason
    text = ("verdict", "by", "status:", "looks:")
    names = [name for name in rows if name in text or str(name).startswith(text[2:])]
    rows[names] = rows[names].fillna("").astype(str)
    missing = [name for name in columns_of(answer) if name not in rows]
    if missing:
        raise UserError(f"{path} lacks the column {missing[0]!r}, which {path.parent / 'answer.json'} calls for")
    return rows


def _contradictory(answer: dict[str, Any], claims: Claims) -> list[str]:
    """Where the answer, its rows and its table do not say the same, or rows contradict themselves."""
    rows = claims.rows
    found = [
        f"answer.json and rows.csv differ in {name!r}" for name in ("index", "label", "predicted", "verdict", "by")
        if [row[name] for row in answer["rows"]] != rows[name].tolist()
    ]
    found += [
        f"the summary counts {answer['summary'][name]} {name}, the table {int((rows['verdict'] == name).sum())}"
        for name in ("certified", "broken", "open") if answer["summary"][name] != (rows["verdict"] == name).sum()
    ]
    return found + (problems(answer, rows) if claims.about_f and not (rows["verdict"] == "timeout").any() else [])
