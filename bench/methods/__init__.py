"""Pruning methods: generators of phases. One file each; a new one is a file and a line in METHODS."""

from __future__ import annotations

from .dense import Dense
from .hydra import HYDRA
from .lwm import LWM
from .random_pruning import RandomPruning

METHODS: dict[str, type] = {"dense": Dense, "random": RandomPruning, "lwm": LWM, "hydra": HYDRA}

__all__ = ["HYDRA", "LWM", "METHODS", "Dense", "RandomPruning"]
