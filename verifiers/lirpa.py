"""The verifiers `crown-ibp` and `crown`: linear relaxations through auto-LiRPA."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .ball import float_above, region
from .bounds import difference_rows
from .guard import selfcheck
from .interval import ibp_settled
from .lowering import Lowered, lower
from .proof import Proof, UnsupportedNetworkError, fixed_radius_proof
from .rounding import allowance, full_precision, in_float64, settle

BATCH = 128


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """auto-LiRPA takes the precision of its own constants from torch's default."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Relaxation:
    """auto-LiRPA bounds of one plain network in one precision, checked against steepest points before first use.

    Not for sharing between threads or processes. After an exception the wrapped graph is discarded and rebuilt.
    """

    def __init__(self, model: nn.Module, example: Tensor, norm: str, eps: Fraction) -> None:
        self.norm, self.eps = norm, eps
        self.lowered: Lowered = lower(model, example[:2])
        if norm == "l2" and not self.lowered.starts_affine:
            raise UnsupportedNetworkError("auto-LiRPA 0.3 bounds l2 balls rightly only where the first layer is Conv2d or Linear")
        self.dtype = example.dtype
        self.classes = int(model(example[:1]).shape[1])
        self._checked: set[str] = set()
        self._wrapped: Any = None

    @property
    def notes(self) -> tuple[str, ...]:
        mode = "patches" if self.lowered.patches_are_sound else "matrix"
        return (*self.lowered.steps, f"auto-LiRPA 0.3, {mode} mode, self-check passed")

    def _bounded(self, example: Tensor) -> Any:
        if self._wrapped is None:
            from .lirpa_compat import BoundedModule

            options = {"conv_mode": "patches" if self.lowered.patches_are_sound else "matrix"}
            example = self.lowered.move(example[:2])
            self._wrapped = BoundedModule(self.lowered.network, example, bound_opts=options, verbose=False)
            self._wrapped.eval()
        return self._wrapped

    def _perturbed(self, x: Tensor) -> Any:
        from .lirpa_compat import BoundedTensor, PerturbationLpNorm

        if self.norm == "linf":
            box = region(x, "linf", self.eps)
            lower, upper = self.lowered.move(box.lower), self.lowered.move(box.upper)
            ball = PerturbationLpNorm(norm=float("inf"), x_L=lower, x_U=upper)
        else:
            ball = PerturbationLpNorm(norm=2.0, eps=float_above(self.eps, self.dtype))
        return BoundedTensor(self.lowered.move(x), ball)

    def margins(self, x: Tensor, y: Tensor, method: str) -> Tensor:
        """Lower bound [N] of the smallest margin over the ball, by auto-LiRPA's `method`."""
        with default_dtype(self.dtype):
            try:
                bounded = self._bounded(x)
                if method not in self._checked:
                    selfcheck(self.lowered, bounded, x[:4], y[:4], self.norm, self.eps, method)
                    self._checked.add(method)
                parts = [self._batch(bounded, x[i], y[i], method) for i in torch.arange(len(x)).split(BATCH)]
            except UnsupportedNetworkError:
                self._discard()
                raise
            except Exception as reason:
                self._discard()
                raise UnsupportedNetworkError(f"auto-LiRPA 0.3 cannot bound this network by {method}: {reason}") from reason
        return torch.cat(parts) if parts else x.new_zeros(0)

    def _discard(self) -> None:
        """After an exception the library's graph may be left inconsistent: a new one is built, and checked, if need be."""
        self._wrapped = None
        self._checked.clear()

    def _batch(self, bounded: Any, x: Tensor, y: Tensor, method: str) -> Tensor:
        rows = difference_rows(y, self.classes, self.dtype)
        lower, _ = bounded.compute_bounds(x=(self._perturbed(x),), C=rows, method=method, bound_upper=False)
        return lower.detach().amin(1)


@dataclass(frozen=True)
class _LinearRelaxation:
    norm: str = "linf"
    eps: Fraction = Fraction(8, 255)
    deterministic: ClassVar[bool] = True
    methods: ClassVar[tuple[str, ...]] = ()

    @torch.no_grad()
    @full_precision()
    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Proof:
        predicted = model(x).argmax(1)
        if len(x) == 0:
            return fixed_radius_proof(float(self.eps), predicted == y, x.new_zeros(0), predicted)
        cheap = ibp_settled(model, x, y, self.norm, self.eps)
        relaxation = Relaxation(model, x, self.norm, self.eps)
        allowed = allowance(model, region(x, self.norm, self.eps))

        def exact(method: str, at: Tensor) -> tuple[Tensor, Tensor]:
            net, pixels = in_float64(model), x[at].double()
            fresh = Relaxation(net, pixels, self.norm, self.eps)
            return fresh.margins(pixels, y[at], method), allowance(net, region(pixels, self.norm, self.eps))

        settled = {
            method: settle(relaxation.margins(x, y, method), allowed, partial(exact, method)) for method in self.methods
        }
        own = settled[self.methods[0]]
        everything = [cheap, *settled.values()]
        proved = torch.stack([one.proved for one in everything]).any(0)
        return fixed_radius_proof(
            float(self.eps),
            proved & (predicted == y),
            torch.stack([one.margin for one in everything]).amax(0),
            predicted,
            notes=relaxation.notes,
            rechecked=int(torch.stack([one.rechecked for one in everything]).any(0).sum()),
            details={"raw_margin": own.margin.cpu()},
        )


@dataclass(frozen=True)
class CrownIBP(_LinearRelaxation):
    """CROWN-IBP: a certified sample is robust in the whole ball; one backward linear relaxation over interval bounds.

    Zhang et al. 2020 (arXiv 1906.06316), through auto-LiRPA. Answers with the larger of its own margin and IBP's. Raises
    UnsupportedNetworkError where the network has an operation that the library bounds wrongly or not at all.
    """

    methods: ClassVar[tuple[str, ...]] = ("CROWN-IBP",)


@dataclass(frozen=True)
class Crown(_LinearRelaxation):
    """CROWN: a certified sample is robust in the whole ball; backward linear relaxation for every intermediate bound too.

    Zhang et al. 2018 (arXiv 1811.00866), through auto-LiRPA. Answers with the largest of its own margin, CROWN-IBP's and
    IBP's. Raises UnsupportedNetworkError where the network has an operation that the library bounds wrongly or not at all.
    """

    methods: ClassVar[tuple[str, ...]] = ("CROWN", "CROWN-IBP")
