"""Batches of a split and their augmentation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import UserError, unknown
from .splits import Split

PAD = 4
AREA, RATIO, TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10  # of a random resized crop

Augmentation = Callable[[Split, Tensor, torch.Generator], Tensor]


def keep(split: Split, at: Tensor, generator: torch.Generator) -> Tensor:
    """The images as they are; draws nothing."""
    return split.pixels(at)


def _window(x: Tensor, generator: torch.Generator, mode: str = "constant") -> Tensor:
    """Each image [C, H, W] becomes a uniformly drawn H x W window of itself padded by 4 pixels on every side."""
    height, width = x.shape[2:]
    windows = functional.pad(x, (PAD,) * 4, mode).unfold(2, height, 1).unfold(3, width, 1)  # [N, C, 9, 9, H, W], a view
    top, left = torch.randint(0, 2 * PAD + 1, (2, len(x)), generator=generator).to(x.device)
    return windows[torch.arange(len(x), device=x.device), :, top, left]


def _flip(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each image is mirrored left to right with probability 1/2."""
    mirrored = (torch.rand(len(x), generator=generator) < 0.5).to(x.device)
    return torch.where(mirrored[:, None, None, None], x.flip(3), x)


def crop(split: Split, at: Tensor, generator: torch.Generator) -> Tensor:
    """A random window of each image padded by 4 zeros."""
    return _window(split.pixels(at), generator)


def crop_flip(split: Split, at: Tensor, generator: torch.Generator) -> Tensor:
    """`crop`, then mirrored left to right with probability 1/2."""
    return _flip(crop(split, at, generator), generator)


def reflect_crop_flip(split: Split, at: Tensor, generator: torch.Generator) -> Tensor:
    """As `crop_flip`, but padded by 4 mirrored pixels (ATMC's SVHN)."""
    return _flip(_window(split.pixels(at), generator, "reflect"), generator)


def random_resized_crop(split: Split, at: Tensor, generator: torch.Generator) -> Tensor:
    """A random part of each stored image, resized (bilinear) to what networks see, then mirrored with probability 1/2.

    The part has 8 to 100 % of the area and an aspect ratio of 3/4 to 4/3 (Szegedy et al. 2015), as usual for ImageNet.
    """
    x = split.pixels(at, whole=True)
    height, width = x.shape[2:]
    size = (height, width) if split.side is None else (split.side, split.side)
    parts = [
        functional.interpolate(x[i : i + 1, :, top : top + high, left : left + wide], size, mode="bilinear", antialias=True)
        for i, (top, left, high, wide) in enumerate(_parts(len(x), height, width, generator))
    ]
    return _flip(torch.cat(parts).clamp(0, 1), generator)


def _parts(count: int, height: int, width: int, generator: torch.Generator) -> list[list[int]]:
    """`count` random parts (top, left, height, width) of an image; where ten tries do not fit in it, the whole image."""
    area, ratio, down, right = torch.rand(4, count, TRIES, generator=generator, dtype=torch.float64)
    area = height * width * (AREA[0] + (AREA[1] - AREA[0]) * area)
    ratio = torch.exp(math.log(RATIO[0]) + (math.log(RATIO[1]) - math.log(RATIO[0])) * ratio)
    wide, high = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (wide >= 1) & (wide <= width) & (high >= 1) & (high <= height)
    at = torch.arange(count), fits.to(torch.uint8).argmax(1)  # the first that fits
    high = torch.where(fits.any(1), high[at], float(height))
    wide = torch.where(fits.any(1), wide[at], float(width))
    top, left = (down[at] * (height - high + 1)).floor(), (right[at] * (width - wide + 1)).floor()
    return torch.stack([top, left, high, wide], 1).long().tolist()


AUGMENTATIONS: Mapping[str, Augmentation] = {
    "none": keep, "crop": crop, "crop-flip": crop_flip, "reflect-crop-flip": reflect_crop_flip,
    "random-resized-crop": random_resized_crop,
}  # fmt: skip


def batches(
    split: Split, size: int, generator: torch.Generator, augment: str = "none"
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch: every image once, in an order drawn from `generator`, the last batch possibly shorter.

    Yields x float32 [n, C, H, W] in [0,1] and y int64 [n] on the split's device. Where the split has extra images, as many
    of them follow in the same batch (n is then up to 2 size), each drawn once before any is drawn again (Hydra's and Carmon
    et al.'s half and half). `generator` is a CPU generator, so equal seeds give equal batches on every device (after a
    random resized crop, up to rounding). Raises UserError for size < 1 and for an unknown augmentation.
    """
    if augment not in AUGMENTATIONS:
        raise unknown("augmentation", augment, AUGMENTATIONS)
    if size < 1:
        raise UserError(f"cannot make batches of {size} images; give a size of at least 1")
    change = AUGMENTATIONS[augment]
    order = torch.randperm(len(split), generator=generator).to(split.device)
    if split.extra is None:
        return ((change(split, at, generator), split.labels[at]) for at in order.split(size) if len(at))
    rounds = math.ceil(len(split) / len(split.extra))
    other = torch.cat([torch.randperm(len(split.extra), generator=generator) for _ in range(rounds)])[: len(split)]
    return _mixed(split, split.extra, order.split(size), other.to(split.device).split(size), change, generator)


def _mixed(
    split: Split, extra: Split, order: tuple[Tensor, ...], other: tuple[Tensor, ...], change: Augmentation,
    generator: torch.Generator,
) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
    for at, more in zip(order, other, strict=True):
        x = torch.cat([change(split, at, generator), change(extra, more, generator)])
        yield x, torch.cat([split.labels[at], extra.labels[more]])
