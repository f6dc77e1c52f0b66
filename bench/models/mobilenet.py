"""MobileNet-v2 (Sandler et al. 2018, arXiv 1801.04381) in its usual CIFAR form: ReLU, stem of stride 1."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from .layers import Layers, Shape, Width
from .resnet import conv1x1, conv3x3, shortcut

STAGES = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


class InvertedResidual(nn.Module):
    """1x1 to `expansion` times the channels, depthwise 3x3, 1x1 back; a shortcut where the stride is 1."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int) -> None:
        super().__init__()
        hidden = expansion * inputs
        self.conv1, self.bn1, self.relu1 = conv1x1(inputs, hidden), nn.BatchNorm2d(hidden), nn.ReLU()
        self.conv2 = nn.Conv2d(hidden, hidden, 3, stride=stride, padding=1, groups=hidden, bias=False)
        self.bn2, self.relu2 = nn.BatchNorm2d(hidden), nn.ReLU()
        self.conv3, self.bn3 = conv1x1(hidden, outputs), nn.BatchNorm2d(outputs)
        self.shortcut = shortcut(inputs, outputs, stride) if stride == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.bn3(self.conv3(self.relu2(self.bn2(self.conv2(out)))))
        return out if self.shortcut is None else out + self.shortcut(x)


def mobilenet_v2(shape: Shape, classes: int, width: Width) -> Layers:
    """MobileNet-v2 for CIFAR: 17 inverted residuals, their shortcut a 1x1 convolution where only the width changes."""
    blocks, inputs, head = [], width(32), width(1280)
    stem = OrderedDict(conv1=conv3x3(shape[0], inputs), bn1=nn.BatchNorm2d(inputs), relu1=nn.ReLU())
    for expansion, channels, depth, stride in STAGES:
        for at in range(depth):
            blocks.append(InvertedResidual(inputs, width(channels), expansion, stride if at == 0 else 1))
            inputs = width(channels)
    return stem | OrderedDict(
        layers=nn.Sequential(*blocks),
        conv2=conv1x1(inputs, head),
        bn2=nn.BatchNorm2d(head),
        relu2=nn.ReLU(),
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        linear=nn.Linear(head, classes),
    )
