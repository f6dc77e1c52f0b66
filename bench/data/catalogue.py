"""The data sets by name: how each becomes tensors, which files it needs and where they are published."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from .. import imagenet as images_of_imagenet
from .. import readers
from ..errors import unknown
from ..files import write_json
from .splits import SPLIT_SEED, Dataset, Split, train_and_validation

DIGITS_HELD_OUT = 100
DIGITS_TEST = Path(__file__).parent.parent / "digits_test.json"


@dataclass(frozen=True)
class Source:
    """An entry of the catalogue: how a data set is read and which files it needs in the data folder."""

    read: Callable[[Path], Dataset]
    files: str = ""  # "" for embedded data
    origin: str = ""  # where the files are published and what to do with them
    pending: Callable[[Path], str] | None = None  # what reading would have to do first, if that takes hours; else ""

    @property
    def description(self) -> str:
        """One line for a list: the first line of the reading function's docstring."""
        return (self.read.__doc__ or "").splitlines()[0]


def digits(_: Path) -> Dataset:
    """Handwritten digits of scikit-learn, 8x8 grey (values 0..16), 1,337 / 100 / 360 images, embedded."""
    from sklearn.datasets import load_digits  # here, because the import takes a second and only these digits need it

    found = load_digits()
    images = found.images[:, None].astype(np.uint8)
    test_at = np.array(json.loads(DIGITS_TEST.read_text()))
    rest = np.random.RandomState(SPLIT_SEED).permutation(np.setdiff1d(np.arange(len(images)), test_at))
    ats = rest[DIGITS_HELD_OUT:], rest[:DIGITS_HELD_OUT], test_at
    train, validation, test = (_split(images, found.target, at, 16.0) for at in ats)
    return Dataset("digits", 10, (1, 8, 8), train, validation, test)


def mnist(data_dir: Path) -> Dataset:
    """MNIST, 28x28 grey, 55,000 / 5,000 / 10,000 images."""
    return _published("mnist", readers.mnist(data_dir))


def cifar10(data_dir: Path) -> Dataset:
    """CIFAR-10, 32x32 colour, 45,000 / 5,000 / 10,000 images."""
    return _published("cifar10", readers.cifar10(data_dir))


def cifar100(data_dir: Path) -> Dataset:
    """CIFAR-100 with its 100 fine classes, 32x32 colour, 45,000 / 5,000 / 10,000 images."""
    return _published("cifar100", readers.cifar100(data_dir), 100)


def svhn(data_dir: Path) -> Dataset:
    """SVHN, cropped house numbers, 32x32 colour, 68,257 / 5,000 / 26,032 images, without its extra split."""
    return _published("svhn", readers.svhn(data_dir))


def imagenet(data_dir: Path) -> Dataset:
    """ImageNet (ILSVRC 2012), 224x224 colour, 1,000 classes, 1,276,167 / 5,000 / 50,000 images, decoded once."""
    found = images_of_imagenet.list_images(data_dir)
    side, (train, validation, test) = images_of_imagenet.SIDE, (_decoded(part) for part in _imagenet_parts(found))
    classes = max(2, len(found.classes))
    return Dataset("imagenet", classes, (3, side, side), replace(train, side=side), validation, test, found.difference)


def imagenet_pending(data_dir: Path) -> str:
    """What is left to decode."""
    parts = _imagenet_parts(images_of_imagenet.list_images(data_dir))
    paths = {images_of_imagenet.array_path(one.folder, one.files, one.side): len(one.files) for one in parts}
    left = {path: count for path, count in paths.items() if not path.exists()}
    if not left:
        return ""
    return f"not decoded yet: the first use decodes {sum(left.values()):,} images into {next(iter(left)).parent}"


class _Part(NamedTuple):
    """Image files of one split, the square that is kept of each, their labels and places in the alphabetical order."""

    folder: Path
    files: list[str]
    side: int
    labels: np.ndarray
    at: np.ndarray


def _imagenet_parts(found: images_of_imagenet.Listing) -> list[_Part]:
    """Training, validation and test; training keeps a wider square, from which random parts are cut."""
    train_at, validation_at = train_and_validation(len(found.train), "imagenet")
    wide, side = images_of_imagenet.RESIZED, images_of_imagenet.SIDE
    train, test = (found.root / "train", found.train, found.train_labels), (found.root / "val", found.test, found.test_labels)
    asked = ((*train, train_at, wide), (*train, validation_at, side), (*test, np.arange(len(found.test)), side))
    return [_Part(folder, [files[i] for i in at], kept, labels[at], at) for folder, files, labels, at, kept in asked]


def _decoded(part: _Part) -> Split:
    """The part's images, mapped from the cache; their digest is computed once, when they were decoded."""
    array, path = images_of_imagenet.decoded(part.folder, part.files, part.side)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nothing here writes to images
        images = torch.from_numpy(array)
    split = Split(images, torch.from_numpy(part.labels), torch.from_numpy(part.at.astype(np.int64)), 255.0)
    digest = path.with_suffix(".sha256.json")
    if not digest.exists():
        write_json(digest, {"digest": split.digest})
    return replace(split, stored_digest=json.loads(digest.read_text(encoding="utf-8"))["digest"])


def cifar10_jpeg(data_dir: Path) -> Dataset:
    """CIFAR-10 after lossy JPEG, to be reported as "CIFAR-10 (JPEG q75)", 45,000 / 5,000 / 10,000 images."""
    return _published("cifar10-jpeg", readers.cifar10_jpeg(data_dir))


def cifar10_subset(data_dir: Path) -> Dataset:
    """A part of CIFAR-10 with exact pixels, 6,397 / 710 / 943 images, the test images 0 to 760 first."""
    return _published("cifar10-subset", readers.cifar10_subset(data_dir))


CIFAR_PAGE = "A. Krizhevsky's page at the University of Toronto"
DATASETS: dict[str, Source] = {
    "digits": Source(digits),
    "mnist": Source(
        mnist, "MNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte[.gz]",
        "the four idx files of LeCun, Cortes and Burges's MNIST page, packed or not; torchvision's folder works as it is",
    ),
    "cifar10": Source(
        cifar10,
        "cifar-10-batches-bin/{data_batch_1..5,test_batch}.bin or cifar-10-batches-py/{data_batch_1..5,test_batch}",
        f"{CIFAR_PAGE}: cifar-10-binary.tar.gz, or cifar-10-python.tar.gz (md5 c58f30108f718f92721af3b95e74349a); unpack it",
    ),
    "cifar100": Source(
        cifar100, "cifar-100-binary/{train,test}.bin or cifar-100-python/{train,test}",
        f"{CIFAR_PAGE}: cifar-100-binary.tar.gz, or cifar-100-python.tar.gz (md5 eb9058c3a382ffc7106e4002c42a8d85); unpack it",
    ),
    "svhn": Source(
        svhn, "svhn/{train,test}_32x32.mat",
        "the Street View House Numbers page of Stanford's UFLDL group, format 2 (cropped digits): train_32x32.mat (md5 "
        "e26dedcc434d2e4c54c9b2d4a06d8373) and test_32x32.mat (md5 eb5a983be6a315427106f1b164d9cef3)",
    ),
    "imagenet": Source(
        imagenet, "imagenet/{train,val}/CLASS/*.JPEG",
        "image-net.org, after registration: ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, unpacked into one folder for "
        "each of the 1,000 classes (n01440764, ...), the validation images sorted into the same folders",
        imagenet_pending,
    ),
    "cifar10-jpeg": Source(
        cifar10_jpeg, "cifar10-jpeg/cifar10_jpeg.npz",
        "made for this project from CIFAR-10 by JPEG at quality 75; see docs/data.md",
    ),
    "cifar10-subset": Source(
        cifar10_subset, "cifar10-exact-subset/cifar10_exact_subset.npz", "made for this project; see docs/data.md"
    ),
}  # fmt: skip


def data_folder(data_dir: str | Path | None = None) -> Path:
    """The folder of the files: the argument, else the environment variable SPARSECERT_DATA, else `data` here."""
    return Path(data_dir or os.environ.get("SPARSECERT_DATA") or "data").expanduser()


def load(name: str, data_dir: str | Path | None = None) -> Dataset:
    """The named data set on the CPU, split the same way on every machine.

    data_dir: the folder of the files; by default the environment variable SPARSECERT_DATA, else `data` in the working
    directory. Raises UserError for an unknown name and for files that are missing or malformed.
    """
    if name not in DATASETS:
        raise unknown("data set", name, DATASETS)
    return DATASETS[name].read(data_folder(data_dir))


def _published(name: str, raw: readers.Raw, classes: int = 10) -> Dataset:
    """Hold out validation images of the published training set; the published test set keeps its order."""
    train_at, validation_at = train_and_validation(len(raw.train_labels), name)
    train = _split(raw.train_images, raw.train_labels, train_at, 255.0, raw.train_index)
    validation = _split(raw.train_images, raw.train_labels, validation_at, 255.0, raw.train_index)
    test = _split(raw.test_images, raw.test_labels, np.arange(len(raw.test_labels)), 255.0, raw.test_index)
    channels, height, width = train.images.shape[1:]
    return Dataset(name, classes, (channels, height, width), train, validation, test, raw.note)


def _split(
    images: np.ndarray, labels: np.ndarray, at: np.ndarray, scale: float, index: np.ndarray | None = None
) -> Split:
    """The images `at`; index: the original position of each image, where that is not its place."""
    place = at if index is None else index[at]
    return Split(
        torch.from_numpy(np.ascontiguousarray(images[at])),
        torch.from_numpy(labels[at].astype(np.int64)), torch.from_numpy(place.astype(np.int64)), scale,
    )  # fmt: skip
