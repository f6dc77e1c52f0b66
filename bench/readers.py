"""Readers of the published image files: bytes on the disk to numpy arrays. Nothing is unpickled, nothing is downloaded.

Every reader answers with a `Raw`; what is missing or malformed is a `UserError` that names the file and the way out.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import PIL
from PIL import Image

from .errors import first_line
from .files import write_whole
from .pickles import array_of, walk_pickle
from .published import File, Published, bad, cache_folder

# What numpy, pickletools, zipfile, scipy and Pillow raise when they meet bytes that are not what they should be.
MALFORMED = (ValueError, TypeError, AttributeError, LookupError, OSError, EOFError, ArithmeticError, MemoryError,
             RuntimeError, SyntaxError, tokenize.TokenError, zlib.error, zipfile.BadZipFile)  # fmt: skip
MNIST_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
CIFAR10_MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
CIFAR100_MD5 = {"train": "16019d7e3df5f24257cddd939b257f8d", "test": "f0ef6b0ae62326f3e7ffdfab6717acfc"}
SVHN_MD5 = {"train_32x32.mat": "e26dedcc434d2e4c54c9b2d4a06d8373", "test_32x32.mat": "eb5a983be6a315427106f1b164d9cef3"}
JPEG_MD5 = {"cifar10_jpeg.npz": "493f3e95018d71ebdb7467cba0dfc356"}
SUBSET_MD5 = {"cifar10_exact_subset.npz": "d91f75429a6eca96bf03fe5e28b70da8"}

MNIST = Published("MNIST", tuple((where, tuple(MNIST_MD5)) for where in ("MNIST/raw", "mnist", "")), (60_000, 10_000), MNIST_MD5)
_BINARY = tuple(f"{name}.bin" for name in CIFAR10_MD5)
CIFAR10 = Published(
    "CIFAR-10",
    (("cifar-10-batches-bin", _BINARY), ("", _BINARY), ("cifar-10-batches-py", tuple(CIFAR10_MD5)), ("", tuple(CIFAR10_MD5))),
    (50_000, 10_000), CIFAR10_MD5,
)  # fmt: skip
# The names train and test say too little to be looked for in the data folder itself.
CIFAR100 = Published(
    "CIFAR-100", (("cifar-100-binary", ("train.bin", "test.bin")), ("cifar-100-python", tuple(CIFAR100_MD5))),
    (50_000, 10_000), CIFAR100_MD5,
)  # fmt: skip
SVHN = Published("SVHN", tuple((where, tuple(SVHN_MD5)) for where in ("svhn", "SVHN", "")), (73_257, 26_032), SVHN_MD5)
JPEG = Published("CIFAR-10 JPEG", (("cifar10-jpeg", tuple(JPEG_MD5)), ("", tuple(JPEG_MD5))), (50_000, 10_000), JPEG_MD5)
SUBSET = Published(
    "CIFAR-10 subset", (("cifar10-exact-subset", tuple(SUBSET_MD5)), ("", tuple(SUBSET_MD5))), (7_107, 943), SUBSET_MD5
)


Part = TypeVar("Part")


class Raw(NamedTuple):
    """The published training and test set in their order: images uint8 [N, C, H, W], labels int64 [N] from 0."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    note: str = ""  # what a report of results must say
    train_index: np.ndarray | None = None  # positions in the original order, where this is a part of a published set
    test_index: np.ndarray | None = None


def mnist(data_dir: Path) -> Raw:
    """MNIST from its four idx files, plain or .gz."""
    files = MNIST.open(data_dir)
    train_images, train_labels, test_images, test_labels = (
        _idx(file, (28, 28) if "images" in file.name else ()) for file in files
    )
    return Raw(
        train_images[:, None], _labels(files[1].path, train_labels, len(train_images)),
        test_images[:, None], _labels(files[3].path, test_labels, len(test_images)),
        MNIST.difference(files, len(train_images), len(test_images)),
    )  # fmt: skip


def cifar10(data_dir: Path) -> Raw:
    """CIFAR-10 from its binary or its python files, five training batches and the test batch."""
    files = CIFAR10.open(data_dir)
    *train, test = [_cifar_binary(file, 1, 10) if _is_binary(file) else _cifar_python(file, "labels", 10) for file in files]
    images, labels = (np.concatenate(parts) for parts in zip(*train, strict=True))
    return Raw(images, labels, *test, CIFAR10.difference(files, len(images), len(test[0])))


def cifar100(data_dir: Path) -> Raw:
    """CIFAR-100 with its 100 fine labels, from its binary or its python files."""
    files = CIFAR100.open(data_dir)
    train, test = [
        _cifar_binary(file, 2, 100) if _is_binary(file) else _cifar_python(file, "fine_labels", 100) for file in files
    ]
    return Raw(*train, *test, CIFAR100.difference(files, len(train[0]), len(test[0])))


def svhn(data_dir: Path) -> Raw:
    """SVHN's cropped digits from its two .mat files; their label 10 is the digit 0."""
    files = SVHN.open(data_dir)
    train, test = (_svhn_part(file) for file in files)
    return Raw(*train, *test, SVHN.difference(files, len(train[0]), len(test[0])))


def cifar10_jpeg(data_dir: Path) -> Raw:
    """CIFAR-10 as re-coded by JPEG at quality 75, which is lossy: the note says how results must be reported."""
    (file,) = JPEG.open(data_dir)
    # Another Pillow may decode to other pixels, so its version is part of what a cached array is the answer to.
    stem = f"cifar10_jpeg-{hashlib.sha256(file.content).hexdigest()}-pillow{PIL.__version__}"
    train, test = _parts_of_npz(file, "cifar10-jpeg", lambda arrays, part: _jpeg_part(file.path, arrays, part, stem))
    notes = ('lossy: report results as "CIFAR-10 (JPEG q75)"', JPEG.difference([file], len(train[0]), len(test[0])))
    return Raw(*train, *test, "; ".join(filter(None, notes)))


def cifar10_subset(data_dir: Path) -> Raw:
    """Some CIFAR-10 images with their exact pixels; the note says that they are a part and how many."""
    (file,) = SUBSET.open(data_dir)
    train, test = _parts_of_npz(file, "cifar10-subset", lambda arrays, part: _subset_part(file.path, arrays, part))
    words = f'a part of CIFAR-10: report results as "{len(test[0]):,} CIFAR-10 test images"'
    notes = (words, SUBSET.difference([file], len(train[0]), len(test[0])))
    return Raw(*train[:2], *test[:2], "; ".join(filter(None, notes)), train[2], test[2])


def _labels(path: Path, labels: np.ndarray, count: int, classes: int = 10) -> np.ndarray:
    if labels.shape != (count,):
        raise bad(path, f"has {labels.size:,} labels for {count:,} images")
    if count == 0:
        raise bad(path, "holds no images")
    if labels.min() < 0 or labels.max() >= classes:
        wrong = int(labels[(labels < 0) | (labels >= classes)][0])
        raise bad(path, f"has the label {wrong}, outside 0..{classes - 1}")
    return labels.astype(np.int64)


# ---- idx and the binary CIFAR batches --------------------------------------------------------------------------------


def _idx(file: File, shape: tuple[int, ...]) -> np.ndarray:
    """The uint8 array [N, *shape] of an idx file."""
    path, content = file
    dims = 1 + len(shape)
    start = 4 + 4 * dims
    if len(content) < start or content[:4] != bytes((0, 0, 8, dims)):
        raise bad(path, f"is not an idx file of unsigned bytes in {dims} dimensions (its first bytes are wrong)")
    sizes = struct.unpack(f">{dims}I", content[4:start])
    if sizes[1:] != shape:
        raise bad(path, f"holds images of {' x '.join(map(str, sizes[1:]))} pixels instead of 28 x 28")
    if len(content) - start != math.prod(sizes):
        raise bad(path, f"has {len(content) - start:,} bytes where its header promises {math.prod(sizes):,}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(sizes)


def _is_binary(file: File) -> bool:
    return file.name.endswith(".bin")


def _cifar_binary(file: File, labels: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Records of `labels` bytes, the last of them the label, and 3,072 bytes of pixels."""
    path, content = file
    length = labels + 3072
    if not content or len(content) % length:
        raise bad(path, f"has {len(content):,} bytes, not a whole number of {length:,}-byte records")
    rows = np.frombuffer(content, np.uint8).reshape(-1, length)
    return rows[:, labels:].reshape(-1, 3, 32, 32), _labels(path, rows[:, labels - 1], len(rows), classes)


# ---- the python CIFAR batches: a pickle that is read as text, never run ----------------------------------------------


def _cifar_python(file: File, key: str, classes: int) -> tuple[np.ndarray, np.ndarray]:
    path = file.path
    try:
        batch = walk_pickle(file.content)
        data, labels = array_of(batch["data"]), array_of(batch[key])
    except MALFORMED as error:
        reason = f"no {error}" if isinstance(error, KeyError) else first_line(error)
        raise bad(path, f"is not a CIFAR-{classes} batch ({reason}; nothing in it was executed)") from error
    whole = data.size > 0 and data.size % 3072 == 0 and (data.ndim == 1 or data.shape[1:] == (3072,))
    if data.dtype != np.uint8 or not whole:
        raise bad(path, f"has data {data.dtype} {data.shape} instead of uint8 (N, 3072)")
    if labels.dtype.kind not in "iu":
        raise bad(path, "has labels that are not whole numbers")
    images = data.reshape(-1, 3, 32, 32)
    return images, _labels(path, labels, len(images), classes)


# ---- SVHN ------------------------------------------------------------------------------------------------------------


def _svhn_part(file: File) -> tuple[np.ndarray, np.ndarray]:
    from scipy.io import loadmat, whosmat  # here, because only SVHN needs them
    from scipy.io.matlab import MatReadError

    try:  # first what the file says it holds, so that nothing else is unpacked
        held = {name: (shape, kind) for name, shape, kind in whosmat(io.BytesIO(file.content))}
        shape, kind = held["X"]
        if shape[:3] != (32, 32, 3) or len(shape) != 4 or kind != "uint8":
            raise ValueError(f"X is {kind} {shape} instead of uint8 (32, 32, 3, N)")
        if held["y"][0] != (shape[3], 1):
            raise ValueError(f"y has shape {held['y'][0]} for {shape[3]} images")
        arrays = loadmat(io.BytesIO(file.content), variable_names=("X", "y"))
        images, labels = arrays["X"], arrays["y"][:, 0]
    except (*MALFORMED, MatReadError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else first_line(error)
        raise bad(file.path, f"is not a .mat file of SVHN's cropped digits ({reason})") from error
    if labels.dtype.kind not in "iu" or (len(labels) and not 1 <= labels.min() <= labels.max() <= 10):
        raise bad(file.path, "has labels that are not whole numbers from 1 to 10")
    return np.ascontiguousarray(images.transpose(3, 2, 0, 1)), _labels(file.path, labels % 10, len(labels))


# ---- archives of numpy arrays ----------------------------------------------------------------------------------------


def _parts_of_npz(file: File, name: str, read: Callable[[Any, str], Part]) -> tuple[Part, Part]:
    """read(arrays, part) for train and test."""
    try:
        with np.load(io.BytesIO(file.content), allow_pickle=False) as arrays:
            return read(arrays, "train"), read(arrays, "test")
    except MALFORMED as error:
        raise bad(file.path, f"is not an .npz file with the arrays of {name} ({first_line(error)})") from error


def _subset_part(path: Path, arrays: Any, part: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    images, labels, index = (arrays[f"{part}_{what}"] for what in ("images", "labels", "index"))
    if images.dtype != np.uint8 or images.shape[1:] != (32, 32, 3):
        raise ValueError(f"{part}_images is {images.dtype} {images.shape} instead of uint8 (N, 32, 32, 3)")
    if index.shape != (len(images),) or index.dtype.kind not in "iu" or labels.dtype.kind not in "iu":
        raise ValueError(f"{part}_labels or {part}_index are not {len(images)} whole numbers")
    if (np.diff(index.astype(np.int64)) <= 0).any() or (len(index) and index[0] < 0):
        raise ValueError(f"{part}_index does not ascend")
    return images.transpose(0, 3, 1, 2), _labels(path, labels, len(images)), index.astype(np.int64)


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
    path = cache_folder() / name
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
