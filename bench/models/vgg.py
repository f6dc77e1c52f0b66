"""VGG (Simonyan & Zisserman 2015, arXiv 1409.1556) in HYDRA's CIFAR form."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from .layers import Layers, Shape, Width, large_enough
from .resnet import conv3x3

CONVOLUTIONS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


def vgg16(shape: Shape, classes: int, width: Width) -> Layers:
    """VGG-16 with BatchNorm: 13 convolutions, 4 max pools, a 2x2 average pool, two layers of 256 units."""
    large_enough("vgg16", shape, 16)
    features: list[nn.Module] = []
    inputs, hidden = shape[0], width(256)
    for stage, channels in enumerate(CONVOLUTIONS):
        features += [nn.MaxPool2d(2)] if stage else []
        for outputs in map(width, channels):
            features += [conv3x3(inputs, outputs), nn.BatchNorm2d(outputs), nn.ReLU()]
            inputs = outputs
    return OrderedDict(
        features=nn.Sequential(*features),
        pool=nn.AdaptiveAvgPool2d(2),
        flatten=nn.Flatten(),
        classifier=nn.Sequential(
            nn.Linear(4 * inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, classes)
        ),
    )
