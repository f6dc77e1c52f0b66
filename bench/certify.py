"""Certify one checkpoint: measured density, clean, attacked and certified accuracy, a verdict per sample."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from leaderboard.canonical import canonical

from .answer import ENDS, VERDICTS, asked, rows_of, summary
from .build import plain
from .cells import Assignment
from .curve import climbs, measure, points, smoothed_points
from .evaluate import Evaluation, evaluate
from .export import export
from .files import make_folder, write_json, write_whole
from .health import Flag, flags
from .onnx_files import is_onnx
from .outside import is_own, own_file
from .passport import claim_holds, passport
from .question import DISTANCE, Case, Question, prepare
from .report import write_report
from .train import nothing

HEALTH = 64  # samples that the health flags are computed on
Report = Callable[[int, int, dict[str, int]], None]


def certify(
    question: Question, device: torch.device, out: Path | None = None, report: Report = nothing,
    doing: Callable[[str], None] = nothing,
) -> dict[str, Any]:
    """{"summary", "rows", "curve", ...} of one checkpoint on the test set.

    Samples are judged batch by batch; with a folder `out` every finished batch survives a kill and is not judged again, and the
    answer is written there as JSON, tables and a page. Samples that neither an earlier run nor this one within the total time
    limit reaches have the verdict timeout, and no part in the curve. Raises UserError and ContradictionError.
    """
    start = time.perf_counter()
    case = prepare(question, device)
    health = flags(case.model, case.samples.first(HEALTH).pixels(), case.samples.first(HEALTH).labels)
    if question.export is not None:
        seconds = dict(question.exact).get("seconds")
        export(case.model, case.data, case.samples, case.threat.eps, question.export, seconds)
    batches = torch.arange(len(case.samples)).split(question.batch)
    _say_what_lies_there(case, batches, out, doing)
    end = math.inf if question.total_seconds is None else start + question.total_seconds
    parts: list[pd.DataFrame] = []
    for at in batches:
        table = _table(case, _place(out, case.fingerprint, at), end, partial(_judge, case, at, doing))
        parts.append(_out_of_time(case, at) if table is None else table)
        done = pd.concat(parts, ignore_index=True)
        report(len(done), len(case.samples), {name: int((done["verdict"] == name).sum()) for name in VERDICTS})
    rows = pd.concat(parts, ignore_index=True)
    curve = _curve(case, parts, batches, out, end, report)
    case.seconds["total"] = round(case.seconds.get("total", 0.0) + time.perf_counter() - start, 4)
    answer = {**_answer(question, case, rows, health), "curve": curve}
    if out is not None:
        write_json(out / "answer.json", answer)
        _write_table(rows, out / "rows")
        write_report(answer, out)
    return answer


def _say_what_lies_there(case: Case, batches: Sequence[Tensor], out: Path | None, doing: Callable[[str], None]) -> None:
    """What a folder of answers holds already: batches of this very question, or the answer to another one."""
    if out is None:
        return
    done = sum(len(at) for at in batches if (path := _place(out, case.fingerprint, at)) is not None and path.exists())
    if done:
        doing(f"{done} of {len(case.samples)} images were judged before and are taken from {out}")
    try:
        before = json.loads((out / "answer.json").read_text(encoding="utf-8"))["asked"]["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if before != case.fingerprint:
        doing(f"{out} holds the answer to another question, which this one replaces")


def _write_table(table: pd.DataFrame, where: Path) -> None:
    write_whole(where.with_suffix(".csv"), lambda temporary: table.to_csv(temporary, index=False))
    write_whole(where.with_suffix(".parquet"), lambda temporary: table.to_parquet(temporary, index=False))


def _curve(
    case: Case, parts: Sequence[pd.DataFrame], batches: Sequence[Tensor], out: Path | None, end: float, report: Report
) -> list[dict[str, Any]]:
    """What `bench.curve` finds about all samples that there was time for; empty if no curve was asked for."""
    found: list[dict[str, Any]] = []
    if case.curve and any(climbs(one) for one in case.verifiers):
        measured: list[pd.DataFrame] = []
        facts = [case.fingerprint, [str(eps) for eps in case.curve]]
        fingerprint = hashlib.sha256(canonical(facts)).hexdigest()
        for rows, at in zip(parts, batches, strict=True):
            table = _table(case, _place(out, fingerprint, at), end, partial(_measure, case, rows, at))
            if table is None:
                continue
            measured.append(table)
            report(int(at[-1]) + 1, len(case.samples), {"curve": int(at[-1]) + 1})
        found += points(pd.concat(measured, ignore_index=True), case.curve) if measured else []
    for one in case.verifiers:
        if not one.tool.deterministic:
            found += smoothed_points(pd.concat(parts, ignore_index=True), one.label, case.curve)
    return found


def _measure(case: Case, rows: pd.DataFrame, at: Tensor) -> pd.DataFrame:
    start = time.perf_counter()
    x, y = case.samples.pixels(at), case.samples.labels[at]
    found = measure(case.model, x, y, rows, case.threat, case.curve, case.attacks, case.verifiers)
    found.attrs = {"seconds": {"curve": time.perf_counter() - start}, "warnings": [], "lowering": []}
    return found


def _place(out: Path | None, fingerprint: str, at: Tensor) -> Path | None:
    """Where a batch is kept, if there is a folder."""
    return None if out is None else make_folder(out / "batches" / fingerprint[:16]) / f"{int(at[0]):08d}.parquet"


def _table(case: Case, path: Path | None, end: float, make: Callable[[], pd.DataFrame]) -> pd.DataFrame | None:
    """The table of one batch: what lies there already, whatever the clock says, else made before `end`, else None.

    Its attrs, which the file keeps, are what the answer says of the batch beside its rows: seconds, warnings, lowering steps.
    """
    table = _kept(path)
    if table is not None:
        case.seconds["total"] = case.seconds.get("total", 0.0) + sum(table.attrs["seconds"].values())  # of an earlier run
    elif time.perf_counter() > end:
        return None
    else:
        table = make()
        if path is not None:
            write_whole(path, lambda temporary: table.to_parquet(temporary, index=False))
    for stage, seconds in table.attrs["seconds"].items():
        case.seconds[stage] = round(case.seconds.get(stage, 0.0) + seconds, 4)
    case.warnings += [sentence for sentence in table.attrs["warnings"] if sentence not in case.warnings]
    case.lowering += [step for step in table.attrs["lowering"] if step not in case.lowering]
    return table


def _kept(path: Path | None) -> pd.DataFrame | None:
    if path is None or not path.exists():
        return None
    try:
        table = pd.read_parquet(path)
        if not {"seconds", "warnings", "lowering"} <= table.attrs.keys():
            raise ValueError("a table of something else")
        return table
    except Exception:
        path.unlink()  # damaged: judged again
        return None


def _judge(case: Case, at: Tensor, doing: Callable[[str], None]) -> pd.DataFrame:
    start = time.perf_counter()
    samples = case.samples
    x, y, index = samples.pixels(at), samples.labels[at], samples.index[at].tolist()
    out: Evaluation = evaluate(case.model, x, y, index, case.threat, case.attacks, case.verifiers, doing)
    rows = out.rows.rename(columns={f"{end}:{DISTANCE}": end for end in ENDS})
    if case.smoothed is not None:
        _about_the_smoothed_classifier(rows, case.smoothed)
    rows["seconds"] = (time.perf_counter() - start) / max(1, len(rows))
    rows.attrs = {"seconds": out.seconds, "warnings": out.warnings, "lowering": out.lowering}
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
        "checkpoint": str(question.path), "digests": dict(case.digests), "asked": _as_asked(question, case),
        "layout": case.layout, "notes": case.notes,
        "arch": case.arch, "data": case.data.name, "note": case.data.note,
        "threat": plain(case.threat),
        "attacks": [one.as_json() for one in case.attacks],
        "verifiers": [one.as_json() for one in asked(case.verifiers)],
        "summary": summary(case, rows),
        "passport": passport(case.model, case.data.shape, case.stored),
        "claim": None if claim is None else {"pruned": str(question.claim), "holds": claim[0], "sentence": claim[1]},
        "health": [asdict(flag) for flag in health],
        "warnings": case.warnings, "lowering": case.lowering,
        "rows": rows_of(rows, case.verifiers),
    }


def _as_asked(question: Question, case: Case) -> dict[str, Any]:
    """What the file and the flags together do not say elsewhere in the answer, so that it can be asked again."""
    own = question.data is not None and question.data.endswith(".npz")
    file, name = own_file(case.arch), case.arch.rpartition(":")[2]
    return {
        "checkpoint": str(question.path.resolve()), "data": str(Path(str(question.data)).resolve()) if own else case.data.name,
        "arch": None if is_onnx(question.path) else f"{file.resolve()}:{name}" if is_own(case.arch) else case.arch,
        "mean": list(question.mean), "std": list(question.std),
        "density": None if question.density is None else str(question.density),
        "batch": question.batch, "fingerprint": case.fingerprint,
        "arch_digest": case.arch_digest, "plugins": dict(case.plugins),
    }
