"""How many samples are bounded at once: as many as an estimate says fit, and half as many after each lack of memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

from .graph import output_of
from .proof import UnsupportedNetworkError

LIMIT = 8 * 2**30  # bytes that one batch of bounds may take, by estimate
SHORT_OF_MEMORY = ("can't allocate memory", "out of memory", "not enough memory")
COPIES = {"CROWN-IBP": 6, "CROWN": 6, "alpha-CROWN": 3}  # lower and upper coefficients, before and after a layer, and scratch


class NoBoundError(UnsupportedNetworkError):
    """The method would take too much memory, or its library raised: nothing is known to be wrong with other methods."""


def lacks_memory(reason: Exception) -> bool:
    if isinstance(reason, MemoryError | torch.cuda.OutOfMemoryError):
        return True
    return isinstance(reason, RuntimeError) and any(words in str(reason) for words in SHORT_OF_MEMORY)


def batch_that_fits(bytes_per_sample: float, largest: int, what: str) -> int:
    """Samples per batch, at most `largest`. Raises NoBoundError where not even one sample fits the limit."""
    if bytes_per_sample > LIMIT:
        raise NoBoundError(
            f"{what} would take about {bytes_per_sample / 2**30:.1f} GiB per image, more than the limit of "
            f"{LIMIT / 2**30:.1f} GiB; `ibp` takes far less"
        )
    return max(1, min(largest, int(LIMIT // max(bytes_per_sample, 1.0))))


def in_batches(bound: Callable[[Tensor], Tensor], count: int, size: int) -> Tensor:
    """bound(indices) over all samples, `size` at a time, joined; lack of memory halves the size and tries again.

    Raises NoBoundError where a single sample does not fit.
    """
    parts: list[Tensor] = []
    start = 0
    while start < count:
        lacking = False
        try:
            parts.append(bound(torch.arange(start, min(start + size, count))))
            start += size
        except Exception as reason:
            if not lacks_memory(reason):
                raise
            if size == 1:
                raise NoBoundError(f"bounding one image takes more memory than there is: {reason}") from reason
            lacking = True
        if lacking:  # after the except block, so that the exception no longer holds the memory
            size = max(1, size // 2)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    return torch.cat(parts) if parts else torch.zeros(0)


class _Sizes(fx.Interpreter):
    def run_node(self, n: fx.Node) -> object:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            n.meta["shape"] = tuple(value.shape[1:])
        return value


@torch.no_grad()
def relaxation_bytes(network: fx.GraphModule, z: Tensor, method: str, patches: bool, classes: int) -> float:
    """About what a backward linear relaxation of one input takes: bounded neurons times the neurons they depend on.

    CROWN-IBP bounds only the margins so; CROWN the input of every ReLU and maximum, one after the other; alpha-CROWN keeps
    all of these for its gradients.
    """
    _Sizes(network).run(z[:1])
    layers = dict(network.named_modules())
    output = output_of(network.graph)
    targets = {output: classes - 1}
    if method != "CROWN-IBP":
        for node in network.graph.nodes:
            if _is_bent(node, layers):
                targets[node.all_input_nodes[0]] = _numel(node.all_input_nodes[0])
    tables = [_coefficients(network.graph, layers, node, rows, patches) for node, rows in targets.items()]
    most = sum(map(sum, tables)) if method == "alpha-CROWN" else max(max(one) for one in tables)
    return float(most * z.element_size() * COPIES[method])


def _is_bent(node: fx.Node, layers: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return isinstance(layers[str(node.target)], nn.ReLU | nn.MaxPool2d)
    return node.op in ("call_function", "call_method") and "relu" in str(node.target)


def _numel(node: fx.Node) -> int:
    return int(torch.Size(node.meta["shape"]).numel())


def _coefficients(graph: fx.Graph, layers: dict[str, nn.Module], of: fx.Node, rows: int, patches: bool) -> list[int]:
    """How many numbers express `rows` neurons of the node `of` by each node before it."""
    fields: dict[fx.Node, float] = {of: 1.0 if patches and len(of.meta["shape"]) == 3 else float("inf")}
    counts = []
    for node in reversed(graph.nodes):
        if node not in fields or "shape" not in node.meta:
            continue
        shape, field = node.meta["shape"], fields[node]
        window = shape[0] * field * field if len(shape) == 3 else float("inf")
        counts.append(rows * int(min(window, _numel(node))))
        for source in node.all_input_nodes:
            fields[source] = max(fields.get(source, 0.0), _field_before(node, layers, field))
    return counts


def _field_before(node: fx.Node, layers: dict[str, nn.Module], field: float) -> float:
    """The side of the window of inputs that a window of this side depends on."""
    layer = layers.get(str(node.target)) if node.op == "call_module" else None
    if isinstance(layer, nn.Conv2d):
        return (field - 1) * max(layer.stride) + max(layer.kernel_size)
    return float("inf") if layer is not None and not isinstance(layer, nn.ReLU | nn.BatchNorm2d) else field
