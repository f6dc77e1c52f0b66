"""Readers of the published image files: bytes on the disk to numpy arrays. Nothing is unpickled, nothing is downloaded.

Every reader answers with a `Raw`; what is missing or malformed is a `UserError` that names the file and the way out.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import math
import os
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
from PIL import Image

from .errors import UserError
from .files import write_whole
from .pickles import array_of, walk_pickle

ELSEWHERE = "name another data folder with --data-dir or the environment variable SPARSECERT_DATA"
LARGEST = 1 << 30  # no published file comes near; a compressed file that unfolds to more is broken
MNIST_MD5 = {  # of the uncompressed files
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
# What numpy, pickletools, zipfile and Pillow raise when they meet bytes that are not what they should be.
MALFORMED = (ValueError, TypeError, AttributeError, LookupError, OSError, EOFError, ArithmeticError, MemoryError,
             RuntimeError, SyntaxError, tokenize.TokenError, zlib.error, zipfile.BadZipFile)  # fmt: skip
CIFAR_PYTHON = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
CIFAR_BINARY = tuple(f"{name}.bin" for name in CIFAR_PYTHON)
CIFAR_JPEG = "cifar10_jpeg.npz"


class Raw(NamedTuple):
    """The published training and test set in their order: images uint8 [N, C, H, W], labels int64 [N] in 0..9."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    note: str = ""


def mnist(data_dir: Path) -> Raw:
    """MNIST from its four idx files, plain or .gz; the note says so if they are not the published ones."""
    paths = _find(data_dir, [("MNIST/raw", tuple(MNIST_MD5)), ("mnist", tuple(MNIST_MD5)), ("", tuple(MNIST_MD5))])
    arrays, sums = zip(*(_idx(path, (28, 28) if "images" in path.name else ()) for path in paths), strict=True)
    train_images, train_labels, test_images, test_labels = arrays
    note = "" if list(sums) == list(MNIST_MD5.values()) else "not the published MNIST files"
    return Raw(
        train_images[:, None], _labels(paths[1], train_labels, len(train_images)),
        test_images[:, None], _labels(paths[3], test_labels, len(test_images)), note,
    )  # fmt: skip


def cifar10(data_dir: Path) -> Raw:
    """CIFAR-10 from its binary or its python files, five training batches and the test batch."""
    layouts = [("cifar-10-batches-bin", CIFAR_BINARY), ("", CIFAR_BINARY),
               ("cifar-10-batches-py", CIFAR_PYTHON), ("", CIFAR_PYTHON)]  # fmt: skip
    paths = _find(data_dir, layouts)
    read = _cifar_binary if paths[0].name.startswith(CIFAR_BINARY[0]) else _cifar_python
    *train, (test_images, test_labels) = [read(path) for path in paths]
    images, labels = (np.concatenate(parts) for parts in zip(*train, strict=True))
    counts = f"{len(images):,} training and {len(test_images):,} test images"
    note = "" if (len(images), len(test_images)) == (50_000, 10_000) else f"not the published CIFAR-10 files: {counts}"
    return Raw(images, labels, test_images, test_labels, note)


def cifar10_jpeg(data_dir: Path) -> Raw:
    """CIFAR-10 as re-coded by JPEG at quality 75, which is lossy: the note says how results must be reported."""
    (path,) = _find(data_dir, [("cifar10-jpeg", (CIFAR_JPEG,)), ("", (CIFAR_JPEG,))])
    content = _content(path)
    # Another Pillow may decode to other pixels, so its version is part of what a cached array is the answer to.
    stem = f"cifar10_jpeg-{hashlib.sha256(content).hexdigest()}-pillow{PIL.__version__}"
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            parts = [_jpeg_part(path, arrays, part, stem) for part in ("train", "test")]
    except MALFORMED as error:
        raise _bad(path, f"is not an .npz file with the arrays of cifar10-jpeg ({_first_line(error)})") from error
    return Raw(*parts[0], *parts[1], 'lossy: report results as "CIFAR-10 (JPEG q75)"')


# ---- finding and opening ---------------------------------------------------------------------------------------------


def _find(data_dir: Path, layouts: Sequence[tuple[str, Sequence[str]]]) -> list[Path]:
    """The files of the first complete layout (folder, names), each plain or .gz."""
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
    raise UserError(f"{best[2]} is missing: put the published files into {best[1]}, or {ELSEWHERE}")


def _content(path: Path) -> bytes:
    """All bytes of a file, unpacked where its name ends in .gz."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            content = file.read(LARGEST + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise _bad(path, f"cannot be read ({_first_line(error)})") from error
    if len(content) > LARGEST:
        raise _bad(path, f"holds more than {LARGEST:,} bytes")
    return content


def _bad(path: Path, what: str) -> UserError:
    return UserError(f"{path} {what}: put the published file in its place, or {ELSEWHERE}")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def _labels(path: Path, labels: np.ndarray, count: int) -> np.ndarray:
    if labels.shape != (count,):
        raise _bad(path, f"has {labels.size:,} labels for {count:,} images")
    if count == 0:
        raise _bad(path, "holds no images")
    if labels.min() < 0 or labels.max() > 9:
        wrong = int(labels[(labels < 0) | (labels > 9)][0])
        raise _bad(path, f"has the label {wrong}, outside 0..9")
    return labels.astype(np.int64)


# ---- idx and the binary CIFAR batches --------------------------------------------------------------------------------


def _idx(path: Path, shape: tuple[int, ...]) -> tuple[np.ndarray, str]:
    """The uint8 array [N, *shape] of an idx file and the md5 of the file's uncompressed content."""
    content = _content(path)
    dims = 1 + len(shape)
    start = 4 + 4 * dims
    if len(content) < start or content[:4] != bytes((0, 0, 8, dims)):
        raise _bad(path, f"is not an idx file of unsigned bytes in {dims} dimensions (its first bytes are wrong)")
    sizes = struct.unpack(f">{dims}I", content[4:start])
    if sizes[1:] != shape:
        raise _bad(path, f"holds images of {' x '.join(map(str, sizes[1:]))} pixels instead of 28 x 28")
    if len(content) - start != math.prod(sizes):
        raise _bad(path, f"has {len(content) - start:,} bytes where its header promises {math.prod(sizes):,}")
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    return np.frombuffer(content, np.uint8, offset=start).reshape(sizes), md5


def _cifar_binary(path: Path) -> tuple[np.ndarray, np.ndarray]:
    content = _content(path)
    if not content or len(content) % 3073:
        raise _bad(path, f"has {len(content):,} bytes, not a whole number of 3,073-byte records")
    rows = np.frombuffer(content, np.uint8).reshape(-1, 3073)
    return rows[:, 1:].reshape(-1, 3, 32, 32), _labels(path, rows[:, 0], len(rows))


# ---- the python CIFAR batches: a pickle that is read as text, never run ----------------------------------------------


def _cifar_python(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        batch = walk_pickle(_content(path))
        data, labels = array_of(batch["data"]), array_of(batch["labels"])
    except MALFORMED as error:
        reason = f"no {error}" if isinstance(error, KeyError) else _first_line(error)
        raise _bad(path, f"is not a CIFAR-10 batch ({reason}; nothing in it was executed)") from error
    whole = data.size > 0 and data.size % 3072 == 0 and (data.ndim == 1 or data.shape[1:] == (3072,))
    if data.dtype != np.uint8 or not whole:
        raise _bad(path, f"has data {data.dtype} {data.shape} instead of uint8 (N, 3072)")
    if labels.dtype.kind not in "iu":
        raise _bad(path, "has labels that are not whole numbers")
    images = data.reshape(-1, 3, 32, 32)
    return images, _labels(path, labels, len(images))


def _jpeg_part(path: Path, arrays: Any, part: str, stem: str) -> tuple[np.ndarray, np.ndarray]:
    offsets, labels = arrays[f"{part}_offsets"], arrays[f"{part}_labels"]
    if offsets.ndim != 1 or offsets.dtype.kind not in "iu" or labels.dtype.kind not in "iu":
        raise ValueError(f"{part}_offsets or {part}_labels are not whole numbers")
    labels = _labels(path, labels, len(offsets) - 1)

    def decode() -> np.ndarray:
        joined = arrays[f"{part}_jpeg"]
        if joined.dtype != np.uint8 or joined.ndim != 1:
            raise ValueError(f"{part}_jpeg is {joined.dtype} {joined.shape} instead of a row of bytes")
        ends = offsets.astype(np.int64)
        if ends[0] != 0 or ends[-1] != len(joined) or (np.diff(ends) <= 0).any():
            raise ValueError(f"{part}_offsets do not divide {part}_jpeg")
        files = [joined[a:b].tobytes() for a, b in pairwise(ends)]
        return np.stack([_decode(jpeg, f"{part} image {i}") for i, jpeg in enumerate(files)])

    return cached(f"{stem}-{part}.npy", (len(labels), 32, 32, 3), decode).transpose(0, 3, 1, 2), labels


def _decode(jpeg: bytes, what: str) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(jpeg), formats=("JPEG",)) as image:
            if (image.size, image.mode) == ((32, 32), "RGB"):
                return np.asarray(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{what} is not a readable JPEG file") from error
    raise ValueError(f"{what} is not a colour image of 32 x 32 pixels")


def cached(name: str, shape: tuple[int, ...], make: Callable[[], np.ndarray]) -> np.ndarray:
    """make(), or its uint8 array of an earlier call kept in the user's cache folder; an unusable folder is no error."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    path = Path(home if os.path.isabs(home) else os.path.expanduser("~/.cache")) / "sparsecert" / name
    with contextlib.suppress(*MALFORMED):
        kept = np.load(path, allow_pickle=False)
        if kept.dtype == np.uint8 and kept.shape == shape:
            return kept
    made = make()

    def save(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.save(file, made)

    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, save)
    return made
