"""A network and its robustness questions as files that any other verifier reads: ONNX, VNN-LIB 1.0 and instances.csv."""

from __future__ import annotations

import copy
import math
import warnings
from fractions import Fraction
from pathlib import Path

import torch
from torch import nn

from verifiers.ball import outward_box

from .data import Dataset, Split
from .errors import UserError
from .files import make_folder, write_whole
from .onnx_files import INSTALL, parsed, require_same
from .vnnlib_files import robustness_property

NETWORK, INDEX = "net.onnx", "instances.csv"
OPSET = 13
SECONDS = 60  # the time-out in instances.csv unless another is asked for


def export(model: nn.Module, data: Dataset, samples: Split, eps: Fraction, folder: Path, seconds: float | None = None) -> None:
    """net.onnx, prop_<index>.vnnlib for every sample, and instances.csv (network, property, time-out), as VNN-COMP has them.

    The network in the file equals the model in float64 on several points (ONNX's reference evaluator). A property holds the
    linf ball of radius eps cut with [0,1], rounded outwards to float32 and written digit by digit: whoever excludes its
    counterexamples has certified the sample. Raises UserError where the network cannot be written.
    """
    folder = make_folder(folder)
    _write_network(model, data.shape, folder / NETWORK)
    limit = SECONDS if seconds is None else max(1, math.ceil(seconds))
    lines = []
    for at, (index, label) in enumerate(zip(samples.index.tolist(), samples.labels.tolist(), strict=True)):
        box = outward_box(samples.pixels(torch.tensor([at])).cpu(), eps)
        title = f"{data.name}: image {index} of class {label}, all images of [0,1] within linf distance {eps}"
        text = robustness_property(box.lower.numpy(), box.upper.numpy(), label, data.classes, title)
        name = f"prop_{index}.vnnlib"
        _write_text(folder / name, text)
        lines.append(f"{NETWORK},{name},{limit}\n")
    _write_text(folder / INDEX, "".join(lines))


def _write_text(path: Path, text: str) -> None:
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _write_network(model: nn.Module, shape: tuple[int, int, int], path: Path) -> None:
    """Layer by layer as it is: no BatchNorm is folded, no constant is computed ahead."""
    plain = copy.deepcopy(model).cpu().eval()

    def write(temporary: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter's own plans
            torch.onnx.export(
                plain, (torch.zeros(1, *shape),), str(temporary), dynamo=False, opset_version=OPSET, input_names=["X"],
                output_names=["Y"], dynamic_axes={"X": {0: "N"}, "Y": {0: "N"}}, do_constant_folding=False,
                training=torch.onnx.TrainingMode.PRESERVE,
            )  # fmt: skip
        require_same(plain, parsed(temporary), shape, path)

    try:
        write_whole(path, write)
    except UserError:
        raise
    except ImportError as reason:
        raise UserError(f"--export needs the package onnx ({reason}): {INSTALL}") from reason
    except Exception as reason:
        first = next(iter(str(reason).splitlines()), "")
        raise UserError(f"the network cannot be written as ONNX: {type(reason).__name__}: {first}") from reason
