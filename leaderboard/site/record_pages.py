"""The page of one record: its numbers with counts, where attacks and verifiers disagree, its neighbours, its provenance."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from leaderboard.board import GROUP
from leaderboard.challenges import Effect
from leaderboard.record import Certified, Metrics, Record
from leaderboard.site import pages, samples
from leaderboard.site.reproduce import suite_of
from leaderboard.site.sources import Kept
from leaderboard.stats import interval, metrics_of

if TYPE_CHECKING:
    import pandas as pd

SHOWN = 20  # samples of each kind of disagreement in the table
NEIGHBOURS = 40
MEANINGS = {
    "clean": "right on the image itself", "robust.worst": "right under every attack within the threat",
    "certified.union": "proven by a deterministic verifier of the threat's norm",
}


@dataclass(frozen=True)
class Neighbour:
    """Another record of the same group, and on how many images only this one, or only the other, is a hit."""

    record: str
    name: str
    value: float
    only_this: int
    only_other: int
    images: int


def neighbours(frame: pd.DataFrame) -> dict[str, list[Neighbour]]:
    """For every record the others of its suite, objective, architecture and density, the best first."""
    import numpy as np

    found: dict[str, list[Neighbour]] = {}
    for _, group in frame.groupby(GROUP, sort=True):
        group = group.sort_values(["value", "record"], ascending=[False, True])
        rows = group.to_dict(orient="records")
        same = [one["outcome"].index.equals(rows[0]["outcome"].index) for one in rows]
        rows = [one for one, yes in zip(rows, same) if yes]
        hits = np.array([one["outcome"].to_numpy(dtype=np.int64) for one in rows])
        ahead = hits @ (1 - hits).T
        for i, one in enumerate(rows):
            found[one["record"]] = [
                Neighbour(
                    other["record"], f"{other['method']}, seed {other['seed']}", 100 * other["value"], int(ahead[i, j]),
                    int(ahead[j, i]), hits.shape[1],
                )
                for j, other in enumerate(rows) if j != i
            ]  # fmt: skip
    return found


@dataclass(frozen=True)
class Standing:
    """What the board knows about a record: its 95 % intervals by metric, its neighbours, and whether another one replaced it."""

    intervals: Mapping[str, tuple[float, float]]
    neighbours: list[Neighbour]
    counts: bool


def render(
    kept: Kept, effect: Effect, rows: pd.DataFrame, lines: Mapping[str, list[samples.Curve]], standing: Standing
) -> dict[str, str]:
    """The record's page and its suite file, by file name, from its verdict rows as challenges left them and their curves."""
    record, cell = kept.record, kept.record.document["cell"]
    kinds, sparsity = samples.disagreements(cell, rows), record.sparsity
    suite_file, suite = f"{record.id}.toml", suite_of(cell)
    text = pages.page(
        "record.html.j2", up="../", record=record, method_page=quote(pages.method_page(cell["method"]["name"])),
        status=effect.status, challenged=len(effect.samples), challenges=effect.challenges, counts=standing.counts,
        problems=kept.problems, numbers=list(_numbers(record, effect, rows, standing.intervals)), layers=list(_layers(record)),
        kept=f"{sparsity.kept:,} of {sparsity.total:,} weights ({sparsity.kept / sparsity.total:.2%})",
        size=_size(record), curves=[_drawn(*one) for one in lines.items()], kinds=kinds, shown=SHOWN,
        samples=list(_samples(cell, rows, kinds)), verdicts=sorted(set(rows["verdict"])), asked=samples.columns(cell, rows),
        neighbours=[_neighbour(one) for one in standing.neighbours[:NEIGHBOURS]],
        more_neighbours=max(0, len(standing.neighbours) - NEIGHBOURS), suite_file=quote(suite_file), suite_text=suite,
        commands=list(_commands(record, suite_file)), facts=list(_facts(record)), history=kept.history,
        document=json.dumps(record.original, indent=1, sort_keys=True, ensure_ascii=False),
    )
    return {pages.record_page(record.id): text, f"record/{suite_file}": suite}


def _numbers(
    record: Record, effect: Effect, rows: pd.DataFrame, intervals: Mapping[str, tuple[float, float]]
) -> Iterator[dict[str, Any]]:
    cell = record.document["cell"]
    metrics = Metrics.model_validate(metrics_of(cell, rows)) if effect.challenges else record.metrics
    for name, share in metrics.all().items():
        value = share.hits / share.n if share.n else 0.0
        low, high = intervals.get(name) or interval(share.hits, share.n)
        before = record.metrics.get(name)
        lowered = before is not None and before.hits != share.hits
        notes = ""
        if isinstance(share, Certified) and share.average_radius is not None:
            notes = f"average radius {share.average_radius:.4f}, abstained on {share.abstained}"
        yield {
            "name": name, "means": _meaning(cell, name), "hits": share.hits, "n": share.n,
            "recorded": before.hits if lowered and before is not None else None,
            "number": {**pages.percents(value, low, high), "notes": notes, "headline": name == cell["headline"]},
        }


def _meaning(cell: Mapping[str, Any], name: str) -> str:
    """Which attack or verifier a metric is about, with its settings."""
    kind, _, label = name.partition(".")
    parts = cell["attacks"] if kind == "robust" else cell["verifiers"]
    found = next((one for one in parts if one["label"] == label), None)
    if name in MEANINGS or found is None:
        return MEANINGS.get(name, "")
    fields = ", ".join(f"{key} {value}" for key, value in found.items() if key not in ("name", "label") and value is not None)
    return f"{found['name']}: {fields}"


def _layers(record: Record) -> Iterator[dict[str, Any]]:
    for name, (kept, total) in record.sparsity.layers.items():
        yield {"name": name, "kept": kept, "total": total, "density": round(100 * kept / total, 2) if total else 0.0}


def _size(record: Record) -> str:
    bits = record.sparsity.bits
    if bits is None:
        return ""
    sizes = {"non-zeros and code books": bits.paper, "with their positions": bits.csr, "dense": bits.dense}
    return "Stored in " + ", ".join(f"{size / 8000:,.1f} kB ({words})" for words, size in sizes.items())


def _samples(
    cell: dict[str, Any], rows: pd.DataFrame, kinds: list[samples.Disagreement]
) -> Iterator[dict[str, Any]]:
    by_number = rows.set_index("index", drop=False)
    for kind in kinds:
        for row in by_number.loc[kind.samples[:SHOWN]].to_dict(orient="records"):
            yield {
                **{name: row[name] for name in ("index", "label", "predicted", "verdict", "by")}, "kind": kind.title,
                "answers": samples.answers(cell, row),
            }


def _neighbour(one: Neighbour) -> dict[str, Any]:
    names = ("name", "value", "only_this", "only_other", "images")
    return {**{name: getattr(one, name) for name in names}, "page": f"../{quote(pages.record_page(one.record))}"}


def _commands(record: Record, suite_file: str) -> Iterator[str]:
    if record.provenance.revision is not None:
        yield f"git checkout {record.provenance.revision}"
    yield f"sparsecert run {shlex.quote(suite_file)} --out again"


def _facts(record: Record) -> Iterator[tuple[str, str]]:
    made, evidence, timing = record.provenance, record.evidence, record.timing
    yield "digest", record.digest
    yield "test samples", f"{record.samples.n} ({record.samples.rule}), digest {record.samples.digest}"
    yield "sparsecert", f"{made.version}, revision {pages.revision(record)}, code {made.code[:12]}, python {made.python}"
    yield "packages", ", ".join(f"{name} {version}" for name, version in sorted(made.packages.items()))
    yield "device", f"{made.device}, {made.threads} thread{'s' if made.threads != 1 else ''}"
    if made.machine is not None:
        yield "machine", f"{made.machine.processor}, {made.machine.cores} cores, {made.machine.memory_gib} GiB"
    yield "data", f"{record.cell.data.name}, digest {made.data}"
    for name, digest in sorted(made.plugins.items()):
        yield "plug-in", f"{name}, sha256 {digest}"
    for what in ("verdicts", "weights", "stored", "witnesses"):
        if getattr(evidence, what) is not None:
            yield what, f"{getattr(evidence, what)}, sha256 {getattr(evidence, f'{what}_sha256')}"
    memory = "" if timing.peak_memory_mib is None else f"; peak memory {timing.peak_memory_mib:,.0f} MiB"
    yield "took", ", ".join(f"{stage} {took:g} s" for stage, took in timing.seconds.items()) + memory
    yield "written", timing.created
    for label, count in record.checks.rechecked_in_float64.items():
        yield "self-check", f"{label}: {count} close margins decided again in float64"
    for sentence in record.checks.lowering:
        yield "self-check", sentence
    for sentence in record.checks.warnings:
        yield "warning", sentence
    if record.supersedes is not None:
        yield "replaces", record.supersedes


# ---- curves as paths -------------------------------------------------------------------------------------------------

WIDE, HIGH = 300, 200


def _drawn(radius: str, lines: list[samples.Curve]) -> dict[str, Any]:
    """Curves as steps in a box of WIDE by HIGH, with ticks of its axes."""
    most = max(line.radii[-1] for line in lines) or 1.0
    return {
        "title": f"{radius} radius, pixels in [0,1]",
        "down": [{"at": HIGH - HIGH * share / 100, "text": f"{share} %"} for share in range(0, 101, 25)],
        "along": [{"at": WIDE * i / 4, "text": f"{most * i / 4:.3g}"} for i in range(5)],
        "lines": [{"name": line.name, "proven": line.proven, "path": _path(line, most)} for line in lines],
    }


def _path(line: samples.Curve, most: float) -> str:
    points = [(WIDE * radius / most, HIGH - HIGH * share) for radius, share in zip(line.radii, line.shares)]
    (x, y), *rest = points
    words = [f"M{x:.1f} {y:.1f}"]
    for x, y in rest:  # a proof holds up to its radius, a witness from its own on
        words.append(f"V{y:.1f}H{x:.1f}" if line.proven else f"H{x:.1f}V{y:.1f}")
    return "".join(words) + (f"V{HIGH}" if line.proven else "")
