"""Objectives: the loss of one batch, callable by every pruning method without knowing which one it is."""

from __future__ import annotations

from .bounded import IBPTraining
from .empirical import Benign, PGDTraining, Trades
from .smoothed import StabilityTraining

OBJECTIVES: dict[str, type] = {
    "benign": Benign,
    "pgd": PGDTraining,
    "trades": Trades,
    "ibp": IBPTraining,
    "stability": StabilityTraining,
}

__all__ = ["OBJECTIVES", "Benign", "IBPTraining", "PGDTraining", "StabilityTraining", "Trades"]
