"""One verdict per sample: misclassified, broken, certified, open or error. Attacks propose, verifiers prove, this decides."""

from __future__ import annotations

import copy
import math
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

from attacks import TooFewClassesError, lp
from attacks.pgd import classes_of
from verifiers import Proof, UnsupportedNetworkError

from .cells import Assignment
from .errors import UserError
from .masking import masking_suspected
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
    attempts: list[Attempt] = field(default_factory=list)

    @property
    def witnesses(self) -> dict[str, Tensor]:
        """The images that each attack, or looking verifier, broke the network with."""
        return {attempt.one.label: attempt.witness[attempt.wrong].cpu() for attempt in self.attempts}


@dataclass
class Attempt:
    """What an attack (or a verifier that looks for counterexamples) reached: legal images for the samples `at`, and which
    of them the float64 network misclassifies."""

    one: Assignment
    at: Tensor
    witness: Tensor
    wrong: Tensor


@dataclass
class _Samples:
    """The images under test and what the plain network says about them."""

    model: nn.Module
    double: nn.Module
    x: Tensor
    y: Tensor
    predicted: Tensor

    @property
    def right(self) -> np.ndarray:
        return (self.predicted == self.y).cpu().numpy()


@torch.no_grad()
def predict(model: nn.Module, x: Tensor, batch: int = ATTACK_BATCH) -> Tensor:
    """Predicted classes [N]; -1, which is nobody's label, where a logit is NaN or infinite."""
    parts = [classes_of(model(part)) for part in x.split(batch)]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64, device=x.device)


def evaluate(
    model: nn.Module, x: Tensor, y: Tensor, index: Sequence[int], threat: Threat,
    attacks: Sequence[Assignment], verifiers: Sequence[Assignment], report: Callable[[str], None] = nothing,
) -> Evaluation:
    """Attack and certify every correctly classified sample of a plain network.

    In order: the clean pass; verifiers on every correct sample; attacks on every correct sample, then those with `rest` on the
    correct samples that no attack has broken in a ball that lies in theirs; verifiers that call themselves `costly` on what is
    then neither proven nor broken. A certified sample is attacked like any other.
    x: float32 [N, C, H, W] in [0,1]; y: int64 [N]; index: N sample numbers. Witnesses are projected to the exact ball and
    [0,1] and re-executed in float64 here; an attack's own word is not taken. Raises ContradictionError when a deterministic
    certificate is broken by a witness inside its ball.
    """
    model = model.eval().requires_grad_(False)
    samples = _Samples(model, copy.deepcopy(model).double(), x, y, predict(model, x))
    table = {"index": np.asarray(index), "label": y.cpu().numpy(), "predicted": samples.predicted.cpu().numpy()}
    out = Evaluation(pd.DataFrame({name: column.astype(np.int64) for name, column in table.items()}))
    done: list[Assignment] = []
    _verify_all([one for one in verifiers if not _costly(one)], samples, out, done, report)
    _attack_all(attacks, samples, out, done, report)
    _verify_all([one for one in verifiers if _costly(one)], samples, out, done, report)
    _decide(out.rows, threat, attacks, verifiers)
    return out


def _costly(one: Assignment) -> bool:
    return bool(getattr(one.tool, "costly", False))


def _verify_all(
    verifiers: Sequence[Assignment], samples: _Samples, out: Evaluation, done: list[Assignment], report: Callable[[str], None]
) -> None:
    for one in verifiers:
        report(one.label)
        with _timed(out, f"verifier:{one.label}"):
            _verify(one, samples, out, done)
        done.append(one)
        _contradictions(samples, out, done)


def _attack_all(
    attacks: Sequence[Assignment], samples: _Samples, out: Evaluation, done: Sequence[Assignment], report: Callable[[str], None]
) -> None:
    before: list[Assignment] = []
    for one in in_order(attacks):
        report(one.label)
        with _timed(out, f"attack:{one.label}"):
            _attack(one, samples, out, before)
        before.append(one)
        _contradictions(samples, out, done)
    out.warnings += masking_suspected(out.rows, attacks)


def in_order(attacks: Sequence[Assignment]) -> list[Assignment]:
    """As they are run: those with `rest` last, cheap ones first (by `cost`, about the forward passes of an image)."""
    return sorted(attacks, key=lambda one: (one.rest, float(getattr(one.tool, "cost", math.inf))))


@contextmanager
def _timed(out: Evaluation, stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    out.seconds[stage] = round(time.perf_counter() - start, 4)


def _verify(one: Assignment, samples: _Samples, out: Evaluation, done: Sequence[Assignment]) -> None:
    """Ask one verifier: a deterministic one about the correct samples, smoothing (which judges g, not f) about all.

    A costly one is not asked about what the verifiers `done` have proven or an attack has broken; it takes their answers.
    """
    status = np.full(len(samples.y), "", dtype=object)
    columns = {"radius": np.zeros(len(status)), "margin": np.full(len(status), np.nan)}
    if one.tool.deterministic:
        status[(samples.predicted != samples.y).cpu().numpy()] = "misclassified"
    if _costly(one):
        _take_over(one, out, done, status, columns)
    if one.first is not None:
        status[one.first :] = "skipped"
    at = np.flatnonzero(status == "")
    asked = torch.from_numpy(at).to(samples.y.device)
    try:
        proof = _proof_of(one, samples.model, samples.x[asked], samples.y[asked]) if len(asked) else None
    except UnsupportedNetworkError as reason:
        out.warnings.append(f"{one.label}: {reason}")
        status[at], proof = "error", None
    if proof is not None:
        status[at] = proof.status
        columns["radius"][at], columns["margin"][at] = proof.radius.numpy(), proof.margin.numpy()
        out.rechecked[one.label] = proof.rechecked
        out.lowering += [f"{one.label}: {note}" for note in proof.notes]
    if getattr(one.tool, "falsifies", False):
        _falsified(one, samples, out, status, asked, None if proof is None else proof.witness)
    out.rows[f"status:{one.label}"] = status.astype(str)
    for name, column in columns.items():
        out.rows[f"{name}:{one.label}"] = column
    if not one.tool.deterministic:
        _smoothing_columns(one, at, proof, out.rows)
    elif proof is not None:
        for name, values in proof.details.items():
            out.rows[f"{name}:{one.label}"] = _spread(values.double().numpy(), at, len(status), np.nan)


def _proof_of(one: Assignment, model: nn.Module, x: Tensor, y: Tensor) -> Proof:
    proof = one.tool(model, x, y)
    if not isinstance(proof, Proof):
        raise UserError(f"the verifier {one.label!r} returned {type(proof).__name__}, not a verifiers.Proof")
    lengths = {len(proof.radius), len(proof.margin), len(proof.predicted), len(proof.status)}
    if lengths != {len(x)}:
        raise UserError(f"the verifier {one.label!r} answered {sorted(lengths)} samples of {len(x)}")
    if not bool(((proof.radius >= 0) & (proof.radius < torch.inf)).all()):
        raise UserError(f"the verifier {one.label!r} returned a radius that is no finite number from 0; 0 proves nothing")
    return proof


def _take_over(
    one: Assignment, out: Evaluation, done: Sequence[Assignment], status: np.ndarray, columns: dict[str, np.ndarray]
) -> None:
    """What is proven or broken already, under the same norm and a ball that settles this one's."""
    open_ = status == ""
    for other in done:
        if other.tool.deterministic and other.tool.norm == one.tool.norm:
            radius = out.rows[f"radius:{other.label}"].to_numpy()
            hit = open_ & (radius >= float(one.tool.eps)) & (radius > 0)
            status[hit], columns["radius"][hit] = "proved", float(one.tool.eps)
            margin = out.rows[f"margin:{other.label}"].to_numpy()
            columns["margin"][hit] = np.fmax(columns["margin"][hit], margin[hit])
    for attempt in out.attempts:
        if attempt.one.tool.norm == one.tool.norm and attempt.one.tool.eps <= one.tool.eps:
            status[attempt.at[attempt.wrong].cpu().numpy()] = "broken"


def _falsified(
    one: Assignment, samples: _Samples, out: Evaluation, status: np.ndarray, asked: Tensor, witness: Tensor | None
) -> None:
    """A verifier's counterexamples enter by the attacks' door: what does not run again here is not believed."""
    survived, far = samples.right.copy(), np.full(len(status), np.nan)
    claimed = np.flatnonzero(status[asked.cpu().numpy()] == "broken")
    if witness is not None and len(claimed):
        at = asked[torch.from_numpy(claimed).to(asked.device)]
        x, y = samples.x[at], samples.y[at]
        legal = _legal(one, witness.to(x)[torch.from_numpy(claimed)], x)
        wrong = predict(samples.double, legal.double()) != y
        survived[at.cpu().numpy()], far[at.cpu().numpy()] = ~wrong.cpu().numpy(), lp.distance(legal, x, one.tool.norm).cpu()
        status[at[~wrong].cpu().numpy()] = "open"
        out.attempts.append(Attempt(one, at, legal, wrong))
    elif len(claimed):
        status[asked.cpu().numpy()[claimed]] = "open"
    out.rows[f"survived:{one.label}"], out.rows[f"distance:{one.label}"] = survived, far


def _smoothing_columns(one: Assignment, at: np.ndarray, proof: Proof | None, rows: pd.DataFrame) -> None:
    found = {} if proof is None else {"predicted": proof.predicted, **proof.details}
    for name in ("predicted", "hits", "n"):
        values = found[name].numpy() if name in found else np.zeros(len(at), dtype=np.int64)
        rows[f"{name}:{one.label}"] = _spread(values, at, len(rows), -1 if name == "predicted" else 0).astype(np.int64)
    if getattr(one.tool, "rule", "fixed") == "sequential":  # its radius follows from the hits at every look
        looks = np.full(len(rows), "", dtype=object)
        if "looks" in found:
            looks[at] = [" ".join(f"{n}:{hits}" for n, hits in seen if n > 0) for seen in found["looks"].tolist()]
        rows[f"looks:{one.label}"] = looks.astype(str)


def _spread(values: np.ndarray, at: np.ndarray, size: int, otherwise: float) -> np.ndarray:
    column = np.full(size, otherwise, dtype=np.float64)
    column[at] = values
    return column


def _attack(one: Assignment, samples: _Samples, out: Evaluation, before: Sequence[Assignment]) -> None:
    """Attack every correct sample; with `rest` those only that are not broken yet, the others counting as broken by it, too."""
    survived, far = samples.right.copy(), np.full(len(samples.y), np.nan)
    for other in before if one.rest else ():
        if other.tool.norm == one.tool.norm and other.tool.eps <= one.tool.eps:
            survived &= out.rows[f"survived:{other.label}"].to_numpy()
    at = torch.from_numpy(np.flatnonzero(survived)).to(samples.y.device)
    x, y = samples.x[at], samples.y[at]
    witness, wrong = x, torch.zeros_like(y, dtype=torch.bool)
    if len(at):
        parts = [_witness(one, samples.model, x[i], y[i]) for i in torch.arange(len(x), device=x.device).split(ATTACK_BATCH)]
        witness = torch.cat(parts)
        wrong = predict(samples.double, witness.double()) != y
        survived[at.cpu().numpy()] = ~wrong.cpu().numpy()
        far[at.cpu().numpy()] = lp.distance(witness, x, one.tool.norm).cpu().numpy()
    out.attempts.append(Attempt(one, at, witness, wrong))
    out.rows[f"survived:{one.label}"] = survived
    out.rows[f"distance:{one.label}"] = far


def _witness(one: Assignment, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The attack's proposal, put into the exact ball and [0,1] by us."""
    try:
        proposed = one.tool(model, x.clone(), y.clone())  # a plug-in may write into what it is given
    except TooFewClassesError as reason:
        raise UserError(f"the attack {one.label!r} does not fit this network: {reason}") from reason
    if not isinstance(proposed, Tensor) or proposed.shape != x.shape:
        got = tuple(proposed.shape) if isinstance(proposed, Tensor) else type(proposed).__name__
        raise UserError(f"the attack {one.label!r} returned {got}, expected images of shape {tuple(x.shape)}")
    return _legal(one, proposed.to(x), x)


def _legal(one: Assignment, proposed: Tensor, x: Tensor) -> Tensor:
    legal = lp.project(torch.where(torch.isfinite(proposed), proposed, x), x, one.tool.norm, one.tool.eps)
    inside = within(legal, x, one.tool.norm, one.tool.eps)
    return torch.where(inside.view(-1, *[1] * (x.dim() - 1)), legal, x)


def _contradictions(samples: _Samples, out: Evaluation, verifiers: Sequence[Assignment]) -> None:
    """Every witness so far against every deterministic certificate so far, whatever norm the attack meant."""
    for attempt in out.attempts:
        for verifier in verifiers:
            if verifier.tool.deterministic:
                _contradict(attempt, verifier, samples, out)


def _contradict(attempt: Attempt, verifier: Assignment, samples: _Samples, out: Evaluation) -> None:
    attack, at, witness, wrong = attempt.one, attempt.at, attempt.witness, attempt.wrong
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
    breakers = [*attacks, *(one for one in verifiers if f"survived:{one.label}" in rows)]
    for one in reversed([one for one in breakers if one.tool.norm == threat.norm and one.tool.eps <= threat.eps]):
        # a rest attack has no distance where another one broke the sample before
        own = rows[f"distance:{one.label}"].notna() & (rows["predicted"] == rows["label"])
        hit = (~rows[f"survived:{one.label}"] & own).to_numpy()
        verdict[hit], by[hit] = "broken", one.label
    wrong = (rows["predicted"] != rows["label"]).to_numpy()
    verdict[wrong], by[wrong] = "misclassified", ""
    rows.insert(3, "verdict", verdict.astype(str))
    rows.insert(4, "by", by.astype(str))
