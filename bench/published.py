"""Data sets as they were published: finding their files, opening them, and telling whether they are the real ones."""

from __future__ import annotations

import gzip
import hashlib
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from .errors import UserError, first_line

ELSEWHERE = "name another data folder with --data-dir or the environment variable SPARSECERT_DATA"
LARGEST = 1 << 30  # no published file comes near; a compressed file that unfolds to more is broken
Layout = tuple[str, Sequence[str]]  # a folder below the data folder, the names in it


class MissingFilesError(UserError):
    """Files that are not there. `found` of the set's files are."""

    def __init__(self, message: str, found: int) -> None:
        super().__init__(message)
        self.found = found


class File(NamedTuple):
    """A file as it lies on the disk and its bytes, unpacked where its name ends in .gz."""

    path: Path
    content: bytes

    @property
    def name(self) -> str:
        return self.path.name.removesuffix(".gz")

    @property
    def md5(self) -> str:
        return hashlib.md5(self.content, usedforsecurity=False).hexdigest()


@dataclass(frozen=True)
class Published:
    """What the files of a data set are called, what they hold, and their md5 sums (unpacked) where they are known."""

    title: str
    layouts: tuple[Layout, ...]
    counts: tuple[int, int]  # training and test images
    md5: Mapping[str, str] = field(default_factory=dict)

    def open(self, data_dir: Path) -> list[File]:
        """The files of the first complete layout, in its order. Raises MissingFilesError, or UserError for damaged ones."""
        return [File(path, _content(path)) for path in find(data_dir, self.layouts)]

    def difference(self, files: Sequence[File], train: int, test: int) -> str:
        """How the files differ from the published ones, as a note for results; empty where they do not."""
        if (train, test) != self.counts:
            return f"not the published {self.title} files: {train:,} training and {test:,} test images"
        other = [file.name for file in files if self.md5.get(file.name, file.md5) != file.md5]
        return f"not the published {self.title} files: another md5 than that of {', '.join(other)}" if other else ""


def find(data_dir: Path, layouts: Sequence[Layout]) -> list[Path]:
    """The files of the first complete layout, each plain or .gz."""
    best: tuple[int, Path, str] = (-1, data_dir, "")
    for folder, names in layouts:
        places = [data_dir / folder / name for name in names]
        pairs = [(place, place.with_name(f"{place.name}.gz")) for place in places]
        found = [next(filter(Path.is_file, pair), None) for pair in pairs]
        if all(found):
            return [path for path in found if path]
        missing = names[found.index(None)]
        # The layout the user has most of is the one they meant; among equals the first.
        if (count := len(found) - found.count(None)) > best[0]:
            best = (count, data_dir / folder, missing)
    raise MissingFilesError(f"{best[2]} is missing: put the published files into {best[1]}, or {ELSEWHERE}", best[0])


def _content(path: Path) -> bytes:
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            content = file.read(LARGEST + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise bad(path, f"cannot be read ({first_line(error)})") from error
    if len(content) > LARGEST:
        raise bad(path, f"holds more than {LARGEST:,} bytes")
    return content


def bad(path: Path, what: str) -> UserError:
    """The error for a file that is not what its name says."""
    return UserError(f"{path} {what}: put the published file in its place, or {ELSEWHERE}")


def cache_folder() -> Path:
    """Where decoded images are kept: sparsecert below XDG_CACHE_HOME, by default below ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    return Path(home if os.path.isabs(home) else os.path.expanduser("~/.cache")) / "sparsecert"
