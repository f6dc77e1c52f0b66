"""The normalisation layer, which every bound knows by type."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normalize(nn.Module):
    """(x - mean) / std per channel, inside the network, so that eps, sigma and radii stay in [0,1] pixel units.

    The two buffers are configuration, not weights: they are not part of the state dict. Raises ValueError where, in float32,
    a mean is not finite or a std not finite and positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        means, stds = _float32(mean), _float32(std)
        if not bool(means.isfinite().all()):
            raise ValueError(f"mean must be finite in float32, got {', '.join(map(str, mean))}")
        if not bool((stds.isfinite() & (stds > 0)).all()):
            raise ValueError(f"std must be positive and finite in float32, got {', '.join(map(str, std))}")
        self.register_buffer("mean", means, persistent=False)
        self.register_buffer("std", stds, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def _float32(values: Sequence[float]) -> Tensor:
    """[1, C, 1, 1]; NaN for a whole number beyond every float."""
    found = [float(value) if abs(value) <= sys.float_info.max else math.nan for value in values]
    return torch.tensor(found, dtype=torch.float32).view(1, -1, 1, 1)
