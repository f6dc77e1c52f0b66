"""Certify one checkpoint: measured density, clean, attacked and certified accuracy, a verdict per sample."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from .build import build, construct
from .cells import Assignment
from .checkpoints import Card, guess_arch, load_checkpoint, network
from .data import Dataset
from .errors import UserError
from .evaluate import Evaluation, evaluate
from .run import dataset
from .sparsity import density_of, layer_counts
from .threat import Threat
from .train import nothing


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


def _card(question: Question, state: dict[str, Any], card: Card | None, data: Dataset) -> Card:
    """What network the tensors belong to: the flags, else what the file says, else the one architecture that fits."""
    arch = question.arch or (card.arch if card else guess_arch(state, data.shape, data.classes))
    if arch is None:
        raise UserError(f"{question.path} fits no known architecture on {data.name}; name its own with --arch and --data")
    mean = question.mean or (card.mean if card else ())
    std = question.std or (card.std if card else ())
    return Card(arch, data.shape, data.classes, data.name, tuple(mean), tuple(std))


def certify(question: Question, device: torch.device, report: Any = nothing) -> dict[str, Any]:
    """{"summary", "rows", ...} of one checkpoint on the test set; raises UserError and ContradictionError."""
    start = time.perf_counter()
    state, card = load_checkpoint(question.path)
    name = question.data or (card.data if card else None)
    if name is None:
        raise UserError(f"{question.path} does not say which data set it was trained on; name it with --data")
    data = dataset(name, question.data_dir, device)
    card = _card(question, state, card, data)
    model = network(state, card, question.path).to(device)
    threat: Threat = construct(Threat, {"norm": question.norm, "eps": question.eps}, "the threat")
    attacks, verifiers = _tools(question, threat)
    samples = data.test if question.limit is None else data.test.first(question.limit)
    out = evaluate(
        model, samples.pixels(), samples.labels, samples.index.tolist(), threat, attacks, verifiers, report
    )
    out.seconds["total"] = round(time.perf_counter() - start, 4)
    counts = layer_counts(model)
    return {
        "checkpoint": str(question.path), "arch": card.arch, "data": name, "note": data.note,
        "threat": {"norm": question.norm, "eps": str(question.eps)},
        "summary": summary(out, verifiers, density_of(model)),
        "layers": {layer: {"kept": kept, "total": total} for layer, (kept, total) in counts.items()},
        "warnings": out.warnings, "lowering": out.lowering,
        "rows": rows_of(out, verifiers),
    }


def _tools(question: Question, threat: Threat) -> tuple[list[Assignment], list[Assignment]]:
    base = {"norm": threat.norm, "eps": threat.eps}
    attacks = [Assignment(name, {"name": name}, build("attack", {"name": name, **base})) for name in question.attacks]
    verifiers = []
    for name in question.verifiers:
        extra = dict(question.smoothing) if name == "smoothing" else {}
        verifiers.append(Assignment(name, {"name": name}, build("verifier", {"name": name, **base, **extra})))
    return attacks, verifiers


def summary(out: Evaluation, verifiers: Sequence[Assignment], density: Fraction) -> dict[str, Any]:
    """Counts of every verdict, measured density, accuracy per verifier and attack, seconds per stage."""
    rows = out.rows
    counts = rows["verdict"].value_counts()
    found: dict[str, Any] = {"n": len(rows), "clean": int((rows["predicted"] == rows["label"]).sum())}
    found |= {name: int(counts.get(name, 0)) for name in ("broken", "certified", "open", "misclassified", "timeout", "error")}
    found["density"] = float(density)
    found["survived"] = {c.removeprefix("survived:"): int(rows[c].sum()) for c in rows if c.startswith("survived:")}
    found["certified_by"] = {one.label: int((rows[f"radius:{one.label}"] >= float(one.tool.eps)).sum()) for one in verifiers}
    for one in verifiers:
        if not one.tool.deterministic:
            found["average_certified_radius"] = math.fsum(rows[f"radius:{one.label}"]) / max(1, len(rows))
            found["abstention_rate"] = float((rows[f"status:{one.label}"] == "abstain").mean())
    found["seconds"] = out.seconds
    return found


def rows_of(out: Evaluation, verifiers: Sequence[Assignment]) -> list[dict[str, Any]]:
    """One JSON row per sample in input order; NaN margins become null."""
    found = []
    for row in out.rows.to_dict("records"):
        one = {key: row[key] for key in ("index", "label", "predicted", "verdict", "by")}
        for verifier in verifiers:
            label = verifier.label
            facts = {"status": row[f"status:{label}"], "radius": row[f"radius:{label}"]}
            margin = row[f"margin:{label}"]
            facts["margin"] = None if math.isnan(margin) else margin
            if not verifier.tool.deterministic:
                facts |= {key: row[f"{key}:{label}"] for key in ("predicted", "hits", "n")}
                facts |= {"n0": verifier.tool.n0, "alpha": verifier.tool.alpha, "sigma": verifier.tool.sigma}
            one[label] = facts
        found.append(one)
    return found
