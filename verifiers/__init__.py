"""Verifiers prove: `verifier(model, x, y)` returns a Proof, a radius per sample within which the answer cannot change."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from .exact import Exact, exact_radius
from .interval import IBP
from .lirpa import AlphaCrown, Crown, CrownIBP
from .proof import Proof, UnsupportedNetworkError
from .smoothing import Smoothing
from .symbolic import SymbolicInterval


class Verifier(Protocol):
    """A frozen dataclass. Its guarantee is the first line of its docstring.

    model: a plain network in eval mode. x: float32 [N, C, H, W] in [0,1]. y: int64 [N]. `deterministic` says whether the
    statement is about the network itself, without probability. Two more class attributes are optional: `costly` (asked last,
    and only about what is neither proven nor broken by then) and `falsifies` (its Proof may hold witnesses).
    """

    @property
    def norm(self) -> str: ...
    @property
    def deterministic(self) -> bool: ...
    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Proof: ...


VERIFIERS: dict[str, type] = {
    "ibp": IBP, "crown-ibp": CrownIBP, "crown": Crown, "alpha-crown": AlphaCrown, "mixtrain": SymbolicInterval,
    "exact": Exact, "smoothing": Smoothing,
}

__all__ = [
    "IBP", "VERIFIERS", "AlphaCrown", "Crown", "CrownIBP", "Exact", "Proof", "Smoothing", "SymbolicInterval",
    "UnsupportedNetworkError", "Verifier", "exact_radius",
]
