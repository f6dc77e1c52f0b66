"""One VNN-LIB property of a network: no counterexample exists, here is one, or neither could be shown."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn

from verifiers import UnsupportedNetworkError
from verifiers.ball import Interval
from verifiers.bounds import ibp_logits
from verifiers.proof import BROKEN, OPEN, PROVED, TIMEOUT, SelfRefutedError
from verifiers.properties import decide
from verifiers.rounding import SHARE, allowance, in_float64

from .errors import UserError
from .vnnlib_files import RANGE, Property, Region, Row, float_above, float_below

RESTARTS, STEPS = 20, 60


@dataclass(frozen=True)
class Answer:
    """unsat: proved that no counterexample exists; sat: input and float64 output of one; else unknown or timeout."""

    status: str
    x: tuple[float, ...] = ()
    y: tuple[float, ...] = ()
    nodes: int = 0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Rows:
    """A conjunction as rows [K, outputs] and offsets [K] in float64; a row that is positive excludes it, for certain."""

    rows: Tensor
    offsets: Tensor

    def row(self, at: int) -> _Rows:
        return _Rows(self.rows[at : at + 1], self.offsets[at : at + 1])


def answer(
    model: nn.Module, shape: Sequence[int], asked: Property, seconds: float | None = None, nodes: int = 2000, seed: int = 0
) -> Answer:
    """unsat only if in every box every conjunction has a constraint that bounds exclude on the whole box; sat only with an
    input inside the exact box whose output, computed in float64, meets the formula in exact arithmetic.

    model: a plain network on float32 [N, *shape]. seconds, nodes: limits of the whole, and of each search. Boxes are rounded
    outwards to float64 for proofs. Raises UserError where the property is about another number of inputs or outputs, and for
    networks that neither `exact` nor `ibp` knows.
    """
    hunt = _Question(model, tuple(shape), asked, None if seconds is None else time.perf_counter() + seconds, nodes, seed)
    try:
        for region in asked.regions:
            found = None if region.empty else hunt.settle(region)
            if found is not None:
                return Answer("sat", *found, hunt.spent, tuple(hunt.notes))
    except UnsupportedNetworkError as reason:
        raise UserError(str(reason)) from reason
    status = "timeout" if TIMEOUT in hunt.left else "unknown" if hunt.left else "unsat"
    return Answer(status, (), (), hunt.spent, tuple(hunt.notes))


Pair = tuple[tuple[float, ...], tuple[float, ...]]


class _Question:
    """One network and property; `left` collects why something could not be excluded."""

    def __init__(
        self, model: nn.Module, shape: tuple[int, ...], asked: Property, deadline: float | None, nodes: int, seed: int
    ) -> None:
        self.model, self.shape, self.asked, self.deadline, self.nodes, self.seed = model, shape, asked, deadline, nodes, seed
        self.double = in_float64(model).requires_grad_(False)
        self.left: list[str] = []
        self.notes: list[str] = []
        self.spent = 0
        with torch.no_grad():
            outputs = self.double(torch.zeros(1, *shape, dtype=torch.float64)).shape[1]
        if (asked.inputs, asked.outputs) != (math.prod(shape), outputs):
            raise UserError(
                f"the property is about {asked.inputs} inputs and {asked.outputs} outputs, the network has "
                f"{math.prod(shape)} and {outputs}"
            )
        self.outputs = outputs

    def settle(self, region: Region) -> Pair | None:
        """A counterexample in the region, or None; what is not excluded then is noted in `left`."""
        wide = self._box([float_below(low) for low in region.lower], [float_above(high) for high in region.upper])
        narrow = self._box([float_above(low) for low in region.lower], [float_below(high) for high in region.upper])
        conjunctions = [self._rows(rows) for rows in region.unsafe]
        singles = [one for one in conjunctions if len(one.rows) == 1]
        if singles:
            joined = _Rows(torch.cat([one.rows for one in singles]), torch.cat([one.offsets for one in singles]))
            status, found = self._ask(wide, narrow, joined)
            if found is not None:
                return found
            if status != PROVED:
                self.left.append(status)
        for one in conjunctions:
            if len(one.rows) != 1:
                found = self._conjunction(wide, narrow, one)
                if found is not None:
                    return found
        return None

    def _box(self, lower: list[float], upper: list[float]) -> Interval:
        return Interval(*(torch.tensor(side, dtype=torch.float64).view(1, *self.shape) for side in (lower, upper)))

    def _rows(self, rows: Sequence[Row]) -> _Rows:
        """Coefficients exactly, offsets rounded down."""
        matrix, offsets = torch.zeros(len(rows), self.outputs, dtype=torch.float64), []
        for at, row in enumerate(rows):
            by = _scale(row)
            for output, value in row.coefficients.items():
                matrix[at, output] = float(value * by)
            offsets.append(float_below(row.offset * by))
        return _Rows(matrix, torch.tensor(offsets, dtype=torch.float64))

    def _conjunction(self, wide: Interval, narrow: Interval, one: _Rows) -> Pair | None:
        """Rows are tried one by one: a single one that is positive on the whole box is enough."""
        found = self._search(narrow, one) if len(one.rows) else self._checked(narrow.centre, narrow)
        if found is not None:
            return found
        with torch.no_grad():
            values = (self.double(wide.centre) @ one.rows.T + one.offsets)[0]
        statuses = []
        for at in values.argsort(descending=True).tolist():
            status, found = self._ask(wide, narrow, one.row(at))
            if found is not None or status == PROVED:
                return found
            statuses.append(status)
        self.left.append(TIMEOUT if TIMEOUT in statuses else OPEN)
        return None

    def _ask(self, wide: Interval, narrow: Interval, one: _Rows) -> tuple[str, Pair | None]:
        """(status, counterexample of the whole property or None) of: all these rows are positive on the whole box."""
        seconds = None if self.deadline is None else self.deadline - time.perf_counter()
        if seconds is not None and seconds <= 0:
            return TIMEOUT, None
        try:
            verdict = decide(self.model, *wide, one.rows, one.offsets, nodes=self.nodes, seconds=seconds, seed=self.seed)
        except SelfRefutedError:
            raise
        except UnsupportedNetworkError as reason:
            return self._by_intervals(wide, narrow, one, reason)
        self.spent += verdict.nodes
        if verdict.status == BROKEN and verdict.witness is not None:
            found = self._checked(verdict.witness, narrow)  # it may lie on the very border
            return BROKEN, self._search_each(narrow, one) if found is None else found
        return verdict.status, None

    def _by_intervals(self, wide: Interval, narrow: Interval, one: _Rows, reason: Exception) -> tuple[str, Pair | None]:
        """Interval bounds and descent, for networks that branch and bound does not know."""
        note = f"interval bounds only: {reason}"
        self.notes += [note] if note not in self.notes else []
        with torch.no_grad():
            logits, allowed = ibp_logits(self.double, wide), allowance(self.double, wide)
            low = one.rows.clamp(min=0) @ logits.lower[0] + one.rows.clamp(max=0) @ logits.upper[0] + one.offsets
            needed = one.rows.abs().sum(1) * allowed + SHARE[torch.float64] * one.offsets.abs()
        if bool((low > needed).all()):
            return PROVED, None
        left = ~(low > needed)
        return OPEN, self._search_each(narrow, _Rows(one.rows[left], one.offsets[left]))

    def _search_each(self, narrow: Interval, one: _Rows) -> Pair | None:
        for at in range(len(one.rows)):
            found = self._search(narrow, one.row(at))
            if found is not None:
                return found
        return None

    def _search(self, narrow: Interval, one: _Rows) -> Pair | None:
        """Signed descent on the largest row from random points of the box; the first that counts."""
        if bool((narrow.lower > narrow.upper).any()):
            return None
        width = narrow.upper - narrow.lower
        generator = torch.Generator().manual_seed(self.seed)
        points = narrow.lower + torch.rand(RESTARTS, *self.shape, generator=generator, dtype=torch.float64) * width
        points[0] = narrow.centre[0]
        for turn in range(STEPS):
            if self.deadline is not None and time.perf_counter() > self.deadline:
                return None
            with torch.enable_grad():
                at = points.clamp(narrow.lower, narrow.upper).requires_grad_()
                worst = (self.double(at) @ one.rows.T + one.offsets).amax(1)
                (gradient,) = torch.autograd.grad(worst.sum(), at)
            for place in (worst <= 0).nonzero().flatten()[:4].tolist():
                found = self._checked(at[place : place + 1].detach(), narrow)
                if found is not None:
                    return found
            points = at.detach() - 0.3 * (1 - turn / STEPS) * width * gradient.sign()
        return None

    def _checked(self, point: Tensor, narrow: Interval) -> Pair | None:
        """The point, put inside the exact box, and its output, if the formula holds for the two."""
        if bool((narrow.lower > narrow.upper).any()):
            return None
        with torch.no_grad():
            inside = point.double().clamp(narrow.lower, narrow.upper)
            y = tuple(self.double(inside)[0].tolist())
        x = tuple(inside.flatten().tolist())
        return (x, y) if all(map(math.isfinite, y)) and self.asked.broken_by(x, y) else None


def _scale(row: Row) -> Fraction:
    """A positive factor that makes all coefficients exact in float64."""
    values = list(row.coefficients.values())
    for by in (Fraction(1), Fraction(math.lcm(*(value.denominator for value in values)))):
        scaled = [value * by for value in (*values, row.offset)]
        if max(map(abs, scaled)) < RANGE and all(Fraction(float(value)) == value for value in scaled[:-1]):
            return by
    raise UserError(f"the property's coefficients {', '.join(str(float(value)) for value in values[:3])} have too many digits")
