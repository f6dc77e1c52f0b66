"""auto-LiRPA 0.3 (written for torch<1.13) made to run, and to be right, on torch 2.x and numpy 2.x.

Import BoundedModule, BoundedTensor and PerturbationLpNorm from here, never from auto_LiRPA. What each mend is for:
docs/decisions/0003-auto-lirpa.md.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.onnx.symbolic_helper as symbolic_helper
import torch.onnx.utils


def _numpy_module_dropped_in_2() -> None:
    if importlib.util.find_spec("numpy.lib.arraysetops") is None:
        module = types.ModuleType("numpy.lib.arraysetops")
        module.isin = np.isin  # type: ignore[attr-defined]
        sys.modules["numpy.lib.arraysetops"] = module


def _exporter_globals() -> Any:
    for name in ("torch.onnx._internal.torchscript_exporter._globals", "torch.onnx._globals"):
        try:
            return importlib.import_module(name).GLOBALS
        except ImportError:
            continue
    raise ImportError("this torch hides the ONNX exporter's globals, which auto-LiRPA 0.3 needs; use torch 2.6 to 2.13")


def _torch_names_moved_since_1_12() -> None:
    exporter = _exporter_globals()

    def set_opset(version: int) -> None:
        exporter.export_onnx_opset_version = version
        exporter.autograd_inlining = False

    if not hasattr(symbolic_helper, "_set_opset_version"):
        symbolic_helper._set_opset_version = set_opset  # type: ignore[attr-defined]
    if not hasattr(torch._C.Node, "__getitem__"):
        setattr(torch._C.Node, "__getitem__", lambda node, key: getattr(node, node.kindOf(key))(key))  # noqa: B010
    if not hasattr(torch, "_six"):
        torch._six = types.SimpleNamespace(string_classes=(str, bytes))  # type: ignore[attr-defined]


_numpy_module_dropped_in_2()
_torch_names_moved_since_1_12()
_handlers, _level, _recursion = logging.root.handlers[:], logging.root.level, sys.getrecursionlimit()
with warnings.catch_warnings(record=True):  # importing it resets the warning filters and puts a handler on the root logger
    from auto_LiRPA import BoundedModule, BoundedTensor, PerturbationLpNorm
    from auto_LiRPA.operators import BoundAveragePool, BoundMaxPool, BoundMul
logging.root.handlers[:] = _handlers
logging.root.setLevel(_level)
sys.setrecursionlimit(_recursion)  # it asks for a million, which turns endless recursion into a crash


def _accept_remove_duplicate(members: Callable[..., Any]) -> Callable[..., Any]:
    """torch 2 passes one more argument; without this bm.parameters() raises."""

    def named_members(
        self: Any, get: Any, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Any:
        return members(self, get, prefix=prefix, recurse=recurse)

    return named_members


def _contiguous_coefficients(kind: Any) -> None:
    """CROWN through pooling calls .view() on coefficients that newer torch leaves non-contiguous."""
    inner = kind.bound_backward

    def bound_backward(self: Any, lA: Any, uA: Any, *args: Any, **kwargs: Any) -> Any:
        lA, uA = (a.contiguous() if isinstance(a, torch.Tensor) else a for a in (lA, uA))
        return inner(self, lA, uA, *args, **kwargs)

    kind.bound_backward = bound_backward


def _product_of_constants(inner: Callable[..., Any]) -> Callable[..., Any]:
    """weight * mask inside a graph was bounded as weight * weight, silently."""

    def interval_propagate_constant(x: Any, y: Any, op: Any = lambda a, b: a * b) -> Any:
        if x[0] is x[1] and y[0] is y[1]:
            return (op(x[0], y[0]),) * 2
        return inner(x, y, op=op)

    return interval_propagate_constant


BoundedModule._named_members = _accept_remove_duplicate(BoundedModule._named_members)
_contiguous_coefficients(BoundAveragePool)
_contiguous_coefficients(BoundMaxPool)
BoundMul.interval_propagate_constant = staticmethod(_product_of_constants(BoundMul.interval_propagate_constant))

__all__ = ["BoundedModule", "BoundedTensor", "PerturbationLpNorm"]
