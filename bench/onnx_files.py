"""Networks from ONNX files: converted by onnx2torch, rebuilt from plain layers, held against ONNX's own reference evaluator."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from verifiers.rounding import in_float64

from .errors import UserError, first_line
from .models import normalisation
from .onnx_layers import rebuilt

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
        raise UserError(f"{path} cannot be converted: {first_line(reason)}; export it with opset_version=13") from reason
    except Exception as reason:
        raise UserError(f"{path} is not an ONNX network that can be read: {first_line(reason)}") from reason
    model = rebuilt(converted, shape, path)
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
        raise UserError(f"{path} is not an ONNX file: {first_line(reason)}") from reason
    _numbers_as_tensors(onnx, proto)
    tensors = [*proto.graph.initializer, *_constants(proto)]
    if any(one.external_data or one.data_location for one in tensors) or proto.graph.sparse_initializer:
        raise UserError(f"{path} keeps weights outside of the file or in sparse form; save it as one file of plain tensors")
    try:
        onnx.checker.check_model(proto)
        return onnx.shape_inference.infer_shapes(proto)
    except Exception as reason:
        raise UserError(f"{path} is not a valid ONNX network: {first_line(reason)}") from reason


def _numbers_as_tensors(onnx: Any, proto: Any) -> None:
    """A Constant may hold bare numbers in place of a tensor; as tensors they are checked, and later widened, like all others."""
    kinds = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}
    for node in proto.graph.node:
        for one in node.attribute if node.op_type == "Constant" else ():
            if one.name in kinds:
                value = np.asarray(onnx.helper.get_attribute_value(one), dtype=kinds[one.name])
                one.CopyFrom(onnx.helper.make_attribute("value", onnx.numpy_helper.from_array(value)))


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
        raise UserError(f"{path}: ONNX's reference evaluator fails on it: {first_line(reason)}") from reason
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
