"""What a record, or the folder of `certify --out`, claims: read with distrust, ready to be run again."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from leaderboard.checks import check
from leaderboard.record import Record, columns_of, read
from leaderboard.row_checks import DISTANCE_ALLOWANCE, correct, problems, where

from .build import build, construct, fraction
from .cells import Assignment
from .certify import HEALTH, _about_the_smoothed_classifier, _answer, _out_of_time
from .checkpoints import Card, load_checkpoint, network
from .checkpoints import read as read_any
from .curve import smoothed_points
from .data import Split
from .errors import UserError
from .evaluate import _decide, predict
from .health import flags
from .outside import is_own
from .provenance import code_digest, device_name, source_digest
from .question import Case, Question, _with_distances, prepare
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
    witnesses: stored images by sample number. about_f: whether predictions and verdicts are the network's own, and not those
    of its smoothed classifier.
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
    about_f: bool = True


def never_reached(rows: pd.DataFrame, verifiers: Sequence[Assignment]) -> np.ndarray:
    """bool [N]: the rows of samples that no time was left for, so that nothing was asked about them."""
    timeouts = [rows[name] == "timeout" for name in ("verdict", *(f"status:{one.label}" for one in verifiers))]
    return np.logical_and.reduce([rows["predicted"] == -1, *timeouts])


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
        Assignment(
            part["label"], {"name": part["name"]}, tool_of(kind, part, outside), None, part.get("first"), part.get("rest", False)
        )
        for part in parts
    ]


def tool_of(kind: str, part: Mapping[str, Any], outside: Outside) -> Any:
    """The attack or verifier that the part describes. Raises UserError; for code from outside, too, unless that was allowed."""
    name = str(part["name"])
    if ":" in name:
        _allow(f"the {kind} {name!r}", outside)
    return build(kind, {key: value for key, value in part.items() if key not in ("label", "first", "rest")})


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
    findings += [Finding("record", why=sentence) for sentence in _distances(rows, (*attacks, *verifiers))]
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


NOT_MADE_AGAIN = ("checkpoint", "warnings", "lowering", "curve")  # of answer.json
KINDS: dict[str, Callable[[str], Any]] = {
    "text": str, "integer": int, "number": lambda cell: float(cell or "nan"),
    "truth": {"True": True, "False": False, "": False}.__getitem__,
}  # fmt: skip


def claims_of_folder(folder: Path, outside: Outside) -> Claims:
    """The claims of a folder that `sparsecert certify --out` wrote, its answer.json derived again from rows.csv and the network.

    Raises UserError where the folder holds no such files.
    """
    answer = json_of(folder / "answer.json")
    try:
        return _claims_of_answer(answer, folder, outside)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError) as reason:
        raise UserError(f"{folder} does not hold an answer of certify ({type(reason).__name__}: {reason})") from reason


def _claims_of_answer(answer: dict[str, Any], folder: Path, outside: Outside) -> Claims:
    rows = _rows(folder / "rows.csv", answer)
    question = _question(answer, len(rows), outside)
    case = prepare(question, outside.device)
    case.attacks, verifiers = (_tools(kind, answer[f"{kind}s"], outside) for kind in ("attack", "verifier"))
    case.plugins = {one.label: source for one in (*case.attacks, *verifiers) if (source := source_digest(one.tool)) is not None}
    case.verifiers, case.seconds = verifiers, answer["summary"]["seconds"]
    if "distance" in answer["summary"]:
        tolerance = fraction(answer["summary"]["distance"]["tolerance"], "the tolerance of the distances")
        case.verifiers = _with_distances(verifiers, tolerance)
    claims = Claims(
        str(folder), case.model, case.samples, rows, case.threat, case.attacks, verifiers, question.batch,
        about_f=case.smoothed is None,
    )  # fmt: skip
    wrong = [
        f"the {what} here is not the one that was judged" for what, digest in case.digests.items()
        if answer["digests"].get(what) != digest
    ]
    if rows["index"].tolist() == case.samples.index.tolist():  # else replay says so, and goes no further
        wrong += [*_contradictory(answer, case, rows), *islice(_forged(answer, question, case, rows), 5)]
    claims.findings = [Finding("answer", why=sentence) for sentence in wrong] or [Finding("answer")]
    claims.notes.append(_trusted(answer, case))
    return claims


def _question(answer: dict[str, Any], count: int, outside: Outside) -> Question:
    """What was asked, of the first `count` test images. Raises UserError for what cannot have been asked."""
    asked, claim = answer["asked"], answer["claim"]
    if is_own(asked["arch"] or ""):
        _allow(f"the architecture {asked['arch']!r}", outside)
    if type(asked["batch"]) is not int or asked["batch"] < 1:
        raise UserError(f"the batch of an answer of certify is a whole number from 1, got {asked['batch']!r}")
    threat: Threat = construct(Threat, answer["threat"], "the threat")
    return Question(
        Path(asked["checkpoint"]), threat.norm, threat.eps, (), (), arch=asked["arch"], data=asked["data"],
        data_dir=outside.data_dir, limit=count, mean=tuple(asked["mean"]), std=tuple(asked["std"]), batch=asked["batch"],
        density=None if asked["density"] is None else fraction(asked["density"], "the density"),
        claim=None if claim is None else fraction(claim["pruned"], "the claimed share"),
    )  # fmt: skip


def _rows(path: Path, answer: dict[str, Any]) -> pd.DataFrame:
    """The table exactly as it was before it became CSV, each column of its kind; blank truths are of samples never reached."""
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as reason:
        raise UserError(f"{path} is not the table of an answer of certify: {reason}") from reason
    called = columns_of(answer)
    missing = [name for name in called if name not in table]
    if missing or table.empty:
        what = f"the column {missing[0]!r}, which {path.parent / 'answer.json'} calls for" if missing else "rows"
        raise UserError(f"{path} lacks {what}")
    return pd.DataFrame({name: _column(table[name], called.get(name) or _kind(name), path) for name in table})


def _kind(name: str) -> str:
    """Of a column that an answer does not call for by itself."""
    return {"survived": "truth", "status": "text", "looks": "text"}.get(name.partition(":")[0], "number")


def _column(cells: pd.Series, kind: str, path: Path) -> Any:
    dtype = {"text": object, "integer": np.int64, "number": np.float64, "truth": np.bool_}[kind]
    try:
        return np.array([KINDS[kind](cell) for cell in cells], dtype=dtype)
    except (ValueError, KeyError, OverflowError) as reason:
        raise UserError(f"{path}: the column {cells.name!r} must hold only {kind} values ({reason})") from None


# ---- an answer derived again -----------------------------------------------------------------------------------------


def _contradictory(answer: dict[str, Any], case: Case, rows: pd.DataFrame) -> Iterator[str]:
    """Where rows contradict themselves: every verdict is decided again from the other columns."""
    never = never_reached(rows, case.verifiers)
    blank, left = _out_of_time(case, torch.from_numpy(np.flatnonzero(never))), rows[never].reset_index(drop=True)
    for name in (name for name in blank if name in left):
        same = (left[name] == blank[name]) | (left[name].isna() & blank[name].isna())
        yield from where(left, ~same, f"never reached, yet something is said in {name!r}")
    reached = rows[~never].reset_index(drop=True)
    again = reached.drop(columns=["verdict", "by"])
    if case.smoothed is not None:  # attacks are on the network, whose predictions the table does not hold
        at = torch.from_numpy(np.flatnonzero(~never)).to(case.samples.labels.device)
        again["predicted"] = predict(case.model, case.samples.pixels(at)).cpu().numpy()
    _decide(again, case.threat, case.attacks, case.verifiers)
    yield from problems(answer, again)
    yield from _distances(again, (*case.attacks, *case.verifiers))
    if case.smoothed is not None:
        _about_the_smoothed_classifier(again, case.smoothed)
    for name in ("verdict", "by"):
        yield from where(reached, reached[name] != again[name], f"{name!r} is not what follows from the row's other columns")


def _distances(rows: pd.DataFrame, tools: Sequence[Assignment]) -> Iterator[str]:
    """A distance is that of an image inside the tool's ball around a correctly classified one."""
    for one in tools:
        if (name := f"distance:{one.label}") not in rows:
            continue
        inside = (rows[name] >= 0) & (rows[name] <= float(one.tool.eps) + DISTANCE_ALLOWANCE)
        yield from where(rows, rows[name].notna() & ~(inside & correct(rows)), f"{name!r} is no distance that it can have")


def _forged(answer: dict[str, Any], question: Question, case: Case, rows: pd.DataFrame) -> Iterator[str]:
    """Where answer.json says anything else than what its table, the network and the images give."""
    first = case.samples.first(HEALTH)
    again = json.loads(json.dumps(_answer(question, case, rows, flags(case.model, first.pixels(), first.labels))))
    said, found = _comparable(answer), _comparable(again)
    if is_own(found["arch"]):
        found["arch"] = said["arch"]  # as it was typed
    for one in case.verifiers:
        if not one.tool.deterministic:
            said["curve"] = [point for point in answer["curve"] if point["by"] == one.label]
            steps = [fraction(point["exact"], "exact") for point in said["curve"] if point["exact"] is not None]
            found["curve"] = smoothed_points(rows, one.label, steps)
    yield from _apart(said, found, "")


def _comparable(answer: Mapping[str, Any]) -> dict[str, Any]:
    """Of the health flags the names: their sentences hold figures that other processors round otherwise."""
    out = {key: value for key, value in answer.items() if key not in NOT_MADE_AGAIN}
    out["asked"] = {key: value for key, value in answer["asked"].items() if key != "fingerprint"}
    return {**out, "health": [flag["name"] for flag in answer["health"]]}


def _apart(said: Any, found: Any, place: str) -> Iterator[str]:
    if isinstance(said, dict) and isinstance(found, dict):
        for key in dict.fromkeys((*found, *said)):
            yield from _apart(said.get(key), found.get(key), f"{place}.{key}" if place else key)
    elif isinstance(said, list) and isinstance(found, list) and len(said) == len(found):
        for at, pair in enumerate(zip(said, found)):
            yield from _apart(*pair, f"{place}[{at}]")
    elif not (said == found or _rounded_alike(said, found)):
        yield f"answer.json says {place} {json.dumps(said):.60}, but rows.csv and the network give {json.dumps(found):.60}"


def _rounded_alike(said: Any, found: Any) -> bool:
    """A mean depends on the order in which a processor adds up."""
    return isinstance(said, float) and isinstance(found, float) and math.isclose(said, found, rel_tol=1e-12)


def _trusted(answer: dict[str, Any], case: Case) -> str:
    """What answer.json says and nothing here derives again."""
    smoothing = [one.label for one in case.verifiers if not one.tool.deterministic]
    left = ["seconds", "warnings", "lowering steps"]
    left += ["points of the curve"] if any(point["by"] not in smoothing for point in answer["curve"]) else []
    left += ["bracketed distances"] if "distance" in answer["summary"] else []
    return f"not made again, but taken as they stand there: {', '.join(left)}"
