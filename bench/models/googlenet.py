"""GoogLeNet (Szegedy et al. 2015, arXiv 1409.4842) in its usual CIFAR form: BatchNorm, no auxiliary heads."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from .layers import Layers, Shape, Width

Branches = tuple[int, int, int, int, int, int]  # 1x1; 3x3 and its reduction; 5x5 and its reduction; after the pool

MODULES: dict[str, Branches] = {
    "a3": (64, 128, 96, 32, 16, 32),
    "b3": (128, 192, 128, 96, 32, 64),
    "a4": (192, 208, 96, 48, 16, 64),
    "b4": (160, 224, 112, 64, 24, 64),
    "c4": (128, 256, 128, 64, 24, 64),
    "d4": (112, 288, 144, 64, 32, 64),
    "e4": (256, 320, 160, 128, 32, 128),
    "a5": (256, 320, 160, 128, 32, 128),
    "b5": (384, 384, 192, 128, 48, 128),
}


def _conv(inputs: int, outputs: int, kernel: int) -> tuple[nn.Module, nn.Module, nn.Module]:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2), nn.BatchNorm2d(outputs), nn.ReLU()


class Inception(nn.Module):
    """Four branches side by side: 1x1; 1x1 and 3x3; 1x1 and twice 3x3 for a 5x5; max pool and 1x1."""

    def __init__(self, inputs: int, branches: Branches) -> None:
        super().__init__()
        one, three, before_three, five, before_five, pooled = branches
        self.b1 = nn.Sequential(*_conv(inputs, one, 1))
        self.b2 = nn.Sequential(*_conv(inputs, before_three, 1), *_conv(before_three, three, 3))
        self.b3 = nn.Sequential(*_conv(inputs, before_five, 1), *_conv(before_five, five, 3), *_conv(five, five, 3))
        self.b4 = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), *_conv(inputs, pooled, 1))
        self.outputs = one + three + five + pooled

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.b1(x), self.b2(x), self.b3(x), self.b4(x)], 1)


def googlenet(shape: Shape, classes: int, width: Width) -> Layers:
    """GoogLeNet for CIFAR: 3x3 stem of 192 channels, nine inception modules with BatchNorm, 5x5 as twice 3x3."""
    outputs = width(192)
    layers: Layers = OrderedDict(pre_layers=nn.Sequential(*_conv(shape[0], outputs, 3)))
    for name, (one, three, before_three, five, before_five, pooled) in MODULES.items():
        if name in ("a4", "a5"):
            layers[f"pool_{name}"] = nn.MaxPool2d(3, stride=2, padding=1)
        branches = (width(one), width(three), width(before_three), width(five), width(before_five), width(pooled))
        module = Inception(outputs, branches)
        layers[name], outputs = module, module.outputs
    return layers | OrderedDict(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), linear=nn.Linear(outputs, classes))
