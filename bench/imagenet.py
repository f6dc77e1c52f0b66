"""ImageNet's JPEG files: found in folders of classes, decoded once by worker processes into arrays that are mapped from disk."""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import shutil
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
from PIL import Image
from rich.console import Console
from rich.progress import track

from .errors import UserError, first_line
from .files import locked, write_json
from .published import ELSEWHERE, MissingFilesError, bad, cache_folder

RESIZED, SIDE = 256, 224  # the shorter side before the crop, the square that networks see
COUNTS = (1_281_167, 50_000)
ENDINGS = (".jpeg", ".jpg")
CHUNK = 1024  # images between two notes of how far decoding came


class Listing(NamedTuple):
    """The image files of both parts in alphabetical order, with the class of each: the place of its folder's name."""

    root: Path
    classes: list[str]
    train: list[str]  # folder/name below root/train
    train_labels: np.ndarray
    test: list[str]  # below root/val
    test_labels: np.ndarray

    @property
    def difference(self) -> str:
        """How this differs from the published set, as a note for results; empty where it does not."""
        counts = (len(self.train), len(self.test))
        return "" if counts == COUNTS else f"not the published ImageNet: {counts[0]:,} training and {counts[1]:,} test images"


def list_images(data_dir: Path) -> Listing:
    """The files below imagenet/ or, where that is not there, below the data folder itself: train/CLASS/*, val/CLASS/*.

    Raises MissingFilesError where a part is absent or empty, and UserError where val has a class that train has not.
    """
    root = next((one for one in (data_dir / "imagenet", data_dir) if (one / "train").is_dir() or (one / "val").is_dir()), None)
    if root is None:
        raise _missing("train", data_dir / "imagenet", 0)
    found = {part: _files_of(root / part) for part in ("train", "val")}
    for part, files in found.items():
        if not files:
            raise _missing(part, root, sum(map(len, found.values())))
    classes = sorted({_class(name) for name in found["train"]})
    strange = sorted({_class(name) for name in found["val"]} - set(classes))
    if strange:
        raise UserError(f"{root / 'val' / strange[0]} is a class that {root / 'train'} has not; the parts must agree")
    place = {name: at for at, name in enumerate(classes)}
    labels = {part: np.array([place[_class(name)] for name in files], np.int64) for part, files in found.items()}
    return Listing(root, classes, found["train"], labels["train"], found["val"], labels["val"])


def _missing(part: str, root: Path, found: int) -> MissingFilesError:
    where = f"{root / part}/CLASS/*.JPEG, one folder for each class"
    return MissingFilesError(f"{part} has no images: put the JPEG files into {where}, or {ELSEWHERE}", found)


def _class(name: str) -> str:
    return name.partition("/")[0]


def _files_of(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    classes = sorted(one.name for one in os.scandir(folder) if one.is_dir())
    names = ((one, file.name) for one in classes for file in os.scandir(folder / one))
    return sorted(f"{one}/{name}" for one, name in names if name.lower().endswith(ENDINGS))


def decode(path: str, side: int) -> np.ndarray:
    """uint8 [3, side, side]: the image with its shorter side resized to 256 (bilinear), its centre square, as RGB."""
    try:
        with Image.open(path, formats=("JPEG", "PNG")) as image:  # one published file is a PNG under the name of a JPEG
            whole = image.convert("RGB")
            width, height = whole.size
            short = min(width, height)
            resized = whole.resize((RESIZED * width // short, RESIZED * height // short), Image.Resampling.BILINEAR)
            left, top = (round((length - side) / 2) for length in resized.size)
            return np.asarray(resized.crop((left, top, left + side, top + side))).transpose(2, 0, 1)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise bad(Path(path), f"is not a readable image ({first_line(error)})") from error


def array_path(folder: Path, files: Sequence[str], side: int) -> Path:
    """Where the decoded array of these files is kept: named after their names and sizes, the crop and Pillow's version."""
    code = hashlib.sha256(f"{side} {RESIZED} {PIL.__version__}\n".encode())
    for name in files:
        code.update(f"{name} {os.stat(folder / name).st_size}\n".encode())
    return cache_folder() / f"imagenet-{folder.name}-{code.hexdigest()}.npy"


def decoded(folder: Path, files: Sequence[str], side: int) -> tuple[np.ndarray, Path]:
    """(uint8 [N, 3, side, side] mapped read-only from the cache folder, the array's file), decoding what is not there yet.

    Decoding runs in one process per core and goes on where a killed call stopped. Raises UserError for an unreadable image
    and where the disk has too little room.
    """
    path = array_path(folder, files, side)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_suffix(".lock")):
            if not path.exists():
                _decode_all(path, folder, files, side)
    return np.load(path, mmap_mode="r", allow_pickle=False), path


def _decode_all(path: Path, folder: Path, files: Sequence[str], side: int) -> None:
    part, progress = path.with_suffix(".part"), path.with_suffix(".progress.json")
    shape = (len(files), 3, side, side)
    size = math.prod(shape)
    done = _done(part, progress, size)
    if done == 0:
        _check_room(path.parent, size)
    array = np.lib.format.open_memmap(part, "r+" if done else "w+", np.uint8, shape)
    for at, image in enumerate(_in_processes([str(folder / name) for name in files[done:]], side, done), start=done):
        array[at] = image
        if (at + 1) % CHUNK == 0:
            array.flush()
            write_json(progress, {"done": at + 1})
    array.flush()
    os.replace(part, path)
    progress.unlink(missing_ok=True)


def _done(part: Path, progress: Path, size: int) -> int:
    """How many images an earlier call decoded; none where its file is not whole."""
    try:
        whole = part.stat().st_size > size  # a header stands before the pixels
        return int(json.loads(progress.read_text(encoding="utf-8"))["done"]) if whole else 0
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"the decoded images need {needed:,} bytes in {folder}, which has {free:,}; set XDG_CACHE_HOME to a larger disk"
        )


def _in_processes(paths: Sequence[str], side: int, done: int) -> Iterable[np.ndarray]:
    """decode() of every path, in order. Workers are started afresh: they need neither torch nor this process's memory."""
    screen = Console(stderr=True)
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), multiprocessing.get_context("spawn")) as pool:
        chunks = (paths[start : start + CHUNK] for start in range(0, len(paths), CHUNK))  # what is in memory at once
        images = (image for chunk in chunks for image in pool.map(partial(decode, side=side), chunk, chunksize=16))
        total = done + len(paths)
        try:
            yield from track(images, "decoding", total, done, console=screen, disable=not screen.is_terminal)
        except BrokenProcessPool as reason:
            raise UserError("a process that decodes images was killed; run the same command again to go on") from reason
        finally:
            pool.shutdown(cancel_futures=True)
