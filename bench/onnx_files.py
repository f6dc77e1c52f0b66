"""Networks from ONNX files: converted by onnx2torch, rebuilt from plain layers, held against ONNX's own reference evaluator."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import operator
import sys
import types
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx, nn

from verifiers.normalise import Normalize
from verifiers.rounding import in_float64

from .errors import UserError
from .models import normalisation

LARGEST = 2**31 - 1  # bytes of a file: what protobuf can hold
WIDEST = 2**27  # numbers of one value on the way through the network
OPSETS = range(9, 18)
OPERATORS = {
    "Add", "AveragePool", "BatchNormalization", "Clip", "Concat", "Constant", "Conv", "Div", "Dropout", "Flatten", "Gather",
    "Gemm", "GlobalAveragePool", "Identity", "MatMul", "MaxPool", "Mul", "ReduceMean", "Relu", "Reshape", "Shape", "Sigmoid",
    "Squeeze", "Sub", "Tanh", "Unsqueeze",
}  # fmt: skip
INSTALL = "pip install onnx==1.23.2, then pip install --no-deps onnx2torch==1.5.15"


@dataclass(frozen=True)
class OnnxNetwork:
    """A plain network in eval mode on float32 [N, *shape], its number of outputs, and what kind of file it came from."""

    model: nn.Module
    shape: tuple[int, ...]
    outputs: int
    layout: str


def is_onnx(path: Path) -> bool:
    return path.suffix.lower() == ".onnx"


def read_onnx(path: Path) -> OnnxNetwork:
    """The file's function of one input as a plain network: equal to ONNX's reference evaluator on several points in float64.

    Only batch size 1 of the file is read; the network then takes any batch. Raises UserError, one sentence that names the
    operator, for whatever is no feed-forward network of plain layers. Nothing is unpickled, nothing beside the file is read.
    """
    onnx, convert = _packages()
    proto = parsed(path)
    _refuse_foreign(onnx, proto, path)
    shape, outputs = _single_input(onnx, proto, path)
    try:
        converted = convert(proto).eval()
    except NotImplementedError as reason:
        raise UserError(f"{path} cannot be converted: {_first(reason)}; export it with opset_version=13") from reason
    except Exception as reason:
        raise UserError(f"{path} is not an ONNX network that can be read: {_first(reason)}") from reason
    model = _rebuilt(converted, shape, path)
    require_same(model, proto, shape, path)
    opset = max(one.version for one in proto.opset_import)
    return OnnxNetwork(model, shape, outputs, f"ONNX (opset {opset})")


def on_images(
    found: OnnxNetwork, shape: tuple[int, int, int], classes: int, path: Path,
    mean: Sequence[float] = (), std: Sequence[float] = (),
) -> nn.Module:  # fmt: skip
    """The network on images [N, *shape] with logits [N, classes], behind a normalisation where one is given.

    A network on flat inputs gets a Flatten in front. Raises UserError where the file is about other shapes.
    """
    if found.outputs != classes:
        raise UserError(f"{path} has {found.outputs} outputs, the data have {classes} classes")
    if found.shape not in (shape, (math.prod(shape),)):
        raise UserError(f"{path} takes inputs of shape {_by(found.shape)}, the images have {_by(shape)}; channels come first")
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if mean or std:
        layers["normalise"] = normalisation(mean, std, shape[0])
    if found.shape != shape:
        layers["flatten"] = nn.Flatten()
    return nn.Sequential(layers | OrderedDict(network=found.model)).eval() if layers else found.model


def _by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _first(reason: BaseException) -> str:
    return f"{type(reason).__name__}: {next(iter(str(reason).splitlines()), '')}"


# ---- the file --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _without_torchvision() -> Iterator[None]:
    """onnx2torch imports it for two operators that no classifier has; an empty module stands in for it meanwhile."""
    names = ("torchvision", "torchvision.ops")
    if importlib.util.find_spec("torchvision") is not None:
        yield
        return
    whole, ops = (types.ModuleType(name) for name in names)
    vars(whole)["ops"], vars(ops)["roi_align"] = ops, None
    sys.modules.update(zip(names, (whole, ops)))
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


def _packages() -> tuple[Any, Callable[[Any], fx.GraphModule]]:
    try:
        import onnx
        import onnx.reference

        with _without_torchvision():
            from onnx2torch import convert
    except ImportError as reason:
        raise UserError(f"ONNX files need the packages onnx and onnx2torch ({reason}): {INSTALL}") from reason
    return onnx, convert


def parsed(path: Path) -> Any:
    """The file as ONNX's own ModelProto, valid and complete in itself, with the shapes that it implies; else UserError."""
    onnx, _ = _packages()
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    if path.stat().st_size > LARGEST:
        raise UserError(f"{path} has {path.stat().st_size:,} bytes; ONNX files above {LARGEST:,} are refused")
    try:
        proto = onnx.load_model_from_string(path.read_bytes())
    except Exception as reason:
        raise UserError(f"{path} is not an ONNX file: {_first(reason)}") from reason
    tensors = [*proto.graph.initializer, *_constants(proto)]
    if any(one.external_data or one.data_location for one in tensors) or proto.graph.sparse_initializer:
        raise UserError(f"{path} keeps weights outside of the file or in sparse form; save it as one file of plain tensors")
    try:
        onnx.checker.check_model(proto)
        return onnx.shape_inference.infer_shapes(proto)
    except Exception as reason:
        raise UserError(f"{path} is not a valid ONNX network: {_first(reason)}") from reason


def _constants(proto: Any) -> Iterator[Any]:
    for node in proto.graph.node:
        yield from (one.t for one in node.attribute if one.HasField("t"))


def _refuse_foreign(onnx: Any, proto: Any, path: Path) -> None:
    """Other operators, opsets, types and sizes than those that this reader is tried on."""
    if proto.functions or any(one.domain not in ("", "ai.onnx") for one in (*proto.opset_import, *proto.graph.node)):
        raise UserError(f"{path} uses operators from outside of ONNX's own set; export it with opset_version=13")
    for one in proto.opset_import:
        if one.version not in OPSETS:
            known = f"{OPSETS[0]} to {OPSETS[-1]} are read"
            raise UserError(f"{path} is written in opset {one.version}; {known}, so export it with opset_version=13")
    for node in proto.graph.node:
        training = any(one.name == "training_mode" and one.i for one in node.attribute)
        if node.op_type not in OPERATORS or training or (node.op_type == "Dropout" and len(node.input) > 2):
            mode = " in training mode" if node.op_type in OPERATORS else ""
            raise UserError(f"{path}: the operator {node.op_type}{mode} ({node.name or node.output[0]}) is not supported")
    for tensor in (*proto.graph.initializer, *_constants(proto)):
        _refuse_numbers(onnx, tensor, path)
    for value in proto.graph.value_info:
        if math.prod(side.dim_value or 1 for side in value.type.tensor_type.shape.dim) > WIDEST:
            raise UserError(f"{path}: the value {value.name} has more than {WIDEST:,} numbers")


def _refuse_numbers(onnx: Any, tensor: Any, path: Path) -> None:
    kinds = onnx.TensorProto
    if tensor.data_type not in (kinds.FLOAT, kinds.INT64, kinds.INT32):
        raise UserError(f"{path}: the tensor {tensor.name!r} has type {kinds.DataType.Name(tensor.data_type)}; float32 is read")
    if not np.isfinite(onnx.numpy_helper.to_array(tensor)).all():
        raise UserError(f"{path}: the tensor {tensor.name!r} holds NaN or infinite values")


def _single_input(onnx: Any, proto: Any, path: Path) -> tuple[tuple[int, ...], int]:
    """(shape of one input, number of outputs) of a network with one float32 input [N, ...] and one output [N, outputs]."""
    weights = {one.name for one in proto.graph.initializer}
    inputs = [one for one in proto.graph.input if one.name not in weights]
    if len(inputs) != 1 or len(proto.graph.output) != 1:
        raise UserError(f"{path} has {len(inputs)} inputs and {len(proto.graph.output)} outputs; one of each is read")
    kind = inputs[0].type.tensor_type
    sides = [side.dim_value for side in kind.shape.dim]
    if kind.elem_type != onnx.TensorProto.FLOAT or len(sides) < 2 or sides[0] not in (0, 1) or min(sides[1:]) < 1:
        raise UserError(
            f"{path}: its input must be float32 of shape [N, ...] with N open or 1 and all other sides known, it has {sides}"
        )
    out = [side.dim_value for side in proto.graph.output[0].type.tensor_type.shape.dim]
    if len(out) != 2 or out[1] < 1:
        raise UserError(f"{path}: its output must have shape [N, classes], it has {out}")
    return tuple(sides[1:]), out[1]


# ---- plain layers ----------------------------------------------------------------------------------------------------


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
def _rebuilt(converted: fx.GraphModule, shape: tuple[int, ...], path: Path) -> nn.Module:
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
        raise UserError(f"{path}: the operator {title} ({node.name}) fails: {_first(reason)}") from reason


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


# ---- the same function -----------------------------------------------------------------------------------------------


def require_same(model: nn.Module, proto: Any, shape: tuple[int, ...], path: Path) -> None:
    """The network and the file agree in float64, on images, on corners and on values far outside [0,1]; else UserError."""
    double = in_float64(model)
    evaluate = _reference(proto)
    generator = torch.Generator().manual_seed(1)
    noise = torch.rand(6, *shape, generator=generator, dtype=torch.float64)
    points = torch.cat([noise[:2], noise[2:4].round(), torch.zeros_like(noise[:1]), 40 * (noise[4:] - 0.5)])
    try:
        want = torch.cat([torch.from_numpy(evaluate(point[None].numpy())) for point in points])
    except Exception as reason:
        raise UserError(f"{path}: ONNX's reference evaluator fails on it: {_first(reason)}") from reason
    with torch.no_grad():
        got = double(points)
    scale = max(1.0, float(want.abs().max()))
    if got.shape != want.shape or not float((got - want).abs().max()) <= 1e-8 * scale:
        raise UserError(f"{path}: the converted network computes something else than the file says, so nothing is certified")


def _reference(proto: Any) -> Callable[[np.ndarray], np.ndarray]:
    """ONNX's own evaluator on a copy of the file in float64.

    Its BatchNormalization before opset 14 takes the statistics of the batch whenever a momentum is set, against the
    specification, so that operator is replaced.
    """
    from onnx import ModelProto, TensorProto, numpy_helper
    from onnx.reference import ReferenceEvaluator
    from onnx.reference.op_run import OpRun

    class BatchNormalization(OpRun):
        def _run(  # type: ignore[no-untyped-def]
            self, x, scale, bias, mean, var, epsilon=None, momentum=None, training_mode=None
        ):  # fmt: skip
            scale, bias, mean, var = (one.reshape(-1, *[1] * (x.ndim - 2)) for one in (scale, bias, mean, var))
            return (scale * (x - mean) / np.sqrt(var + epsilon) + bias,)

    double = ModelProto()
    double.CopyFrom(proto)
    for tensor in (*double.graph.initializer, *_constants(double)):
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name))
    weights = {one.name for one in proto.graph.initializer}
    (name,) = (one.name for one in proto.graph.input if one.name not in weights)
    evaluator = ReferenceEvaluator(double, new_ops=[BatchNormalization])
    return lambda x: np.asarray(evaluator.run(None, {name: x})[0])
