"""ResNets (He et al. 2016, arXiv 1512.03385): the CIFAR form with a 3x3 stem, and ResNet-50 as for ImageNet.

The last average pool takes whatever map is left (4x4 for 32x32 images), so every image size is admitted.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

from .layers import Layers, Shape, Width

STAGES = (64, 128, 256, 512)


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)


def conv1x1(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)


def shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """Nothing where the shape stays, else a 1x1 convolution with BatchNorm."""
    if stride == 1 and inputs == outputs:
        return nn.Sequential()
    return nn.Sequential(conv1x1(inputs, outputs, stride), nn.BatchNorm2d(outputs))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    expansion = 1

    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu1 = conv3x3(inputs, channels, stride), nn.BatchNorm2d(channels), nn.ReLU()
        self.conv2, self.bn2 = conv3x3(channels, channels), nn.BatchNorm2d(channels)
        self.shortcut = shortcut(inputs, channels, stride)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(out)) + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride) and 1x1 convolutions beside a shortcut; four times as many channels come out."""

    expansion = 4

    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        super().__init__()
        outputs = self.expansion * channels
        self.conv1, self.bn1, self.relu1 = conv1x1(inputs, channels), nn.BatchNorm2d(channels), nn.ReLU()
        self.conv2, self.bn2, self.relu2 = conv3x3(channels, channels, stride), nn.BatchNorm2d(channels), nn.ReLU()
        self.conv3, self.bn3 = conv1x1(channels, outputs), nn.BatchNorm2d(outputs)
        self.shortcut = shortcut(inputs, outputs, stride)
        self.relu3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.relu2(self.bn2(self.conv2(out)))
        return self.relu3(self.bn3(self.conv3(out)) + self.shortcut(x))


Block = type[BasicBlock] | type[Bottleneck]


def _resnet(stem: Layers, block: Block, depths: Sequence[int], classes: int, width: Width) -> Layers:
    layers, inputs = stem, width(STAGES[0])
    for stage, (depth, channels) in enumerate(zip(depths, map(width, STAGES), strict=True), 1):
        blocks = []
        for at in range(depth):
            blocks.append(block(inputs, channels, stride=2 if at == 0 and stage > 1 else 1))
            inputs = block.expansion * channels
        layers[f"layer{stage}"] = nn.Sequential(*blocks)
    return layers | OrderedDict(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), linear=nn.Linear(inputs, classes))


def _cifar_stem(shape: Shape, width: Width) -> Layers:
    channels = width(STAGES[0])
    return OrderedDict(conv1=conv3x3(shape[0], channels), bn1=nn.BatchNorm2d(channels), relu1=nn.ReLU())


def resnet18(shape: Shape, classes: int, width: Width) -> Layers:
    """ResNet-18 for CIFAR: 3x3 stem without max pooling, four stages of 2 basic blocks."""
    return _resnet(_cifar_stem(shape, width), BasicBlock, (2, 2, 2, 2), classes, width)


def resnet34(shape: Shape, classes: int, width: Width) -> Layers:
    """ResNet-34 for CIFAR: 3x3 stem without max pooling, stages of 3, 4, 6 and 3 basic blocks."""
    return _resnet(_cifar_stem(shape, width), BasicBlock, (3, 4, 6, 3), classes, width)


def resnet50(shape: Shape, classes: int, width: Width) -> Layers:
    """ResNet-50 for CIFAR: 3x3 stem without max pooling, stages of 3, 4, 6 and 3 bottlenecks."""
    return _resnet(_cifar_stem(shape, width), Bottleneck, (3, 4, 6, 3), classes, width)


def resnet101(shape: Shape, classes: int, width: Width) -> Layers:
    """ResNet-101 for CIFAR: 3x3 stem without max pooling, stages of 3, 4, 23 and 3 bottlenecks."""
    return _resnet(_cifar_stem(shape, width), Bottleneck, (3, 4, 23, 3), classes, width)


def resnet50_imagenet(shape: Shape, classes: int, width: Width) -> Layers:
    """ResNet-50 for ImageNet: 7x7 stem of stride 2 and max pooling, stages of 3, 4, 6 and 3 bottlenecks."""
    channels = width(STAGES[0])
    stem: Layers = OrderedDict(
        conv1=nn.Conv2d(shape[0], channels, 7, stride=2, padding=3, bias=False),
        bn1=nn.BatchNorm2d(channels),
        relu1=nn.ReLU(),
        pool1=nn.MaxPool2d(3, stride=2, padding=1),
    )
    return _resnet(stem, Bottleneck, (3, 4, 6, 3), classes, width)
