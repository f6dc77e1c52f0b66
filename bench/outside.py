"""What a user brings along: an architecture as `file.py:build`, images as `file.npz`. Checked, or refused in one sentence."""

from __future__ import annotations

import copy
import inspect
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .build import load_file
from .checkpoints import LARGEST_SIDE, MOST_CLASSES, fill
from .data import Dataset, Split, train_and_validation
from .errors import UserError, first_line
from .models import Shape, normalisation

LARGEST = 4 * 2**30  # bytes of an archive of images, unpacked
ARRAYS = ("x", "y", "x_train", "y_train", "classes")


def is_own(arch: str) -> bool:
    """Whether an architecture is given as file.py:function rather than by name."""
    return own_file(arch).suffix == ".py"


def own_file(arch: str) -> Path:
    """The file of an architecture that is given as file.py:function."""
    return Path(arch.rpartition(":")[0])


def own_network(
    arch: str, state: Mapping[str, Tensor], shape: Shape, classes: int, where: Path,
    mean: Sequence[float] = (), std: Sequence[float] = (),
) -> nn.Module:  # fmt: skip
    """The user's network with exactly the state's weights, in eval mode, behind a normalisation where one is given.

    arch: `file.py:build`, the name of a function build() or build(shape, classes) that returns an nn.Module on images
    [N, *shape] with logits [N, classes]. Its file is executed: it is the user's own. Raises UserError where the file, the
    function, its network or the weights are not that, and for a network that cannot be judged: it must run in float64, pass
    gradients on to the images, leave them as they are and answer each of them alone.
    """
    model = _built(arch, shape, classes)
    try:
        model = fill(model, state, arch, where)
    except RuntimeError as reason:
        raise UserError(f"{arch}: its network does not take these weights: {first_line(reason)}") from reason
    if mean or std:
        model = nn.Sequential(OrderedDict(normalise=normalisation(mean, std, shape[0]), network=model))
    model = model.eval().requires_grad_(False)
    _try(model, arch, shape, classes)
    _try_in_float64(model, arch, shape)
    return model


def _built(arch: str, shape: Shape, classes: int) -> nn.Module:
    where, _, name = arch.rpartition(":")
    build = getattr(_module(Path(where)), name, None)
    if not callable(build):
        raise UserError(f"{where} has no function {name!r}; --arch takes file.py:build, where build() returns an nn.Module")
    try:
        model = build(*_arguments(build, shape, classes))
    except Exception as reason:
        raise UserError(f"{arch} failed: {first_line(reason)}") from reason
    if not isinstance(model, nn.Module):
        raise UserError(f"{arch} returned a {type(model).__name__}, not an nn.Module")
    return model.to("cpu", torch.float32)


def _arguments(build: Callable[..., Any], shape: Shape, classes: int) -> tuple[Any, ...]:
    """(shape, classes) for a function that takes two arguments or has them by name, else nothing."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    wanted = [one for one in inspect.signature(build).parameters.values() if one.kind in kinds]
    required = [one for one in wanted if one.default is inspect.Parameter.empty]
    named = [one.name for one in wanted[:2]] == ["shape", "classes"]
    return (shape, classes) if len(required) == 2 or named else ()


def _module(path: Path) -> Any:
    try:
        return load_file(path)
    except UserError:
        raise
    except Exception as reason:
        raise UserError(f"cannot import {path}: {first_line(reason)}") from reason


@torch.no_grad()
def _try(model: nn.Module, arch: str, shape: Shape, classes: int) -> None:
    x = _noise(shape)
    before = x.clone()
    try:
        out = model(x)
    except Exception as reason:
        raise UserError(f"{arch} does not take images of {'x'.join(map(str, shape))}: {first_line(reason)}") from reason
    if not isinstance(out, Tensor) or not out.is_floating_point() or out.shape != (2, classes):
        found = f"shape {tuple(out.shape[1:])}" if isinstance(out, Tensor) else f"type {type(out).__name__}"
        raise UserError(f"{arch} must answer an image with {classes} logits, its answer has {found}")
    if not torch.equal(x, before):
        raise UserError(f"{arch} writes into the images that it is given; let forward compute new tensors (no x.mul_, no x += 1)")


def _noise(shape: Shape) -> Tensor:
    return torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))


@torch.enable_grad()
def _try_in_float64(model: nn.Module, arch: str, shape: Shape) -> None:
    """Verdicts are decided in float64, attacks follow the gradient, and a sample's answer is its own."""
    x = _noise(shape).double().requires_grad_()
    way_out = "let forward keep the type of its input (no x.float(), no torch.float32)"
    try:
        double = copy.deepcopy(model).double()
        out = double(x)
    except Exception as reason:
        raise UserError(f"{arch} cannot run in float64, which decides verdicts; {way_out}: {first_line(reason)}") from reason
    if out.dtype != torch.float64:
        raise UserError(f"{arch} answers float64 images in {str(out.dtype).removeprefix('torch.')}; {way_out}")
    if not out.requires_grad:
        raise UserError(f"{arch} passes no gradient on to its images, so attacks cannot look; leave out x.detach() and no_grad")
    _refuse_coupled(double, x.detach(), out.detach(), arch)


@torch.no_grad()
def _refuse_coupled(model: nn.Module, x: Tensor, out: Tensor, arch: str) -> None:
    """Raises UserError where an image's answer depends on the others; answers that depend on chance are a health flag's."""
    try:
        again, alone = model(x), model(x[:1])
    except Exception as reason:
        raise UserError(f"{arch} does not take a single image [1, C, H, W]: {first_line(reason)}") from reason
    allowed = 1e-9 * max(1.0, float(out.abs().max()))
    if torch.allclose(again, out, rtol=0, atol=allowed) and (
        alone.shape != out[:1].shape or not torch.allclose(alone, out[:1], rtol=0, atol=allowed)
    ):
        raise UserError(f"{arch} answers an image differently alone than beside others; images of a batch must not be coupled")


# ---- images ----------------------------------------------------------------------------------------------------------


def own_data(path: Path, classes: int | None = None) -> Dataset:
    """The images and labels of an .npz file: x and y are the test set, x_train and y_train, where it has them, for training.

    The file holds x, uint8 (0..255) or floating point in [0,1], [N, C, H, W] or [N, H, W]; y, whole numbers [N]; and may hold
    x_train and y_train of the same kind, and `classes`. A tenth of the training images (5,000 of 50,000 or more) is held out
    for validation. The number of classes is the argument, else the file's, else the largest label + 1. Nothing is unpickled.
    Raises UserError for anything else.
    """
    arrays = _arrays(path)
    test = _part(arrays, "x", "y", path)
    has_train = "x_train" in arrays or "y_train" in arrays
    train = _part(arrays, "x_train", "y_train", path) if has_train else test.nothing()
    if train.images.shape[1:] != test.images.shape[1:]:
        raise UserError(f"{path}: x_train has images of another shape than x; they must be equal")
    if classes is None and "classes" in arrays:
        classes = _count(arrays["classes"], path)
    largest = int(torch.cat([train.labels, test.labels]).max())
    if classes is None:
        classes = max(2, largest + 1)
    if largest >= classes:
        raise UserError(f"{path}: the label {largest} is none of {classes} classes (0 to {classes - 1})")
    channels, height, width = test.images.shape[1:]
    return Dataset(path.name, classes, (channels, height, width), *_held_out(train, path), test)


def own_training_data(path: Path) -> Dataset:
    """`own_data` with images to train on. Raises UserError where there are none."""
    data = own_data(path)
    if not len(data.train):
        raise UserError(f"{path} has no arrays x_train and y_train to train on; a suite needs them beside x and y")
    return data


def _held_out(train: Split, path: Path) -> tuple[Split, Split]:
    if not len(train):
        return train, train
    train_at, validation_at = (torch.from_numpy(at) for at in train_and_validation(len(train), str(path)))
    return train.at(train_at), train.at(validation_at)


def _part(arrays: Mapping[str, np.ndarray], x: str, y: str, path: Path) -> Split:
    for name in (x, y):
        if name not in arrays:
            raise UserError(f"{path} has no array {name!r}; save it with numpy.savez(path, {x}=images, {y}=labels)")
    images, scale = _images(arrays[x], x, path)
    labels = _labels(arrays[y], y, len(images), path)
    return Split(images, labels, torch.arange(len(labels)), scale)


def _arrays(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > LARGEST:
                raise UserError(f"{path} unpacks to more than {LARGEST:,} bytes and is refused")
        with np.load(path, allow_pickle=False) as found:
            return {name: np.asarray(found[name]) for name in ARRAYS if name in found.files}
    except UserError:
        raise
    except Exception as reason:  # numpy and zipfile raise many kinds for damaged bytes
        why = first_line(reason) if zipfile.is_zipfile(path) else "it is something else, or it was cut off; save or copy it again"
        raise UserError(f"{path} is not an .npz file of plain arrays: {why}") from reason


def _images(x: np.ndarray, name: str, path: Path) -> tuple[Tensor, float]:
    """(images [N, C, H, W], what to divide by)."""
    if x.ndim == 3:
        x = x[:, None]
    if x.ndim != 4 or 0 in x.shape or max(x.shape[1:]) > LARGEST_SIDE:
        raise UserError(f"{path}: {name} has shape {x.shape}, expected images [N, C, H, W] or [N, H, W]")
    if x.dtype == np.uint8:
        return torch.from_numpy(np.ascontiguousarray(x)), 255.0
    if x.dtype.kind != "f":
        raise UserError(f"{path}: {name} has type {x.dtype}; give uint8 or floating point pixels in [0,1]")
    low, high = float(x.min()), float(x.max())
    if not 0 <= low <= high <= 1:  # NaN fails too
        raise UserError(f"{path}: the pixels {name} lie in [{low:g}, {high:g}], not in [0,1]; divide them, or save uint8")
    return torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32)), 1.0


def _labels(y: np.ndarray, name: str, count: int, path: Path) -> Tensor:
    if y.shape != (count,) or y.dtype.kind not in "iu":
        raise UserError(f"{path}: {name} has shape {y.shape} and type {y.dtype}, expected {count} whole numbers, one per image")
    if int(y.min()) < 0 or int(y.max()) >= MOST_CLASSES:
        raise UserError(f"{path}: the labels {name} lie in [{int(y.min())}, {int(y.max())}], expected classes from 0")
    return torch.from_numpy(np.ascontiguousarray(y, dtype=np.int64))


def _count(value: np.ndarray, path: Path) -> int:
    if value.shape != () or value.dtype.kind not in "iu" or not 2 <= int(value) <= MOST_CLASSES:
        raise UserError(f"{path}: classes must be one whole number of at least 2")
    return int(value)
