"""A whole suite: what is already on record is skipped, the rest runs, and the board is drawn from the records."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from leaderboard.entering import adopt

from .cells import Cell, Suite
from .files import make_folder, sweep
from .models import build_model
from .run import Folders, dataset, is_current, pick_device, stored_record
from .screen import LiveScreen
from .selfcheck import gate
from .workers import Job, Outcome, run_cells


@dataclass(frozen=True)
class Finished:
    """A suite's end: its folder, every cell's record, and what went wrong."""

    root: Path
    records: dict[str, dict[str, Any]]
    outcome: Outcome
    skipped: int
    refused: bool = False

    @property
    def exit_code(self) -> int:
        """0 all done, 1 a cell failed, 3 a certificate was contradicted or known answers were missed, so that nothing ran."""
        return 3 if self.outcome.contradicted or self.refused else 1 if self.outcome.failed else 0


def check_ready(suite: Suite, data_dir: str | None) -> None:
    """Raises UserError, before anything runs, for data that is not there or images that a network does not admit."""
    for name, extra, arch in {(cell.data["name"], cell.data.get("extra"), cell.arch): None for cell in suite.cells}:
        data = dataset(name, data_dir, torch.device("cpu"), extra)
        with torch.device("meta"):
            build_model(arch, data.shape, data.classes)


def run_suite(
    suite: Suite, job: Job, workers: int, console: Console, cells: Iterable[Cell] | None = None
) -> Finished:
    """Run every cell that has no current record; cells without pruning come first, since others start from their weights."""
    folders = Folders(Path(job.root))
    make_folder(folders.root)
    folders.make()
    sweep(folders.root)
    if adopted := adopt(folders.records):
        console.print(f"{len(adopted)} whole records that the ledger did not list are entered into it", highlight=False)
    chosen = sorted(cells if cells is not None else suite.cells, key=lambda cell: cell.density != 1)
    records, todo, stale = {}, [], 0
    for cell in chosen:
        before = stored_record(cell, folders)
        if before is not None and is_current(before, cell, folders):
            records[cell.id] = before
        else:
            stale += before is not None
            todo.append(cell.id)
    if stale:
        console.print(f"{stale} records are by other code or lost their evidence: their cells run again", highlight=False)
    if records and todo:
        console.print(f"{len(records)} of {len(chosen)} cells are on record already", highlight=False)
    outcome = Outcome()
    checked = gate(folders.root, pick_device(job.device)) if todo else None
    if checked is not None:
        console.print(checked.sentence, highlight=False, markup=False, soft_wrap=True)
        if checked.failed:
            refusal = Outcome(failed=dict.fromkeys(todo, checked.sentence))
            return Finished(folders.root, records, refusal, len(records), refused=True)
    if todo:
        with LiveScreen(console, len(todo), len(records)) as screen:
            outcome = run_cells(job, todo, workers, screen)
    return Finished(folders.root, {**records, **outcome.records}, outcome, len(records))
