"""Verifiers prove: `verifier(model, x, y)` returns a Proof, a radius per sample within which the answer cannot change."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from .interval import IBP
from .lirpa import Crown, CrownIBP
from .proof import Proof, UnsupportedNetworkError
from .smoothing import Smoothing


class Verifier(Protocol):
    """A frozen dataclass. Its guarantee is the first line of its docstring.

    model: a plain network in eval mode. x: float32 [N, C, H, W] in [0,1]. y: int64 [N]. `deterministic` says whether the
    statement is about the network itself, without probability.
    """

    @property
    def norm(self) -> str: ...
    @property
    def deterministic(self) -> bool: ...
    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Proof: ...


VERIFIERS: dict[str, type] = {"ibp": IBP, "crown-ibp": CrownIBP, "crown": Crown, "smoothing": Smoothing}

__all__ = ["IBP", "VERIFIERS", "Crown", "CrownIBP", "Proof", "Smoothing", "UnsupportedNetworkError", "Verifier"]
