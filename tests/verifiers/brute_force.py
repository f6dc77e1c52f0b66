"""The truth about tiny ReLU networks: every activation pattern that a box admits, one linear programme each."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from scipy.optimize import linprog
from torch import Tensor, nn

Block = tuple[np.ndarray, np.ndarray]


@torch.no_grad()
def blocks(net: nn.Sequential, shape: tuple[int, ...]) -> list[Block]:
    """The affine maps (matrix, constant) between the ReLUs of a chain, measured on unit vectors in float64."""
    found, layers = [], [*net.double().eval(), nn.ReLU()]
    while layers:
        cut = next(i for i, layer in enumerate(layers) if isinstance(layer, nn.ReLU))
        part, layers = nn.Sequential(*layers[:cut]), layers[cut + 1 :]
        size = int(torch.Size(shape).numel())
        points = torch.cat([torch.zeros(1, size), torch.eye(size)]).double().view(-1, *shape)
        values = part(points)
        shape = tuple(values.shape[1:])
        flat = values.flatten(1).numpy()
        found.append(((flat[1:] - flat[0]).T, flat[0]))
    return found


def _solve(objective: np.ndarray, rows: list[np.ndarray], ends: list[float], box: np.ndarray) -> float | None:
    found = linprog(objective, A_ub=np.array(rows) if rows else None, b_ub=np.array(ends) if rows else None, bounds=box)
    assert found.status in (0, 2), found.message
    return float(found.fun) if found.status == 0 else None


def _patterns(
    layers: list[Block], matrix: np.ndarray, constant: np.ndarray, rows: list[np.ndarray], ends: list[float], box: np.ndarray,
    signs: list[int],
) -> Iterator[tuple[np.ndarray, np.ndarray, list[np.ndarray], list[float]]]:
    """Depth first over the neurons of layers[:-1]; a side that no point of the box reaches is left out."""
    weight, bias = layers[0]
    z, z0 = weight @ matrix, weight @ constant + bias
    if len(layers) == 1:
        yield z, z0, rows, ends
        return

    def choose(i: int, open_: np.ndarray, rows: list[np.ndarray], ends: list[float]) -> Iterator[tuple[object, ...]]:
        if i == len(z0):
            yield from _patterns(layers[1:], z * open_[:, None], z0 * open_, rows, ends, box, signs[len(z0) :])
            return
        for sign in (1, -1):
            if signs[i] in (0, sign):
                more, further = [*rows, -sign * z[i]], [*ends, sign * z0[i]]
                if _solve(np.zeros(box.shape[0]), more, further, box) is not None:
                    side = open_.copy()
                    side[i] = sign > 0
                    yield from choose(i + 1, side, more, further)

    yield from choose(0, np.zeros(len(z0)), rows, ends)  # type: ignore[misc]


def true_minimum(
    net: nn.Sequential, lower: Tensor, upper: Tensor, row: Tensor, signs: list[int] | None = None
) -> float:
    """The smallest row @ net(x) over the box [1, ...] where neuron k's input has the sign signs[k] (0: any); else inf."""
    layers = blocks(net, tuple(lower.shape[1:]))
    box = np.stack([lower.flatten().double().numpy(), upper.flatten().double().numpy()], 1)
    signs = signs or [0] * sum(len(b) for _, b in layers[:-1])
    size = box.shape[0]
    least = np.inf
    for z, z0, rows, ends in _patterns(layers, np.eye(size), np.zeros(size), [], [], box, signs):
        value = _solve(row.double().numpy() @ z, rows, ends, box)
        if value is not None:
            least = min(least, value + float(row.double().numpy() @ z0))
    return least


def true_margin(net: nn.Sequential, lower: Tensor, upper: Tensor, y: int, classes: int) -> float:
    """The smallest f_y - f_j over the box and all j != y."""
    eye = torch.eye(classes, dtype=torch.float64)
    return min(true_minimum(net, lower, upper, eye[y] - eye[j]) for j in range(classes) if j != y)
