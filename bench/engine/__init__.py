"""A pruned network answered in the time of its non-zero weights: `accelerated(model, example)` (docs/engine.md)."""

from .module import Accelerated, accelerated

__all__ = ["Accelerated", "accelerated"]
