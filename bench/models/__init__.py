"""Architectures as plain functions of the input's shape, the number of classes and the width; normalisation is the first layer.

No maintained library that does without torchvision has these networks, so all are written here (docs/architectures.md).
"""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from fractions import Fraction

import torch
from torch import nn

from verifiers.normalise import Normalize

from ..errors import UserError, unknown
from .googlenet import googlenet
from .layers import Architecture, Layers, Shape, Width
from .mobilenet import mobilenet_v2
from .plain import cnn_large, cnn_small, lenet, mlp
from .resnet import resnet18, resnet34, resnet50, resnet50_imagenet, resnet101
from .vgg import vgg16
from .wide_resnet import wrn_16_8, wrn_28_2, wrn_28_4, wrn_28_10

# chains of plain layers, small enough for every test at full width
PLAIN: dict[str, Architecture] = {"mlp": mlp, "cnn_small": cnn_small, "cnn_large": cnn_large, "lenet": lenet}

ARCHITECTURES: dict[str, Architecture] = {
    **PLAIN,
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
    "resnet101": resnet101,
    "resnet50_imagenet": resnet50_imagenet,
    "wrn_16_8": wrn_16_8,
    "wrn_28_2": wrn_28_2,
    "wrn_28_4": wrn_28_4,
    "wrn_28_10": wrn_28_10,
    "vgg16": vgg16,
    "googlenet": googlenet,
    "mobilenet_v2": mobilenet_v2,
}


def architecture(name: str) -> Callable[[Shape, int], Layers]:
    """The function that makes the layers of a named architecture; `resnet18@1/16` is resnet18 at one sixteenth of its width.

    A width is a fraction below 1 in lowest terms, so that a network has one name. Every hidden channel and unit count is
    multiplied by it and rounded to the nearest whole number (halves to the even one), at least 1; a block's expansion stays.
    Raises UserError for an unknown name or another width.
    """
    family, at, fraction = name.partition("@")
    if family not in ARCHITECTURES:
        raise unknown("model", family, ARCHITECTURES)
    make = ARCHITECTURES[family]
    width: Width = _width(family, fraction) if at else lambda channels: channels
    return lambda shape, classes: make(shape, classes, width)


def _width(family: str, text: str) -> Width:
    if not re.fullmatch(r"[1-9]\d{0,3}/[1-9]\d{0,3}", text, re.ASCII) or str(Fraction(text)) != text or Fraction(text) >= 1:
        raise UserError(
            f"{family}@{text}: a width is a fraction below 1 in lowest terms, as in {family}@1/16; the full width is {family}"
        )
    return lambda channels: max(1, round(Fraction(text) * channels))


def build_model(
    name: str, shape: Shape, classes: int, mean: Sequence[float] = (), std: Sequence[float] = (), seed: int = 0
) -> nn.Sequential:
    """The named network on [0,1] images of `shape`, initialised by torch's defaults from `seed` without touching the global RNG.

    name: an architecture, with or without a width (`architecture`). Raises UserError for an unknown one or images that the
    network does not admit.
    """
    layers = architecture(name)
    first: Layers = OrderedDict()
    if mean or std:
        first["normalise"] = normalisation(mean, std, shape[0])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(first | layers(shape, classes))


def initialise_(model: nn.Sequential, rule: str, seed: int) -> nn.Sequential:
    """The model with the weights of its convolutions and linear layers drawn anew from `seed`; their biases become 0.

    torch: nothing changes. kaiming: N(0, 2 / fan_in), which keeps the size of a ReLU network's values (He et al. 2015, arXiv
    1502.01852). ibp: N(0, 2 pi / fan_in^2), which keeps the size of interval bounds instead (Shi et al. 2021, arXiv 2103.17268).
    """
    if rule == "torch":
        return model
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                fan_in = layer.weight[0].numel()
                layer.weight.normal_(0.0, math.sqrt(2 / fan_in) if rule == "kaiming" else math.sqrt(2 * math.pi) / fan_in)
                if layer.bias is not None:
                    layer.bias.zero_()
    return model


def normalisation(mean: Sequence[float], std: Sequence[float], channels: int) -> Normalize:
    """The first layer for these per-channel numbers (no mean is 0, no std is 1). Raises UserError where they do not fit."""
    mean, std = mean or [0.0] * channels, std or [1.0] * channels
    if len(mean) != channels or len(std) != channels:
        raise UserError(f"mean and std need one number per channel ({channels}), got {len(mean)} and {len(std)}")
    try:
        return Normalize(mean, std)
    except ValueError as reason:
        raise UserError(str(reason)) from reason
