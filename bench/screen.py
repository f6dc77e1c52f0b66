"""What a person sees while a suite runs: a live bar on a terminal, one line per finished cell elsewhere (on stderr)."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .workers import Screen


def clock(seconds: float) -> str:
    whole = max(0, round(seconds))
    return f"{whole // 60}:{whole % 60:02d}"


class TimeLeft:
    """Time left from the share of the work done; the share counts cells that are half way too."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.shares: dict[str, float] = {}
        self.start = time.monotonic()

    @property
    def done(self) -> float:
        return sum(self.shares.values())

    def __str__(self) -> str:
        spent = time.monotonic() - self.start
        if self.done < 0.3:
            return "-:--"
        return clock(spent * (self.total - self.done) / self.done)


class LiveScreen(Screen):
    """Cells done, time left, the robust accuracy of the last cell and what each worker is doing."""

    def __init__(self, console: Console, total: int, skipped: int) -> None:
        self.console, self.total, self.skipped = console, total, skipped
        self.left = TimeLeft(total)
        self.finished_cells = 0
        self.now: dict[str, str] = {}
        self.last = ""
        self.bar = Progress(
            TextColumn("[bold]{task.fields[cells]}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(),
            TextColumn("left {task.fields[left]}"), TextColumn("{task.fields[last]}"), TextColumn("[dim]{task.fields[now]}"),
            console=console, transient=True,
        )
        self.task = self.bar.add_task("", total=total, cells=self._cells(), left="-:--", last="", now="")

    def __enter__(self) -> LiveScreen:
        if self.console.is_terminal:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self.bar.stop()

    def _cells(self) -> str:
        return f"{self.finished_cells}/{self.total} cells"

    def _refresh(self) -> None:
        now = "  ".join(f"{cell}: {what}" for cell, what in self.now.items())
        self.bar.update(
            self.task, completed=self.left.done, cells=self._cells(), left=str(self.left), last=self.last, now=now
        )

    def started(self, cell: str) -> None:
        self.left.shares[cell] = 0.0
        self.now[short(cell)] = "starting"
        self._refresh()

    def moved(self, cell: str, share: float, what: str) -> None:
        self.left.shares[cell] = share
        self.now[short(cell)] = what
        self._refresh()

    def finished(self, cell: str, record: dict[str, Any]) -> None:
        self._end(cell)
        self.last = f"robust {robust(record)} ({short(cell)})"
        self._line(f"{self._cells()}  left {self.left}  {short(cell)}: {summary(record)}")

    def broke(self, cell: str, sentence: str) -> None:
        self._end(cell)
        self.console.print(f"[red]{short(cell)}[/red]: {sentence}", highlight=False, soft_wrap=True)

    def _end(self, cell: str) -> None:
        self.finished_cells += 1
        self.left.shares[cell] = 1.0
        self.now.pop(short(cell), None)
        self._refresh()

    def _line(self, text: str) -> None:
        if not self.console.is_terminal:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)


class Judging:
    """Samples judged so far, with the verdicts, as a bar on a terminal and as lines elsewhere."""

    def __init__(self, console: Console) -> None:
        self.bar = Progress(
            TextColumn("[bold]{task.completed}/{task.total} images"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(),
            TimeRemainingColumn(), TextColumn("{task.fields[verdicts]}"), console=console, transient=True,
            disable=not console.is_terminal,
        )
        self.console = console
        self.task = self.bar.add_task("", total=None, verdicts="reading")

    def __enter__(self) -> Judging:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def moved(self, done: int, total: int, verdicts: dict[str, int]) -> None:
        words = "  ".join(f"{name} {count}" for name, count in verdicts.items() if count)
        self.bar.update(self.task, completed=done, total=total, verdicts=words)
        self._line(f"{done}/{total} images  {words}")

    def doing(self, what: str) -> None:
        """A tool of the batch under way, or a sentence about the whole."""
        self.bar.update(self.task, verdicts=what)
        self._line(what)

    def _line(self, text: str) -> None:
        if not self.console.is_terminal:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def short(cell: str) -> str:
    """digits@1-cnn_small-hydra-pgd-d0.05-s0-1a2b3c4d -> cnn_small-hydra-pgd-d0.05-s0."""
    return "-".join(cell.split("-")[1:-1])


def percent(share: dict[str, Any] | None) -> str:
    return "-" if not share or not share["n"] else f"{100 * share['hits'] / share['n']:.1f}"


def robust(record: dict[str, Any]) -> str:
    return percent(record["metrics"]["robust"].get("worst"))


def summary(record: dict[str, Any]) -> str:
    metrics = record["metrics"]
    proven = "  ".join(f"{label} {percent(share)}" for label, share in metrics["certified"].items())
    return f"clean {percent(metrics['clean'])}  robust {robust(record)}  certified: {proven}"
