"""Architectures as plain functions of the input's shape and the number of classes; normalisation is the first layer."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import nn

from verifiers.normalise import Normalize

from .errors import UserError, unknown

Shape = tuple[int, int, int]
Layers = OrderedDict[str, nn.Module]


def mlp(shape: Shape, classes: int) -> Layers:
    """Flatten, two hidden layers of 128 units, ReLU."""
    channels, height, width = shape
    return OrderedDict(
        flatten=nn.Flatten(),
        fc1=nn.Linear(channels * height * width, 128),
        relu1=nn.ReLU(),
        fc2=nn.Linear(128, 128),
        relu2=nn.ReLU(),
        fc3=nn.Linear(128, classes),
    )


def cnn_small(shape: Shape, classes: int) -> Layers:
    """Two 4x4 convolutions of stride 2 (16, 32 channels), 100 units (Wong & Kolter 2018's small network)."""
    channels, side = shape[0], _side("cnn_small", shape, 4)
    return OrderedDict(
        conv1=nn.Conv2d(channels, 16, 4, stride=2, padding=1),
        relu1=nn.ReLU(),
        conv2=nn.Conv2d(16, 32, 4, stride=2, padding=1),
        relu2=nn.ReLU(),
        flatten=nn.Flatten(),
        fc1=nn.Linear(32 * (side // 2 // 2) ** 2, 100),
        relu3=nn.ReLU(),
        fc2=nn.Linear(100, classes),
    )


def cnn_large(shape: Shape, classes: int) -> Layers:
    """Four convolutions (32, 32, 64, 64 channels), two layers of 512 units (Wong et al. 2018's large network)."""
    channels, side = shape[0], _side("cnn_large", shape, 4)
    return OrderedDict(
        conv1=nn.Conv2d(channels, 32, 3, stride=1, padding=1),
        relu1=nn.ReLU(),
        conv2=nn.Conv2d(32, 32, 4, stride=2, padding=1),
        relu2=nn.ReLU(),
        conv3=nn.Conv2d(32, 64, 3, stride=1, padding=1),
        relu3=nn.ReLU(),
        conv4=nn.Conv2d(64, 64, 4, stride=2, padding=1),
        relu4=nn.ReLU(),
        flatten=nn.Flatten(),
        fc1=nn.Linear(64 * (side // 2 // 2) ** 2, 512),
        relu5=nn.ReLU(),
        fc2=nn.Linear(512, 512),
        relu6=nn.ReLU(),
        fc3=nn.Linear(512, classes),
    )


def lenet(shape: Shape, classes: int) -> Layers:
    """Caffe's LeNet as ATMC used it: two 5x5 convolutions with max pooling and no ReLU between, 500 units."""
    channels, side = shape[0], _side("lenet", shape, 16)
    return OrderedDict(
        conv1=nn.Conv2d(channels, 20, 5),
        pool1=nn.MaxPool2d(2),
        conv2=nn.Conv2d(20, 50, 5),
        pool2=nn.MaxPool2d(2),
        flatten=nn.Flatten(),
        fc1=nn.Linear(50 * (((side - 4) // 2 - 4) // 2) ** 2, 500),
        relu1=nn.ReLU(),
        fc2=nn.Linear(500, classes),
    )


MODELS: dict[str, Callable[[Shape, int], Layers]] = {
    "mlp": mlp,
    "cnn_small": cnn_small,
    "cnn_large": cnn_large,
    "lenet": lenet,
}


def _side(name: str, shape: Shape, smallest: int) -> int:
    _, height, width = shape
    if height != width:
        raise UserError(f"{name} takes square images, not {height}x{width}; use mlp, which takes any shape")
    if height < smallest:
        raise UserError(f"{name} needs images of at least {smallest}x{smallest} pixels, got {height}x{width}")
    return height


def build_model(
    name: str, shape: Shape, classes: int, mean: Sequence[float] = (), std: Sequence[float] = (), seed: int = 0
) -> nn.Sequential:
    """The named network on [0,1] images of `shape`, initialised by torch's defaults from `seed` without touching the global RNG.

    Raises UserError for an unknown name or images that the network does not admit.
    """
    if name not in MODELS:
        raise unknown("model", name, MODELS)
    first: Layers = OrderedDict()
    if mean or std:
        first["normalise"] = normalisation(mean, std, shape[0])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(first | MODELS[name](shape, classes))


def normalisation(mean: Sequence[float], std: Sequence[float], channels: int) -> Normalize:
    """The first layer for these per-channel numbers (no mean is 0, no std is 1). Raises UserError where they do not fit."""
    mean, std = mean or [0.0] * channels, std or [1.0] * channels
    if len(mean) != channels or len(std) != channels:
        raise UserError(f"mean and std need one number per channel ({channels}), got {len(mean)} and {len(std)}")
    try:
        return Normalize(mean, std)
    except ValueError as reason:
        raise UserError(str(reason)) from reason
