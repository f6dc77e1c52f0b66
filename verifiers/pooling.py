"""Pooling as convolutions and ReLUs, where auto-LiRPA bounds the pooling itself wrongly or not at all."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from .graph import operation
from .proof import UnsupportedNetworkError
from .rewrites import Editor, scaled

MAX_POOL_RELUS = 20_000  # above, relaxing an overlapping maximum costs more memory than the whole network
ARGUMENTS = {
    F.max_pool2d: (nn.MaxPool2d, ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")),
    F.avg_pool2d: (
        nn.AvgPool2d, ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
    ),
    F.adaptive_avg_pool2d: (nn.AdaptiveAvgPool2d, ("output_size",)),
}
RELUS = (nn.ReLU, nn.ReLU6, nn.Sigmoid, F.relu, torch.relu, "relu")
KEEPS_SIGN = (
    nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Identity, nn.Dropout, nn.Flatten, operator.add, torch.add, torch.cat,
    F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, torch.flatten, "flatten",
)


def pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def plain_pool(layer: Any) -> bool:
    """Windows side by side, no padding, no dilation, a true mean: what auto-LiRPA bounds rightly."""
    windows = pair(layer.kernel_size) == pair(layer.stride) and pair(layer.padding) == (0, 0)
    ordinary = not layer.ceil_mode and getattr(layer, "divisor_override", None) is None
    return windows and ordinary and pair(getattr(layer, "dilation", 1)) == (1, 1) and not getattr(layer, "return_indices", False)


def calls_as_layers(edit: Editor) -> None:
    """F.max_pool2d and its kin as the layers of the same name."""
    for node, kind, _ in edit.nodes():
        if kind not in ARGUMENTS or not node.args or len(node.all_input_nodes) != 1:
            continue
        make, names = ARGUMENTS[kind]
        options = dict(zip(names, node.args[1:])) | dict(node.kwargs)
        edit.replace(node, edit.put(node, node.all_input_nodes[0], make(**options)), f"{node.name} as {make.__name__}")
    edit.refresh()


def pools_as_layers(edit: Editor, every_maximum: bool = False) -> None:
    """Averages that overlap, are padded or leave gaps as fixed convolutions, such maxima (or all) as ReLUs, where that is
    right."""
    positive = _never_negative(edit)
    for node, kind, layer in edit.nodes():
        if kind is nn.AdaptiveAvgPool2d and pair_of_output(layer) != (1, 1):
            _parts_as_windows(edit, node, layer)
        elif kind is nn.AvgPool2d and not plain_pool(layer):
            _average_as_convolution(edit, node, layer)
        elif kind is nn.MaxPool2d and (every_maximum or not plain_pool(layer)):
            _maximum_as_relus(edit, node, layer, positive)
    edit.refresh()


def pair_of_output(layer: Any) -> tuple[int | None, int | None]:
    size = layer.output_size
    return (size, size) if size is None or isinstance(size, int) else (size[0], size[1])


def _never_negative(edit: Editor) -> set[fx.Node]:
    """The values that are >= 0 whatever the image is."""
    found: set[fx.Node] = set()
    for node in edit.module.graph.nodes:
        if node.op not in ("call_module", "call_function", "call_method"):
            continue
        kind = operation(node, edit.layers)
        layer: Any = edit.layers.get(str(node.target)) if node.op == "call_module" else None
        clipped = kind is nn.Hardtanh and layer.min_val >= 0
        divisor = getattr(layer, "divisor_override", None) or 1
        factor = bool(node.kwargs.get("alpha", 1) == 1) and len(node.all_input_nodes) >= 1 and divisor > 0
        inherited = kind in KEEPS_SIGN and factor and _all_nodes(node) and all(one in found for one in node.all_input_nodes)
        if kind in RELUS or clipped or inherited:
            found.add(node)
    return found


def _all_nodes(node: fx.Node) -> bool:
    """Sums with a constant, and average calls with a divisor of their own, keep no sign for sure."""
    if node.target in (operator.add, torch.add):
        return len(node.args) == 2 and all(isinstance(one, fx.Node) for one in node.args)
    return node.target is not F.avg_pool2d


def _parts_as_windows(edit: Editor, node: fx.Node, layer: Any) -> None:
    (height, width), (rows, columns) = node.meta["source"][2:], node.meta["shape"][2:]
    if height % rows or width % columns:
        return
    window = nn.AvgPool2d((height // rows, width // columns))
    source = node.all_input_nodes[0]
    edit.replace(node, edit.put(node, source, window), f"AdaptiveAvgPool2d {node.target} as AvgPool2d")


@torch.no_grad()
def _average_as_convolution(edit: Editor, node: fx.Node, layer: Any) -> None:
    rows, columns = pair(layer.kernel_size)
    padded = pair(layer.padding) != (0, 0)
    divisor = layer.divisor_override if layer.divisor_override is not None else rows * columns
    if layer.ceil_mode or divisor <= 0 or (padded and not layer.count_include_pad and layer.divisor_override is None):
        return
    channels = node.meta["shape"][1]
    same = nn.Conv2d(channels, channels, (rows, columns), pair(layer.stride), pair(layer.padding), groups=channels).double()
    same.weight.fill_(1 / divisor)
    assert same.bias is not None
    same.bias.zero_()
    new = edit.put(node, node.all_input_nodes[0], same)
    edit.replace(node, new, f"AvgPool2d {node.target} as a fixed convolution")


def _maximum_as_relus(edit: Editor, node: fx.Node, layer: Any, positive: set[fx.Node]) -> None:
    """max(a, b) = a + relu(b - a), along the rows of a window and then along its columns."""
    source = node.all_input_nodes[0]
    if layer.ceil_mode or layer.return_indices:
        return
    if pair(layer.padding) != (0, 0) and source not in positive:
        raise UnsupportedNetworkError(
            f"no sound linear relaxation for the padded MaxPool2d ({node.name}): its input may be negative, where padding "
            "counts as minus infinity; `ibp` may bound it"
        )
    (rows, columns), (_, channels, height, _), out = pair(layer.kernel_size), node.meta["source"], node.meta["shape"]
    relus = channels * out[3] * (height * (columns - 1) + out[2] * (rows - 1))
    if relus > MAX_POOL_RELUS:
        raise UnsupportedNetworkError(
            f"the MaxPool2d ({node.name}) would take {relus} ReLUs, more than {MAX_POOL_RELUS}; `ibp` may bound it"
        )
    value = source
    for axis, size in ((3, columns), (2, rows)):
        value = _maximum_along(edit, node, value, layer, channels, axis, size)
    edit.replace(node, value, f"MaxPool2d {node.target} as {relus} ReLUs")


def _maximum_along(edit: Editor, node: fx.Node, x: fx.Node, layer: Any, channels: int, axis: int, size: int) -> fx.Node:
    def pick(weights: dict[int, float]) -> fx.Node:
        return edit.put(node, x, _picker(layer, channels, axis, size, weights))

    best: list[fx.Node] = []
    for at in range(0, size - 1, 2):
        rise = edit.put(node, pick({at + 1: 1.0, at: -1.0}), nn.ReLU())
        best.append(edit.add(node, pick({at: 1.0}), rise))
    if size % 2:
        best.append(pick({size - 1: 1.0}))
    while len(best) > 1:
        a, b = best.pop(0), best.pop(0)
        less = edit.put(node, a, scaled((0, channels, 0, 0), -1.0, 0.0))
        best.append(edit.add(node, a, edit.put(node, edit.add(node, b, less), nn.ReLU())))
    return best[0]


@torch.no_grad()
def _picker(layer: Any, channels: int, axis: int, size: int, weights: dict[int, float]) -> nn.Conv2d:
    """The convolution that adds the given positions of a window along one axis, channel by channel."""

    def along(value: Any, otherwise: int) -> tuple[int, int]:
        own = pair(value)[axis - 2]
        return (own, otherwise) if axis == 2 else (otherwise, own)

    step = pair(layer.dilation)[axis - 2]  # zeros in between, since the library errs on strides with dilation
    conv = nn.Conv2d(
        channels, channels, along(step * (size - 1) + 1, 1), along(layer.stride, 1), along(layer.padding, 0), groups=channels
    ).double()
    conv.weight.zero_()
    for at, weight in weights.items():
        conv.weight[:, 0, step * at if axis == 2 else 0, step * at if axis == 3 else 0] = weight
    assert conv.bias is not None
    conv.bias.zero_()
    return conv
