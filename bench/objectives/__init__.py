"""Objectives: the loss of one batch, callable by every pruning method without knowing which one it is."""

from __future__ import annotations

from .bounded import MTLIBP, SABR, CrownIBPTraining, IBPTraining
from .empirical import Benign, FastTraining, FreeTraining, PGDTraining, Trades
from .mixtrain import MixTrain
from .smoothed import NoiseTraining, StabilityTraining
from .wrm import WRM

OBJECTIVES: dict[str, type] = {
    "benign": Benign,
    "pgd": PGDTraining,
    "trades": Trades,
    "free": FreeTraining,
    "fast": FastTraining,
    "wrm": WRM,
    "ibp": IBPTraining,
    "crown-ibp": CrownIBPTraining,
    "sabr": SABR,
    "mtl-ibp": MTLIBP,
    "mixtrain": MixTrain,
    "noise": NoiseTraining,
    "stability": StabilityTraining,
}

__all__ = [
    "MTLIBP", "OBJECTIVES", "SABR", "WRM", "Benign", "CrownIBPTraining", "FastTraining", "FreeTraining", "IBPTraining",
    "MixTrain", "NoiseTraining", "PGDTraining", "StabilityTraining", "Trades",
]
