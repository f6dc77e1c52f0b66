"""The verifiers `crown-ibp`, `crown` and `alpha-crown`: linear relaxations through auto-LiRPA."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .ball import Ellipsoid, Interval, Region, float_above, region
from .bounds import difference_rows
from .compaction import compacted
from .guard import selfcheck
from .interval import ibp_settled
from .lowering import Lowered, lower, simplified
from .memory import NoBoundError, batch_that_fits, in_batches, lacks_memory, relaxation_bytes
from .proof import Proof, UnsupportedNetworkError, fixed_radius_proof
from .rounding import Settled, allowance, full_precision, in_float64, settle

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


class _Differentiating:
    """A wrapped network whose bounds are optimised, which takes gradients even where the caller has switched them off."""

    def __init__(self, wrapped: Any) -> None:
        self._wrapped = wrapped

    def __call__(self, z: Tensor) -> Tensor:
        return self._wrapped(z)

    def compute_bounds(self, **options: Any) -> tuple[Tensor, None]:
        with torch.enable_grad():
            lower, _ = self._wrapped.compute_bounds(**options)
        return lower.detach(), None


class Relaxation:
    """auto-LiRPA bounds of one plain network in one precision, checked against steepest points before first use.

    Not for sharing between threads or processes. After an exception the wrapped graph is discarded and rebuilt.
    `iterations` and `lr` are those of alpha-CROWN's optimiser.
    """

    def __init__(
        self, model: nn.Module, example: Tensor, norm: str, eps: Fraction, iterations: int = 10, lr: float = 0.5
    ) -> None:
        self.norm, self.eps = norm, eps
        self.iterations, self.lr = iterations, lr
        self.lowered: Lowered = lower(model, example[:2])
        if norm == "l2" and not self.lowered.starts_affine:
            raise UnsupportedNetworkError("auto-LiRPA 0.3 bounds l2 balls rightly only where the first layer is Conv2d or Linear")
        self.dtype = example.dtype
        self.classes = int(model(example[:1]).shape[1])
        self._checked: set[str] = set()
        self._wrapped: dict[bool, Any] = {}

    @property
    def notes(self) -> tuple[str, ...]:
        mode = "patches" if self.lowered.patches_are_sound else "matrix"
        return (*self.lowered.steps, f"auto-LiRPA 0.3, {mode} mode, self-check passed")

    def allowance(self, x: Tensor) -> Tensor:
        """What a margin [N] of the lowered network must exceed: its layers round otherwise than the original's."""
        ball = region(x, self.norm, self.eps)
        moved: Region
        if isinstance(ball, Interval):
            moved = Interval(*map(self.lowered.move, ball))
        else:
            lower, upper, middle = map(self.lowered.move, (ball.lower, ball.upper, ball.middle))
            moved = Ellipsoid(lower, upper, middle, ball.spread)
        return allowance(self.lowered.network, moved)

    def _bounded(self, example: Tensor, optimised: bool) -> Any:
        """The wrapped network; alpha-CROWN has one of its own, since its slopes would stay for the other methods."""
        if optimised not in self._wrapped:
            from .lirpa_compat import BoundedModule

            options: dict[str, Any] = {"conv_mode": "patches" if self.lowered.patches_are_sound else "matrix"}
            if optimised:  # with the sparse forms of alpha, version 0.3 raises on many networks
                options |= {"sparse_features_alpha": False, "sparse_spec_alpha": False}
                options["optimize_bound_args"] = {"iteration": self.iterations, "lr_alpha": self.lr}
            example = self.lowered.move(example[:2])
            made = BoundedModule(self.lowered.network, example, bound_opts=options, verbose=False)
            made.eval()
            self._wrapped[optimised] = _Differentiating(made) if optimised else made
        return self._wrapped[optimised]

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
        """Lower bound [N] of the smallest margin over the ball, by auto-LiRPA's `method`.

        Batches fit an estimate of the memory; where memory lacks all the same, they are halved. Raises NoBoundError where
        the library raises or one image would take too much, UnsupportedNetworkError where its bounds are wrong.
        """
        if len(x) == 0:
            return x.new_zeros(0)
        with default_dtype(self.dtype):
            return in_batches(lambda at: self._batch(x[at], y[at], method), len(x), self._batch_size(x, method))

    def _batch_size(self, x: Tensor, method: str) -> int:
        network, z = self.lowered.network, self.lowered.move(x[:1])
        needed = relaxation_bytes(network, z, method, self.lowered.patches_are_sound, self.classes)
        return batch_that_fits(needed, BATCH, f"{method} of this network")

    def _discard(self) -> None:
        """After an exception the library's graph may be left inconsistent: a new one is built, and checked, if need be."""
        self._wrapped.clear()
        self._checked.clear()

    def _batch(self, x: Tensor, y: Tensor, method: str) -> Tensor:
        try:
            bounded = self._bounded(x, method == "alpha-CROWN")
            if method not in self._checked:
                few = 1 if method == "alpha-CROWN" else 4  # optimising slopes four times is most of a small run
                selfcheck(self.lowered, bounded, x[:few], y[:few], self.norm, self.eps, method)
                self._checked.add(method)
            rows = difference_rows(y, self.classes, self.dtype)
            lower, _ = bounded.compute_bounds(x=(self._perturbed(x),), C=rows, method=method, bound_upper=False)
            return lower.detach().amin(1)
        except UnsupportedNetworkError:
            self._discard()
            raise
        except Exception as reason:
            self._discard()
            if lacks_memory(reason):
                raise
            raise NoBoundError(f"auto-LiRPA 0.3 cannot bound this network by {method}: {reason!r}") from reason


@dataclass(frozen=True)
class _LinearRelaxation:
    norm: str = "linf"
    eps: Fraction = Fraction(8, 255)
    deterministic: ClassVar[bool] = True
    methods: ClassVar[tuple[str, ...]] = ()

    def _relaxation(self, model: nn.Module, x: Tensor) -> Relaxation:
        return Relaxation(model, x, self.norm, self.eps)

    @torch.no_grad()
    @full_precision()
    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Proof:
        predicted = model(x).argmax(1)
        if len(x) == 0:
            return fixed_radius_proof(float(self.eps), predicted == y, x.new_zeros(0), predicted)
        plain, small, done = self._forms(model, x)
        cheap = ibp_settled(plain, x, y, self.norm, self.eps)
        relaxation = self._relaxation(small, x)
        allowed = self._allowed((plain, small) if done else (plain,), relaxation, x)
        settled, notes = self._settled(model, allowed, relaxation, x, y)
        own, everything = settled[0], [cheap, *settled]
        proved = torch.stack([one.proved for one in everything]).any(0)
        return fixed_radius_proof(
            float(self.eps),
            proved & (predicted == y),
            torch.stack([one.margin for one in everything]).amax(0),
            predicted,
            notes=(*done, *relaxation.notes, *notes),
            rechecked=int(torch.stack([one.rechecked for one in everything]).any(0).sum()),
            details={"raw_margin": own.margin.cpu()},
        )

    def _forms(self, model: nn.Module, x: Tensor) -> tuple[nn.Module, nn.Module, tuple[str, ...]]:
        """The network in forms that interval bounds know; without its dead and constant units, or as it is; what was done."""
        plain, steps = simplified(model, x)
        small, removed = compacted(plain, x[:2])
        return (plain, small, (*steps, *removed)) if removed else (plain, model, ())

    def _allowed(self, counted: Sequence[nn.Module], relaxation: Relaxation, x: Tensor) -> Tensor:
        """The largest allowance [N] of these networks and of the lowered one, since each rounds otherwise."""
        ball = region(x, self.norm, self.eps)
        return torch.stack([*(allowance(one, ball) for one in counted), relaxation.allowance(x)]).amax(0)

    def _settled(
        self, model: nn.Module, allowed: Tensor, relaxation: Relaxation, x: Tensor, y: Tensor
    ) -> tuple[list[Settled], list[str]]:
        """What each method proves, its own first; where the library cannot optimise slopes, the next method is the first."""
        found: list[Settled] = []
        notes: list[str] = []
        for method in self.methods:
            try:
                exact = partial(self._exact, model, x, y, method)
                found.append(settle(relaxation.margins(x, y, method), allowed, exact))
            except NoBoundError as reason:
                if method != "alpha-CROWN":
                    raise
                notes.append(f"answered by CROWN, without optimised slopes: {reason}")
        return found, notes

    def _exact(self, model: nn.Module, x: Tensor, y: Tensor, method: str, at: Tensor) -> tuple[Tensor, Tensor]:
        """Margins and allowances of the samples `at` in float64."""
        net, pixels = in_float64(model), x[at].double()
        plain, small, done = self._forms(net, pixels)
        fresh = self._relaxation(small, pixels)
        return fresh.margins(pixels, y[at], method), self._allowed((plain, small) if done else (plain,), fresh, pixels)


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


@dataclass(frozen=True)
class AlphaCrown(_LinearRelaxation):
    """alpha-CROWN: a certified sample is robust in the whole ball; CROWN whose lower slopes are optimised per image.

    Xu et al. 2021 (arXiv 2011.13824), through auto-LiRPA: `iterations` steps of Adam with step size `lr` from CROWN's own
    slopes, without randomness. Answers with the largest of its own margin, CROWN's, CROWN-IBP's and IBP's; where the library
    cannot optimise the network's slopes, or memory would not hold them, a note says so and CROWN answers. Raises
    UnsupportedNetworkError where the network has an operation that the library bounds wrongly or not at all.
    """

    iterations: int = 10
    lr: float = 0.5
    methods: ClassVar[tuple[str, ...]] = ("alpha-CROWN", "CROWN", "CROWN-IBP")
    costly: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (self.iterations >= 1 and 0 < self.lr < math.inf):
            raise ValueError(f"alpha-CROWN needs iterations >= 1 and lr > 0, got iterations={self.iterations}, lr={self.lr}")

    def _relaxation(self, model: nn.Module, x: Tensor) -> Relaxation:
        return Relaxation(model, x, self.norm, self.eps, self.iterations, self.lr)
