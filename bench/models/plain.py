"""Small networks in a row, without BatchNorm."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from .layers import Layers, Shape, Width, square_side


def mlp(shape: Shape, classes: int, width: Width) -> Layers:
    """Flatten, two hidden layers of 128 units, ReLU."""
    channels, height, columns = shape
    hidden = width(128)
    return OrderedDict(
        flatten=nn.Flatten(),
        fc1=nn.Linear(channels * height * columns, hidden),
        relu1=nn.ReLU(),
        fc2=nn.Linear(hidden, hidden),
        relu2=nn.ReLU(),
        fc3=nn.Linear(hidden, classes),
    )


def cnn_small(shape: Shape, classes: int, width: Width) -> Layers:
    """Two 4x4 convolutions of stride 2 (16, 32 channels), 100 units (Wong & Kolter 2018's small network)."""
    channels, side = shape[0], square_side("cnn_small", shape, 4)
    first, second, hidden = width(16), width(32), width(100)
    return OrderedDict(
        conv1=nn.Conv2d(channels, first, 4, stride=2, padding=1),
        relu1=nn.ReLU(),
        conv2=nn.Conv2d(first, second, 4, stride=2, padding=1),
        relu2=nn.ReLU(),
        flatten=nn.Flatten(),
        fc1=nn.Linear(second * (side // 2 // 2) ** 2, hidden),
        relu3=nn.ReLU(),
        fc2=nn.Linear(hidden, classes),
    )


def cnn_large(shape: Shape, classes: int, width: Width) -> Layers:
    """Four convolutions (32, 32, 64, 64 channels), two layers of 512 units (Wong et al. 2018's large network)."""
    channels, side = shape[0], square_side("cnn_large", shape, 4)
    first, second, hidden = width(32), width(64), width(512)
    return OrderedDict(
        conv1=nn.Conv2d(channels, first, 3, stride=1, padding=1),
        relu1=nn.ReLU(),
        conv2=nn.Conv2d(first, first, 4, stride=2, padding=1),
        relu2=nn.ReLU(),
        conv3=nn.Conv2d(first, second, 3, stride=1, padding=1),
        relu3=nn.ReLU(),
        conv4=nn.Conv2d(second, second, 4, stride=2, padding=1),
        relu4=nn.ReLU(),
        flatten=nn.Flatten(),
        fc1=nn.Linear(second * (side // 2 // 2) ** 2, hidden),
        relu5=nn.ReLU(),
        fc2=nn.Linear(hidden, hidden),
        relu6=nn.ReLU(),
        fc3=nn.Linear(hidden, classes),
    )


def lenet(shape: Shape, classes: int, width: Width) -> Layers:
    """Caffe's LeNet as ATMC used it: two 5x5 convolutions with max pooling and no ReLU between, 500 units."""
    channels, side = shape[0], square_side("lenet", shape, 16)
    first, second, hidden = width(20), width(50), width(500)
    return OrderedDict(
        conv1=nn.Conv2d(channels, first, 5),
        pool1=nn.MaxPool2d(2),
        conv2=nn.Conv2d(first, second, 5),
        pool2=nn.MaxPool2d(2),
        flatten=nn.Flatten(),
        fc1=nn.Linear(second * (((side - 4) // 2 - 4) // 2) ** 2, hidden),
        relu1=nn.ReLU(),
        fc2=nn.Linear(hidden, classes),
    )
