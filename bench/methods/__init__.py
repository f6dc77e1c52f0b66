"""Pruning methods: generators of phases. One file each; a new one is a file and a line in METHODS."""

from __future__ import annotations

from .admm import ADMM
from .al0 import AL0
from .atmc import ATMC, ATMC8
from .channel import ChannelPruning
from .dense import Dense
from .dnr import DNR
from .flying_bird import FlyingBird, FlyingBirdPlus
from .harp import HARP
from .hydra import HYDRA
from .lottery import IMP
from .low_rank import ALR
from .lwm import LWM
from .mad import MAD
from .nap import AP, NAP
from .nrs_loss import NRSLoss
from .pwoa import PwoA
from .quantised import Uniform8Bit
from .random_pruning import RandomPruning
from .rigl import RigL
from .snip import SNIP
from .soft_threshold import STR
from .twin_rep import TwinRep

METHODS: dict[str, type] = {
    "dense": Dense,
    "random": RandomPruning,
    "lwm": LWM,
    "hydra": HYDRA,
    "admm": ADMM,
    "snip": SNIP,
    "str": STR,
    "rigl": RigL,
    "nap": NAP,
    "ap": AP,
    "al0": AL0,
    "alr": ALR,
    "atmc": ATMC,
    "atmc-8bit": ATMC8,
    "uniform-8bit": Uniform8Bit,
    "imp": IMP,
    "channel": ChannelPruning,
    "harp": HARP,
    "flyingbird": FlyingBird,
    "flyingbird+": FlyingBirdPlus,
    "twinrep": TwinRep,
    "dnr": DNR,
    "pwoa": PwoA,
    "mad": MAD,
    "nrsloss": NRSLoss,
}

__all__ = [
    "ADMM", "AL0", "ALR", "AP", "ATMC", "ATMC8", "DNR", "HARP", "HYDRA", "IMP", "LWM", "MAD", "METHODS", "NAP", "SNIP", "STR",
    "ChannelPruning", "Dense", "FlyingBird", "FlyingBirdPlus", "NRSLoss", "PwoA", "RandomPruning", "RigL", "TwinRep",
    "Uniform8Bit",
]  # fmt: skip
