"""What every verifier returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

PROVED, BROKEN, OPEN, ABSTAIN, TIMEOUT, ERROR = "proved", "broken", "open", "abstain", "timeout", "error"


class UnsupportedNetworkError(Exception):
    """The network holds something that a bound method has no sound rule for; the message names it."""


class SelfRefutedError(UnsupportedNetworkError):
    """A bound does not hold at a point that was looked at: nothing of this verifier may be believed on this network."""


@dataclass(frozen=True)
class Proof:
    """Per-sample answers of one verifier: "certified at r" is `radius >= r`, and a radius of 0 proves nothing.

    radius, margin: float64 [N]; margin is a lower bound of the smallest f_y - f_j over the ball, NaN where there is none.
    predicted: int64 [N], -1 where the verifier abstains. status: N of proved / broken / open / abstain / timeout / error.
    witness: like x, NaN but for the samples that are broken: inside the exact ball and misclassified in float64.
    details: further per-sample columns. notes: what was done to the network. rechecked: samples decided in float64.
    """

    radius: Tensor
    margin: Tensor
    predicted: Tensor
    status: tuple[str, ...]
    witness: Tensor | None = None
    details: Mapping[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    rechecked: int = 0


def require_finite(x: Tensor, logits: Tensor) -> None:
    """Raises UnsupportedNetworkError where pixels or outputs are NaN or infinite: nothing can be said about them."""
    for what, values in (("images have pixels", x), ("network has outputs", logits)):
        if not bool(torch.isfinite(values).all()):
            raise UnsupportedNetworkError(f"the {what} that are no finite numbers")


def fixed_radius_proof(
    eps: float, proved: Tensor, margin: Tensor, predicted: Tensor, notes: tuple[str, ...] = (), rechecked: int = 0,
    details: Mapping[str, Tensor] | None = None,
) -> Proof:
    """The proof of a verifier that answers one question, "robust in the ball of radius eps?", per sample."""
    proved = proved.cpu()
    return Proof(
        radius=proved.double() * eps,  # in float64 from the start: float32 would round a radius up
        margin=margin.double().cpu(),
        predicted=predicted.cpu(),
        status=tuple(PROVED if yes else OPEN for yes in proved.tolist()),
        details=details or {},
        notes=notes,
        rechecked=rechecked,
    )
