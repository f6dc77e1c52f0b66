"""Verifiers that answer with a radius where others answer yes or no at one: a ladder of several eps, the minimal distance."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from verifiers import Proof, UnsupportedNetworkError
from verifiers.exact import Exact, exact_radius
from verifiers.proof import OPEN, PROVED
from verifiers.witness import float_below

from .errors import UserError


@dataclass(frozen=True)
class Ladder:
    """The largest of `steps` at which a deterministic verifier certifies each sample; its certificates and no others count.

    It is asked from the largest step down, at each about the samples that no larger step has settled: a ball that is proven
    holds every smaller one. known: float64 [N], radii that it has proven before, of the very samples of the call (else ignored).
    """

    verifier: Any
    steps: tuple[Fraction, ...]
    known: Tensor | None = None
    deterministic: ClassVar[bool] = True

    @property
    def norm(self) -> str:
        return self.verifier.norm

    @property
    def eps(self) -> Fraction:
        return max((self.verifier.eps, *self.steps))

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Proof:
        known = self.known if self.known is not None and len(self.known) == len(x) else torch.zeros(len(x))
        radius, margin = known.double().cpu().clone(), torch.full((len(x),), torch.nan, dtype=torch.float64)
        for step in sorted(self.steps, reverse=True):
            at = (radius < float(step)).nonzero().flatten()
            if not len(at):
                continue
            asked = at.to(x.device)
            proof = replace(self.verifier, eps=step)(model, x[asked], y[asked])
            radius[at], margin[at] = torch.maximum(radius[at], proof.radius), proof.margin
        return Proof(radius, margin, y.cpu(), tuple(PROVED if far > 0 else OPEN for far in radius.tolist()))


@dataclass(frozen=True)
class MinimalDistance:
    """Brackets of the smallest linf distance at which the answer changes, up to the eps of `exact`; radius is the lower end.

    details: distance_lower, proven; distance_upper, that of a witness, inf where none was found within eps (float64 [N], [0,1]
    pixel units). Bisection ends at a bracket of `tolerance`, or with only open questions left. Raises UserError for a network
    that `exact` cannot treat. Tjeng et al. 2019, arXiv 1711.07356.
    """

    exact: Exact
    tolerance: Fraction = Fraction(1, 1000)
    norm: ClassVar[str] = "linf"
    deterministic: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.tolerance <= 0:
            raise ValueError(f"the tolerance must be positive, got {self.tolerance}")

    @property
    def eps(self) -> Fraction:
        return self.exact.eps

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Proof:
        try:
            proof = self.exact(model, x, y)
            lower, upper = torch.full_like(proof.radius, float_below(self.eps)), torch.full_like(proof.radius, torch.inf)
            left = torch.tensor([status != PROVED for status in proof.status]).nonzero().flatten()
            at = left.to(x.device)
            lower[left], upper[left] = exact_radius(model, x[at], y[at], self.eps, self.tolerance, self.exact)
        except UnsupportedNetworkError as reason:
            raise UserError(f"--radius cannot treat this network: {reason}") from reason
        status = tuple(one if one == PROVED else OPEN for one in proof.status)  # its counterexamples are those of `exact` itself
        details = {"distance_lower": lower, "distance_upper": upper}
        return replace(proof, radius=torch.maximum(proof.radius, lower), status=status, witness=None, details=details)
