"""Small records with rows and weights that hold together, written the way the bench writes them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import save_file
from scipy.stats import beta, norm

from leaderboard.canonical import digest, sha256_file
from leaderboard.record import Record, read
from leaderboard.stats import metrics_of

SIGMA, ALPHA, DRAWS = 0.25, 0.001, 1000
MACHINE = {"processor": "AMD EPYC 7763 64-Core Processor", "cores": 2, "memory_gib": 8}
WEIGHTS = {"conv1.weight": np.eye(4, dtype=np.float32), "fc.weight": np.ones((2, 4), dtype=np.float32)}


def cell_of(method: str = "hydra", objective: str = "pgd", density: str = "1/2", seed: int = 0, **changes: Any) -> dict[str, Any]:
    cell = {
        "suite": "toy", "version": 1, "data": {"name": "toy", "augment": "none"}, "arch": "cnn_small",
        "method": {"name": method}, "objective": {"name": objective, "eps": "1/10"}, "density": density, "seed": seed,
        "budget": {"pretrain": 1}, "threat": {"norm": "linf", "eps": "1/10"},
        "attacks": [
            {"name": "pgd", "label": "pgd-50", "norm": "linf", "eps": "1/10"},
            {"name": "apgd", "label": "apgd", "norm": "linf", "eps": "1/10"},
        ],
        "verifiers": [
            {"name": "ibp", "label": "ibp", "norm": "linf", "eps": "1/10"},
            {"name": "crown", "label": "crown", "norm": "linf", "eps": "1/10"},
            {"name": "smoothing", "label": "smoothing", "norm": "l2", "eps": "1/4", "sigma": SIGMA, "n": DRAWS, "alpha": ALPHA,
             "first": 10},
        ],
        "headline": "robust.worst",
    }
    return {**cell, **changes}


def smoothed_radius(hits: int) -> float:
    """Cohen's radius by scipy.stats, another way than the package's."""
    p = ALPHA ** (1 / DRAWS) if hits == DRAWS else beta.ppf(ALPHA, hits, DRAWS - hits + 1) if hits else 0.0
    return float(SIGMA * norm.ppf(p)) if p > 0.5 else 0.0


def rows_of(n: int = 20, wrong: int = 2, broken: int = 4, ibp: int = 6, crown: int = 9, asked: int = 10) -> pd.DataFrame:
    """n samples, in this order: certified by ibp, by crown only, open, broken (all by apgd, half by pgd-50), misclassified."""
    index = np.arange(n)
    right = index < n - wrong
    apgd = index < n - wrong - broken
    pgd = index < n - wrong - broken // 2
    hits = np.where(index % 5 == 4, 500, np.where(index % 2 == 0, DRAWS, 900))
    radius = np.array([smoothed_radius(int(one)) for one in hits])
    status = np.where(hits == 500, "abstain", np.where(radius >= 0.25, "proved", "open"))
    inside = index < asked
    by_bounds = {
        label: {
            f"status:{label}": np.where(~right, "misclassified", np.where(index < count, "proved", "open")).tolist(),
            f"radius:{label}": np.where(index < count, 0.1, 0.0),
            f"margin:{label}": np.where(right, np.where(index < count, 0.5, -0.5), np.nan),
        }
        for label, count in (("ibp", ibp), ("crown", crown))
    }
    verdict = np.where(~right, "misclassified", np.where(~apgd, "broken", np.where(index < crown, "certified", "open")))
    by = np.where(~right, "", np.where(~pgd, "pgd-50", np.where(~apgd, "apgd", "")))
    by = np.where(verdict == "certified", np.where(index < ibp, "ibp", "crown"), by)
    return pd.DataFrame({
        "index": index, "label": index % 3, "predicted": np.where(right, index % 3, (index + 1) % 3),
        "verdict": verdict.tolist(), "by": by.tolist(),
        "survived:pgd-50": right & pgd, "distance:pgd-50": np.where(right, 0.1, np.nan),
        "survived:apgd": right & apgd, "distance:apgd": np.where(right, 0.1, np.nan),
        **by_bounds["ibp"], **by_bounds["crown"],
        "status:smoothing": np.where(inside, status, "skipped").tolist(),
        "radius:smoothing": np.where(inside & (status != "abstain"), radius, 0.0),
        "margin:smoothing": np.full(n, np.nan),
        "predicted:smoothing": np.where(inside & (status != "abstain"), index % 3, -1),
        "hits:smoothing": np.where(inside, hits, 0), "n:smoothing": np.where(inside, DRAWS, 0),
    })


@dataclass
class Run:
    """A run's folder under construction."""

    root: Path

    @property
    def records(self) -> Path:
        return self.root / "records"

    def add(self, rows: pd.DataFrame | None = None, name: str | None = None, **changes: Any) -> Record:
        """Writes rows, weights and record of one cell; `changes` are those of `cell_of`."""
        cell, rows = cell_of(**changes), rows_of() if rows is None else rows
        words = [cell["arch"], cell["method"]["name"], cell["objective"]["name"], f"d{cell['density']}", f"s{cell['seed']}"]
        name = (name or "-".join(["toy@1", *words])).replace("/", "over")
        table, weights = self.records / f"{name}.parquet", self.root / "checkpoints" / f"{name}.safetensors"
        rows.to_parquet(table, index=False)
        save_file(WEIGHTS, weights)
        self.write(document_of(name, cell, rows, table, weights))
        return self.read(name)

    def write(self, document: dict[str, Any], sign: bool = True) -> None:
        signed = {**document, "digest": digest(document)} if sign else document
        (self.records / f"{document['id']}.json").write_text(json.dumps(signed), encoding="utf-8")

    def read(self, name: str) -> Record:
        return read(self.records / f"{name}.json")

    def edit(self, record: Record, change: Callable[[dict[str, Any]], None], sign: bool = True) -> Record:
        """The record with its JSON changed, signed again as a careful forger would (or not)."""
        document = copy.deepcopy(record.document)
        change(document)
        self.write(document, sign)
        return self.read(record.id)

    def forge(self, record: Record, change: Callable[[pd.DataFrame], None], consistent: bool = True) -> Record:
        """The record with its rows changed; where consistent, with the metrics and every digest made to fit."""
        table = self.records / record.evidence.verdicts
        rows = pd.read_parquet(table)
        change(rows)
        rows.to_parquet(table, index=False)
        if not consistent:
            return record

        def fit(document: dict[str, Any]) -> None:
            document["metrics"] = metrics_of(document["cell"], rows)
            document["evidence"]["verdicts_sha256"] = sha256_file(table)

        return self.edit(record, fit)


def document_of(name: str, cell: dict[str, Any], rows: pd.DataFrame, table: Path, weights: Path) -> dict[str, Any]:
    return {
        "schema": 2, "id": name, "suite": cell["suite"], "suite_version": cell["version"], "status": "measured", "cell": cell,
        "metrics": metrics_of(cell, rows),
        "sparsity": {
            "scope": "global", "requested": cell["density"], "kept": 12, "total": 24,
            "layers": {"conv1": [4, 16], "fc": [8, 8]},
        },
        "samples": {"rule": "all", "n": len(rows), "digest": "a" * 64},
        "evidence": {
            "verdicts": table.name, "verdicts_sha256": sha256_file(table),
            "weights": f"../checkpoints/{weights.name}", "weights_sha256": sha256_file(weights),
        },
        "checks": {"rechecked_in_float64": {"ibp": 2}, "lowering": [], "warnings": []},
        "provenance": {
            "version": "0.1.0", "code": "c" * 64, "revision": None, "dirty": None, "packages": {"torch": "2.13.0"},
            "python": "3.11.7", "device": "cpu", "machine": MACHINE, "threads": 1, "data": "d" * 64, "plugins": {},
        },
        "supersedes": None,
        "timing": {"created": "2026-11-21T09:00:00Z", "seconds": {"train": 3.5, "attack:pgd-50": 0.5}, "peak_memory_mib": 300.0},
    }


@pytest.fixture
def run(tmp_path: Path) -> Run:
    (tmp_path / "records").mkdir()
    (tmp_path / "checkpoints").mkdir()
    return Run(tmp_path)
