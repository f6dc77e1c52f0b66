"""A network as a torch.fx graph, walked with one rule per operation."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import fx, nn
from torch.nn.utils.parametrize import type_before_parametrizations as layer_type

from .normalise import Normalize
from .proof import UnsupportedNetworkError

Value = TypeVar("Value")
Rule = Callable[..., Any]
Rules = Mapping[Any, Rule]

_graphs: weakref.WeakKeyDictionary[nn.Module, fx.Graph] = weakref.WeakKeyDictionary()


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Normalize) or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module) -> fx.Graph:
    """The graph of the model, traced once; layers are looked up anew at each walk, so parametrizations may come and go."""
    if model not in _graphs:
        try:
            _graphs[model] = _Tracer().trace(model)
        except Exception as reason:
            raise UnsupportedNetworkError(f"the network's forward cannot be traced by torch.fx: {reason}") from reason
    return _graphs[model]


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


def walk(model: nn.Module, value: Value, rules: Rules, until: fx.Node | None = None) -> dict[fx.Node, Any]:
    """Values of all nodes up to and including the output (or before `until`), each by its rule.

    A rule is called as rule(layer, value, ...) for layers and rule(value, ...) for functions and methods.
    Raises UnsupportedNetworkError, naming the operation, where the table has no rule.
    """
    modules = dict(model.named_modules())
    values: dict[fx.Node, Any] = {}
    for node in trace(model).nodes:
        if node is until or node.op == "output":
            break
        if node.op == "placeholder":
            values[node] = value
            continue
        if node.op == "get_attr":
            raise UnsupportedNetworkError(f"no bound rule for the constant {node.target!r} inside the network's forward")
        kind = operation(node, modules)
        if kind not in rules:
            known = ", ".join(sorted({name_of(key) for key in rules}))
            raise UnsupportedNetworkError(f"no bound rule for {name_of(kind)} ({node.name}); known: {known}")
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        first = (modules[str(node.target)],) if node.op == "call_module" else ()
        values[node] = rules[kind](*first, *args, **kwargs)
    return values
