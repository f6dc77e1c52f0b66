"""A ReLU network as sparse matrices: the input of every ReLU layer is affine in the pixels and in earlier ReLUs' outputs.

Zero weights take no room, and neurons that no output depends on are left out, both exactly.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from . import memory
from .bounds import batchnorm_scale
from .graph import name_of, operation, output_of, trace
from .lowering import SUMS, Lowered, lower
from .pooling import pair
from .proof import UnsupportedNetworkError

RELUS = (nn.ReLU, torch.relu, F.relu, "relu")
FLATS = (nn.Flatten, torch.flatten, "flatten")
AFFINE = (nn.Linear, nn.Conv2d, *FLATS, *SUMS, nn.BatchNorm2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, torch.cat)
BYTES = 40  # per number of a matrix: index, value, absolute value, and a copy while it is sorted
CHUNK = 4_000_000  # numbers held at once where a matrix is measured on unit vectors


class Affine(NamedTuple):
    """Values [n] as sum_j parts[j] @ source j + constant; source 0 is the pixels, source j the outputs of ReLU layer j.

    absolute, bulk: the same with absolute values inside every product, which bound what may cancel; terms: how many numbers
    are added up for one value, at most, one layer after the other.
    """

    parts: dict[int, sp.csr_matrix]
    absolute: dict[int, sp.csr_matrix]
    constant: np.ndarray
    bulk: np.ndarray
    terms: int

    def rows(self, at: np.ndarray) -> Affine:
        cut = [{j: part[at] for j, part in parts.items()} for parts in (self.parts, self.absolute)]
        return Affine(cut[0], cut[1], self.constant[at], self.bulk[at], self.terms)

    def columns(self, kept: list[np.ndarray]) -> Affine:
        cut = [{j: part[:, kept[j]].tocsr() for j, part in parts.items()} for parts in (self.parts, self.absolute)]
        return Affine(cut[0], cut[1], self.constant, self.bulk, self.terms)


class Unrolled:
    """`steps`: the inputs of every ReLU layer, then the outputs. Equal to the model at points that are tried (in float64).

    model: plain, in float64, on the CPU. pause is called often and may raise to stop. Raises UnsupportedNetworkError, naming
    the operation, for anything but affine steps, ReLUs and max pooling, and for networks too large for memory.LIMIT.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, example: Tensor, pause: Callable[[], None] = lambda: None) -> None:
        self._pause = pause
        self.lowered: Lowered = lower(model, example[:1], maxima_as_relus=True)
        self.shape = example.shape[1:]
        self._modules = dict(self.lowered.network.named_modules())
        graph = trace(self.lowered.network)
        self._output = output_of(graph)
        nodes = [node for node in graph.nodes if node.op != "output"]
        for node in nodes:
            self._refuse_unless_known(node)
        generator = torch.Generator().manual_seed(0)
        noise = torch.rand(6, *self.shape, generator=generator, dtype=torch.float64)
        points = torch.cat([example[:1].double(), noise[:3], 40 * (noise[3:] - 0.5)])
        self._shapes = {node: value.shape[1:] for node, value in self._values(nodes, points).items()}
        _require_room(sum(map(self._numbers, nodes)), "this network")
        self.outputs = int(self._shapes[self._output].numel())
        self.steps = self._relevant(self._unroll(nodes))
        self._require_same_function(model, points)

    def _kind(self, node: fx.Node) -> Any:
        return None if node.op == "placeholder" else operation(node, self._modules)

    def _refuse_unless_known(self, node: fx.Node) -> None:
        kind = self._kind(node)
        if kind is not None and kind not in RELUS and kind not in AFFINE:
            raise UnsupportedNetworkError(f"exact verification knows ReLU networks only, not {name_of(kind)} ({node.name})")

    def _apply(self, node: fx.Node, values: dict[fx.Node, Tensor]) -> Tensor:
        """ReLUs never work in place here: another step may read their input."""
        args: Any
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        if self._kind(node) in RELUS:
            return torch.relu(args[0])
        if node.op == "call_module":
            return self._modules[str(node.target)](*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    def _values(self, nodes: list[fx.Node], points: Tensor) -> dict[fx.Node, Tensor]:
        values: dict[fx.Node, Tensor] = {}
        for node in nodes:
            values[node] = self.lowered.move(points) if node.op == "placeholder" else self._apply(node, values)
        return values

    # ---- building ----------------------------------------------------------------------------------------------------------

    def _unroll(self, nodes: list[fx.Node]) -> list[Affine]:
        values: dict[fx.Node, Affine] = {}
        steps: list[Affine] = []
        for node in nodes:
            self._pause()
            size = self._shapes[node].numel()
            if node.op == "placeholder":
                values[node] = _source(0, size)
            elif self._kind(node) in RELUS:
                steps.append(values[node.all_input_nodes[0]])
                values[node] = _source(len(steps), size)
            else:
                values[node] = self._step(node, values)
        return [*steps, values[self._output]]

    def _numbers(self, node: fx.Node) -> int:
        """In the matrix of a layer with weights."""
        layer = self._modules.get(str(node.target)) if node.op == "call_module" else None
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            return 0
        places = self._shapes[node][1:].numel() if isinstance(layer, nn.Conv2d) else 1
        return int(layer.weight.count_nonzero()) * places

    def _step(self, node: fx.Node, values: dict[fx.Node, Affine]) -> Affine:
        """The affine operation `node` on what it reads."""
        zeros = {source: torch.zeros(1, *self._shapes[source], dtype=torch.float64) for source in node.all_input_nodes}
        constant = self._apply(node, zeros).flatten().numpy()
        found = Affine({}, {}, constant, np.abs(constant), 2)
        for source in node.all_input_nodes:
            self._pause()
            matrix = self._matrix(node, source, zeros)
            found = _sum(found, _product(matrix, values[source]))
        return found

    def _matrix(self, node: fx.Node, source: fx.Node, zeros: dict[fx.Node, Tensor]) -> sp.csr_matrix:
        kind, layer = self._kind(node), self._modules.get(str(node.target))
        if isinstance(layer, nn.Linear):
            return sp.csr_matrix(layer.weight.numpy())
        if isinstance(layer, nn.Conv2d) and layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
            return _convolution(layer, self._shapes[source], self._shapes[node])
        if isinstance(layer, nn.BatchNorm2d):
            return sp.diags(batchnorm_scale(layer)[0][0].expand(self._shapes[node]).flatten().numpy(), format="csr")
        if kind in FLATS or kind is torch.cat:
            return self._selected(node, source, zeros)
        if kind in SUMS and not node.kwargs and len({self._shapes[one] for one in (node, *node.all_input_nodes)}) == 1:
            return len([one for one in node.args if one is source]) * sp.identity(self._shapes[node].numel(), format="csr")
        return self._measured(node, source, zeros)

    def _selected(self, node: fx.Node, source: fx.Node, zeros: dict[fx.Node, Tensor]) -> sp.csr_matrix:
        """An operation that only moves values: where each of them comes from."""
        size = self._shapes[source].numel()
        numbers = torch.arange(1, size + 1, dtype=torch.float64).view(1, *self._shapes[source])
        found = self._apply(node, {**zeros, source: numbers}).flatten().long().numpy()
        at = found.nonzero()[0]
        return sp.csr_matrix((np.ones(len(at)), (at, found[at] - 1)), shape=(len(found), size))

    def _measured(self, node: fx.Node, source: fx.Node, zeros: dict[fx.Node, Tensor]) -> sp.csr_matrix:
        """Column by column, on unit vectors of one of the operation's inputs."""
        size, wide = self._shapes[source].numel(), self._shapes[node].numel()
        _require_room(size * wide // 100, node.name)
        at_zero, pieces = self._apply(node, zeros), []
        for part in torch.arange(size).split(max(1, CHUNK // max(size, wide))):
            units = torch.zeros(len(part), size, dtype=torch.float64)
            units[torch.arange(len(part)), part] = 1
            values = {one: zero.expand(len(part), *zero.shape[1:]) for one, zero in zeros.items()}
            values[source] = units.view(-1, *self._shapes[source])
            pieces.append(sp.csr_matrix((self._apply(node, values) - at_zero).flatten(1).numpy()))
        return sp.vstack(pieces).T.tocsr()

    def _relevant(self, steps: list[Affine]) -> list[Affine]:
        """Without the neurons that no output depends on."""
        kept = [np.arange(self.shape.numel()), *(np.zeros(len(step.constant), bool) for step in steps[:-1])]
        steps = list(steps)
        for k in range(len(steps) - 1, -1, -1):
            self._pause()
            if k < len(steps) - 1:
                kept[k + 1] = kept[k + 1].nonzero()[0]
                steps[k] = steps[k].rows(kept[k + 1])
            for j, part in steps[k].parts.items():
                if j:
                    kept[j][np.unique(part.indices)] = True
        for k, step in enumerate(steps):
            self._pause()
            steps[k] = step.columns(kept)
        return steps

    def _require_same_function(self, model: nn.Module, points: Tensor) -> None:
        """A ReLU in place whose input is read elsewhere computes something else than the graph says."""
        self._pause()
        inputs = self.inputs(points)
        size = max(1.0, *(float(np.abs(value).max(initial=0)) for value in inputs))
        if not float(np.abs(model(points).flatten(1).numpy().T - inputs[-1]).max()) <= 1e-9 * size:
            raise UnsupportedNetworkError("the network computes something else than its graph of affine steps and ReLUs")

    # ---- use -----------------------------------------------------------------------------------------------------------------

    def pixels(self, x: Tensor) -> np.ndarray:
        """Images [N, ...] as columns [d, N] of source 0."""
        return self.lowered.move(x).flatten(1).double().numpy().T

    def images(self, pixels: Tensor) -> Tensor:
        """The images [N, ...] of source 0 at [N, d]."""
        x = pixels.view(-1, *self.shape)
        return x if self.lowered.shift is None else x + self.lowered.shift.to(x)

    def inputs(self, points: Tensor) -> list[np.ndarray]:
        """What every step is at the images [N, ...]: [n, N] each."""
        sources, found = [self.pixels(points)], []
        for step in self.steps:
            found.append(weighted(step.parts, sources) + step.constant[:, None])
            sources.append(np.maximum(found[-1], 0))
        return found


def weighted(parts: dict[int, Any], sources: list[Any]) -> Any:
    """sum_j parts[j] @ sources[j]."""
    return reduce(operator.add, (part @ sources[j] for j, part in parts.items())) if parts else 0.0


def _source(j: int, size: int) -> Affine:
    one = sp.identity(size, format="csr")
    return Affine({j: one}, {j: one}, np.zeros(size), np.zeros(size), 0)


def _product(matrix: sp.csr_matrix, x: Affine) -> Affine:
    size = abs(matrix)
    parts, absolute = ({j: by @ part for j, part in parts.items()} for by, parts in ((matrix, x.parts), (size, x.absolute)))
    for part in parts.values():
        part.eliminate_zeros()
    longest = int(np.diff(matrix.indptr).max(initial=0))
    return Affine(parts, absolute, matrix @ x.constant, size @ x.bulk, x.terms + longest + 2)


def _sum(a: Affine, b: Affine) -> Affine:
    def joined(one: dict[int, Any], other: dict[int, Any]) -> dict[int, Any]:
        return {j: one[j] + other[j] if j in one and j in other else one.get(j, other.get(j)) for j in {**one, **other}}

    parts, absolute = joined(a.parts, b.parts), joined(a.absolute, b.absolute)
    return Affine(parts, absolute, a.constant + b.constant, a.bulk + b.bulk, a.terms + b.terms + 1)


def _convolution(layer: nn.Conv2d, before: torch.Size, after: torch.Size) -> sp.csr_matrix:
    """One entry per weight that is not zero and place of the kernel, but for those that meet the padding."""
    weight = layer.weight.numpy()
    out, inner, *place = weight.nonzero()
    source = inner + out // (after[0] // layer.groups) * (before[0] // layer.groups)
    ends = []
    for axis in (0, 1):
        stride, padding, gap = (pair(value)[axis] for value in (layer.stride, layer.padding, layer.dilation))
        ends.append(np.arange(after[axis + 1]) * stride + (place[axis] * gap - padding)[:, None])
    rows, columns = ends[0][:, :, None], ends[1][:, None, :]
    inside = (rows >= 0) & (rows < before[1]) & (columns >= 0) & (columns < before[2])
    targets = np.arange(after[1] * after[2]).reshape(1, after[1], after[2]) + out[:, None, None] * (after[1] * after[2])
    sources = (source[:, None, None] * before[1] + rows) * before[2] + columns
    values = np.broadcast_to(weight[out, inner, place[0], place[1]][:, None, None], inside.shape)
    entries = values[inside], (targets[inside], sources[inside])
    return sp.coo_matrix(entries, shape=(after.numel(), before.numel())).tocsr()


def _require_room(numbers: int, name: str) -> None:
    if numbers * BYTES > memory.LIMIT:
        raise UnsupportedNetworkError(
            f"exact verification would unroll {name} into {numbers:.2g} numbers, more than the limit of "
            f"{memory.LIMIT / 2**30:.1f} GiB; prune the network further, or ask `crown`"
        )
