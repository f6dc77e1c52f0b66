"""Small networks, points of balls, and the smallest margins that samples and PGD reach: what bounds are held against."""

from __future__ import annotations

import copy
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks import PGD
from verifiers.normalise import Normalize


class Forward(nn.Module):
    """A network whose forward is `function(self, x)`."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def linear(weight: list[list[float]], bias: list[float] | None = None) -> nn.Linear:
    """A linear layer with the given numbers."""
    layer = nn.Linear(len(weight[0]), len(weight), bias=bias is not None)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight, dtype=torch.float64))
        if bias is not None:
            layer.bias.copy_(torch.tensor(bias, dtype=torch.float64))
    return layer


@torch.no_grad()
def randomised(model: nn.Module, seed: int = 0, kept: float = 1.0, gain: float = 2.0) -> nn.Module:
    """The same network in eval mode with larger random weights, a share of them kept, and BatchNorm statistics of use."""
    generator = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            fan_in = layer.weight[0].numel() * kept
            mask = torch.rand(layer.weight.shape, generator=generator) < kept
            layer.weight.copy_(gain * mask * torch.randn(layer.weight.shape, generator=generator) / fan_in**0.5)
            if layer.bias is not None:
                layer.bias.copy_(0.3 * torch.randn(layer.bias.shape, generator=generator))
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            for tensor in (layer.running_mean, layer.weight, layer.bias):
                if tensor is not None:
                    tensor.copy_(torch.randn(tensor.shape, generator=generator))
            layer.running_var.copy_(0.3 + torch.rand(layer.running_var.shape, generator=generator))
    return model.eval()


def images(n: int, shape: tuple[int, ...] = (2, 6, 6), seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def exact(model: nn.Module) -> nn.Module:
    """The network in double precision, so that its own rounding does not blur a comparison."""
    return copy.deepcopy(model).double()


@torch.no_grad()
def labels(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).argmax(1)


@torch.no_grad()
def margins_at(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """min over j != y of f_y - f_j in double precision: [N]."""
    logits = exact(model)(x.double())
    own = logits.gather(1, y[:, None]).squeeze(1)
    return own - logits.scatter(1, y[:, None], -torch.inf).amax(1)


def points_of_ball(x: Tensor, norm: str, eps: Fraction, count: int, seed: int = 0) -> Tensor:
    """Corners, edges and inner points of the ball in [0,1], in double precision: [count, *x.shape]."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, *x.shape, generator=generator, dtype=torch.float64)
    length = torch.rand(count, *[1] * x.dim(), generator=generator, dtype=torch.float64)
    length[::2] = 1
    if norm == "linf":
        step = torch.where(length == 1, noise.sign(), noise.tanh())
    else:
        step = noise / noise.flatten(2).norm(dim=2).view(count, len(x), *[1] * (x.dim() - 1)) * length
    return (x.double() + float(eps) * (1 - 1e-12) * step).clamp(0, 1)


def lowest_sampled(model: nn.Module, x: Tensor, y: Tensor, norm: str, eps: Fraction, count: int = 32) -> Tensor:
    """The smallest margin [N] at random points of the ball."""
    points = points_of_ball(x, norm, eps, count)
    return margins_at(model, points.flatten(0, 1), y.repeat(count)).view(count, -1).amin(0)


def lowest_attacked(model: nn.Module, x: Tensor, y: Tensor, norm: str, eps: Fraction, steps: int = 15) -> Tensor:
    """The smallest margin [N] that PGD on the margin loss reaches."""
    attack = PGD(norm=norm, eps=eps, steps=steps, loss="margin", random_start=False, last=True)
    return margins_at(model, attack(model, x, y), y)


def lowest_reached(model: nn.Module, x: Tensor, y: Tensor, norm: str, eps: Fraction) -> Tensor:
    """The smallest margin [N] that samples or PGD reach."""
    return torch.minimum(lowest_sampled(model, x, y, norm, eps), lowest_attacked(model, x, y, norm, eps))


def _convolution(**options: Any) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, **options))


def _head(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(width, 5))


def _around(layer: nn.Module, width: int = 144) -> nn.Module:
    """The layer between a convolution of [2, 6, 6] images (4 channels) and a linear head."""
    return nn.Sequential(_convolution(), layer, _head(width))


def _calling(function: Callable[[Tensor], Tensor], width: int = 144) -> nn.Module:
    return Forward(lambda s, x: s.head(function(s.first(x))), first=_convolution(), head=_head(width))


RULE_NETS: dict[str, Callable[[], nn.Module]] = {
    "Linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(72, 9), nn.Tanh(), nn.Linear(9, 5)),
    "Linear without bias": lambda: nn.Sequential(nn.Flatten(), nn.Linear(72, 9, bias=False), nn.ReLU(), nn.Linear(9, 5, False)),
    "Conv2d": lambda: nn.Sequential(nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=False), _head(27)),
    "Conv2d grouped": lambda: nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.ReLU(), _head(64)),
    "Conv2d dilated": lambda: nn.Sequential(nn.Conv2d(2, 4, 3, dilation=2, padding=1), nn.ReLU(), _head(64)),
    "Conv2d rectangular": lambda: nn.Sequential(nn.Conv2d(2, 3, (1, 3), stride=(2, 1), padding=(1, 0)), nn.ReLU(), _head(48)),
    "Conv2d same": lambda: nn.Sequential(nn.Conv2d(2, 4, 4, padding="same"), nn.ReLU(), _head(144)),
    "Normalize": lambda: nn.Sequential(Normalize([0.4, 0.6], [0.5, 0.2]), _convolution(), nn.ReLU(), _head(144)),
    "Normalize, Linear": lambda: nn.Sequential(Normalize([0.4, 0.6], [0.5, 0.2]), _head(72)),
    "Identity": lambda: nn.Sequential(nn.Identity(), nn.Dropout(0.5), _head(72)),
    "BatchNorm2d": lambda: _around(nn.BatchNorm2d(4)),
    "BatchNorm2d first": lambda: nn.Sequential(nn.BatchNorm2d(2), nn.ReLU(), _head(72)),
    "BatchNorm2d without weights": lambda: _around(nn.BatchNorm2d(4, affine=False)),
    "ReLU": lambda: _around(nn.ReLU()),
    "ReLU inplace": lambda: _around(nn.ReLU(inplace=True)),
    "ReLU6": lambda: _around(nn.ReLU6()),
    "Hardtanh": lambda: _around(nn.Hardtanh(-0.5, 0.3)),
    "Tanh": lambda: _around(nn.Tanh()),
    "Sigmoid": lambda: _around(nn.Sigmoid()),
    "Dropout": lambda: _around(nn.Dropout(0.3)),
    "MaxPool2d": lambda: _around(nn.MaxPool2d(2), 36),
    "MaxPool2d overlapping": lambda: _around(nn.MaxPool2d(3, stride=1, padding=1)),
    "MaxPool2d first": lambda: nn.Sequential(nn.MaxPool2d(2), _head(18)),
    "AvgPool2d": lambda: _around(nn.AvgPool2d(3), 16),
    "AvgPool2d padded": lambda: _around(nn.AvgPool2d(3, stride=2, padding=1), 36),
    "AvgPool2d without padding in the mean": lambda: _around(nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False), 36),
    "AvgPool2d sums": lambda: _around(nn.AvgPool2d(3, divisor_override=1), 16),
    "AdaptiveAvgPool2d": lambda: _around(nn.AdaptiveAvgPool2d(1), 4),
    "AdaptiveAvgPool2d to 4x4": lambda: _around(nn.AdaptiveAvgPool2d(4), 64),
    "+": lambda: Forward(
        lambda s, x: s.head(torch.relu(s.a(x) + s.b(x))), a=_convolution(), b=_convolution(groups=2), head=_head(144)
    ),
    "residual": lambda: Forward(lambda s, x: s.head(torch.relu(x + s.a(x))), a=nn.Conv2d(2, 2, 3, padding=1), head=_head(72)),
    "torch.add": lambda: Forward(
        lambda s, x: s.head(torch.add(s.a(x), s.b(x))), a=_convolution(), b=_convolution(), head=_head(144)
    ),
    "torch.cat": lambda: Forward(
        lambda s, x: s.head(torch.cat([torch.relu(s.a(x)), x], 1)), a=_convolution(), head=_head(216)
    ),
    "torch.cat of rows": lambda: Forward(
        lambda s, x: s.head(torch.cat([s.a(x), s.b(x)], dim=2)), a=_convolution(), b=_convolution(), head=_head(288)
    ),
    "torch.flatten": lambda: Forward(lambda s, x: s.head(torch.flatten(s.a(x), 1)), a=_convolution(), head=nn.Linear(144, 5)),
    "torch.flatten first": lambda: Forward(lambda s, x: s.head(torch.flatten(x, start_dim=1)), head=nn.Linear(72, 5)),
    "x.flatten": lambda: Forward(lambda s, x: s.head(s.a(x).flatten(1)), a=_convolution(), head=nn.Linear(144, 5)),
    "F.relu": lambda: _calling(F.relu),
    "F.relu inplace": lambda: _calling(lambda x: F.relu(x, inplace=True)),
    "torch.relu": lambda: _calling(torch.relu),
    "x.relu": lambda: _calling(lambda x: x.relu()),
    "F.max_pool2d": lambda: _calling(lambda x: F.max_pool2d(x, 2), 36),
    "F.max_pool2d padded": lambda: _calling(lambda x: F.max_pool2d(x, 3, stride=2, padding=1), 36),
    "F.avg_pool2d": lambda: _calling(lambda x: F.avg_pool2d(x, 2), 36),
    "F.adaptive_avg_pool2d": lambda: _calling(lambda x: F.adaptive_avg_pool2d(x, 2), 16),
}

# what interval bounds have rules for and the methods through linear relaxations of whole networks rewrite or refuse
SHAPE_NETS: dict[str, Callable[[], nn.Module]] = {
    "F.relu6": lambda: _calling(F.relu6),
    "F.dropout": lambda: Forward(
        lambda s, x: s.head(F.dropout2d(F.dropout(s.a(x), 0.3, s.training), 0.3, s.training)), a=_convolution(), head=_head(144)
    ),
    "Dropout2d": lambda: _around(nn.Dropout2d(0.3)),
    "BatchNorm1d": lambda: nn.Sequential(nn.Flatten(), nn.Linear(72, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 5)),
    "BatchNorm1d first": lambda: nn.Sequential(nn.Flatten(), nn.BatchNorm1d(72), nn.Linear(72, 5)),
    "BatchNorm1d of sequences": lambda: nn.Sequential(nn.Flatten(2), nn.BatchNorm1d(2), nn.ReLU(), _head(72)),
    "view by size": lambda: Forward(lambda s, x: s.head(s.a(x).view(x.size(0), -1)), a=_convolution(), head=nn.Linear(144, 5)),
    "view by shape": lambda: Forward(lambda s, x: s.head(s.a(x).view(x.shape[0], 144)), a=_convolution(), head=nn.Linear(144, 5)),
    "view of the image": lambda: Forward(lambda s, x: s.head(x.view(-1, 72)), head=nn.Linear(72, 5)),
    "x.reshape": lambda: Forward(lambda s, x: s.head(s.a(x).reshape((x.size()[0], 144))), a=nn.Conv2d(2, 4, 3, padding=1),
                                 head=nn.Linear(144, 5)),
    "mean over the pixels": lambda: Forward(lambda s, x: s.head(s.a(x).mean([2, 3])), a=_convolution(), head=nn.Linear(4, 5)),
    "mean keeping dimensions": lambda: _calling(lambda x: torch.mean(x, dim=(2, 3), keepdim=True), 4),
    "mean over rows": lambda: _calling(lambda x: x.mean(-1), 24),
    "average over what is there": lambda: _calling(lambda x: F.avg_pool2d(x, x.size()[2:]), 4),
}
