"""A suite on several one-thread processes: a worker that fails or dies costs one cell, never the suite."""

from __future__ import annotations

import multiprocessing
import os
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from .files import make_folder

THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Job:
    """What a worker must know to find a cell again: plug-ins do not travel between processes, their names do."""

    suite: str
    methods: tuple[str, ...]
    root: str
    device: str
    data_dir: str | None


@dataclass
class Outcome:
    """How a suite ended: records by cell id, and a sentence per cell that has none."""

    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    contradicted: dict[str, str] = field(default_factory=dict)


class Screen:
    """What is shown while cells run; this one shows nothing."""

    def started(self, cell: str) -> None: ...
    def moved(self, cell: str, share: float, what: str) -> None: ...
    def finished(self, cell: str, record: dict[str, Any]) -> None: ...
    def broke(self, cell: str, sentence: str) -> None: ...


def do_cell(job: Job, name: str, report: Callable[[float, str], None]) -> tuple[str, Any]:
    """("record", record), ("contradicted", sentence) or ("failed", sentence): never an exception."""
    from .cells import read_suite
    from .evaluate import ContradictionError
    from .run import Folders, pick_device, run_cell

    try:
        (cell,) = [one for one in read_suite(job.suite, job.methods).cells if one.id == name]
        record = run_cell(cell, Folders(Path(job.root)), pick_device(job.device), job.data_dir, report)
        (Path(job.root) / "failures" / f"{name}.txt").unlink(missing_ok=True)  # of an earlier run
        return "record", record
    except ContradictionError as found:
        return "contradicted", str(found)
    except BrokenPipeError:
        raise  # the parent is gone
    except Exception as reason:
        folder = make_folder(Path(job.root) / "failures")
        (folder / f"{name}.txt").write_text(traceback.format_exc(), encoding="utf-8")
        return "failed", f"{type(reason).__name__}: {reason} (details in {folder / name}.txt)"


def _serve(pipe: Connection, job: Job) -> None:
    """A worker's life: cells come in, reports and outcomes go out, until the pipe closes."""
    import torch

    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        while True:
            name = pipe.recv()
            pipe.send(("outcome", do_cell(job, name, lambda share, what: pipe.send(("moved", (share, what))))))
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        os._exit(0)  # the parent is gone or has closed: nothing here is worth keeping


def _end_with_parent() -> None:
    """A killed suite leaves no worker behind, however long the worker would not have reported."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(0)


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    cell: str | None = None


def _spawn(job: Job) -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, job), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours)


def run_cells(job: Job, names: Sequence[str], workers: int, screen: Screen) -> Outcome:
    """Every named cell on `workers` processes, in order; with 0 workers in this process, on its own thread count."""
    outcome, todo = Outcome(), list(names)
    if workers == 0:
        for name in todo:
            screen.started(name)
            _settle(outcome, screen, name, *do_cell(job, name, partial(screen.moved, name)))
        return outcome
    before = {key: os.environ.get(key) for key in THREADS}
    os.environ.update(THREADS)
    crew = [_spawn(job) for _ in range(min(workers, len(todo)))]
    try:
        for worker in crew:
            _give(worker, todo, screen)
        while any(worker.cell for worker in crew):
            _listen(crew, todo, job, outcome, screen)
    finally:
        for worker in crew:
            worker.pipe.close()
            worker.process.terminate()
        for key, value in before.items():
            os.environ.pop(key) if value is None else os.environ.update({key: value})
    return outcome


def _give(worker: _Worker, todo: list[str], screen: Screen) -> None:
    worker.cell = todo.pop(0) if todo else None
    if worker.cell is not None:
        screen.started(worker.cell)
        worker.pipe.send(worker.cell)


def _listen(crew: list[_Worker], todo: list[str], job: Job, outcome: Outcome, screen: Screen) -> None:
    ready = wait([worker.pipe for worker in crew if worker.cell])
    for place, worker in enumerate(crew):
        if worker.pipe not in ready or worker.cell is None:
            continue
        try:
            kind, value = worker.pipe.recv()
        except (EOFError, ConnectionResetError):
            worker.process.join(5)
            sentence = f"its process died with exit code {worker.process.exitcode} (out of memory?)"
            _settle(outcome, screen, worker.cell, "failed", sentence)
            crew[place] = _spawn(job)
            _give(crew[place], todo, screen)
            continue
        if kind == "moved":
            screen.moved(worker.cell, *value)
        else:
            _settle(outcome, screen, worker.cell, *value)
            _give(worker, todo, screen)


def _settle(outcome: Outcome, screen: Screen, name: str, kind: str, value: Any) -> None:
    if kind == "record":
        outcome.records[name] = value
        screen.finished(name, value)
    else:
        (outcome.contradicted if kind == "contradicted" else outcome.failed)[name] = value
        screen.broke(name, value)
