"""A network converted by onnx2torch, rebuilt from the layers and sums that bounds have rules for."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from verifiers.normalise import Normalize

from .errors import UserError, first_line


class _Value(NamedTuple):
    """A value that depends on the input: its place in the new graph, what it is for one random input, if one step reads it."""

    node: fx.Node
    sample: Tensor
    alone: bool = True


class _RefusedError(Exception):
    """This form of an operator has no plain layer."""


class _Builder:
    """The new graph, layer by layer."""

    def __init__(self, sample: Tensor) -> None:
        self.graph, self.root, self.counts = fx.Graph(), nn.Module(), Counter[str]()
        self.start = _Value(self.graph.placeholder("x"), sample)
        self.layers: dict[fx.Node, Any] = {}

    def put(self, value: _Value, layer: nn.Module) -> _Value:
        kind = type(layer).__name__.lower()
        name, self.counts[kind] = f"{kind}_{self.counts[kind]}", self.counts[kind] + 1
        self.root.add_module(name, layer.eval())
        node = self.graph.call_module(name, (value.node,))
        self.layers[node] = layer
        return _Value(node, layer(value.sample))

    def last(self, value: _Value, kind: type[nn.Module]) -> Any:
        """The layer that made the value, if it is of this kind and nothing else reads the value."""
        layer = self.layers.get(value.node)
        return layer if type(layer) is kind and value.alone else None


@torch.no_grad()
def rebuilt(converted: fx.GraphModule, shape: tuple[int, ...], path: Path) -> nn.Module:
    """The converted graph from layers and sums that bounds have rules for; constants are computed, shapes taken at batch 1."""
    modules = dict(converted.named_modules())
    sample = torch.rand(1, *shape, generator=torch.Generator().manual_seed(0))
    builder = _Builder(sample)
    values: dict[fx.Node, Any] = {}
    for node in converted.graph.nodes:
        args = fx.node.map_arg(node.args, values.__getitem__)
        if node.op == "placeholder":
            values[node] = builder.start
        elif node.op == "get_attr":
            values[node] = operator.attrgetter(str(node.target))(converted)
        elif node.op == "output":
            (result,) = args
            if not isinstance(result, _Value):
                raise UserError(f"{path}: its output does not depend on its input")
            builder.graph.output(result.node)
        else:
            values[node] = _step(builder, node, modules.get(str(node.target)), args, path)
        if isinstance(values.get(node), _Value):
            values[node] = values[node]._replace(alone=values[node].alone and len(node.users) == 1)
    return fx.GraphModule(builder.root, builder.graph).eval().requires_grad_(False)


def _step(builder: _Builder, node: fx.Node, module: Any, args: tuple[Any, ...], path: Path) -> Any:
    """One operation: a value of the new graph, or a constant where it depends on constants and shapes only."""
    title = type(module).__name__.removeprefix("Onnx") if module is not None else str(node.target)
    try:
        if node.op != "call_module" or node.kwargs:
            raise _RefusedError("it has several outputs or left-out inputs")
        if title == "Shape":
            return module(*(one.sample if isinstance(one, _Value) else one for one in args))
        if not any(isinstance(one, _Value) for one in args):
            return module(*args)
        rule = RULES.get(type(module)) or RULES.get(title)
        if rule is None:
            raise _RefusedError("no plain layer computes it here")
        return rule(builder, module, *args)
    except _RefusedError as reason:
        raise UserError(f"{path}: the operator {title} ({node.name}) is not supported in this form: {reason}") from reason
    except (RuntimeError, ValueError, TypeError, IndexError) as reason:
        raise UserError(f"{path}: the operator {title} ({node.name}) fails: {first_line(reason)}") from reason


def _keep(builder: _Builder, module: Any, value: _Value) -> _Value:
    return builder.put(value, module)


def _drop(builder: _Builder, module: Any, value: _Value, *_: Any) -> _Value:
    return value


def _batchnorm(builder: _Builder, module: Any, value: Any, *rest: Any) -> _Value:
    if not isinstance(value, _Value) or any(isinstance(one, _Value) for one in rest) or value.sample.dim() not in (2, 4):
        raise _RefusedError("only with constants, on images and flat values, is")
    layer = (nn.BatchNorm2d if value.sample.dim() == 4 else nn.BatchNorm1d)(len(rest[0]), eps=module.epsilon)
    for name, constant in zip(("weight", "bias", "running_mean", "running_var"), rest, strict=True):
        getattr(layer, name).data = constant.clone()
    return builder.put(value, layer)


def _pool(builder: _Builder, module: Any, value: _Value) -> _Value:
    for name in ("kernel_size", "stride", "padding", "dilation"):
        setting = getattr(module, name, None)
        if isinstance(setting, list):
            setattr(module, name, tuple(setting))
    return builder.put(value, module)


def _linear_layer(builder: _Builder, module: nn.Linear, value: _Value) -> _Value:
    return _linear(builder, value, module.weight, module.bias)


def _linear(builder: _Builder, value: _Value, weight: Tensor, bias: Tensor | None) -> _Value:
    if value.sample.dim() != 2:
        raise _RefusedError(f"its input has shape {tuple(value.sample.shape)}, expected [N, features]")
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight.data = weight.detach().clone().contiguous()
    if bias is not None:
        layer.bias.data = bias.detach().reshape(-1).expand(len(weight)).clone()
    return builder.put(value, layer)


def _matmul(builder: _Builder, module: Any, value: Any, weight: Any) -> _Value:
    if not isinstance(value, _Value) or isinstance(weight, _Value) or weight.dim() != 2:
        raise _RefusedError("only a value times a constant matrix is")
    return _linear(builder, value, weight.T, None)


def _gemm(builder: _Builder, module: Any, value: Any, weight: Any, bias: Any = None) -> _Value:
    constant = not isinstance(weight, _Value) and not isinstance(bias, _Value)
    if not isinstance(value, _Value) or not constant or module.trans_a or (module.alpha, module.beta) != (1.0, 1.0):
        raise _RefusedError("only a value times a constant matrix plus a constant is")
    return _linear(builder, value, weight if module.trans_b else weight.T, bias)


def _reshaped(builder: _Builder, module: Any, value: Any, *rest: Any) -> _Value:
    if not isinstance(value, _Value) or any(isinstance(one, _Value) for one in rest):
        raise _RefusedError("only to a constant shape is")
    after = module(value.sample, *rest)
    if after.shape == value.sample.shape:
        return value
    if after.shape != (1, value.sample.numel()):
        raise _RefusedError(f"{tuple(value.sample.shape)} to {tuple(after.shape)}, only flattening is")
    return builder.put(value, nn.Flatten())


def _average(builder: _Builder, module: Any, value: _Value) -> _Value:
    after = module(value.sample)
    kept = value.sample.shape[:2]
    mean = torch.allclose(after.reshape(-1), value.sample.mean((2, 3)).reshape(-1)) if value.sample.dim() == 4 else False
    if not mean or after.shape not in (kept, (*kept, 1, 1)):
        raise _RefusedError("only the mean over all pixels of a channel is")
    average = builder.put(value, nn.AdaptiveAvgPool2d(1))
    return average if after.dim() == 4 else builder.put(average, nn.Flatten())


def _concat(builder: _Builder, module: Any, *parts: Any) -> _Value:
    if not all(isinstance(one, _Value) for one in parts) or module.axis % parts[0].sample.dim() == 0:
        raise _RefusedError("only of values, along another axis than the batch, is")
    node = builder.graph.call_function(torch.cat, ([one.node for one in parts], module.axis))
    return _Value(node, torch.cat([one.sample for one in parts], module.axis))


def _clip(builder: _Builder, module: Any, value: _Value) -> _Value:
    if module.min_val is None or module.max_val is None or not module.min_val < module.max_val:
        raise _RefusedError("only between two constants is")
    return builder.put(value, nn.Hardtanh(float(module.min_val), float(module.max_val)))


def _arithmetic(builder: _Builder, module: Any, a: Any, b: Any) -> _Value:
    """A sum of two values; or one with a constant per channel, as normalisation, bias or BatchNorm."""
    does = {torch.add: "add", torch.sub: "sub", torch.mul: "mul"}.get(module.math_op_function, "div")
    if isinstance(a, _Value) and isinstance(b, _Value):
        if does != "add" or a.sample.shape != b.sample.shape:
            raise _RefusedError("of two values only sums of one shape are")
        return _Value(builder.graph.call_function(operator.add, (a.node, b.node)), a.sample + b.sample)
    value, first = (a, False) if isinstance(a, _Value) else (b, True)
    if (first and does == "div") or module.broadcast:
        raise _RefusedError("only with a constant as the second operand is")
    constant = b if value is a else a
    neutral = bool((constant == (0 if does in ("add", "sub") else 1)).all()) and not (first and does == "sub")
    if neutral and torch.broadcast_shapes(value.sample.shape, constant.shape) == value.sample.shape:
        return value
    return _with_constant(builder, value, does, first, _per_channel(value, constant))


def _per_channel(value: _Value, constant: Tensor) -> Tensor:
    """[C] of a constant that is the same at every position of a channel."""
    channels, rank = value.sample.shape[1], value.sample.dim()
    sides = (1,) * (rank - constant.dim()) + tuple(constant.shape)
    if rank not in (2, 4) or sides not in ((1, side, *(1,) * (rank - 2)) for side in (1, channels)):
        raise _RefusedError(f"a constant of shape {[*constant.shape]} is not one number per channel of {[*value.sample.shape]}")
    return constant.reshape(-1).float().expand(channels).clone()


def _with_constant(builder: _Builder, value: _Value, does: str, first: bool, constant: Tensor) -> _Value:
    if value.sample.dim() == 4 and not first:
        normalised = _normalised(builder, value, does, constant)
        if normalised is not None:
            return normalised
    linear = builder.last(value, nn.Linear)
    if linear is not None and linear.bias is None and does == "add":
        linear.bias = nn.Parameter(constant)
        return _Value(value.node, value.sample + constant)
    if does == "div" and not bool(((1 / constant).double() * constant.double() == 1).all()):
        raise _RefusedError("division only of the input [N, C, H, W], or by numbers with an exact float32 inverse, is")
    one = torch.ones_like(constant)
    scale = {"add": one, "sub": -one if first else one, "mul": constant, "div": 1 / constant}[does]
    shift = {"add": constant, "sub": constant if first else -constant}.get(does, torch.zeros_like(constant))
    return builder.put(value, _scaled(value, scale, shift))


def _normalised(builder: _Builder, value: _Value, does: str, constant: Tensor) -> _Value | None:
    """(x - mean) / std as the first thing that is done to the image: a layer that bounds know."""
    if value.node is builder.start.node:
        if does == "div" and bool((constant > 0).all()):
            return builder.put(value, Normalize([0.0] * len(constant), constant.tolist()))
        if does in ("sub", "add"):
            return builder.put(value, Normalize((constant if does == "sub" else -constant).tolist(), [1.0] * len(constant)))
    layer = builder.last(value, Normalize)
    if does == "div" and layer is not None and bool((layer.std == 1).all()) and bool((constant > 0).all()):
        layer.std.copy_(constant.view_as(layer.std))
        return _Value(value.node, value.sample / layer.std)
    return None


def _scaled(value: _Value, scale: Tensor, shift: Tensor) -> nn.Module:
    """scale * x + shift as a BatchNorm, which is exact here and whose numbers do not count as weights."""
    layer = (nn.BatchNorm2d if value.sample.dim() == 4 else nn.BatchNorm1d)(len(scale), eps=0.0)
    layer.weight.data, layer.bias.data = scale.clone(), shift.clone()
    return layer


RULES: dict[Any, Callable[..., _Value]] = {
    **dict.fromkeys((nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Tanh), _keep),
    **dict.fromkeys((nn.Identity, nn.Dropout, "CopyIdentity", "Identity", "DropoutDynamic"), _drop),
    **dict.fromkeys((nn.MaxPool2d, nn.AvgPool2d), _pool),
    **dict.fromkeys((nn.Flatten, "Flatten", "Reshape", "SqueezeStaticAxes", "SqueezeDynamicAxes"), _reshaped),
    **dict.fromkeys(("UnsqueezeStaticAxes", "UnsqueezeDynamicAxes"), _reshaped),
    **dict.fromkeys(("GlobalAveragePool", "GlobalAveragePoolWithKnownInputShape", "ReduceStaticAxes"), _average),
    nn.Linear: _linear_layer,
    "BatchNorm": _batchnorm,
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Concat": _concat,
    "Clip": _clip,
    "BinaryMathOperation": _arithmetic,
}
