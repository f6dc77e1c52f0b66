"""What every family of architectures shares: the form of its functions, and the sides that it admits."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from torch import nn

from ..errors import UserError

Shape = tuple[int, int, int]
Layers = OrderedDict[str, nn.Module]
Width = Callable[[int], int]  # channels at full width -> channels
Architecture = Callable[[Shape, int, Width], Layers]


def large_enough(name: str, shape: Shape, smallest: int) -> None:
    """Raises UserError for images with a side below `smallest`."""
    _, height, width = shape
    if min(height, width) < smallest:
        raise UserError(f"{name} needs images of at least {smallest}x{smallest} pixels, got {height}x{width}")


def square_side(name: str, shape: Shape, smallest: int) -> int:
    """The side of square images. Raises UserError for others, and for a side below `smallest`."""
    _, height, width = shape
    if height != width:
        raise UserError(f"{name} takes square images, not {height}x{width}; use mlp, which takes any shape")
    large_enough(name, shape, smallest)
    return height
