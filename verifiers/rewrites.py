"""Operations rewritten into plain layers that compute the same function in exact arithmetic.

What is rewritten is named in `steps`; whatever is left alone is judged, and refused by name, by verifiers/lowering.py.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from decimal import Decimal, localcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .graph import operation
from .proof import UnsupportedNetworkError

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
DROPOUT_CALLS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)
RESHAPES = ("view", "reshape", torch.reshape)
MEANS = ("mean", torch.mean)
MAX_WIDTH = 4096  # a per-unit scaling of flat values becomes a square matrix


class Editor:
    """The graph under work: a copy that may be changed, the shape of every value, and the steps done so far."""

    def __init__(self, module: fx.GraphModule, example: Tensor, steps: list[str]) -> None:
        self.module, self.example, self.steps = module, example, steps
        self.layers: dict[str, nn.Module] = {}
        self._built = 0
        self.refresh()

    def refresh(self) -> None:
        """Clean up after edits, and note the shapes of values anew."""
        self.module.graph.eliminate_dead_code()
        self.module.graph.lint()
        self.module.recompile()
        self.module.delete_all_unused_submodules()
        self.layers = dict(self.module.named_modules())
        with torch.no_grad():
            _Shapes(self.module).run(self.example)

    def nodes(self) -> Iterator[tuple[fx.Node, Any, nn.Module | None]]:
        """Every operation as it was at the start: node, what rule tables are keyed by, and its layer if it is one."""
        for node in list(self.module.graph.nodes):
            if node.op in ("call_module", "call_function", "call_method"):
                layer = self.layers.get(str(node.target)) if node.op == "call_module" else None
                yield node, operation(node, self.layers), layer

    def put(self, before: fx.Node, source: fx.Node, layer: nn.Module) -> fx.Node:
        """A new layer applied to `source`."""
        name, self._built = f"lowered_{self._built}", self._built + 1
        while name in self.layers:
            name, self._built = f"lowered_{self._built}", self._built + 1
        made = layer.to(self.example.device, self.example.dtype).eval().requires_grad_(False)
        self.module.add_submodule(name, made)
        self.layers[name] = made
        with self.module.graph.inserting_before(before):
            return self.module.graph.call_module(name, (source,))

    def add(self, before: fx.Node, a: fx.Node, b: fx.Node) -> fx.Node:
        with self.module.graph.inserting_before(before):
            return self.module.graph.call_function(operator.add, (a, b))

    def replace(self, node: fx.Node, by: fx.Node, step: str) -> None:
        node.replace_all_uses_with(by)
        self.module.graph.erase_node(node)
        self.steps.append(step)


class _Shapes(fx.Interpreter):
    """Notes the shape of every value, and of the value that it was made from."""

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        n.meta["shape"] = tuple(value.shape) if isinstance(value, Tensor) else ()
        first = n.args[0] if n.args else None
        n.meta["source"] = first.meta.get("shape", ()) if isinstance(first, fx.Node) else ()
        return value


# ---- what interval bounds need, too --------------------------------------------------------------------------------------


def simplify(edit: Editor) -> None:
    """Forms without an interval rule into ones that have one: dropouts, view and reshape, mean over pixels, BatchNorm1d."""
    for node, kind, layer in edit.nodes():
        if kind in DROPOUTS[1:] or (kind in DROPOUT_CALLS and not _active(node)):
            edit.replace(node, node.all_input_nodes[0], f"dropped {_title(node, layer)}")
        elif kind in RESHAPES and _flattens(node, edit.layers):
            edit.replace(node, edit.put(node, _source(node), nn.Flatten()), f"{node.name} as Flatten")
        elif kind in MEANS and _averages_pixels(node):
            average = edit.put(node, _source(node), nn.AdaptiveAvgPool2d(1))
            whole = average if len(node.meta["shape"]) == 4 else edit.put(node, average, nn.Flatten())
            edit.replace(node, whole, f"{node.name} over the pixels as AdaptiveAvgPool2d(1)")
    edit.refresh()
    fold_batchnorms(edit, nn.Linear, nn.BatchNorm1d)


def _source(node: fx.Node) -> fx.Node:
    assert isinstance(node.args[0], fx.Node)
    return node.args[0]


def _title(node: fx.Node, layer: nn.Module | None) -> str:
    return node.name if layer is None else f"{type(layer).__name__} {node.target}"


def _active(node: fx.Node) -> bool:
    """Whether a functional dropout drops; torch's default is that it does."""
    training = node.kwargs.get("training", node.args[2] if len(node.args) > 2 else node.target not in LAZY_DROPOUTS)
    return training is not False


LAZY_DROPOUTS = (F.alpha_dropout, F.feature_alpha_dropout)


def _flattens(node: fx.Node, layers: Mapping[str, nn.Module]) -> bool:
    """view(N, -1) and its kin: [N, ...] to [N, all the rest], with N read from the tensor or left open."""
    before, after = node.meta["source"], node.meta["shape"]
    if not before or len(after) != 2 or after[0] != before[0] or node.kwargs or not isinstance(node.args[0], fx.Node):
        return False
    sizes = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], tuple | list) else node.args[1:]
    if len(sizes) != 2:
        return False
    rows, columns = sizes
    if isinstance(rows, fx.Node):
        return _is_batch_size(rows) and isinstance(columns, int)
    return bool(rows == -1) and isinstance(columns, int)


def _is_batch_size(node: fx.Node) -> bool:
    """x.size(0), x.shape[0] or x.size()[0]."""
    if node.target == "size":
        return bool(node.args[1:] == (0,)) and not node.kwargs
    if node.target is not operator.getitem or node.args[1] != 0 or not isinstance(node.args[0], fx.Node):
        return False
    whole = node.args[0]
    return bool((whole.target is getattr and whole.args[1] == "shape") or (whole.target == "size" and len(whole.args) == 1))


def _averages_pixels(node: fx.Node) -> bool:
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    plain = set(node.kwargs) <= {"dim", "keepdim"} and isinstance(node.args[0], fx.Node)
    if not plain or len(node.meta["source"]) != 4 or not isinstance(dims, tuple | list):
        return False
    return sorted(d % 4 if isinstance(d, int) else -1 for d in dims) == [2, 3]


# ---- BatchNorm -----------------------------------------------------------------------------------------------------------


def fold_batchnorms(edit: Editor, before: type[nn.Module], kind: type[nn.Module]) -> None:
    """BatchNorm in eval mode goes into the layer before it, where that layer feeds nothing else."""
    for node, operation_kind, norm in edit.nodes():
        source = node.args[0] if node.args else None
        if operation_kind is not kind or not isinstance(source, fx.Node) or len(source.users) != 1:
            continue
        first = edit.layers.get(str(source.target)) if source.op == "call_module" else None
        calls = [one for one in edit.module.graph.nodes if one.op == "call_module" and one.target == source.target]
        if type(first) is not before or len(calls) != 1 or getattr(norm, "running_var", None) is None:
            continue
        if isinstance(norm, nn.BatchNorm1d) and len(node.meta["shape"]) != 2:
            continue
        _fold(first, norm)
        edit.replace(node, source, f"folded {type(norm).__name__} {node.target} into {source.target}")
    edit.refresh()


@torch.no_grad()
def _fold(layer: Any, norm: Any) -> None:
    """Weights and biases are rounded once: a bias that cancels with the running mean must not lose its digits."""
    channels = layer.weight.shape[0]
    gammas = norm.weight.tolist() if norm.affine else [1.0] * channels
    betas = norm.bias.tolist() if norm.affine else [0.0] * channels
    biases = [0.0] * channels if layer.bias is None else layer.bias.tolist()
    scales, shifts = [], []
    with localcontext() as context:
        context.prec = 60
        for gamma, beta, mean, var, bias in zip(gammas, betas, norm.running_mean.tolist(), norm.running_var.tolist(), biases):
            if not all(map(_finite, (gamma, beta, mean, var, bias))) or var + norm.eps <= 0:
                raise UnsupportedNetworkError("a BatchNorm holds a value that is not finite, or a variance below zero")
            scale = Decimal(gamma) / (Decimal(var) + Decimal(norm.eps)).sqrt()
            scales.append(float(scale))
            shifts.append(float((Decimal(bias) - Decimal(mean)) * scale + Decimal(beta)))
    weight = layer.weight.double() * torch.tensor(scales, dtype=torch.float64, device=layer.weight.device).view(
        -1, *[1] * (layer.weight.dim() - 1)
    )
    layer.weight = nn.Parameter(weight.to(layer.weight.dtype), requires_grad=False)
    layer.bias = nn.Parameter(torch.tensor(shifts, dtype=torch.float64).to(layer.weight), requires_grad=False)


def _finite(value: float) -> bool:
    return value - value == 0


# ---- forms that auto-LiRPA refuses unclearly -------------------------------------------------------------------------------


def make_plain(edit: Editor) -> None:
    """Linear layers get a (zero) bias, BatchNorm its (unit) weights, padding='same' its numbers."""
    for name, layer in edit.layers.items():
        if type(layer) is nn.Linear and layer.bias is None:
            layer.bias = nn.Parameter(layer.weight.new_zeros(layer.out_features), requires_grad=False)
            edit.steps.append(f"gave {name} a bias of zero")
        elif type(layer) is nn.BatchNorm2d and not layer.affine and layer.running_var is not None:
            layer.affine = True
            layer.weight = nn.Parameter(torch.ones_like(layer.running_var), requires_grad=False)
            layer.bias = nn.Parameter(torch.zeros_like(layer.running_var), requires_grad=False)
            edit.steps.append(f"gave {name} unit weights")
        elif type(layer) is nn.Conv2d and isinstance(layer.padding, str) and _symmetric(layer):
            layer.padding = _padding_of(layer)
            layer._reversed_padding_repeated_twice = [side for side in reversed(layer.padding) for _ in range(2)]
            edit.steps.append(f"gave {name} its padding as numbers")


def _symmetric(layer: nn.Conv2d) -> bool:
    """Whether 'same' pads both sides alike; an even kernel does not."""
    return layer.padding == "valid" or all(d * (k - 1) % 2 == 0 for d, k in zip(layer.dilation, layer.kernel_size))


def _padding_of(layer: nn.Conv2d) -> tuple[int, int]:
    if layer.padding == "valid":
        return 0, 0
    return layer.dilation[0] * (layer.kernel_size[0] - 1) // 2, layer.dilation[1] * (layer.kernel_size[1] - 1) // 2


# ---- clipped ReLUs -------------------------------------------------------------------------------------------------------


def clips_as_relus(edit: Editor) -> None:
    """min(max(x, a), b) = b - relu((b - a) - relu(x - a)); shifts are layers, since the library errs on constants."""
    for node, kind, layer in edit.nodes():
        if not isinstance(layer, nn.Hardtanh) or kind not in (nn.ReLU6, nn.Hardtanh):
            continue
        low, high, shape = float(layer.min_val), float(layer.max_val), node.meta["shape"]
        if len(shape) not in (2, 4) or (len(shape) == 2 and shape[1] > MAX_WIDTH):
            continue
        value = node.args[0]
        assert isinstance(value, fx.Node)
        if low != 0:
            value = edit.put(node, value, scaled(shape, 1.0, -low))
        value = edit.put(node, value, nn.ReLU())
        value = edit.put(node, value, scaled(shape, -1.0, high - low))
        value = edit.put(node, value, nn.ReLU())
        value = edit.put(node, value, scaled(shape, -1.0, high))
        edit.replace(node, value, f"{kind.__name__} {node.target} as two ReLUs")
    edit.refresh()


@torch.no_grad()
def scaled(shape: tuple[int, ...], factor: float, shift: float) -> nn.Module:
    """The layer factor * x + shift for values [N, C, H, W] or [N, d]."""
    width = shape[1]
    layer: Any = nn.Conv2d(width, width, 1, groups=width) if len(shape) == 4 else nn.Linear(width, width)
    layer = layer.double()
    layer.weight.copy_(torch.full((width, 1, 1, 1), factor) if len(shape) == 4 else factor * torch.eye(width))
    layer.bias.fill_(shift)
    return layer
