"""A data set and its three parts; the rule that holds validation images out of the training set."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError

SPLIT_SEED = 20180  # of RandomState, whose stream numpy has frozen; another seed is another benchmark
HELD_OUT = 5_000
STAY = 8 << 30  # bytes; larger arrays stay where they are (a mapped file), and only batches move to the device


@dataclass(frozen=True, eq=False)
class Split:
    """One part of a data set on one device; images / scale lies in [0,1]."""

    images: Tensor  # uint8 [N, C, H, W], or float32 with scale 1
    labels: Tensor  # int64 [N]
    index: Tensor  # int64 [N], position in the original train / test order
    scale: float
    side: int | None = None  # networks see the centre square of this side; None: the whole image
    extra: Split | None = None  # pseudo-labelled images: the other half of every training batch
    stored_digest: str | None = None  # of images that are too large to be read at every start

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def device(self) -> torch.device:
        return self.labels.device

    def pixels(self, at: Tensor | slice | None = None, whole: bool = False) -> Tensor:
        """float32 [n, C, H, W] in [0,1] of the images `at` (all by default), to the bit the same on every device.

        whole: the stored images uncut, where networks see only their centre.
        """
        at = at.to(self.images.device) if isinstance(at, Tensor) else at
        chosen = self.images if at is None else self.images[at]
        if self.side is not None and not whole:
            top, left = ((length - self.side) // 2 for length in chosen.shape[2:])
            chosen = chosen[:, :, top : top + self.side, left : left + self.side]
        # A GPU multiplies by the rounded 1 / 255 where the divisor is a Python number; by a tensor it divides.
        return chosen.to(self.device).to(torch.float32) / torch.full((), self.scale, dtype=torch.float32, device=self.device)

    def to(self, device: str | torch.device) -> Split:
        """The same split on another device; more than 8 GiB of images stay where they are and move batch by batch."""
        images = self.images if self.images.nbytes > STAY else self.images.to(device)
        extra = None if self.extra is None else self.extra.to(device)
        return replace(self, images=images, labels=self.labels.to(device), index=self.index.to(device), extra=extra)

    def first(self, n: int) -> Split:
        """The first n images, or all if there are fewer. Raises UserError for n < 1."""
        if n < 1:
            raise UserError(f"cannot take the first {n} images; give a count of at least 1")
        return self.at(slice(n))

    def every(self, k: int) -> Split:
        """Images 0, k, 2k, ... Raises UserError for k < 1."""
        if k < 1:
            raise UserError(f"cannot take every {k}-th image; give a step of at least 1")
        return self.at(slice(None, None, k))

    def nothing(self) -> Split:
        """No images, of the same kind."""
        return self.at(slice(0))

    def at(self, at: slice | Tensor) -> Split:
        """The images at these positions."""
        return replace(self, images=self.images[at], labels=self.labels[at], index=self.index[at], stored_digest=None)

    def with_extra(self, extra: Split) -> Split:
        """The same images beside `extra` ones, which fill the other half of every training batch.

        Raises UserError where their shapes differ, and for images that are only cropped while training.
        """
        if self.side is not None:
            raise UserError("extra images cannot be mixed with images that are cropped while training; leave `extra` out")
        shapes = [tuple(one.images.shape[1:]) for one in (self, extra)]
        if shapes[0] != shapes[1]:
            raise UserError(f"the extra images have shape {shapes[1]}, the training images {shapes[0]}; they must be equal")
        return replace(self, extra=extra)

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) over shape, scale, pixels and labels, in this order; the same on every device.

        Where there are extra images, sha256 over the digests of both.
        """
        own = self.stored_digest or self._content_digest()
        return own if self.extra is None else hashlib.sha256((own + self.extra.digest).encode()).hexdigest()

    def _content_digest(self) -> str:
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
        return replace(self, **parts)

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) over the digests of train (its extra images among it), validation and test."""
        return hashlib.sha256((self.train.digest + self.validation.digest + self.test.digest).encode()).hexdigest()


def train_and_validation(count: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the training and of the held-out images of a published training set, the same on every machine.

    5,000 images are held out, a tenth of sets below 50,000. Raises UserError for fewer than two images.
    """
    if count < 2:
        raise UserError(f"{name} has {count} training image, too few to hold out a validation set; use the full files")
    held_out = HELD_OUT if count >= 10 * HELD_OUT else max(1, count // 10)
    order = np.random.RandomState(SPLIT_SEED).permutation(count)
    return order[held_out:], order[:held_out]
