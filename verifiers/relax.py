"""Own backward linear relaxation (CROWN, with optimised slopes and split constraints) on one box, in float64.

Zhang et al. 2018 (arXiv 1811.00866), Xu et al. 2020 (arXiv 2011.13824, alpha), Wang et al. 2021 (arXiv 2103.06624, beta).
Batched over subproblems. On a box most ReLUs of a pruned network are dead or always open: they are substituted exactly, and
only the unstable ones are relaxed. auto-LiRPA 0.3 has no split constraints and its bounds serve as the tests' reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from .ball import Interval
from .proof import SelfRefutedError
from .rounding import SAFETY, SHARE, UNIT
from .unrolled import Affine, Unrolled, weighted

NUMBERS = 1_000_000  # coefficients held at once: a chunk stays well below half a second
PRODUCTS = 2_000_000  # of numbers, in sparse matrices, between two looks at the clock


def nothing() -> None:
    """A pause that never interrupts."""


def never() -> bool:
    return False


class Choice(NamedTuple):
    """Per subproblem and unstable neuron [R, K]: lower slope alpha in [0,1], multiplier beta >= 0, split sign -1, 0 or 1."""

    alpha: Tensor
    beta: Tensor
    sign: Tensor

    def rows(self, at: Tensor) -> Choice:
        return Choice(self.alpha[at], self.beta[at], self.sign[at])


class Bounded(NamedTuple):
    """Lower bounds [R] over the box and the splits, their minimisers' signs [R, d], and coefficients [R, K] at the ReLUs."""

    value: Tensor
    downhill: Tensor
    coefficients: Tensor


class Rows(NamedTuple):
    """Affine functions: matrix [R, d + K] over the d pixels and the outputs of the first K unstable ReLUs, constant [R]."""

    matrix: Tensor
    constant: Tensor

    def at(self, which: Tensor) -> Rows:
        return Rows(self.matrix[which], self.constant[which])

    def both_signs(self) -> Rows:
        return Rows(torch.cat([self.matrix, -self.matrix]), torch.cat([self.constant, -self.constant]))


@dataclass(frozen=True)
class Box:
    """A network on one box: pixels [d] between lower and upper, in the lowered network's coordinates; K unstable ReLUs.

    blocks: per ReLU layer the inputs of its unstable neurons, over the pixels and the unstable neurons before; places: which
    neurons of the layer these are. low, high, error [K]: bounds of these inputs, and how far their computed values may be
    off. outputs: the network's, with the rounding error `allowed` [outputs] of each.
    """

    lower: Tensor
    upper: Tensor
    blocks: tuple[Rows, ...]
    places: tuple[np.ndarray, ...]
    low: Tensor
    high: Tensor
    error: Tensor
    outputs: Rows
    allowed: Tensor

    def starts(self) -> list[tuple[int, Rows]]:
        """Every block and the number of its first neuron."""
        counts = [len(block.constant) for block in self.blocks]
        return list(zip(np.cumsum([0, *counts]).tolist(), self.blocks))

    def inputs(self, pixels: Tensor) -> Tensor:
        """[N, K]: the inputs of the unstable ReLUs at pixels [N, d], which must lie in the box; differentiable."""
        found, known = [pixels[:, :0]], pixels
        for block in self.blocks:
            found.append(known @ block.matrix.mT + block.constant)
            known = torch.cat([known, torch.relu(found[-1])], 1)
        return torch.cat(found, 1)

    def neurons(self, pixels: Tensor) -> Tensor:
        """[N, d + K]: the pixels and the outputs of the unstable ReLUs."""
        return torch.cat([pixels, torch.relu(self.inputs(pixels))], 1)

    def corners(self, downhill: Tensor) -> Tensor:
        """The pixels [N, d] at the lower end where downhill, else at the upper one."""
        return torch.where(downhill, self.lower, self.upper)

    @property
    def chunk(self) -> int:
        """Rows that are bounded at once."""
        return max(1, NUMBERS // (len(self.lower) + 4 * len(self.low)))


Bound = Callable[[Box, Rows, Tensor], Tensor]


@torch.no_grad()
def relax(
    network: Unrolled, pixels: Interval, pause: Callable[[], None] = nothing, intersect: bool = True,
    enough: Callable[[], bool] = never, bound: Bound | None = None,
) -> Box:
    """The network on the pixel box [1, ...]: backward bounds of every ReLU's input, widened by their own rounding error.

    bound: how rows are bounded on the box so far, by default by CROWN. intersect: take the better of these and interval
    bounds. pause is called often and may raise to stop. Once enough() is true, interval bounds have to do for the rest.
    """
    low, high = (network.pixels(end)[:, 0] for end in pixels)
    known = _Known(low, high, pause, intersect, enough, bound or crown)
    for step in network.steps[:-1]:
        known.add(step)
    box = known.box(network.steps[-1])
    require_that_true_points_fit(network, box)
    return box


def require_that_true_points_fit(network: Unrolled, box: Box) -> None:
    """Raises UnsupportedNetworkError unless the network's own values at points of the box are those that the box says."""
    generator = torch.Generator().manual_seed(0)
    share = torch.rand(4, len(box.lower), generator=generator, dtype=torch.float64)
    share[1:3] = share[1:3].round()
    pixels = box.lower + share * (box.upper - box.lower)
    *inputs, outputs = (torch.from_numpy(value.T) for value in network.inputs(network.images(pixels)))
    known = torch.cat([pixels[:, :0], *(value[:, at] for value, at in zip(inputs, box.places))], 1)
    said = box.neurons(pixels) @ box.outputs.matrix.mT + box.outputs.constant
    spare = box.allowed + 1e-7 * (1 + outputs.abs())
    inside = (known >= box.low - box.error) & (known <= box.high + box.error)
    finite = torch.isfinite(box.low) & torch.isfinite(box.high)
    if bool(((said - outputs).abs() > spare).any()) or not bool(inside[:, finite].all()):
        raise SelfRefutedError("the relaxation does not hold at points of its own network; please report this network")


class _Source(NamedTuple):
    """One source of the steps: bounds and absolute sums [n], terms added up, and itself over pixels and unstable neurons."""

    low: np.ndarray
    high: np.ndarray
    bulk: np.ndarray
    terms: int
    matrix: sp.csr_matrix
    constant: np.ndarray


class _Known:
    """What is known of a box while its ReLU layers are taken one by one."""

    def __init__(
        self, low: np.ndarray, high: np.ndarray, pause: Callable[[], None], intersect: bool, enough: Callable[[], bool],
        bound: Bound,
    ) -> None:
        self.pause, self.intersect, self.enough, self.bound, d = pause, intersect, enough, bound, len(low)
        self.sources = [_Source(low, high, np.maximum(np.abs(low), np.abs(high)), 4, sp.identity(d, format="csr"), np.zeros(d))]
        none = torch.zeros(0, dtype=torch.float64)
        ends = torch.from_numpy(low.copy()), torch.from_numpy(high.copy())
        self.sofar = Box(*ends, (), (), none, none, none, Rows(torch.zeros(0, d, dtype=torch.float64), none), none)

    def box(self, outputs: Affine) -> Box:
        low, high = self._interval(outputs)
        allowed = self._error(outputs, np.maximum(np.abs(low), np.abs(high)))
        return replace(self.sofar, outputs=_dense(*self._expressed(outputs)), allowed=torch.from_numpy(allowed))

    def add(self, step: Affine) -> None:
        """The inputs of the next ReLU layer."""
        self.pause()
        low, high = self._interval(step)
        error = self._error(step, np.maximum(np.abs(low), np.abs(high)))
        low, high = low - error, high + error
        alive = (~(high <= 0)).nonzero()[0]  # a bound that is not finite leaves its neuron unstable
        matrix, constant = self._expressed(step.rows(alive))
        unsure = (~(low[alive] >= 0)).nonzero()[0]
        if len(unsure) and len(self.sofar.blocks) and not set(step.parts) <= {0}:
            at = alive[unsure]
            low[at], high[at] = self._tightened(matrix[unsure], constant[unsure], low[at], high[at], error[at])
        self._keep(step, low, high, error, alive, matrix, constant)

    def _interval(self, step: Affine) -> tuple[np.ndarray, np.ndarray]:
        middle = weighted(step.parts, [(source.low + source.high) / 2 for source in self.sources]) + step.constant
        sizes = {j: abs(part) for j, part in step.parts.items()}
        radius = weighted(sizes, [(source.high - source.low) / 2 for source in self.sources])
        return middle - radius, middle + radius

    def _error(self, step: Affine, size: np.ndarray) -> np.ndarray:
        """What rounding may add to a value, in whatever order its products and sums are taken."""
        least = torch.finfo(torch.float64).tiny / UNIT[torch.float64]
        bulk = weighted(step.absolute, [source.bulk for source in self.sources]) + step.bulk + least
        return SHARE[torch.float64] * size + SAFETY * UNIT[torch.float64] * self._terms(step) * bulk

    def _terms(self, step: Affine) -> int:
        return step.terms + max(self.sources[j].terms for j in (0, *step.parts)) + 4

    def _expressed(self, step: Affine) -> tuple[sp.csr_matrix, np.ndarray]:
        """A step over pixels and unstable neurons; some rows at a time, since products of dense layers take long."""
        width = len(self.sofar.lower) + len(self.sofar.low)
        for source in self.sources:
            source.matrix.resize(source.matrix.shape[0], width)
        lengths = [np.diff(source.matrix.indptr) for source in self.sources]
        costs = np.zeros(len(step.constant)) + weighted({j: part != 0 for j, part in step.parts.items()}, lengths)
        cuts = np.arange(PRODUCTS, costs.sum(), PRODUCTS)
        pieces = []
        for rows in np.split(np.arange(len(costs)), np.searchsorted(np.cumsum(costs), cuts)):
            self.pause()
            pieces.append(sp.csr_matrix((len(rows), width)) + weighted(
                {j: part[rows] for j, part in step.parts.items()}, [source.matrix for source in self.sources]
            ))
        constant = weighted(step.parts, [source.constant for source in self.sources]) + step.constant
        return sp.vstack(pieces).tocsr(), constant

    def _tightened(
        self, matrix: sp.csr_matrix, constant: np.ndarray, low: np.ndarray, high: np.ndarray, error: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Backward bounds of the neurons that interval bounds leave unstable."""
        low, high = low.copy(), high.copy()
        for part in np.split(np.arange(len(low)), np.arange(self.sofar.chunk, len(low), self.sofar.chunk)):
            self.pause()
            if self.enough():
                break
            rows = _dense(matrix[part], constant[part]).both_signs()
            below, above = self.bound(self.sofar, rows, torch.from_numpy(error[part]).repeat(2)).chunk(2)
            least, most = below.numpy() - error[part], error[part] - above.numpy()
            low[part] = np.fmax(low[part], least) if self.intersect else least
            high[part] = np.fmin(high[part], most) if self.intersect else most
        return low, high

    def _keep(
        self, step: Affine, low: np.ndarray, high: np.ndarray, error: np.ndarray, alive: np.ndarray, matrix: sp.csr_matrix,
        constant: np.ndarray,
    ) -> None:
        opened, unstable = low[alive] >= 0, ~(low[alive] >= 0) & ~(high[alive] <= 0)
        at, box, width = alive[unstable], self.sofar, matrix.shape[1]
        block = _dense(matrix[unstable], constant[unstable])
        pairs = (box.low, low), (box.high, high), (box.error, error)
        ends = [torch.cat([old, torch.from_numpy(new[at])]) for old, new in pairs]
        blocks, places = (*box.blocks, block), (*box.places, at)
        self.sofar = replace(box, blocks=blocks, places=places, low=ends[0], high=ends[1], error=ends[2])
        units = sp.csr_matrix((np.ones(len(at)), (at, width + np.arange(len(at)))), shape=(len(low), width + len(at)))
        passing = sp.csr_matrix((opened[opened] * 1.0, (alive[opened], opened.nonzero()[0])), shape=(len(low), len(alive)))
        own = (passing @ matrix).tocsr()
        own.resize(len(low), width + len(at))
        bulk = weighted(step.absolute, [source.bulk for source in self.sources]) + step.bulk
        low, high = np.fmax(low, 0), np.where(np.isnan(high), np.inf, np.fmax(high, 0))
        self.sources.append(_Source(low, high, bulk, self._terms(step), own + units, passing @ constant))


def _dense(matrix: sp.csr_matrix, constant: np.ndarray) -> Rows:
    return Rows(torch.from_numpy(matrix.toarray()), torch.from_numpy(constant.copy()))


def lower_bounds(box: Box, rows: Rows, choice: Choice) -> Bounded:
    """Lower bounds [R] of rows over the box and each row's splits.

    choice has R rows, or one for all. Sound for every alpha in [0,1] and beta >= 0, up to rounding.
    """
    low_slope, high_slope, shift, push = _lines(box, choice)
    a, constant, seen = rows.matrix, rows.constant, [rows.matrix[:, :0]]
    for start, block in reversed(box.starts()):
        width = len(box.lower) + start
        part, own = a[:, width:], slice(start, start + len(block.constant))
        seen.append(part.detach())
        positive, negative = part.clamp(min=0), part.clamp(max=0)
        back = positive * low_slope[:, own] + negative * high_slope[:, own] - push[:, own]
        constant = constant + (negative * shift[:, own]).sum(1) + back @ block.constant
        a = a[:, :width] + back @ block.matrix
    value = a.clamp(min=0) @ box.lower + a.clamp(max=0) @ box.upper + constant
    return Bounded(value, a.detach() > 0, torch.cat(seen[::-1], 1))


def crown(box: Box, rows: Rows, above: Tensor) -> Tensor:
    """Lower bounds [R] by CROWN's own slopes, whatever they should exceed."""
    return lower_bounds(box, rows, crown_choice(box)).value


def _lines(box: Box, choice: Choice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Slopes of the lower and upper line, the upper line's constant, and the pull of the split constraints: [R, K] each."""
    slope = (box.high / (box.high - box.low)).expand_as(choice.alpha)
    fixed = (choice.sign > 0).to(slope.dtype)
    free = choice.sign == 0
    shift = torch.where(free, -box.low * slope, torch.zeros_like(slope))
    return torch.where(free, choice.alpha, fixed), torch.where(free, slope, fixed), shift, choice.sign * choice.beta


def crown_choice(box: Box, rows: int = 1) -> Choice:
    """CROWN's slopes: 1 where the upper line is steeper than 1/2, else 0; no splits."""
    alpha = (box.high / (box.high - box.low) > 0.5).to(box.low.dtype).expand(rows, -1).clone()
    return Choice(alpha, torch.zeros_like(alpha), torch.zeros_like(alpha))
