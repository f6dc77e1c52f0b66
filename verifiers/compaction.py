"""A pruned network without its dead and constant channels and units: smaller, and the same function.

Values that depend on no pixel, and values that no path of non-zero weights leads from to a logit, are found by
verifiers/liveness.py. Channels that sums, BatchNorm, pooling, activations, flattening and groups tie together (a residual
stream) are kept or removed as one.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, fx, nn
from torch.nn.utils.parametrize import is_parametrized

from .bounds import conv
from .graph import operation, output_of, trace, visit
from .liveness import RULES, Signal, pixels
from .lowering import flat_copy, require_same_function
from .normalise import Normalize
from .proof import SelfRefutedError, UnsupportedNetworkError
from .rewrites import Editor, simplify
from .rounding import in_float64

FLATS = (nn.Flatten, torch.flatten, "flatten")
EVEN = 64 * torch.finfo(torch.float64).eps  # share of its terms by which a constant may differ from place to place
AGREE = 1e-9  # share of the largest logit or constant by which the two networks may differ in float64
SMALL = 1e-3  # a constant channel does not stand for others that are larger than itself by more than this factor


@dataclass(frozen=True)
class Compacted:
    """`network` computes what the original does; `units` has (kept, all) output channels or units of every convolution and
    linear layer; `constant` says that no logit depends on the image: the network has collapsed."""

    network: nn.Module
    units: Mapping[str, tuple[int, int]]
    constant: bool


def compacted(model: nn.Module, example: Tensor) -> tuple[nn.Module, tuple[str, ...]]:
    """The compacted network and what was done; the network itself where nothing can be removed or it cannot be compacted.

    Raises SelfRefutedError where the compacted network is another function.
    """
    if all(bool((layer.weight != 0).all()) for layer in model.modules() if isinstance(layer, nn.Linear | nn.Conv2d)):
        return model, ()
    try:
        found = compact(model, example)
    except SelfRefutedError:
        raise
    except UnsupportedNetworkError:
        return model, ()
    kept, total = (sum(side) for side in zip(*found.units.values(), strict=True))
    return (found.network, (f"removed {total - kept} dead or constant units of {total}",)) if kept < total else (model, ())


@torch.no_grad()
def compact(model: nn.Module, example: Tensor) -> Compacted:
    """The plain network, in eval mode, without dead and constant channels and units: the same function in exact arithmetic.

    example: images [N, C, H, W]; there, at random images and far outside [0,1] the two are compared in float64. Layers keep
    their names and at least one unit; a layer that is used more than once is written out once per use. Constants go into the
    biases that follow; before a padded convolution, where its borders show, one constant channel stays and stands for all even
    ones. Raises UnsupportedNetworkError for operations without a rule in verifiers/liveness.py and values that are not finite.
    """
    try:
        return _compacted(model, example)
    except UnsupportedNetworkError:
        raise
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as reason:  # a graph its rules do not fit
        sentence = next(iter(str(reason).splitlines()), type(reason).__name__)
        raise UnsupportedNetworkError(f"the network's graph could not be followed: {sentence}") from reason


def _compacted(model: nn.Module, example: Tensor) -> Compacted:
    if any(is_parametrized(layer) for layer in model.modules()):
        raise UnsupportedNetworkError("the network still has parametrizations attached; bake its masks first")
    original, pixels_of = in_float64(model).cpu(), example.cpu().double()
    _require_finite_weights(original, "holds weights or statistics that are not finite")
    module = flat_copy(original)
    simplify(Editor(module, pixels_of[:2], []))
    _unshare(module)
    work = _Compaction(module, pixels_of.shape[1:])
    units = work.rebuild()
    require_same_function(original, module, pixels_of, AGREE, "compacted", work.size)
    like = next(model.parameters(), example)
    module.to(like.device, like.dtype)
    _require_finite_weights(module, f"folds into constants that {like.dtype} cannot hold")
    return Compacted(module, units, work.constant)


def _require_finite_weights(network: nn.Module, otherwise: str) -> None:
    if not all(bool(value.isfinite().all()) for value in network.state_dict().values()):
        raise UnsupportedNetworkError(f"the network {otherwise}")


def _unshare(module: fx.GraphModule) -> None:
    """Every use of a layer gets a layer of its own."""
    used: set[str] = set()
    for node in [node for node in module.graph.nodes if node.op == "call_module"]:
        if str(node.target) in used:
            layer = copy.deepcopy(module.get_submodule(str(node.target)))
            node.target = f"{node.target}_{node.name}"
            module.add_submodule(node.target, layer)
        used.add(str(node.target))
    module.recompile()


class _Fold(NamedTuple):
    """What the removed inputs of a layer come to: biases [O], and a kernel [O, ...] for the kept constant input `onto`."""

    bias: Tensor
    onto: int | None = None
    kernel: Tensor | None = None


class _Compaction:
    """The network under work, the signal of every value, and the set of streams that are kept."""

    def __init__(self, module: fx.GraphModule, shape: tuple[int, ...]) -> None:
        self.layers: dict[str, Any] = dict(module.named_modules())
        self.output = output_of(trace(module))
        with torch.enable_grad():
            self.signals: dict[fx.Node, Signal] = dict(visit(module, pixels(shape), RULES))
            for signal in self.signals.values():
                signal.present.register_hook(_over_all_places)
                signal.present.retain_grad()
            self.signals[self.output].present.sum().backward()
        self.heard = {node: _leads_on(signal.present) for node, signal in self.signals.items()}  # bool [C] each
        self.constant = not bool(self.signals[self.output].fed.any())
        if self.constant and self._kind(self.output) is nn.Linear:  # its biases say it all
            self.heard = {node: heard & (node is self.output) for node, heard in self.heard.items()}
        self.streams = self._tied()
        self.kept = np.zeros(1 + max(int(one.max()) for one in self.streams.values()), bool)
        self._choose()

    @property
    def size(self) -> float:
        """The largest constant, or 1."""
        return max(1.0, *(float(signal.value.abs().max()) for signal in self.signals.values()))

    def _layer(self, node: fx.Node) -> Any:
        return self.layers[str(node.target)] if node.op == "call_module" else None

    def _kind(self, node: fx.Node) -> Any:
        return None if node.op == "placeholder" else operation(node, self.layers)

    def _width(self, node: fx.Node) -> int:
        return self.signals[node].fed.shape[1]

    def _in_place(self, node: fx.Node) -> bool:
        return bool(node.target is operator.iadd or getattr(self._layer(node), "inplace", False) or node.kwargs.get("inplace"))

    def _stays(self, node: fx.Node) -> Tensor:
        """Which channels of a value are kept: bool [C]."""
        return torch.from_numpy(self.kept[self.streams[node]])

    # ---- streams ---------------------------------------------------------------------------------------------------------

    def _tied(self) -> dict[fx.Node, np.ndarray]:
        """Per value and channel the number of its stream: channels that can only be kept or removed together."""
        ends = np.cumsum([0, *(self._width(node) for node in self.signals)])
        numbers = {node: np.arange(ends[i], ends[i + 1]) for i, node in enumerate(self.signals)}
        pairs = [(numbers[node][own], numbers[source][other]) for node in self.signals for own, source, other in self._ties(node)]
        a, b = (np.concatenate([np.zeros(0, int), *side]) for side in zip(*pairs)) if pairs else (np.zeros(0, int),) * 2
        labels = connected_components(coo_array((np.ones(len(a)), (a, b)), shape=(ends[-1], ends[-1])), directed=False)[1]
        return {node: labels[own] for node, own in numbers.items()}

    def _ties(self, node: fx.Node) -> Iterator[tuple[np.ndarray, fx.Node, np.ndarray]]:
        """(channels of the value, one of its sources, channels of that): pairs that belong to one stream."""
        kind, layer, width = self._kind(node), self._layer(node), self._width(node)
        shape = self.signals[node].fed.shape
        if len(shape) not in (2, 4) or (kind is nn.Linear and len(shape) != 2):
            raise UnsupportedNetworkError(f"compaction knows [N, C, H, W] and [N, d] only, not {len(shape)} axes ({node.name})")
        if self._in_place(node) and any(len(source.users) > 1 for source in node.all_input_nodes):
            raise UnsupportedNetworkError(f"{node.name} works in place on a value that is read elsewhere, too")
        if kind in (nn.Linear, nn.Conv2d):
            if getattr(layer, "groups", 1) > 1:
                yield from self._groups(node, layer)
            return
        at = 0
        for source in _sources(node):
            before = self.signals[source].fed.shape
            if kind is torch.cat and _axis(node, len(shape)) == 1:
                own, other, at = np.arange(at, at + before[1]), np.arange(before[1]), at + before[1]
            elif kind in FLATS and len(before) == 4 and len(shape) == 2:
                own, other = np.arange(width), np.repeat(np.arange(before[1]), before[2] * before[3])
            elif len(before) == len(shape) and before[:2] == shape[:2]:
                own = other = np.arange(width)
            else:
                raise UnsupportedNetworkError(f"compaction has no rule for {tuple(before)} becoming {tuple(shape)} ({node.name})")
            yield own, source, other

    def _groups(self, node: fx.Node, layer: nn.Conv2d) -> Iterator[tuple[np.ndarray, fx.Node, np.ndarray]]:
        """Groups stay as large as they were, so all inputs and outputs of one belong together."""
        (source,) = node.all_input_nodes
        first = np.arange(layer.groups) * (layer.in_channels // layer.groups)
        outputs, inputs = np.arange(layer.out_channels), np.arange(layer.in_channels)
        yield outputs, source, first[outputs // (layer.out_channels // layer.groups)]
        heads = np.arange(layer.groups) * (layer.out_channels // layer.groups)
        yield heads[inputs // (layer.in_channels // layer.groups)], source, inputs

    # ---- what stays ------------------------------------------------------------------------------------------------------

    def _choose(self) -> None:
        """Streams that carry what depends on the image to a logit, and the constants that no bias can stand for."""
        for node, signal in self.signals.items():
            whole = node is self.output or node.op == "placeholder"
            self._keep(node, torch.ones(self._width(node), dtype=torch.bool) if whole else _any(signal.fed) & self.heard[node])
        while True:
            before = self.kept.sum()
            for node in reversed(self.signals):
                if isinstance(self._layer(node), nn.Conv2d):
                    self._keep(node.all_input_nodes[0], self._fold(node)[1])
            if self.kept.sum() == before:
                for node in self.signals:
                    if not self._stays(node).any():
                        self.kept[self.streams[node][int(self.heard[node].int().argmin())]] = True
            if self.kept.sum() == before:
                return

    def _keep(self, node: fx.Node, channels: Tensor) -> None:
        self.kept[self.streams[node][channels.numpy()]] = True

    def _fixed(self, node: fx.Node) -> tuple[Tensor, Tensor]:
        """Outputs of a layer that are one constant, or that nothing listens to: bool [O], and their value [O]."""
        signal, heard = self.signals[node], self.heard[node]
        even, level = _even(signal.value, signal.bulk)
        return ~heard | (even & ~_any(signal.fed)), torch.where(heard, level, 0.0)

    def _fold(self, node: fx.Node) -> tuple[_Fold, Tensor]:
        """What a layer's removed inputs come to, and which of them must stay after all: bool [I].

        A layer with groups keeps all inputs of the outputs that it keeps.
        """
        layer, (source,) = self._layer(node), node.all_input_nodes
        signal, stays = self.signals[source], self._stays(source)
        wanted, bias = torch.zeros_like(stays), torch.zeros(self._width(node), dtype=torch.float64)
        rows = (self._stays(node) & ~self._fixed(node)[0]).nonzero().flatten()
        if getattr(layer, "groups", 1) > 1 or not len(rows):
            return _Fold(bias), wanted
        value = torch.where(_column(~stays, signal.value), signal.value, 0.0)
        if not value.any():
            return _Fold(bias), wanted
        weight = layer.weight[rows]

        def come_to(value: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            """Per row whether the constants `value` add the same everywhere, and how much."""
            return _even(_through(layer, value, weight), _through(layer, value.abs(), weight.abs()))

        even, level = come_to(value, weight)
        if bool(even.all()):
            bias[rows] = level
            return _Fold(bias), wanted
        spread = torch.zeros_like(stays)
        for i in (_any(value != 0) & (weight != 0).transpose(0, 1).flatten(1).any(1)).nonzero().flatten().tolist():
            even, level = come_to(value[:, i : i + 1], weight[:, i : i + 1])
            if bool(even.all()):
                bias[rows] += level
            else:
                spread[i] = True
        return self._stand_in(source, spread, stays, layer.weight, rows, bias)

    def _stand_in(
        self, source: fx.Node, spread: Tensor, stays: Tensor, weight: Tensor, rows: Tensor, bias: Tensor
    ) -> tuple[_Fold, Tensor]:
        """Of the constant channels `spread` whose borders show, even ones are taken over by the largest even one, kept anyhow or
        now; the others stay."""
        level, even = self._levels(source)
        wanted, merged = spread & ~even, spread & even
        if not merged.any():
            return _Fold(bias), wanted
        size = torch.where(merged, level.abs(), 0.0)
        already = torch.where(stays & even, level.abs(), 0.0)
        onto = int((already if already.max() >= SMALL * size.max() else size).argmax())
        wanted[onto] = not stays[onto]
        factors = torch.where(merged, level, 0.0) / level[onto]
        factors[onto] = 0.0
        kernel = torch.zeros_like(weight[:, 0])
        kernel[rows] = torch.einsum("oi...,i->o...", weight[rows], factors)
        return _Fold(bias, onto, kernel), wanted

    def _levels(self, node: fx.Node) -> tuple[Tensor, Tensor]:
        """The value of every channel [C], and whether it is this constant, other than 0, at every place."""
        signal = self.signals[node]
        even, level = _even(signal.value, signal.bulk)
        return level, even & self.heard[node] & ~_any(signal.fed) & (level != 0)

    # ---- the smaller network ---------------------------------------------------------------------------------------------

    def rebuild(self) -> dict[str, tuple[int, int]]:
        """Cuts the layers to what stays; returns (kept, all) outputs of those with weights."""
        units = {}
        for node in self.signals:
            layer = self._layer(node)
            if isinstance(layer, nn.Linear | nn.Conv2d):
                units[str(node.target)] = int(self._stays(node).sum()), self._width(node)
                self._cut(node, layer)
            elif isinstance(layer, nn.BatchNorm2d | Normalize):
                _cut_channels(layer, self._stays(node))
        return units

    def _cut(self, node: fx.Node, layer: Any) -> None:
        (source,) = node.all_input_nodes
        inputs, outputs, (fixed, level), (fold, _) = self._stays(source), self._stays(node), self._fixed(node), self._fold(node)
        weight = torch.where(_column(fixed, layer.weight, 0), 0.0, layer.weight)
        if fold.onto is not None and fold.kernel is not None:
            weight[:, fold.onto] += fold.kernel
        bias = fold.bias if layer.bias is None else fold.bias + layer.bias
        bias = torch.where(fixed, level, bias)[outputs]
        if isinstance(layer, nn.Conv2d) and layer.groups > 1:
            layer.groups = int(inputs.sum()) // (layer.in_channels // layer.groups)
            weight = weight[outputs]
        else:
            weight = weight[outputs][:, inputs]
        sizes = ("in_channels", "out_channels") if isinstance(layer, nn.Conv2d) else ("in_features", "out_features")
        for name, stays in zip(sizes, (inputs, outputs), strict=True):
            setattr(layer, name, int(stays.sum()))
        layer.weight = nn.Parameter(weight, requires_grad=False)
        if layer.bias is not None or bool((bias != 0).any()):
            layer.bias = nn.Parameter(bias, requires_grad=False)


def _cut_channels(layer: Any, stays: Tensor) -> None:
    if isinstance(layer, Normalize):
        layer.mean, layer.std = layer.mean[:, stays], layer.std[:, stays]
        return
    layer.num_features = int(stays.sum())
    layer.running_mean, layer.running_var = layer.running_mean[stays], layer.running_var[stays]
    if layer.affine:
        layer.weight = nn.Parameter(layer.weight[stays], requires_grad=False)
        layer.bias = nn.Parameter(layer.bias[stays], requires_grad=False)


# ---- tensors ---------------------------------------------------------------------------------------------------------------


def _over_all_places(gradient: Tensor) -> Tensor:
    """A channel that leads on from one place counts as leading on from all: so its value is kept at every place."""
    return _column((_places(gradient) > 0).any(1), gradient).to(gradient.dtype).expand_as(gradient)


def _leads_on(present: Tensor) -> Tensor:
    return torch.zeros(present.shape[1], dtype=torch.bool) if present.grad is None else _any(present.grad > 0)


def _places(value: Tensor) -> Tensor:
    """[1, C, H, W] or [1, C] as [C, places]."""
    return value[0].flatten(1) if value.dim() > 2 else value[0, :, None]


def _any(value: Tensor) -> Tensor:
    """Per channel of [1, C, ...]."""
    return _places(value).any(1)


def _column(flags: Tensor, like: Tensor, axis: int = 1) -> Tensor:
    """Flags [C] along an axis of `like`."""
    return flags.view([-1 if one == axis else 1 for one in range(like.dim())])


def _even(value: Tensor, bulk: Tensor) -> tuple[Tensor, Tensor]:
    """Per channel of [1, C, ...] whether all places hold one value, up to its rounding, and that value."""
    places = _places(value)
    low, high = places.aminmax(dim=1)
    return high - low <= EVEN * _places(bulk).amax(1), high


def _through(layer: Any, value: Tensor, weight: Tensor) -> Tensor:
    return conv(layer, value, weight) if isinstance(layer, nn.Conv2d) else F.linear(value, weight)


def _sources(node: fx.Node) -> list[fx.Node]:
    """What a node reads, in order and as often as it reads it."""
    first = node.args[0] if node.args else ()
    parts = first if isinstance(first, tuple | list) else node.args
    return [one for one in parts if isinstance(one, fx.Node)]


def _axis(node: fx.Node, dims: int) -> int:
    axis = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    return int(str(axis)) % dims
