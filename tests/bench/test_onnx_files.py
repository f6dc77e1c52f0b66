"""ONNX files: what is read computes what the file says, verifiers take it, everything else is refused in one sentence."""

from __future__ import annotations

import importlib.util
import json
import sys
import warnings
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bench.onnx_files
from bench.__main__ import main
from bench.errors import UserError
from bench.models import build_model
from bench.onnx_files import on_images, read_onnx
from verifiers import IBP, Crown, Exact
from verifiers.normalise import Normalize

onnx = pytest.importorskip("onnx")
if importlib.util.find_spec("onnx2torch") is None:
    pytest.skip("onnx2torch is not installed", allow_module_level=True)
from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402

EPS = Fraction(1, 100)


class Residual(nn.Module):
    """Normalisation, BatchNorm with statistics of its own, a sum of two paths, a mean over the pixels, view(N, -1)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 4, 3, 2, 1), nn.BatchNorm2d(4)
        self.second, self.last = nn.Conv2d(4, 4, 3, 1, 1), nn.Linear(4, 10)
        self.normalise = Normalize([0.3], [0.4])

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.first(self.normalise(x))))
        h = torch.relu(h + self.second(h)).mean([2, 3])
        return self.last(h.view(h.size(0), -1))


def with_batchnorm() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(),
        nn.Linear(24, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(), nn.Linear(12, 10),
    )  # fmt: skip


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = {
    "mlp": (lambda: build_model("mlp", (1, 8, 8), 10, (0.2,), (0.5,)), (1, 8, 8)),
    "cnn_small": (lambda: build_model("cnn_small", (3, 8, 8), 10, (0.2, 0.3, 0.1), (0.5, 0.6, 0.7)), (3, 8, 8)),
    "cnn_large": (lambda: build_model("cnn_large", (1, 8, 8), 10), (1, 8, 8)),
    "lenet": (lambda: build_model("lenet", (1, 16, 16), 10), (1, 16, 16)),
    "batchnorm": (with_batchnorm, (1, 8, 8)),
    "residual": (Residual, (1, 8, 8)),
}


def built(name: str) -> tuple[nn.Module, tuple[int, int, int]]:
    """The net in eval mode with statistics that are not the trivial ones."""
    make, shape = NETS[name]
    torch.manual_seed(0)
    model = make()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(layer.running_mean), nn.init.uniform_(layer.running_var, 0.5, 2)
            nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
    return model.eval().requires_grad_(False), shape


def save(model: nn.Module, shape: tuple[int, ...], path: Path, opset: int = 13, open_batch: bool = True) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, (torch.rand(1, *shape),), str(path), dynamo=False, opset_version=opset, input_names=["X"], output_names=["Y"],
            dynamic_axes={"X": {0: "N"}, "Y": {0: "N"}} if open_batch else None, training=torch.onnx.TrainingMode.PRESERVE,
        )
    return path


def refused(path: Path) -> str:
    with pytest.raises(UserError) as found:
        read_onnx(path)
    assert "\n" not in str(found.value)
    return str(found.value)


# ---- the same network --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opset, open_batch", [(11, True), (13, True), (13, False), (17, False)])
@pytest.mark.parametrize("name", NETS)
def test_an_exported_network_comes_back_for_any_batch(name: str, opset: int, open_batch: bool, tmp_path: Path) -> None:
    model, shape = built(name)
    found = read_onnx(save(model, shape, tmp_path / "net.onnx", opset, open_batch))
    x = torch.rand(5, *shape, dtype=torch.float64) * 3 - 1
    assert (found.shape, found.outputs) == (shape, 10)
    assert torch.allclose(found.model.double()(x), model.double()(x), rtol=1e-9, atol=1e-9)


SLOW = [pytest.param(name, (Crown,), marks=pytest.mark.slow) for name in ("cnn_large", "lenet")]
BOUNDED = [
    ("mlp", (IBP, Crown, Exact)), ("cnn_small", (IBP, Crown)), ("batchnorm", (IBP, Crown, Exact)),
    ("residual", (IBP, Crown, Exact)), ("cnn_large", (IBP,)), ("lenet", (IBP,)), *SLOW,
]  # fmt: skip


@pytest.mark.parametrize("name, kinds", BOUNDED)
def test_bounds_of_an_imported_network_are_those_of_the_original(name: str, kinds: tuple[Any, ...], tmp_path: Path) -> None:
    model, shape = built(name)
    imported = read_onnx(save(model, shape, tmp_path / "net.onnx")).model
    x = torch.rand(2, *shape)
    y = model(x).argmax(1)
    for kind in kinds:
        want, got = (kind("linf", EPS)(network, x, y) for network in (model, imported))
        assert torch.allclose(got.margin, want.margin, rtol=1e-4, atol=1e-4)
        assert got.status == want.status


def written(path: Path, nodes: list[Any], weights: dict[str, np.ndarray], sides: list[Any], outputs: int) -> Path:
    """A network X -> Y by hand."""
    given = helper.make_tensor_value_info("X", TensorProto.FLOAT, sides)
    result = helper.make_tensor_value_info("Y", TensorProto.FLOAT, [sides[0], outputs])
    tensors = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "net", [given], [result], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    return path


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


FORMS: dict[str, tuple[list[Any], dict[str, np.ndarray], list[Any]]] = {
    "matmul and bias": (
        [("MatMul", "X W", "h"), ("Add", "h b", "a"), ("Relu", "a", "r"), ("MatMul", "r V", "Y")],
        {"W": random(6, 5), "b": random(5), "V": random(5, 3)}, ["N", 6],
    ),
    "a value read before and after its bias": (
        [("MatMul", "X W", "h"), ("Add", "h b", "a"), ("Add", "a h", "s"), ("Relu", "s", "r"), ("MatMul", "r V", "Y")],
        {"W": random(6, 5), "b": random(5), "V": random(5, 3)}, [1, 6],
    ),
    "constants that change nothing, as ACAS Xu files have them": (
        [("Sub", "X zero", "s"), ("Flatten", "s", "f"), ("MatMul", "f W", "h"), ("Add", "h b", "a"), ("Relu", "a", "r"),
         ("MatMul", "r V", "Y")],
        {"zero": np.zeros((1, 1, 1, 6), np.float32), "W": random(6, 5), "b": random(5), "V": random(5, 3)}, [1, 1, 1, 6],
    ),
    "gemm with a bias matrix": (
        [("Gemm", "X W b", "h"), ("Clip", "h low high", "c"), ("Gemm", "c V", "Y")],
        {"W": random(6, 5), "b": random(1, 5), "V": random(5, 3), "low": np.float32(-0.5), "high": np.float32(0.75)}, [1, 6],
    ),
    "scaled image, reshape with the batch inside": (
        [("Mul", "X two", "m"), ("Sub", "one m", "s"), ("Conv", "s K", "h"), ("Relu", "h", "r"), ("Reshape", "r to", "f"),
         ("Gemm", "f V", "Y")],
        {"two": np.float32(2), "one": np.float32(1), "K": random(2, 1, 3, 3), "to": np.array([1, 18]), "V": random(18, 3)},
        [1, 1, 5, 5],
    ),
    "two branches side by side": (
        [("Conv", "X K", "a"), ("Conv", "X L", "b"), ("Concat", "a b", "c", {"axis": 1}), ("Relu", "c", "r"),
         ("GlobalAveragePool", "r", "g"), ("Squeeze", "g ends", "f"), ("Gemm", "f V", "Y")],
        {"K": random(2, 1, 3, 3), "L": random(3, 1, 3, 3), "ends": np.array([2, 3]), "V": random(5, 3)}, ["N", 1, 5, 5],
    ),
    "constants as bare numbers, and a division by a power of two": (
        [("Constant", "", "b", {"value_floats": [0.1, -0.7, 0.3, 0.9, -0.2]}), ("Constant", "", "tenth", {"value_float": 0.1}),
         ("Constant", "", "to", {"value_ints": [1, 5]}), ("MatMul", "X W", "h"), ("Add", "h b", "a"), ("Mul", "a tenth", "m"),
         ("Relu", "m", "r"), ("Div", "r quarter", "d"), ("Reshape", "d to", "f"), ("MatMul", "f V", "Y")],
        {"W": random(6, 5), "V": random(5, 3), "quarter": np.float32(-0.25)}, [1, 6],
    ),
    "an image divided by three": (
        [("Div", "X three", "d"), ("Flatten", "d", "f"), ("MatMul", "f V", "Y")],
        {"three": np.float32(3), "V": random(8, 3)}, ["N", 2, 2, 2],
    ),
    "batchnorm of constants that are computed": (
        [("Identity", "one", "g"), ("BatchNormalization", "X g b m v", "n", {"momentum": 0.9}), ("Flatten", "n", "f"),
         ("Gemm", "f V", "Y")],
        {"one": np.ones(2, np.float32), "b": random(2), "m": random(2), "v": random(2) ** 2, "V": random(8, 3)}, ["N", 2, 2, 2],
    ),
}  # fmt: skip


def nodes_of(form: list[Any]) -> list[Any]:
    return [helper.make_node(kind, ins.split(), [out], **dict(*more)) for kind, ins, out, *more in form]


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_other_exporters_compute_what_the_reference_evaluator_computes(form: str, tmp_path: Path) -> None:
    nodes, weights, sides = FORMS[form]
    path = written(tmp_path / "net.onnx", nodes_of(nodes), weights, sides, 3)
    found = read_onnx(path)
    x = random(4, *sides[1:])
    if form.startswith("batchnorm"):  # the evaluator takes the batch's statistics here, against the specification
        scale, mean = (1 / np.sqrt(weights["v"] + 1e-5))[:, None, None], weights["m"][:, None, None]
        want = (((x - mean) * scale + weights["b"][:, None, None]).reshape(4, -1)) @ weights["V"]
    else:
        evaluator = ReferenceEvaluator(str(path))
        want = np.concatenate([evaluator.run(None, {"X": one[None]})[0] for one in x])
    assert np.allclose(found.model(torch.from_numpy(x)).numpy(), want, rtol=1e-4, atol=1e-5)
    middle = torch.rand(2, *found.shape)
    assert IBP("linf", EPS)(found.model, middle, found.model(middle).argmax(1)).status  # bounds have a rule for every step


def test_a_conversion_that_computes_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, shape = built("mlp")
    path = save(model, shape, tmp_path / "net.onnx")
    library, convert = bench.onnx_files._packages()

    def wrong(proto: Any) -> Any:
        found = convert(proto)
        next(layer for layer in found.modules() if isinstance(layer, nn.Linear)).weight.data[3, 3] += 1e-3
        return found

    monkeypatch.setattr(bench.onnx_files, "_packages", lambda: (library, wrong))
    assert "computes something else" in refused(path)


def test_reading_leaves_no_stand_in_module_behind(tmp_path: Path) -> None:
    before = "torchvision" in sys.modules
    read_onnx(save(*built("mlp"), tmp_path / "net.onnx"))
    assert ("torchvision" in sys.modules) == before


def test_flat_networks_take_images_and_a_normalisation_goes_in_front(tmp_path: Path) -> None:
    nodes, weights, _ = FORMS["matmul and bias"]
    path = written(tmp_path / "net.onnx", nodes_of(nodes), weights, ["N", 6], 3)
    found = read_onnx(path)
    x = torch.rand(4, 1, 2, 3)
    assert torch.equal(on_images(found, (1, 2, 3), 3, path)(x), found.model(x.flatten(1)))
    assert torch.allclose(on_images(found, (1, 2, 3), 3, path, (0.5,), (0.25,))(x), found.model((x.flatten(1) - 0.5) / 0.25))
    for shape, classes, words in (((1, 2, 4), 3, "takes inputs of shape 6"), ((1, 2, 3), 4, "has 3 outputs")):
        with pytest.raises(UserError, match=words):
            on_images(found, shape, classes, path)


# ---- refused -----------------------------------------------------------------------------------------------------------


def with_changes(path: Path, change: Callable[[Any], None]) -> Path:
    proto = onnx.load(path)
    change(proto)
    path.write_bytes(proto.SerializeToString())
    return path


@pytest.mark.parametrize(
    "form, weights, sides, words",
    [
        ([("Softmax", "X", "Y")], {}, ["N", 3], "the operator Softmax"),
        ([("MatMul", "X W", "h"), ("Exp", "h", "Y")], {"W": random(3, 3)}, ["N", 3], "the operator Exp"),
        ([("Mul", "X X", "Y")], {}, ["N", 3], "BinaryMathOperation .* only sums"),
        ([("Gather", "X at", "Y", {"axis": 1})], {"at": np.array([0, 1, 2])}, ["N", 3], "the operator Gather"),
        ([("Conv", "X K", "h", {"pads": [0, 0, 1, 1]}), ("Flatten", "h", "Y")], {"K": random(1, 1, 2, 2)},
         [1, 1, 1, 3], "no plain layer"),
        ([("MatMul", "X W", "Y")], {"W": random(3, 3) * np.float32(np.nan)}, ["N", 3], "'W' holds NaN"),
        ([("MatMul", "X W", "Y")], {"W": random(3, 3)}, [4, 3], r"N open or 1"),
        ([("MatMul", "X W", "Y")], {"W": random(3, 3)}, ["N", "d"], "all other sides known"),
        ([("Relu", "X", "r"), ("Div", "r c", "d"), ("Flatten", "d", "Y")], {"c": np.float32(3)}, [1, 3, 1, 1],
         "division .* exact float32 inverse"),
        ([("Div", "X c", "Y")], {"c": np.array([1, 2, 3], np.float32)}, [1, 3], "exact float32 inverse"),
        ([("Div", "X c", "Y")], {"c": np.array([1, 2, 0], np.float32)}, [1, 3], "exact float32 inverse"),
        ([("Constant", "", "c", {"value_floats": [1.0, 2.0, float("nan")]}), ("Add", "X c", "Y")], {}, [1, 3], "holds NaN"),
        ([("Identity", "W", "Y")], {"W": random(1, 3)}, [1, 3], "does not depend on its input"),
        ([("Reshape", "X to", "h"), ("Flatten", "h", "Y")], {"to": np.array([1, 1, 1, 3])}, [1, 3], "only flattening"),
    ],
)
def test_what_cannot_be_read_is_named(
    form: list[Any], weights: dict[str, np.ndarray], sides: list[Any], words: str, tmp_path: Path
) -> None:
    path = written(tmp_path / "net.onnx", nodes_of(form), weights, sides, 3)
    with pytest.raises(UserError, match=words):
        read_onnx(path)


def test_files_of_other_kinds_are_refused_in_one_sentence(tmp_path: Path) -> None:
    assert "there is no file" in refused(tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_text("not a network")
    assert "is not a" in refused(tmp_path / "text.onnx")
    path = save(*built("mlp"), tmp_path / "net.onnx")
    (tmp_path / "cut.onnx").write_bytes(path.read_bytes()[:-200])
    assert "is not a" in refused(tmp_path / "cut.onnx")


def refused_after(path: Path, change: Callable[[Any], None]) -> str:
    return refused(with_changes(save(*built("mlp"), path), change))


def test_opsets_domains_outside_weights_and_types_are_limited(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"

    def outside(proto: Any) -> None:
        tensor = proto.graph.initializer[0]
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="../secret")

    def double(proto: Any) -> None:
        tensor = proto.graph.initializer[0]
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name))

    assert "opset 21" in refused_after(path, lambda proto: setattr(proto.opset_import[0], "version", 21))
    assert "opset 7" in refused_after(path, lambda proto: setattr(proto.opset_import[0], "version", 7))
    assert "outside of ONNX's own set" in refused_after(path, lambda proto: proto.opset_import.add(domain="com.other", version=1))
    assert "outside of the file" in refused_after(path, outside)
    assert "net.onnx" in refused_after(path, double)
    twice = refused_after(path, lambda proto: proto.graph.input.add().CopyFrom(helper.make_tensor_value_info("Z", 1, [1, 2])))
    assert "2 inputs" in twice


def test_a_missing_package_is_named_with_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(*built("mlp"), tmp_path / "net.onnx")
    monkeypatch.setitem(sys.modules, "onnx2torch", None)
    assert "pip install --no-deps onnx2torch" in refused(path)


# ---- the command line ------------------------------------------------------------------------------------------------


def test_certify_judges_an_onnx_file_and_counts_its_zeros(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, shape = built("mlp")
    model.fc1.weight[:64] = 0  # type: ignore[union-attr, index]
    path = save(model, shape, tmp_path / "net.onnx")
    words = ["certify", str(path), "--data", "digits", "--eps", "1/100", "--limit", "6"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    kept, total = 64 * 64 + 128 * 128 + 128 * 10, 128 * 64 + 128 * 128 + 128 * 10
    assert (found["passport"]["kept"], found["passport"]["total"]) == (kept, total)
    assert (found["layout"], len(found["rows"])) == ("ONNX (opset 13)", 6)


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--arch", "mlp"], "leave out --arch"),
        (["--density", "0.1"], "leave out --density"),
        (["--data", "many.npz"], "the label 10 is none of 10 classes"),
        (["--data", "wide.npz"], "takes inputs of shape 1x8x8"),
        (["--norm", "l2", "--export", "out"], "linf balls"),
    ],
)
def test_options_and_data_that_do_not_fit_are_bad_input(
    words: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("many.npz", x=np.zeros((3, 8, 8), np.uint8), y=np.array([1, 2, 10]))
    np.savez("wide.npz", x=np.zeros((3, 8, 9), np.uint8), y=np.arange(3))
    path = save(*built("mlp"), tmp_path / "net.onnx")
    assert main(["certify", str(path), "--data", "digits", *words]) == 2
    told = capsys.readouterr().err
    assert sentence in told
    assert told.count("\n") == 1
