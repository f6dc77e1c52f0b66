"""Certify one checkpoint: measured density, clean, attacked and certified accuracy, a verdict per sample."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from leaderboard.canonical import canonical, sha256_file

from .build import build, construct, plain
from .cells import Assignment
from .checkpoints import Card, Loaded, classes_of, guess_arch, network, read
from .data import Dataset, Split
from .errors import UserError
from .evaluate import Evaluation, evaluate
from .files import make_folder, write_json, write_whole
from .health import Flag, flags
from .outside import is_own, own_data, own_network
from .passport import claim_holds, passport
from .provenance import code_digest
from .run import dataset
from .sparsity import density_of
from .threat import Threat
from .train import nothing

VERDICTS = ("certified", "broken", "open", "misclassified", "abstain", "timeout", "error")
HEALTH = 64  # samples that the health flags are computed on
Report = Callable[[int, int, dict[str, int]], None]


@dataclass(frozen=True)
class Question:
    """What is asked of a checkpoint."""

    path: Path
    norm: str
    eps: Fraction
    verifiers: tuple[str, ...]
    attacks: tuple[str, ...]
    arch: str | None = None
    data: str | None = None
    data_dir: str | None = None
    limit: int | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    smoothing: tuple[tuple[str, Any], ...] = ()
    exact: tuple[tuple[str, Any], ...] = ()
    density: Fraction | None = None
    claim: Fraction | None = None
    batch: int = 250
    total_seconds: float | None = None


@dataclass
class Case:
    """Everything that is needed to judge one batch of samples."""

    model: nn.Module
    arch: str
    layout: str
    notes: list[str]
    data: Dataset
    samples: Split
    threat: Threat
    attacks: list[Assignment]
    verifiers: list[Assignment]
    fingerprint: str
    warnings: list[str] = field(default_factory=list)
    lowering: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def smoothed(self) -> Assignment | None:
        """The smoothing verifier, when nothing but smoothing was asked: the verdicts are then about the smoothed classifier."""
        probabilistic = [one for one in self.verifiers if not one.tool.deterministic]
        return probabilistic[0] if probabilistic and len(probabilistic) == len(self.verifiers) else None


def prepare(question: Question, device: torch.device) -> Case:
    """Read the checkpoint and the data; raises UserError for anything that does not fit together."""
    loaded = read(question.path, question.density)
    data = _data(question, loaded, device)
    arch, model = _network(question, loaded, data)
    model = model.to(device)
    threat: Threat = construct(Threat, {"norm": question.norm, "eps": question.eps}, "the threat")
    attacks, verifiers = _tools(question, threat)
    samples = data.test if question.limit is None else data.test.first(question.limit)
    facts = [
        sha256_file(question.path), arch, str(question.density), question.mean, question.std, plain(threat),
        samples.digest, code_digest(), question.batch, device.type, torch.get_num_threads(),
        [[one.label, plain(one.tool)] for one in (*attacks, *verifiers)],
    ]
    fingerprint = hashlib.sha256(canonical(facts)).hexdigest()
    return Case(model, arch, loaded.layout, list(loaded.notes), data, samples, threat, attacks, verifiers, fingerprint)


def _data(question: Question, loaded: Loaded, device: torch.device) -> Dataset:
    """A known set, or the images of an .npz file."""
    card = loaded.card
    name = question.data or (card.data if card else None)
    if name is None:
        raise UserError(f"{question.path} does not say which data set it was trained on; name it with --data")
    if not name.endswith(".npz"):
        return dataset(name, question.data_dir, device)
    images = own_data(Path(name), card.classes if card else None)
    if card is None and question.arch and not is_own(question.arch):
        images = own_data(Path(name), classes_of(question.arch, loaded.state, images.shape))
    return images.to(device)


def _network(question: Question, loaded: Loaded, data: Dataset) -> tuple[str, nn.Module]:
    """(its name, the plain network): of the user's own file.py:build, or the architecture that flags, file or shapes say."""
    if question.arch and is_own(question.arch):
        tensors, where = loaded.state, question.path
        return question.arch, own_network(
            question.arch, tensors, data.shape, data.classes, where, question.mean, question.std
        )
    card = _card(question, loaded.state, loaded.card, data)
    return card.arch, network(loaded.state, card, question.path)


def _card(question: Question, state: Mapping[str, Tensor], card: Card | None, data: Dataset) -> Card:
    """What network the tensors belong to: the flags, else what the file says, else the one architecture that fits."""
    arch = question.arch or (card.arch if card else guess_arch(state, data.shape, data.classes))
    if arch is None:
        raise UserError(f"{question.path} fits no known architecture on {data.name}; name its own with --arch and --data")
    mean, std = question.mean, question.std
    if card is not None:
        if (mean or std) and (tuple(mean), tuple(std)) != (tuple(card.mean), tuple(card.std)):
            raise UserError(f"{question.path} says its own normalisation ({card.mean}, {card.std}); leave out --mean and --std")
        mean, std = card.mean, card.std
    return Card(arch, data.shape, data.classes, data.name, tuple(mean), tuple(std))


def _tools(question: Question, threat: Threat) -> tuple[list[Assignment], list[Assignment]]:
    base = {"norm": threat.norm, "eps": threat.eps}
    attacks = [Assignment(name, {"name": name}, build("attack", {"name": name, **base})) for name in question.attacks]
    verifiers = []
    for name in question.verifiers:
        extra = dict({"smoothing": question.smoothing, "exact": question.exact}.get(name, ()))
        verifiers.append(Assignment(name, {"name": name}, build("verifier", {"name": name, **base, **extra})))
    labels = [one.label for one in (*attacks, *verifiers)]
    for label in labels:
        if labels.count(label) > 1:
            raise UserError(f"{label!r} was asked for twice; name each attack and verifier once")
    return attacks, verifiers


def certify(question: Question, device: torch.device, out: Path | None = None, report: Report = nothing) -> dict[str, Any]:
    """{"summary", "rows", ...} of one checkpoint on the test set.

    Samples are judged batch by batch; with a folder `out` every finished batch survives a kill and is not judged again.
    Samples that the total time limit does not reach have the verdict timeout. Raises UserError and ContradictionError.
    """
    start = time.perf_counter()
    case = prepare(question, device)
    health = flags(case.model, case.samples.first(HEALTH).pixels(), case.samples.first(HEALTH).labels)
    parts: list[pd.DataFrame] = []
    for at in torch.arange(len(case.samples)).split(question.batch):
        late = question.total_seconds is not None and time.perf_counter() - start > question.total_seconds
        parts.append(_out_of_time(case, at) if late else _judged(case, at, out))
        done = pd.concat(parts, ignore_index=True)
        report(len(done), len(case.samples), {name: int((done["verdict"] == name).sum()) for name in VERDICTS})
    rows = pd.concat(parts, ignore_index=True)
    case.seconds["total"] = round(time.perf_counter() - start, 4)
    answer = _answer(question, case, rows, health)
    if out is not None:
        write_json(out / "answer.json", answer)
        write_whole(out / "rows.csv", lambda temporary: rows.to_csv(temporary, index=False))
    return answer


def _judged(case: Case, at: Tensor, out: Path | None) -> pd.DataFrame:
    """The verdict rows of one batch, from the folder where they lie already."""
    if out is None:
        return _judge(case, at)
    folder = make_folder(out / "batches" / case.fingerprint[:16])
    path = folder / f"{int(at[0]):08d}.parquet"
    if path.exists():
        try:
            return pd.read_parquet(path)
        except Exception:
            path.unlink()  # damaged: judged again
    rows = _judge(case, at)
    write_whole(path, lambda temporary: rows.to_parquet(temporary, index=False))
    return rows


def _judge(case: Case, at: Tensor) -> pd.DataFrame:
    start = time.perf_counter()
    samples = case.samples
    x, y, index = samples.pixels(at), samples.labels[at], samples.index[at].tolist()
    out: Evaluation = evaluate(case.model, x, y, index, case.threat, case.attacks, case.verifiers)
    for stage, seconds in out.seconds.items():
        case.seconds[stage] = round(case.seconds.get(stage, 0.0) + seconds, 4)
    case.warnings += [sentence for sentence in out.warnings if sentence not in case.warnings]
    case.lowering += [step for step in out.lowering if step not in case.lowering]
    rows = out.rows
    if case.smoothed is not None:
        _about_the_smoothed_classifier(rows, case.smoothed)
    rows["seconds"] = (time.perf_counter() - start) / max(1, len(rows))
    return rows


def _about_the_smoothed_classifier(rows: pd.DataFrame, one: Assignment) -> None:
    """Predictions and verdicts of g instead of f; attacks on f say nothing about g."""
    rows["predicted"] = rows[f"predicted:{one.label}"]
    status, wrong = rows[f"status:{one.label}"], rows["predicted"] != rows["label"]
    verdict = np.where(wrong, "misclassified", np.where(rows[f"radius:{one.label}"] >= float(one.tool.eps), "certified", "open"))
    verdict = np.where(status == "abstain", "abstain", verdict)
    rows["verdict"] = np.where(status == "error", "error", verdict)
    rows["by"] = np.where(rows["verdict"] == "certified", one.label, "")


def _out_of_time(case: Case, at: Tensor) -> pd.DataFrame:
    samples = case.samples
    rows = pd.DataFrame({"index": samples.index[at].cpu().numpy(), "label": samples.labels[at].cpu().numpy()})
    rows["predicted"], rows["verdict"], rows["by"], rows["seconds"] = -1, "timeout", "", 0.0
    for one in case.verifiers:
        rows[f"status:{one.label}"], rows[f"radius:{one.label}"], rows[f"margin:{one.label}"] = "timeout", 0.0, math.nan
        if not one.tool.deterministic:
            rows[f"predicted:{one.label}"], rows[f"hits:{one.label}"], rows[f"n:{one.label}"] = -1, 0, 0
            rows[f"looks:{one.label}"] = ""
    for one in case.attacks:
        rows[f"survived:{one.label}"], rows[f"distance:{one.label}"] = False, math.nan
    return rows


def _answer(question: Question, case: Case, rows: pd.DataFrame, health: list[Flag]) -> dict[str, Any]:
    claim = None if question.claim is None else claim_holds(case.model, question.claim)
    return {
        "checkpoint": str(question.path), "layout": case.layout, "notes": case.notes,
        "arch": case.arch, "data": case.data.name, "note": case.data.note,
        "threat": plain(case.threat),
        "attacks": [one.as_json() for one in case.attacks], "verifiers": [one.as_json() for one in case.verifiers],
        "summary": summary(case, rows),
        "passport": passport(case.model, case.data.shape),
        "claim": None if claim is None else {"pruned": str(question.claim), "holds": claim[0], "sentence": claim[1]},
        "health": [asdict(flag) for flag in health],
        "warnings": case.warnings, "lowering": case.lowering,
        "rows": rows_of(rows, case.verifiers),
    }


def summary(case: Case, rows: pd.DataFrame) -> dict[str, Any]:
    """Counts of every verdict, measured density, accuracy per verifier and attack, seconds per stage."""
    found: dict[str, Any] = {"n": len(rows), "clean": int((rows["predicted"] == rows["label"]).sum())}
    found |= {name: int((rows["verdict"] == name).sum()) for name in VERDICTS}
    found["density"] = float(density_of(case.model))
    found["survived"] = {one.label: int(rows[f"survived:{one.label}"].sum()) for one in case.attacks}
    found["certified_by"] = {one.label: _certified(rows, one) for one in case.verifiers}
    for one in case.verifiers:
        if not one.tool.deterministic:
            found["average_certified_radius"] = math.fsum(rows[f"radius:{one.label}"]) / max(1, len(rows))
            found["abstention_rate"] = float((rows[f"status:{one.label}"] == "abstain").mean())
    found["seconds"] = case.seconds
    return found


def _certified(rows: pd.DataFrame, one: Assignment) -> int:
    return int((rows[f"status:{one.label}"] == "proved").sum())


def rows_of(rows: pd.DataFrame, verifiers: Sequence[Assignment]) -> list[dict[str, Any]]:
    """One JSON row per sample in input order: the best radius and margin, and each verifier's own under its label."""
    found = []
    for row in rows.to_dict("records"):
        one = {key: row[key] for key in ("index", "label", "predicted", "verdict", "by")}
        one["seconds"] = round(row["seconds"], 6)
        each = {verifier.label: _row_of(row, verifier) for verifier in verifiers}
        one["radius"] = max((facts["radius"] for facts in each.values()), default=0.0)
        margins = [facts["margin"] for facts in each.values() if facts["margin"] is not None]
        one["margin"] = max(margins, default=None)
        if len(each) == 1:
            (facts,) = each.values()
            one |= {key: value for key, value in facts.items() if key not in one}
        found.append({**one, **each})
    return found


def _row_of(row: dict[str, Any], verifier: Assignment) -> dict[str, Any]:
    label = verifier.label
    margin = row[f"margin:{label}"]
    facts = {"status": row[f"status:{label}"], "radius": row[f"radius:{label}"], "margin": None if math.isnan(margin) else margin}
    if not verifier.tool.deterministic:
        tool = verifier.tool
        facts |= {"predicted": row[f"predicted:{label}"], "hits": row[f"hits:{label}"], "n": row[f"n:{label}"]}
        facts |= {"n0": tool.n0, "alpha": tool.alpha, "sigma": tool.sigma, "rule": tool.rule}
        if tool.rule == "sequential":
            facts |= {"looks": row[f"looks:{label}"], "radii": plain(tool.radii), "growth": plain(tool.growth)}
    return facts
