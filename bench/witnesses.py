"""The witnesses of a record: for every sample with the verdict broken, the image that broke it, so that anyone can run it."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import UserError
from .evaluate import Evaluation
from .files import write_whole

LARGEST = 32 * 2**20  # bytes of images in one file: all 10,000 of MNIST, the first 2,730 broken ones of CIFAR-10


def witnesses(out: Evaluation, largest: int = LARGEST) -> dict[int, Tensor]:
    """float32 image [C, H, W] by sample number: of each broken sample, in the order of the rows, what `by` broke it with.

    Every image lies in the exact ball and in [0,1] and was misclassified in float64 by `evaluate`. At most `largest` bytes.
    """
    by_tool = {}
    for attempt in out.attempts:
        rows, images = attempt.at[attempt.wrong].tolist(), attempt.witness[attempt.wrong].cpu()
        by_tool[attempt.one.label] = dict(zip(rows, images))
    found: dict[int, Tensor] = {}
    broken = out.rows[out.rows["verdict"] == "broken"]
    for row, index, by in zip(broken.index, broken["index"], broken["by"]):
        image = by_tool[by][row]
        if (len(found) + 1) * image.nbytes > largest:
            break
        found[int(index)] = image
    return found


def save_witnesses(path: Path, images: dict[int, Tensor]) -> None:
    """One safetensors file: `index` int64 [n] and `images` float32 [n, C, H, W]."""
    tensors = {"index": torch.tensor(list(images), dtype=torch.int64), "images": torch.stack(list(images.values()))}
    write_whole(path, lambda temporary: save_file(tensors, temporary))


def load_witnesses(path: Path, shape: tuple[int, ...]) -> dict[int, Tensor]:
    """The images of a file by sample number. Raises UserError unless it holds images of that shape, one per sample."""
    try:
        with safe_open(path, framework="pt") as handle:
            index, images = handle.get_tensor("index"), handle.get_tensor("images")
    except (SafetensorError, OSError, ValueError) as reason:
        raise UserError(f"{path} is not a file of witnesses: {reason}") from reason
    numbers = index.tolist() if index.dtype == torch.int64 and index.dim() == 1 else []
    if images.dtype != torch.float32 or images.shape != (len(set(numbers)), *shape):
        raise UserError(
            f"{path} is not a file of witnesses: it must hold one float32 image {shape} per sample number, got "
            f"{images.dtype} {tuple(images.shape)} for {len(set(numbers))} numbers"
        )
    return dict(zip(numbers, images))
