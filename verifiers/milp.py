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
from torch import Tensor, fx

from .proof import UnsupportedNetworkError
from .relax import NUMBERS, Box, ReluNetwork

TOLERANCE = 1e-5  # ten times HiGHS's own feasibility tolerance, relative to the absolute sum of the margin's row
FIRST_FOUND = 1e9  # a relative gap that any feasible point satisfies


class Rows(NamedTuple):
    """Affine functions of scaled pixels [d] and scaled outputs of unstable ReLUs [K]: matrices [R, d], [R, K], constants [R]."""

    pixels: np.ndarray
    neurons: np.ndarray
    constant: np.ndarray

    def scaled(self, by: np.ndarray) -> Rows:
        return Rows(self.pixels / by[:, None], self.neurons / by[:, None], self.constant / by)

    @property
    def size(self) -> np.ndarray:
        return np.abs(self.pixels).sum(1) + np.abs(self.neurons).sum(1) + np.abs(self.constant)


@dataclass(frozen=True)
class Answer:
    """proved: no point of the box has a margin at or below the tolerance; found: `point` [1, ...] of pixels may be one;
    limit: node or time limit; failed: the solver gave up. `nodes` were spent."""

    kind: Literal["proved", "found", "limit", "failed"]
    nodes: int
    point: Tensor | None = None


class Encoding:
    """All unstable neurons of one box, and the rows [T, classes] of its margins.

    Raises UnsupportedNetworkError when the encoding does not hold at true points of the box (it always should).
    """

    def __init__(self, network: ReluNetwork, box: Box, rows: Tensor) -> None:
        self.box, self.shift = box, network.lowered.shift
        self.span = (box.upper - box.lower).flatten().cpu().numpy()
        self.low, self.high = box.lowers.cpu().numpy(), box.uppers.cpu().numpy()
        self.range = np.maximum(self.high, -self.low)
        parts = [_rows(self, network, relu.all_input_nodes[0], _one_hot(network, box, relu)) for relu in box.layers]
        empty = Rows(np.zeros((0, len(self.span))), np.zeros((0, len(self.low))), np.zeros(0))
        self.inputs = Rows(*(np.concatenate(part) for part in zip(*(parts or [empty])))).scaled(self.range)
        self.margins = _rows(self, network, network.output, rows)
        self._require_that_true_points_fit(network, rows)

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
        self, target: int, sign: Tensor, allowed: float, nodes: int, seconds: float | None, least: bool = False
    ) -> Answer:
        """Is there a point with margin `target` at or below the tolerance, where split neurons [K] have the given signs?

        Stops at the first such point, or with `least` at the smallest margin. allowed: the margin's rounding allowance.
        """
        size = float(self.margins.size[target])
        if size == 0:  # the margin is 0 everywhere
            return Answer("failed", 0)
        margin = self.margins.scaled(self.margins.size.clip(min=1e-300))
        objective = np.concatenate([margin.pixels[target], margin.neurons[target], np.zeros(len(self.low))])
        matrix, lower, upper = self._constraints()
        limit = allowed / size + TOLERANCE - margin.constant[target]
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
        part = torch.from_numpy(scaled.clip(0, 1)).to(self.box.lower).view_as(self.box.lower)
        point = self.box.lower + part * (self.box.upper - self.box.lower)
        return point if self.shift is None else point + self.shift.to(point)

    def _require_that_true_points_fit(self, network: ReluNetwork, rows: Tensor) -> None:
        """Forward passes at points of the box must satisfy every constraint and give the margins."""
        generator = np.random.default_rng(0)
        scaled = np.concatenate([generator.random((3, len(self.span))), generator.integers(0, 2, (3, len(self.span)))])
        points = torch.cat([self._pixels(one) for one in scaled])
        active = network.activity(points)
        parts = [active[relu][:, layer.at] for relu, layer in self.box.layers.items()]
        z = torch.cat(parts, 1).cpu().numpy() if parts else np.zeros((len(points), 0))
        with np.errstate(divide="ignore", invalid="ignore"):
            values = np.hstack([scaled, np.maximum(z, 0) / self.high, z > 0])
        matrix, lower, upper = self._constraints()
        got = (matrix @ values.T).T
        logits = network.network(network.lowered.move(points)) @ rows.mT
        said = values[:, : len(self.span)] @ self.margins.pixels.T + self.margins.constant
        said = said + values[:, len(self.span) : len(self.span) + len(self.low)] @ self.margins.neurons.T
        off = np.abs(said - logits.cpu().numpy()) / (1 + self.margins.size)
        spare = 1e-7 * (1 + np.tile(self.inputs.size, 3))
        if not ((got >= lower - spare) & (got <= upper + spare)).all() or not (off <= 1e-7).all():
            raise UnsupportedNetworkError("the integer programme does not hold at points of its own network; please report it")


def _one_hot(network: ReluNetwork, box: Box, relu: fx.Node) -> Tensor:
    layer, (source,) = box.layers[relu], relu.all_input_nodes
    rows = torch.zeros(len(layer.at), len(layer.active), dtype=torch.float64, device=layer.at.device)
    rows[torch.arange(len(layer.at)), layer.at] = 1
    return rows.view(-1, *network.shapes[source])


def _rows(encoding: Encoding, network: ReluNetwork, start: fx.Node, rows: Tensor) -> Rows:
    """Coefficients of rows at `start`: stable ReLUs are passed or dropped, unstable ones picked off into variables."""
    pieces = []
    for part in rows.split(max(1, NUMBERS // network.widest)):
        picked: dict[fx.Node, Tensor] = {}

        def through(relu: fx.Node, a: Tensor, picked: dict[fx.Node, Tensor] = picked) -> tuple[Tensor, Tensor]:
            layer, flat = encoding.box.layers[relu], a.flatten(1)
            picked[relu] = flat[:, layer.at]
            return (flat * layer.active).index_fill(1, layer.at, 0).view_as(a), a.new_zeros(len(a))

        pixels, constant = network.pull(start, part, through)
        columns = [picked.get(relu, part.new_zeros(len(part), len(layer.at))) for relu, layer in encoding.box.layers.items()]
        neurons = torch.cat(columns, 1) if columns else part.new_zeros(len(part), 0)
        constant = constant + (pixels * encoding.box.lower).flatten(1).sum(1)
        pieces.append((pixels.flatten(1) * torch.from_numpy(encoding.span).to(part), neurons, constant))
    if not pieces:
        return Rows(np.zeros((0, len(encoding.span))), np.zeros((0, len(encoding.low))), np.zeros(0))
    columns_of_pixels, columns_of_neurons, constants = (torch.cat(part).cpu().numpy() for part in zip(*pieces))
    return Rows(columns_of_pixels, columns_of_neurons * encoding.high, constants)
