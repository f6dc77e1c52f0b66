"""Files that are either whole or absent, and locks that die with their process."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .errors import UserError


def make_folder(path: Path) -> Path:
    """The folder, created if need be; raises UserError where it cannot be written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as reason:
        raise UserError(f"cannot write to the folder {path}: {reason.strerror}; name another one with --out") from reason
    return path


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """`write(temporary)` must create the file; it appears under `path` only once it is complete and on disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(temporary)
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove what writers that are no longer alive left unfinished."""
    for path in folder.rglob(".*.part"):
        writer = path.name.split(".")[-2]
        if writer.isdigit() and not Path(f"/proc/{writer}").exists():
            path.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Only one process at a time holds the lock; the kernel releases it when its holder dies, however it dies."""
    with open(path, "a+b") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
