"""One verdict per sample: misclassified, broken, certified, open or error. Attacks propose, verifiers prove, this decides."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from attacks import lp
from verifiers import Proof, UnsupportedNetworkError

from .cells import Assignment
from .threat import Threat, within
from .train import nothing

ATTACK_BATCH = 500


class ContradictionError(Exception):
    """A deterministic certificate is broken by a witness inside its ball: something is wrong with a bound."""

    def __init__(self, facts: dict[str, Any], image: Tensor, witness: Tensor) -> None:
        self.facts, self.image, self.witness = facts, image, witness
        super().__init__(
            f"sample {facts['index']}: {facts['verifier']} certified {facts['norm']} radius {facts['radius']}, but "
            f"{facts['attack']} found a misclassified image at distance "
            f"{facts['distance']:.9g} (label {facts['label']}, float64 prediction {facts['predicted']})"
        )


@dataclass
class Evaluation:
    """The verdict table (one row per sample) and what is worth knowing about how it came about."""

    rows: pd.DataFrame
    seconds: dict[str, float] = field(default_factory=dict)
    rechecked: dict[str, int] = field(default_factory=dict)
    lowering: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    witnesses: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class _Samples:
    """The images under test and what the plain network says about them."""

    model: nn.Module
    double: nn.Module
    x: Tensor
    y: Tensor
    predicted: Tensor

    @property
    def correct(self) -> Tensor:
        return (self.predicted == self.y).nonzero().flatten()


@torch.no_grad()
def predict(model: nn.Module, x: Tensor, batch: int = ATTACK_BATCH) -> Tensor:
    """Predicted classes [N]."""
    parts = [model(part).argmax(1) for part in x.split(batch)]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64, device=x.device)


def evaluate(
    model: nn.Module, x: Tensor, y: Tensor, index: Sequence[int], threat: Threat,
    attacks: Sequence[Assignment], verifiers: Sequence[Assignment], report: Callable[[str], None] = nothing,
) -> Evaluation:
    """Attack and certify every correctly classified sample of a plain network.

    x: float32 [N, C, H, W] in [0,1]; y: int64 [N]; index: N sample numbers. Witnesses are projected to the exact ball and
    [0,1] and re-executed in float64 here; an attack's own word is not taken. Raises ContradictionError when a deterministic
    certificate is broken by a witness inside its ball.
    """
    model = model.eval().requires_grad_(False)
    samples = _Samples(model, copy.deepcopy(model).double(), x, y, predict(model, x))
    table = {"index": np.asarray(index), "label": y.cpu().numpy(), "predicted": samples.predicted.cpu().numpy()}
    out = Evaluation(pd.DataFrame({name: column.astype(np.int64) for name, column in table.items()}))
    proofs: dict[str, Proof] = {}
    for one in verifiers:
        report(one.label)
        with _timed(out, f"verifier:{one.label}"):
            _verify(one, samples, out, proofs)
    for one in attacks:
        report(one.label)
        with _timed(out, f"attack:{one.label}"):
            _attack(one, samples, out, proofs, verifiers)
    _decide(out.rows, threat, attacks, verifiers)
    return out


@contextmanager
def _timed(out: Evaluation, stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    out.seconds[stage] = round(time.perf_counter() - start, 4)


def _verify(one: Assignment, samples: _Samples, out: Evaluation, proofs: dict[str, Proof]) -> None:
    """Ask one verifier: a deterministic one about the correct samples, smoothing (which judges g, not f) about all."""
    asked = samples.correct if one.tool.deterministic else torch.arange(len(samples.y), device=samples.y.device)
    if one.first is not None:
        asked = asked[asked < one.first]
    status = np.full(len(samples.y), "skipped", dtype=object)
    if one.tool.deterministic:
        status[(samples.predicted != samples.y).cpu().numpy()] = "misclassified"
        if one.first is not None:
            status[one.first :] = "skipped"
    columns = {"radius": np.zeros(len(status)), "margin": np.full(len(status), np.nan)}
    at = asked.cpu().numpy()
    try:
        proof = one.tool(samples.model, samples.x[asked], samples.y[asked]) if len(asked) else None
    except UnsupportedNetworkError as reason:
        out.warnings.append(f"{one.label}: {reason}")
        status[at], proof = "error", None
    if proof is not None:
        proofs[one.label] = proof
        status[at] = proof.status
        columns["radius"][at], columns["margin"][at] = proof.radius.numpy(), proof.margin.numpy()
        out.rechecked[one.label] = proof.rechecked
        out.lowering += [f"{one.label}: {note}" for note in proof.notes]
    out.rows[f"status:{one.label}"] = status.astype(str)
    for name, column in columns.items():
        out.rows[f"{name}:{one.label}"] = column
    if not one.tool.deterministic:
        _smoothing_columns(one, at, proof, out.rows)
    elif proof is not None:
        for name, values in proof.details.items():
            out.rows[f"{name}:{one.label}"] = _spread(values.double().numpy(), at, len(status), np.nan)


def _smoothing_columns(one: Assignment, at: np.ndarray, proof: Proof | None, rows: pd.DataFrame) -> None:
    found = {} if proof is None else {"predicted": proof.predicted, **proof.details}
    for name in ("predicted", "hits", "n"):
        values = found[name].numpy() if name in found else np.zeros(len(at), dtype=np.int64)
        rows[f"{name}:{one.label}"] = _spread(values, at, len(rows), -1 if name == "predicted" else 0).astype(np.int64)


def _spread(values: np.ndarray, at: np.ndarray, size: int, otherwise: float) -> np.ndarray:
    column = np.full(size, otherwise, dtype=np.float64)
    column[at] = values
    return column


def _attack(
    one: Assignment, samples: _Samples, out: Evaluation, proofs: dict[str, Proof], verifiers: Sequence[Assignment]
) -> None:
    correct = samples.correct
    x, y = samples.x[correct], samples.y[correct]
    survived = (samples.predicted == samples.y).cpu().numpy().copy()
    far = np.full(len(survived), np.nan)
    if len(correct):
        parts = [_witness(one, samples.model, x[i], y[i]) for i in torch.arange(len(x), device=x.device).split(ATTACK_BATCH)]
        witness = torch.cat(parts)
        wrong = predict(samples.double, witness.double()) != y
        survived[correct.cpu().numpy()] = ~wrong.cpu().numpy()
        far[correct.cpu().numpy()] = lp.distance(witness, x, one.tool.norm).cpu().numpy()
        out.witnesses[one.label] = witness[wrong].cpu()
        for check in verifiers:
            if check.tool.deterministic and check.label in proofs:
                _contradict(one, check, samples, out, witness, wrong, correct)
    out.rows[f"survived:{one.label}"] = survived
    out.rows[f"distance:{one.label}"] = far


def _witness(one: Assignment, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The attack's proposal, put into the exact ball and [0,1] by us."""
    proposed = one.tool(model, x.clone(), y.clone())  # a plug-in may write into what it is given
    legal = lp.project(torch.where(torch.isfinite(proposed), proposed, x), x, one.tool.norm, one.tool.eps)
    inside = within(legal, x, one.tool.norm, one.tool.eps)
    return torch.where(inside.view(-1, *[1] * (x.dim() - 1)), legal, x)


def _contradict(
    attack: Assignment, verifier: Assignment, samples: _Samples, out: Evaluation, witness: Tensor, wrong: Tensor, at: Tensor
) -> None:
    rows = at.cpu().numpy()
    radius = out.rows[f"radius:{verifier.label}"].to_numpy()[rows]
    for k in wrong.nonzero().flatten().tolist():
        if radius[k] <= 0:
            continue
        image = samples.x[at[k]][None]
        if not bool(within(witness[k][None], image, verifier.tool.norm, Fraction(float(radius[k])))):
            continue
        label = int(samples.y[at[k]])
        facts = {
            "index": int(out.rows["index"].to_numpy()[rows[k]]), "label": label, "verifier": verifier.label,
            "norm": verifier.tool.norm, "radius": float(radius[k]), "attack": attack.label,
            "distance": float(lp.distance(witness[k][None], image, verifier.tool.norm)),
            "predicted": int(predict(samples.double, witness[k][None].double())),
        }
        raise ContradictionError(facts, image[0].cpu(), witness[k].cpu())


def _decide(rows: pd.DataFrame, threat: Threat, attacks: Sequence[Assignment], verifiers: Sequence[Assignment]) -> None:
    """The typed verdict under the cell's threat: broken beats certified beats error beats open, and none are merged."""
    verdict = np.full(len(rows), "open", dtype=object)
    by = np.full(len(rows), "", dtype=object)
    deterministic = [one for one in verifiers if one.tool.deterministic and one.tool.norm == threat.norm]
    for status in ("error", "timeout"):
        for one in reversed(deterministic):
            hit = (rows[f"status:{one.label}"] == status).to_numpy()
            verdict[hit], by[hit] = status, one.label
    for one in reversed(deterministic):
        hit = (rows[f"radius:{one.label}"] >= float(threat.eps)).to_numpy() & (rows[f"radius:{one.label}"] > 0).to_numpy()
        verdict[hit], by[hit] = "certified", one.label
    for one in reversed([one for one in attacks if one.tool.norm == threat.norm and one.tool.eps <= threat.eps]):
        hit = (~rows[f"survived:{one.label}"] & (rows["predicted"] == rows["label"])).to_numpy()
        verdict[hit], by[hit] = "broken", one.label
    wrong = (rows["predicted"] != rows["label"]).to_numpy()
    verdict[wrong], by[wrong] = "misclassified", ""
    rows.insert(3, "verdict", verdict.astype(str))
    rows.insert(4, "by", by.astype(str))
