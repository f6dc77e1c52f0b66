"""One cell of a suite from nothing to its record."""

from __future__ import annotations

import functools
import json
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from leaderboard.canonical import digest, sha256_file
from leaderboard.stats import metrics_of

from .build import build
from .cells import Cell
from .checkpoints import Card, network, save_checkpoint
from .data import Dataset, Split, load
from .errors import UserError
from .evaluate import ContradictionError, Evaluation, evaluate
from .files import make_folder, write_json, write_whole
from .models import build_model
from .phases import fit
from .provenance import code_digest, provenance, source_digest
from .sparsity import kept_of, layer_counts
from .train import Training, derived_seed, nothing

SCHEMA = 1


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
def dataset(name: str, data_dir: str | None, device: torch.device) -> Dataset:
    return load(name, data_dir).to(device)


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


def chosen_samples(cell: Cell, test: Split) -> Split:
    rule = cell.samples
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
    data = dataset(cell.data["name"], data_dir, device)
    model = train_cell(cell, data, device, folders.phases, lambda share, what: report(0.85 * share, what))
    trained = time.perf_counter()
    samples = chosen_samples(cell, data.test)
    index = samples.index.tolist()
    try:
        x, y = samples.pixels(), samples.labels
        out = evaluate(model, x, y, index, cell.threat, cell.attacks, cell.verifiers, lambda what: report(0.9, what))
    except ContradictionError as found:
        keep_contradiction(found, cell.id, model, folders)
        raise
    out.seconds = {"train": round(trained - start, 4), **out.seconds}
    return write_record(cell, folders, data, samples, model, out, device)


def train_cell(
    cell: Cell, data: Dataset, device: torch.device, store: Path | None, report: Callable[[float, str], None] = nothing
) -> nn.Module:
    """The cell's plain pruned network, in eval mode."""
    objective, method = build("objective", cell.objective), build("method", cell.method)
    images = data.train.first(cell.data["train"]) if "train" in cell.data else data.train
    training = Training(objective, images, cell.budget, cell.seed, cell.data["augment"])
    model = build_model(cell.arch, data.shape, data.classes, seed=derived_seed(cell.seed, "initial weights")).to(device)
    total, done = max(1, cell.budget.pretrain + cell.budget.prune + cell.budget.finetune), dict[str, int]()

    def progress(phase: str, epoch: int, epochs: int, loss: float) -> None:
        done[phase] = epoch
        report(min(1.0, sum(done.values()) / total), f"{phase} {epoch}/{epochs}")

    state = fit(model, method, cell.density, training, store, progress)
    card = Card(cell.arch, data.shape, data.classes, data.name)
    return network(state, card, Path(cell.id)).to(device)


def sparsity_of(model: nn.Module, cell: Cell) -> tuple[dict[str, Any], list[str]]:
    """(the record's sparsity block, warnings): counted on the plain network, held against what the method promised."""
    counts = layer_counts(model)
    method = build("method", cell.method)
    warnings = []
    if getattr(method, "scope", None) == "per layer":
        for name, (kept, total) in counts.items():
            allowed = kept_of(total, cell.density)
            if kept > allowed:
                raise UserError(f"{cell.id}: the method kept {kept} weights of {name}, density {cell.density} allows {allowed}")
            if kept < allowed:
                warnings.append(f"{name} has {kept} non-zero weights of the {allowed} that density {cell.density} allows")
    block = {
        "scope": getattr(method, "scope", "whole network"),
        "requested": str(cell.density),
        "kept": sum(kept for kept, _ in counts.values()),
        "total": sum(total for _, total in counts.values()),
        "layers": {name: list(count) for name, count in counts.items()},
    }
    return block, warnings


def write_record(
    cell: Cell, folders: Folders, data: Dataset, samples: Split, model: nn.Module, out: Evaluation, device: torch.device
) -> dict[str, Any]:
    """Weights and verdict rows first, the record last: a record on disk is a whole one."""
    sparsity, warnings = sparsity_of(model, cell)
    weights, rows = folders.checkpoints / f"{cell.id}.safetensors", folders.records / f"{cell.id}.parquet"
    card = Card(cell.arch, data.shape, data.classes, data.name, facts={"cell": cell.id})
    save_checkpoint(weights, model.state_dict(), card)
    write_whole(rows, lambda temporary: out.rows.to_parquet(temporary, index=False))
    before = stored_record(cell, folders)
    described = cell.as_json()
    record = {
        "schema": SCHEMA, "id": cell.id, "suite": cell.suite, "suite_version": cell.version, "status": "measured",
        "cell": described,
        "metrics": metrics_of(described, out.rows),
        "sparsity": sparsity,
        "samples": {"rule": _rule(cell), "n": len(samples), "digest": samples.digest},
        "evidence": {
            "verdicts": rows.name, "verdicts_sha256": sha256_file(rows),
            "weights": f"../checkpoints/{weights.name}", "weights_sha256": sha256_file(weights),
        },
        "checks": {"rechecked_in_float64": out.rechecked, "lowering": out.lowering, "warnings": [*warnings, *out.warnings]},
        "provenance": {**provenance(device, data.digest), "plugins": plugin_digests(cell)},
        "supersedes": None if before is None else before["digest"],
        "timing": {
            "created": datetime.now(UTC).isoformat(timespec="seconds"), "seconds": out.seconds,
            "peak_memory_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        },
    }
    record["digest"] = digest(record)
    if before is not None:
        keep = make_folder(folders.root / "superseded")
        write_json(keep / f"{cell.id}-{before['digest'][:8]}.json", before)
    write_json(folders.record(cell), record)
    return record


def _rule(cell: Cell) -> str:
    return cell.samples["rule"] if "value" not in cell.samples else f"{cell.samples['rule']} {cell.samples['value']}"


def keep_contradiction(found: ContradictionError, name: str, model: nn.Module, folders: Folders) -> Path:
    """The facts, the image, the witness and the weights, so that anyone can run the witness again."""
    folder = make_folder(folders.contradictions)
    tensors = {"image": found.image.contiguous(), "witness": found.witness.contiguous()}
    tensors |= {f"weights.{key}": value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    write_whole(folder / f"{name}.safetensors", lambda temporary: save_file(tensors, temporary))
    write_json(folder / f"{name}.json", found.facts)
    return folder / f"{name}.json"
