"""Wide ResNets (Zagoruyko & Komodakis 2016, arXiv 1605.07146): pre-activation blocks, names as in the usual checkpoints."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from .layers import Layers, Shape, Width
from .resnet import conv1x1, conv3x3


class PreActivation(nn.Module):
    """BatchNorm and ReLU before each of two 3x3 convolutions; where the shape changes, the activated input has a 1x1 shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1, self.relu1, self.conv1 = nn.BatchNorm2d(inputs), nn.ReLU(), conv3x3(inputs, outputs, stride)
        self.bn2, self.relu2 = nn.BatchNorm2d(outputs), nn.ReLU()
        self.dropout = nn.Dropout(dropout) if dropout else nn.Sequential()
        self.conv2 = conv3x3(outputs, outputs)
        same = stride == 1 and inputs == outputs
        self.convShortcut = None if same else conv1x1(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        active = self.relu1(self.bn1(x))
        out = self.conv2(self.dropout(self.relu2(self.bn2(self.conv1(active)))))
        return out + (x if self.convShortcut is None else self.convShortcut(active))


def _wide_resnet(depth: int, factor: int, shape: Shape, classes: int, width: Width, dropout: float = 0.0) -> Layers:
    inputs = width(16)
    layers: Layers = OrderedDict(conv1=conv3x3(shape[0], inputs))
    for group, channels in enumerate((16, 32, 64), 1):
        blocks, outputs = [], width(factor * channels)
        for at in range((depth - 4) // 6):
            blocks.append(PreActivation(inputs, outputs, 2 if at == 0 and group > 1 else 1, dropout))
            inputs = outputs
        layers[f"block{group}"] = nn.Sequential(OrderedDict(layer=nn.Sequential(*blocks)))
    return layers | OrderedDict(
        bn1=nn.BatchNorm2d(inputs),
        relu=nn.ReLU(),
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        fc=nn.Linear(inputs, classes),
    )


def wrn_16_8(shape: Shape, classes: int, width: Width) -> Layers:
    """WRN-16-8 as in ATMC: 2 blocks per group, 128, 256 and 512 channels, dropout 0.4 between the two convolutions."""
    return _wide_resnet(16, 8, shape, classes, width, dropout=0.4)


def wrn_28_2(shape: Shape, classes: int, width: Width) -> Layers:
    """WRN-28-2: 4 blocks per group, 32, 64 and 128 channels."""
    return _wide_resnet(28, 2, shape, classes, width)


def wrn_28_4(shape: Shape, classes: int, width: Width) -> Layers:
    """WRN-28-4: 4 blocks per group, 64, 128 and 256 channels (HYDRA's, without the unused copy of its first group)."""
    return _wide_resnet(28, 4, shape, classes, width)


def wrn_28_10(shape: Shape, classes: int, width: Width) -> Layers:
    """WRN-28-10: 4 blocks per group, 160, 320 and 640 channels."""
    return _wide_resnet(28, 10, shape, classes, width)
