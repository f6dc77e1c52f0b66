"""A mixed-integer programme that decides a margin on a box exactly, up to a stated tolerance, by scipy's HiGHS.

Tjeng et al. 2019 (arXiv 1711.07356). Stable ReLUs are folded away: only unstable ones become variables. Every variable is
scaled to [0,1] and every row to the neuron's own range, so that the solver's absolute tolerances are relative ones.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from scipy.optimize import Bounds, LinearConstraint, OptimizeWarning, milp
from torch import Tensor

from .proof import SelfRefutedError
from .relax import Box, Rows

TOLERANCE = 1e-5  # ten times HiGHS's own feasibility tolerance, relative to the absolute sum of the margin's row
FIRST_FOUND = 1e9  # a relative gap that any feasible point satisfies


class Scaled(NamedTuple):
    """Affine functions of scaled pixels [d] and scaled outputs of unstable ReLUs [K]: matrices [R, d], [R, K], constants [R]."""

    pixels: np.ndarray
    neurons: np.ndarray
    constant: np.ndarray

    def over(self, by: np.ndarray) -> Scaled:
        return Scaled(self.pixels / by[:, None], self.neurons / by[:, None], self.constant / by)

    @property
    def size(self) -> np.ndarray:
        return np.abs(self.pixels).sum(1) + np.abs(self.neurons).sum(1) + np.abs(self.constant)


@dataclass(frozen=True)
class Answer:
    """proved: no point of the box has a margin at or below the tolerance; found: pixels `point` [1, d] may be one;
    limit: node or time limit; failed: the solver gave up. `nodes` were spent."""

    kind: Literal["proved", "found", "limit", "failed"]
    nodes: int
    point: Tensor | None = None


class Encoding:
    """All unstable neurons of one box, and the rows of its margins.

    Raises UnsupportedNetworkError when the encoding does not hold at true points of the box (it always should).
    """

    def __init__(self, box: Box, rows: Rows) -> None:
        self.box, self.span = box, (box.upper - box.lower).numpy()
        self.low, self.high = box.low.numpy(), box.high.numpy()
        self.range = np.maximum(self.high, -self.low)
        blocks = [self._scaled(block) for block in box.blocks]
        none = Scaled(np.zeros((0, len(self.span))), np.zeros((0, len(self.low))), np.zeros(0))
        self.inputs = Scaled(*(np.concatenate(part) for part in zip(*(blocks or [none])))).over(self.range)
        self.margins = self._scaled(rows)
        self._require_that_true_points_fit(rows)

    def _scaled(self, rows: Rows) -> Scaled:
        """Blocks know the neurons before them only: the others have no part in them."""
        d, matrix = len(self.span), rows.matrix.numpy()
        neurons = np.zeros((len(matrix), len(self.low)))
        neurons[:, : matrix.shape[1] - d] = matrix[:, d:] * self.high[: matrix.shape[1] - d]
        constant = rows.constant.numpy() + matrix[:, :d] @ self.box.lower.numpy()
        return Scaled(matrix[:, :d] * self.span, neurons, constant)

    def _constraints(self) -> tuple[sp.csr_matrix, np.ndarray, np.ndarray]:
        """Over (pixels, neurons, switches): s >= z, s <= z - l (1 - a), s <= u a, in units of each neuron's range."""
        z, low, high = self.inputs, self.low / self.range, self.high / self.range
        own, none = np.diag(high) - z.neurons, np.zeros_like(z.neurons)
        above = np.hstack([-z.pixels, own, none])
        below = np.hstack([-z.pixels, own, np.diag(-low)])
        closed = np.hstack([np.zeros_like(z.pixels), np.eye(len(low)), -np.eye(len(low))])
        lower = np.concatenate([z.constant, np.full(2 * len(low), -np.inf)])
        upper = np.concatenate([np.full(len(low), np.inf), z.constant - low, np.zeros(len(low))])
        return sp.csr_matrix(np.vstack([above, below, closed])), lower, upper

    def solve(
        self, target: int, sign: Tensor, above: float, nodes: int, seconds: float | None, least: bool = False
    ) -> Answer:
        """Is there a point with margin `target` not above `above` and the tolerance, where split neurons [K] have given signs?

        Stops at the first such point, or with `least` at the smallest margin.
        """
        size = float(self.margins.size[target])
        if size == 0:  # the margin is 0 everywhere
            return Answer("failed", 0)
        margin = self.margins.over(self.margins.size.clip(min=1e-300))
        objective = np.concatenate([margin.pixels[target], margin.neurons[target], np.zeros(len(self.low))])
        matrix, lower, upper = self._constraints()
        limit = above / size + TOLERANCE - margin.constant[target]
        matrix = sp.vstack([matrix, objective[None]], format="csr")
        fixed = sign.cpu().numpy()
        ends = np.concatenate([np.zeros(len(self.span) + len(fixed)), fixed > 0]), np.ones(len(objective))
        ends[1][len(self.span) + len(fixed) :] = fixed >= 0
        options: dict[str, Any] = {"node_limit": max(1, nodes), **({} if seconds is None else {"time_limit": max(seconds, 0.01)})}
        if not least:
            options["mip_rel_gap"] = FIRST_FOUND
        integer = np.concatenate([np.zeros(len(self.span) + len(fixed)), np.ones(len(fixed))])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", OptimizeWarning)
            found = milp(
                objective, constraints=LinearConstraint(matrix, np.append(lower, -np.inf), np.append(upper, limit)),
                bounds=Bounds(*ends), integrality=integer, options=options,
            )
        return self._answer(found)

    def _answer(self, found: Any) -> Answer:
        spent = int(found.mip_node_count or 0) + 1
        if found.x is not None:
            return Answer("found", spent, self._pixels(found.x[: len(self.span)]))
        if found.status == 2:
            return Answer("proved", spent)
        # scipy knows HiGHS's time limit (1) but not its node limit, which it reports as an unknown status with HiGHS's words
        return Answer("limit" if found.status == 1 or "limit reached" in str(found.message) else "failed", spent)

    def _pixels(self, scaled: np.ndarray) -> Tensor:
        part = torch.from_numpy(scaled.clip(0, 1)).view(1, -1)
        return self.box.lower + part * (self.box.upper - self.box.lower)

    def _require_that_true_points_fit(self, rows: Rows) -> None:
        """Forward passes at points of the box must satisfy every constraint and give the margins."""
        generator, d = np.random.default_rng(0), len(self.span)
        scaled = np.concatenate([generator.random((3, d)), generator.integers(0, 2, (3, d))])
        points = self.box.neurons(torch.cat([self._pixels(one) for one in scaled]))
        outputs = points[:, d:].numpy()
        with np.errstate(divide="ignore", invalid="ignore"):
            values = np.hstack([scaled, outputs / self.high, outputs > 0])
        matrix, lower, upper = self._constraints()
        got = (matrix @ values.T).T
        said = values[:, :d] @ self.margins.pixels.T + self.margins.constant
        said = said + values[:, d : d + len(self.low)] @ self.margins.neurons.T
        off = np.abs(said - (points @ rows.matrix.mT + rows.constant).numpy()) / (1 + self.margins.size)
        spare = 1e-7 * (1 + np.tile(self.inputs.size, 3))
        if not ((got >= lower - spare) & (got <= upper + spare)).all() or not (off <= 1e-7).all():
            raise SelfRefutedError("the integer programme does not hold at points of its own network; please report it")
