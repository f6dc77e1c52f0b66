"""demo, run and board: suites and their leaderboards."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from ..errors import UserError, unknown
from .boards import checked
from .options import RUNS, DataDir, Device, Json, Out, Workers, app, show, stderr
from .site import CORES, about_methods


@app.command(epilog="Example: `sparsecert demo`")
def demo(
    out: Out = RUNS, device: Device = "cpu", workers: Workers = None, as_json: Json = False, data_dir: DataDir = None
) -> None:
    """Run the embedded suite digits@1: the whole job on real data in minutes, ending with the ranked table and a page."""
    run("digits@1", out=out, device=device, workers=workers, as_json=as_json, data_dir=data_dir)


@app.command(epilog="Example: `sparsecert run digits@1 --method my_method.py:Mine --workers 2`")
def run(
    suite: Annotated[str, typer.Argument(help="A shipped suite (`sparsecert list suites`) or a TOML file.")],
    out: Out = RUNS,
    method: Annotated[Optional[list[str]], typer.Option(help="Another method to rank: a name or file.py:Class.")] = None,  # noqa: UP045
    device: Device = "cpu",
    workers: Workers = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Run a suite: every cell without a current record is trained, attacked and certified; then the board is drawn.

    Killed at any moment and run again, it goes on where it was and ends with the same records.
    """
    from ..cells import read_suite
    from ..run import pick_device
    from ..suite import check_ready, run_suite
    from ..workers import Job

    console, methods = stderr(), tuple(method or ())
    chosen = read_suite(suite, methods)
    place = pick_device(device)
    count = workers if workers is not None else 1 if place.type == "cuda" else (os.cpu_count() or 1)
    if count < 1:
        raise UserError(f"--workers must be at least 1, got {count}")
    check_ready(chosen, data_dir)
    job = Job(suite, methods, str(out / chosen.title), place.type, data_dir)
    finished = run_suite(chosen, job, count, console)
    pages = draw(finished.root, as_json)
    report = {
        "suite": chosen.title, "cells": len(chosen.cells), "skipped": finished.skipped,
        "failed": finished.outcome.failed, "contradicted": finished.outcome.contradicted, **pages,
    }
    if as_json:
        show(report)
    raise typer.Exit(finished.exit_code)


def draw(root: Path, as_json: bool) -> dict[str, Any]:
    """The board of a run folder: a table on stdout (unless JSON is asked for) and a site that opens from disk."""
    from rich.console import Console

    from leaderboard.challenges import notes
    from leaderboard.render import terminal
    from leaderboard.site.sources import gather
    from leaderboard.site.write import write_site

    if not any((root / "records").glob("*.json")):
        return {"page": None, "entries": []}
    contents = gather([root], CORES)
    path = write_site(contents, root / "site", about_methods(), CORES)
    if not as_json:
        terminal(contents.board, Console())
        for note in notes(contents.board):
            print(note)
        print(f"\nboard: {path}\nrecords: {root / 'records'}")
    return {"page": str(path), "entries": json.loads(contents.board.to_json(orient="records"))}


@app.command(epilog="Example: `sparsecert board digits@1`")
def board(
    suite: Annotated[str, typer.Argument(help="A suite's title such as digits@1, or the folder of its results.")],
    out: Out = RUNS,
    as_json: Json = False,
) -> None:
    """Check the records of a suite (as `leaderboard check` does) and draw its board."""
    root = Path(suite) if Path(suite).is_dir() else out / suite
    if not (root / "records").is_dir():
        known = [path.parent.name for path in out.glob("*/records")] if out.is_dir() else []
        raise unknown("board", suite, known) if known else UserError(f"there are no records under {root}; run the suite first")
    problems = checked(root / "records")["problems"]
    for sentence in problems:
        print(sentence, file=sys.stderr)
    if problems:
        raise typer.Exit(3)
    if not any((root / "records").glob("*.json")):
        raise UserError(f"there are no records in {root / 'records'}; see {root / 'failures'} for cells that failed")
    pages = draw(root, as_json)
    if as_json:
        show(pages)
