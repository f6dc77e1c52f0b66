"""A network as a torch.fx graph, walked with one rule per operation."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from torch import fx, nn
from torch.nn.utils.parametrize import type_before_parametrizations as layer_type

from .normalise import Normalize
from .proof import UnsupportedNetworkError

Value = TypeVar("Value")
Rule = Callable[..., Any]
Rules = Mapping[Any, Rule]

Shape = tuple[tuple[str, type, bool], ...]
_graphs: weakref.WeakKeyDictionary[nn.Module, tuple[Shape, fx.Graph]] = weakref.WeakKeyDictionary()


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Normalize) or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module) -> fx.Graph:
    """The graph of the model: traced once, and again when layers or modes changed; parametrizations may come and go.

    Raises UnsupportedNetworkError for a forward that cannot be traced, takes several inputs or is changed by hooks.
    """
    shape = _shape(model)
    _refuse_hooks(model)
    if model not in _graphs or _graphs[model][0] != shape:
        try:
            graph = _Tracer().trace(model)
        except Exception as reason:
            raise UnsupportedNetworkError(f"the network's forward cannot be traced by torch.fx: {reason}") from reason
        inputs = [node.name for node in graph.nodes if node.op == "placeholder"]
        if len(inputs) != 1:
            raise UnsupportedNetworkError(f"the network must take one tensor of images, its forward takes {', '.join(inputs)}")
        _graphs[model] = shape, graph
    return _graphs[model][1]


def _shape(model: nn.Module) -> Shape:
    return tuple((name, layer_type(layer), layer.training) for name, layer in model.named_modules())


def share_trace(model: nn.Module, copy: nn.Module) -> None:
    """A deep copy takes the graph of its original, if that was traced with the same layers in the same modes."""
    if model in _graphs and _graphs[model][0] == _shape(copy):
        _graphs[copy] = _graphs[model]


def _refuse_hooks(model: nn.Module) -> None:
    for name, layer in model.named_modules():
        if layer._forward_hooks or layer._forward_pre_hooks:
            raise UnsupportedNetworkError(
                f"the layer {name!r} has forward hooks, which bounds cannot see; bake them in (prune.remove for masks)"
            )


def output_of(graph: fx.Graph) -> fx.Node:
    """The node whose value the network returns."""
    (output,) = (node for node in graph.nodes if node.op == "output")
    result = output.args[0]
    if not isinstance(result, fx.Node):
        raise UnsupportedNetworkError("the network must return one tensor of logits")
    return result


def operation(node: fx.Node, modules: Mapping[str, nn.Module]) -> Any:
    """What a rule table is keyed by: the layer's type, the function, or the method's name."""
    return layer_type(modules[str(node.target)]) if node.op == "call_module" else node.target


def name_of(kind: Any) -> str:
    return kind if isinstance(kind, str) else getattr(kind, "__name__", str(kind))


def visit(model: nn.Module, value: Value, rules: Rules) -> Iterator[tuple[fx.Node, Any]]:
    """Every operation with its value, in order, when each is done by its rule; see `walk`."""
    modules, graph = dict(model.named_modules()), trace(model)
    values: dict[fx.Node, Any] = {}
    uses = {node: len(node.users) for node in graph.nodes}
    for node in graph.nodes:
        if node.op == "output":
            return
        values[node] = value if node.op == "placeholder" else _step(node, modules, rules, values)
        yield node, values[node]
        for source in node.all_input_nodes:
            uses[source] -= 1
            if uses[source] == 0:
                del values[source]


def walk(model: nn.Module, value: Value, rules: Rules, wanted: fx.Node | None = None) -> Any:
    """The value of the output, or of the node `wanted`, when every operation is done by its rule.

    A rule is called as rule(layer, value, ...) for layers and rule(value, ...) for functions and methods. Values that
    nothing needs any more are dropped at once: without gradients, memory stays that of the widest layer.
    Raises UnsupportedNetworkError, naming the operation, where the table has no rule.
    """
    wanted = output_of(trace(model)) if wanted is None else wanted
    return next(found for node, found in visit(model, value, rules) if node is wanted)


def _step(node: fx.Node, modules: Mapping[str, nn.Module], rules: Rules, values: dict[fx.Node, Any]) -> Any:
    if node.op == "get_attr":
        raise UnsupportedNetworkError(f"no bound rule for the constant {node.target!r} inside the network's forward")
    kind = operation(node, modules)
    if kind not in rules:
        known = ", ".join(sorted({name_of(key) for key in rules}))
        raise UnsupportedNetworkError(f"no bound rule for {name_of(kind)} ({node.name}); known: {known}")
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    first = (modules[str(node.target)],) if node.op == "call_module" else ()
    return rules[kind](*first, *args, **kwargs)
