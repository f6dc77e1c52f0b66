"""Writing a site: every file at any moment the old one or the whole new one, and nothing left of records that are gone."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from leaderboard.challenges import Effect, effects
from leaderboard.checks import WORTH_A_PROCESS
from leaderboard.errors import BoardError
from leaderboard.plot import Curve
from leaderboard.site import pages
from leaderboard.site.downloads import downloads
from leaderboard.site.plots import Figure, figures, tasks
from leaderboard.site.record_pages import Standing, neighbours, render
from leaderboard.site.samples import curves
from leaderboard.site.sources import Contents, Kept

MARK = "site.json"  # says that the folder is a site, and of which records
FOLDERS = ("record", "method", "plots", "downloads")
Written = tuple[str, list[Path], dict[str, list[Curve]]]  # a record's id, its files, its curves


def write_site(contents: Contents, folder: Path, about: Mapping[str, str] | None = None, processes: int = 1) -> Path:
    """Writes the site of the contents (see `sources.gather`) into `folder` and returns its first page.

    Static files that need nothing outside themselves, for any host and for opening from disk; the same bytes for the same
    records, written by however many processes. `about` says what a pruning method does, by name. Pages that the site no longer
    has are removed. Raises BoardError where the folder holds something else than a site, RecordError for unreadable rows.
    """
    site = _Site(folder)
    site.begin(contents)
    lines, drawn = {}, list[Figure]()
    with _shared(processes, len(contents.kept)) as each:
        for name, files, found in each(partial(_written, folder), _tasks(contents)):
            lines[name] = found
            site.written.update(files)
        for own in each(figures, tasks(contents, lines)):
            drawn += own
    for one in drawn:
        site.write(f"plots/{one.file}", one.svg.encode())
    for name, data in downloads(contents).items():
        site.write(f"downloads/{name}", data)
    rows = list(pages.board_rows(contents))
    texts = {
        **pages.methods(contents, rows, about or {}), "reported.html": pages.reported(), "site.css": pages.asset("site.css"),
        "site.js": pages.asset("site.js"), "index.html": pages.index(contents, rows, drawn),
    }
    for name, text in texts.items():
        site.write(name, text.encode())
    site.sweep()
    return folder / "index.html"


@contextmanager
def _shared(processes: int, records: int) -> Iterator[Callable[..., Iterable[Any]]]:
    """A `map` that so many processes share, where there are records enough for them to start."""
    if processes == 1 or records < WORTH_A_PROCESS * processes:
        yield map
        return
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        yield partial(pool.map, chunksize=4)


def _tasks(contents: Contents) -> Iterator[tuple[Kept, Effect, Standing]]:
    beside = neighbours(contents.frame)
    happened = {folder: effects(folder) for folder in {one.folder for one in contents.kept.values()}}
    known = {row["record"]: row for row in contents.frame.drop(columns="outcome").to_dict(orient="records")}
    for name, kept in contents.kept.items():
        row = known.get(name, {})
        metrics = [metric for metric in kept.record.metrics.all() if f"{metric}:low" in row]
        ends = {metric: (row[f"{metric}:low"], row[f"{metric}:high"]) for metric in metrics}
        effect = happened[kept.folder].get(kept.record.digest, Effect())
        yield kept, effect, Standing(ends, beside.get(name, []), name in known)


def _written(folder: Path, task: tuple[Kept, Effect, Standing]) -> Written:
    kept, effect, standing = task
    rows = kept.record.verdicts(kept.folder)
    rows = effect.lowered(rows) if effect.challenges else rows
    lines = curves(kept.record.document["cell"], rows)
    files = [_write(folder / name, text.encode()) for name, text in render(kept, effect, rows, lines, standing).items()]
    return kept.record.id, files, lines


def _write(path: Path, data: bytes) -> Path:
    """The file under `path` is at any moment the old one or the whole new one."""
    tag = hashlib.sha256(path.name.encode()).hexdigest()[:16]  # a name of its own might be too long with more to it
    temporary = path.with_name(f".{tag}.{os.getpid()}.part")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


class _Site:
    """The folder of a site while it is written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.written: set[Path] = set()

    def begin(self, contents: Contents) -> None:
        """Makes the folder and marks it; only a marked one is written to again, and swept."""
        if self.folder.is_dir() and not (self.folder / MARK).is_file() and any(map(_foreign, self.folder.iterdir())):
            raise BoardError(f"{self.folder} holds other files than a site; name a new folder with --out")
        for name in ("", *FOLDERS):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        digests = {name: one.record.digest for name, one in contents.kept.items()}
        self.write(MARK, (json.dumps({"records": digests}, indent=1) + "\n").encode())

    def write(self, name: str, data: bytes) -> None:
        self.written.add(_write(self.folder / name, data))

    def sweep(self) -> None:
        """Removes pages of records, methods and pictures that are no longer there, and what a killed writer left."""
        for path in [*self.folder.glob(".*.part"), *(path for name in FOLDERS for path in (self.folder / name).iterdir())]:
            if path.is_file() and path not in self.written:
                path.unlink()


def _foreign(path: Path) -> bool:
    """Not of a site whose writer was killed before its first file was whole."""
    return path.name not in FOLDERS and not path.name.endswith(".part")
