"""Data sets as tensors: fixed splits with digests, batches that are equal on every device, augmentation as tensor code.

Pixels are stored as uint8 and leave as float32 in [0,1], without mean or standard deviation: eps is in pixel units.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from . import readers
from .errors import UserError, unknown

SPLIT_SEED = 20180  # of RandomState, whose stream numpy has frozen; another seed is another benchmark
HELD_OUT = 5_000
DIGITS_HELD_OUT = 100
PAD = 4


@dataclass(frozen=True, eq=False)
class Split:
    """One part of a data set on one device; images / scale lies in [0,1]."""

    images: Tensor  # uint8 [N, C, H, W]
    labels: Tensor  # int64 [N]
    index: Tensor  # int64 [N], position in the original train / test order
    scale: float

    def __len__(self) -> int:
        return len(self.labels)

    def pixels(self, at: Tensor | slice | None = None) -> Tensor:
        """float32 [n, C, H, W] in [0,1] of the images `at` (all by default), to the bit the same on every device."""
        chosen = self.images if at is None else self.images[at]
        # A GPU multiplies by the rounded 1 / 255 where the divisor is a Python number; by a tensor it divides.
        return chosen.to(torch.float32) / torch.full((), self.scale, dtype=torch.float32, device=chosen.device)

    def to(self, device: str | torch.device) -> Split:
        """The same split on another device."""
        return Split(self.images.to(device), self.labels.to(device), self.index.to(device), self.scale)

    def first(self, n: int) -> Split:
        """The first n images, or all if there are fewer. Raises UserError for n < 1."""
        if n < 1:
            raise UserError(f"cannot take the first {n} images; give a count of at least 1")
        return self._at(slice(n))

    def every(self, k: int) -> Split:
        """Images 0, k, 2k, ... Raises UserError for k < 1."""
        if k < 1:
            raise UserError(f"cannot take every {k}-th image; give a step of at least 1")
        return self._at(slice(None, None, k))

    def _at(self, at: slice) -> Split:
        return Split(self.images[at], self.labels[at], self.index[at], self.scale)

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) over shape, scale, pixels and labels, in this order; the same on every device."""
        code = hashlib.sha256(f"{tuple(self.images.shape)} {float(self.scale)!r} ".encode())
        code.update(np.ascontiguousarray(self.images.cpu().numpy()).data)
        code.update(np.ascontiguousarray(self.labels.cpu().numpy(), dtype="<i8").data)
        return code.hexdigest()


@dataclass(frozen=True, eq=False)
class Dataset:
    """Training, validation and test images of one data set; no image is in two of them."""

    name: str
    classes: int
    shape: tuple[int, int, int]  # C, H, W
    train: Split
    validation: Split
    test: Split
    note: str = ""  # what a report of results on this data must say

    def to(self, device: str | torch.device) -> Dataset:
        """The same data on another device."""
        parts = {part: getattr(self, part).to(device) for part in ("train", "validation", "test")}
        return dataclasses.replace(self, **parts)

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) over the digests of train, validation and test."""
        return hashlib.sha256((self.train.digest + self.validation.digest + self.test.digest).encode()).hexdigest()


@dataclass(frozen=True)
class Source:
    """An entry of the catalogue: how a data set is read and which files it needs in the data folder."""

    read: Callable[[Path], Dataset]
    files: str  # "" for embedded data

    @property
    def description(self) -> str:
        """One line for a list: the first line of the reading function's docstring."""
        return (self.read.__doc__ or "").splitlines()[0]


def digits(_: Path) -> Dataset:
    """Handwritten digits of scikit-learn, 8x8 grey (values 0..16), 1,337 / 100 / 360 images, embedded."""
    from sklearn.datasets import load_digits  # here, because the import takes a second and only these digits need it

    found = load_digits()
    images = found.images[:, None].astype(np.uint8)
    test_at = np.array(json.loads((Path(__file__).parent / "digits_test.json").read_text()))
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


def cifar10_jpeg(data_dir: Path) -> Dataset:
    """CIFAR-10 after lossy JPEG, to be reported as "CIFAR-10 (JPEG q75)", 45,000 / 5,000 / 10,000 images."""
    return _published("cifar10-jpeg", readers.cifar10_jpeg(data_dir))


DATASETS: dict[str, Source] = {
    "digits": Source(digits, ""),
    "mnist": Source(mnist, "MNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte[.gz]"),
    "cifar10": Source(
        cifar10,
        "cifar-10-batches-bin/{data_batch_1..5,test_batch}.bin or cifar-10-batches-py/{data_batch_1..5,test_batch}",
    ),
    "cifar10-jpeg": Source(cifar10_jpeg, "cifar10-jpeg/cifar10_jpeg.npz"),
}


def load(name: str, data_dir: str | Path | None = None) -> Dataset:
    """The named data set on the CPU, split the same way on every machine.

    data_dir: the folder of the files; by default the environment variable SPARSECERT_DATA, else `data` in the working
    directory. Raises UserError for an unknown name and for files that are missing or malformed.
    """
    if name not in DATASETS:
        raise unknown("data set", name, DATASETS)
    folder = Path(data_dir or os.environ.get("SPARSECERT_DATA") or "data")
    return DATASETS[name].read(folder.expanduser())


def _published(name: str, raw: readers.Raw) -> Dataset:
    """Hold out validation images of the published training set; the published test set keeps its order."""
    count = len(raw.train_labels)
    if count < 2:
        raise UserError(f"{name} has {count} training image, too few to hold out a validation set; use the full files")
    held_out = HELD_OUT if count >= 10 * HELD_OUT else max(1, count // 10)
    order = np.random.RandomState(SPLIT_SEED).permutation(count)
    train = _split(raw.train_images, raw.train_labels, order[held_out:], 255.0)
    validation = _split(raw.train_images, raw.train_labels, order[:held_out], 255.0)
    test = _split(raw.test_images, raw.test_labels, np.arange(len(raw.test_labels)), 255.0)
    channels, height, width = train.images.shape[1:]
    return Dataset(name, 10, (channels, height, width), train, validation, test, raw.note)


def _split(images: np.ndarray, labels: np.ndarray, at: np.ndarray, scale: float) -> Split:
    return Split(
        torch.from_numpy(np.ascontiguousarray(images[at])),
        torch.from_numpy(labels[at].astype(np.int64)), torch.from_numpy(at.astype(np.int64)), scale,
    )  # fmt: skip


# ---- batches ---------------------------------------------------------------------------------------------------------

Augmentation = Callable[[Tensor, torch.Generator], Tensor]


def keep(x: Tensor, generator: torch.Generator) -> Tensor:
    """x as it is; draws nothing."""
    return x


def crop(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each image [C, H, W] becomes a uniformly drawn H x W window of itself padded by 4 zeros on every side."""
    height, width = x.shape[2:]
    windows = functional.pad(x, (PAD,) * 4).unfold(2, height, 1).unfold(3, width, 1)  # [N, C, 9, 9, H, W], a view
    top, left = torch.randint(0, 2 * PAD + 1, (2, len(x)), generator=generator).to(x.device)
    return windows[torch.arange(len(x), device=x.device), :, top, left]


def crop_flip(x: Tensor, generator: torch.Generator) -> Tensor:
    """`crop`, then each image is mirrored left to right with probability 1/2."""
    x = crop(x, generator)
    mirrored = (torch.rand(len(x), generator=generator) < 0.5).to(x.device)
    return torch.where(mirrored[:, None, None, None], x.flip(3), x)


AUGMENTATIONS: Mapping[str, Augmentation] = {"none": keep, "crop": crop, "crop-flip": crop_flip}


def batches(
    split: Split, size: int, generator: torch.Generator, augment: str = "none"
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch: every image once, in an order drawn from `generator`, the last batch possibly shorter.

    Yields x float32 [n, C, H, W] in [0,1] and y int64 [n] on the split's device. `generator` is a CPU generator, so
    equal seeds give equal batches on every device. Raises UserError for size < 1 and for an unknown augmentation.
    """
    if augment not in AUGMENTATIONS:
        raise unknown("augmentation", augment, AUGMENTATIONS)
    if size < 1:
        raise UserError(f"cannot make batches of {size} images; give a size of at least 1")
    order = torch.randperm(len(split), generator=generator).to(split.images.device)
    change = AUGMENTATIONS[augment]
    return ((change(split.pixels(at), generator), split.labels[at]) for at in order.split(size) if len(at))
