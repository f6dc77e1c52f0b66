"""One cell of a suite from nothing to its record."""

from __future__ import annotations

import functools
import json
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from leaderboard.canonical import digest, sha256_file
from leaderboard.checks import PER_LAYER, WHOLE_FILTERS, over_density
from leaderboard.entering import enter, retire
from leaderboard.migrations import SCHEMA
from leaderboard.stats import metrics_of

from .build import build
from .cells import Cell
from .checkpoints import Card, network, save_checkpoint
from .data import Dataset, Split, load
from .errors import UserError
from .evaluate import ContradictionError, Evaluation, evaluate
from .factors import Stored, stored_forms, stored_state
from .files import make_folder, write_json, write_whole
from .health import MOST, collapsed
from .loop import Epoch
from .models import build_model, initialise_
from .outside import own_data, own_training_data
from .passport import stored_form
from .phases import fit
from .provenance import code_digest, provenance, source_digest
from .selfcheck import stamp
from .sparsity import budget_of, kept_of, layer_counts
from .train import Training, derived_seed, nothing
from .witnesses import save_witnesses, witnesses


@dataclass(frozen=True)
class Folders:
    """Where a suite's results live: <out>/<suite>@<version>/."""

    root: Path

    @property
    def records(self) -> Path:
        return self.root / "records"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def phases(self) -> Path:
        return self.root / "phases"

    @property
    def curves(self) -> Path:
        return self.root / "curves"

    @property
    def contradictions(self) -> Path:
        return self.root / "contradictions"

    def record(self, cell: Cell) -> Path:
        return self.records / f"{cell.id}.json"

    def make(self) -> Folders:
        for folder in (self.records, self.checkpoints, self.phases):
            make_folder(folder)
        return self


def pick_device(name: str) -> torch.device:
    """cpu, cuda or auto. Raises UserError where cuda is asked for and absent."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise UserError(f"device must be cpu, cuda or auto, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda was asked for, but torch finds no CUDA device; use --device cpu or auto")
    return torch.device(name)


@functools.lru_cache(maxsize=2)
def dataset(name: str, data_dir: str | None, device: torch.device, extra: str | None = None) -> Dataset:
    """A data set by name or from a file.npz, with the pseudo-labelled images of another one beside its training images."""
    if extra is None:
        return (own_training_data(Path(name)) if name.endswith(".npz") else load(name, data_dir)).to(device)
    data = dataset(name, data_dir, device)
    return replace(data, train=data.train.with_extra(own_data(Path(extra), data.classes).test.to(device)))


def stored_record(cell: Cell, folders: Folders) -> dict[str, Any] | None:
    """The cell's record as it lies on disk, whatever code wrote it; None where there is none or it is damaged."""
    try:
        found = json.loads(folders.record(cell).read_text(encoding="utf-8"))
        return found if found["digest"] == digest(found) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def is_current(record: dict[str, Any], cell: Cell, folders: Folders) -> bool:
    """Whether the record was written by this very code and its evidence is whole."""
    evidence = record["evidence"]
    try:
        return (
            record["provenance"]["code"] == code_digest()
            and record["provenance"]["plugins"] == plugin_digests(cell)
            and sha256_file(folders.records / evidence["verdicts"]) == evidence["verdicts_sha256"]
        )
    except (OSError, KeyError):
        return False


def plugin_digests(cell: Cell) -> dict[str, str]:
    """sha256 of every source file from outside that takes part in the cell."""
    tools = {"method": build("method", cell.method), "objective": build("objective", cell.objective)}
    tools |= {one.label: one.tool for one in (*cell.attacks, *cell.verifiers)}
    found = {name: source_digest(tool) for name, tool in tools.items()}
    return {name: value for name, value in found.items() if value is not None}


def chosen_samples(rule: Mapping[str, Any], test: Split) -> Split:
    """The test images of a suite's rule, such as {"rule": "first", "value": 500}."""
    if rule["rule"] == "first":
        return test.first(rule["value"])
    return test.every(rule["value"]) if rule["rule"] == "every" else test


def run_cell(
    cell: Cell, folders: Folders, device: torch.device, data_dir: str | None = None,
    report: Callable[[float, str], None] = nothing,
) -> dict[str, Any]:
    """Train, prune, attack and certify one cell; returns its record, which is written last, when all else is on disk.

    report(fraction done, what). Raises ContradictionError, TrainingDivergedError or UserError.
    """
    folders.make()
    start = time.perf_counter()
    data = dataset(cell.data["name"], data_dir, device, cell.data.get("extra"))
    epochs: list[tuple[Any, ...]] = []
    model, stored = train_cell(
        cell, data, device, folders.phases, lambda share, what: report(0.85 * share, what),
        lambda phase, curve: epochs.extend((phase, *astuple(one)) for one in curve),
    )
    write_curve(make_folder(folders.curves) / f"{cell.id}.csv", epochs)
    trained = time.perf_counter()
    samples = chosen_samples(cell.samples, data.test)
    index = samples.index.tolist()
    try:
        x, y = samples.pixels(), samples.labels
        out = evaluate(model, x, y, index, cell.threat, cell.attacks, cell.verifiers, lambda what: report(0.9, what))
    except ContradictionError as found:
        keep_contradiction(found, Card(cell.arch, data.shape, data.classes, data.name), cell.id, model, folders)
        raise
    out.seconds = {"train": round(trained - start, 4), **out.seconds}
    return write_record(cell, folders, data, samples, model, stored, out, device)


def train_cell(
    cell: Cell, data: Dataset, device: torch.device, store: Path | None, report: Callable[[float, str], None] = nothing,
    curve: Callable[[str, list[Epoch]], None] = nothing,
) -> tuple[nn.Module, dict[str, Stored]]:
    """(the cell's plain pruned network, in eval mode; what its method stored in place of weights)."""
    objective, method = build("objective", cell.objective), build("method", cell.method)
    images = data.train.first(cell.data["train"]) if "train" in cell.data else data.train
    training = Training(objective, images, cell.budget, cell.seed, cell.data["augment"])
    seed = derived_seed(cell.seed, "initial weights")
    model = initialise_(build_model(cell.arch, data.shape, data.classes, seed=seed), cell.budget.init, seed).to(device)
    total, done = max(1, cell.budget.pretrain + cell.budget.prune + cell.budget.finetune), dict[str, int]()

    def progress(phase: str, epoch: int, epochs: int, loss: float) -> None:
        done[phase] = epoch
        report(min(1.0, sum(done.values()) / total), f"{phase} {epoch}/{epochs}")

    state = fit(model, method, cell.density, training, store, progress, curve)
    card = Card(cell.arch, data.shape, data.classes, data.name)
    return network(state, card, Path(cell.id)).to(device), stored_forms(model)


def write_curve(path: Path, epochs: list[tuple[Any, ...]]) -> None:
    """A row per epoch of every phase: phase, epoch, mean loss, mean |gradient| over the parameters that the phase trained."""
    table = pd.DataFrame(epochs, columns=["phase", *(one.name for one in fields(Epoch))])
    write_whole(path, lambda temporary: table.to_csv(temporary, index=False))


def sparsity_of(
    model: nn.Module, cell: Cell, stored: Mapping[str, Stored] | None = None
) -> tuple[dict[str, Any], list[str]]:
    """(the record's sparsity block, warnings): counted on what is stored, held against what the method promised.

    Where the method stored factors or codes, the plain network's own counts stand beside, under `merged`.
    """
    plain, found = layer_counts(model), stored_form(model, stored or {})
    kept_in = {name: sum(part["kept"] for part in layer["parts"].values()) for name, layer in found["layers"].items()}
    counts = {name: (kept_in[name], total) for name, (_, total) in plain.items()}
    scope = getattr(build("method", cell.method), "scope", "whole network")
    kept, total = map(sum, zip(*counts.values(), strict=True))
    warnings = []
    if scope == PER_LAYER:
        for name, (own, size) in counts.items():
            allowed = kept_of(size, cell.density)
            if own > allowed:
                raise UserError(f"{cell.id}: the method kept {own} weights of {name}, density {cell.density} allows {allowed}")
            if own < allowed:
                warnings.append(f"{name} has {own} non-zero weights of the {allowed} that density {cell.density} allows")
    elif scope.startswith("global"):
        allowed = budget_of(total, cell.density)
        if kept > allowed:
            raise UserError(f"{cell.id}: the method kept {kept} of {total} weights, density {cell.density} allows {allowed}")
        if kept < allowed:
            warnings.append(f"{kept} non-zero weights of the {allowed} that density {cell.density} allows")
    elif scope != WHOLE_FILTERS and kept > cell.density * total:
        warnings.append(over_density(kept, total, cell.density))
    block = {
        "scope": scope,
        "requested": str(cell.density),
        "kept": kept,
        "total": total,
        "layers": {name: list(count) for name, count in counts.items()},
        "bits": found["bits"],
    }
    if stored:
        block["merged"] = {"kept": sum(kept for kept, _ in plain.values()), "layers": {n: list(one) for n, one in plain.items()}}
    return block, warnings


def write_record(
    cell: Cell, folders: Folders, data: Dataset, samples: Split, model: nn.Module, stored: Mapping[str, Stored],
    out: Evaluation, device: torch.device,
) -> dict[str, Any]:
    """Weights and verdict rows first, then the record, then its line in the ledger: a record on disk is a whole one.

    An earlier record of the cell is moved away before any file it speaks of changes.
    """
    sparsity, warnings = sparsity_of(model, cell, stored)
    warnings += [f"{data.name}: {data.note}"] if data.note else []
    warnings += _own_loss(cell) + collapsed(model, samples.first(min(len(samples), MOST)).pixels())
    before = retire(folders.records, cell.id)
    weights, rows = folders.checkpoints / f"{cell.id}.safetensors", folders.records / f"{cell.id}.parquet"
    card = Card(cell.arch, data.shape, data.classes, data.name, facts={"cell": cell.id})
    save_checkpoint(weights, model.state_dict(), card)
    kept = _write_stored(folders.checkpoints / f"{cell.id}.stored.safetensors", model, stored, card)
    write_whole(rows, lambda temporary: out.rows.to_parquet(temporary, index=False))
    witnessed = _write_witnesses(folders.records / f"{cell.id}.witnesses.safetensors", out)
    described = cell.as_json()
    record = {
        "schema": SCHEMA, "id": cell.id, "suite": cell.suite, "suite_version": cell.version, "status": "measured",
        "cell": described,
        "metrics": metrics_of(described, out.rows),
        "sparsity": sparsity,
        "samples": {"rule": _rule(cell), "n": len(samples), "digest": samples.digest},
        "evidence": {
            "verdicts": rows.name, "verdicts_sha256": sha256_file(rows),
            "weights": f"../checkpoints/{weights.name}", "weights_sha256": sha256_file(weights), **kept, **witnessed,
        },
        "checks": {"rechecked_in_float64": out.rechecked, "lowering": out.lowering, "warnings": [*warnings, *out.warnings]},
        "provenance": {
            **provenance(device, data.digest), "plugins": plugin_digests(cell), "selfcheck": stamp(folders.root, device),
        },
        "supersedes": before,
        "timing": {
            "created": datetime.now(UTC).isoformat(timespec="seconds"), "seconds": out.seconds,
            "peak_memory_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        },
    }
    record["digest"] = digest(record)
    write_json(folders.record(cell), record)
    enter(folders.records, record)
    return record


def _own_loss(cell: Cell) -> list[str]:
    """The mark of a method that does not train with the cell's objective alone: it says which loss it fixes itself."""
    fixed = getattr(build("method", cell.method), "fixes_loss", cell.objective["name"])
    return [] if fixed == cell.objective["name"] else [f"{cell.method['name']} fixes a loss of its own: {fixed}"]


def _write_stored(path: Path, model: nn.Module, stored: Mapping[str, Stored], card: Card) -> dict[str, str]:
    """The record's entries for the checkpoint in its stored form; none where the plain weights are what is stored."""
    if not stored:
        path.unlink(missing_ok=True)  # of an earlier record of the cell
        return {}
    save_checkpoint(path, stored_state(model.state_dict(), stored), card)
    return {"stored": f"../checkpoints/{path.name}", "stored_sha256": sha256_file(path)}


def _write_witnesses(path: Path, out: Evaluation) -> dict[str, str]:
    """The record's entries for the images that broke its samples; none where no sample is broken."""
    found = witnesses(out)
    if not found:
        path.unlink(missing_ok=True)  # of an earlier record of the cell
        return {}
    save_witnesses(path, found)
    return {"witnesses": path.name, "witnesses_sha256": sha256_file(path)}


def _rule(cell: Cell) -> str:
    return cell.samples["rule"] if "value" not in cell.samples else f"{cell.samples['rule']} {cell.samples['value']}"


def keep_contradiction(found: ContradictionError, card: Card, name: str, model: nn.Module, folders: Folders) -> Path:
    """The facts, the image, the witness, the weights and what network they are of, so that anyone can run the witness again."""
    folder = make_folder(folders.contradictions)
    tensors = {"image": found.image, "witness": found.witness}
    tensors |= {f"weights.{key}": value for key, value in model.state_dict().items()}
    save_checkpoint(folder / f"{name}.safetensors", tensors, card)
    write_json(folder / f"{name}.json", found.facts)
    return folder / f"{name}.json"
