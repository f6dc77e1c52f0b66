"""What certify does with --vnnlib: one property of one network."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..errors import UserError
from .options import show

if TYPE_CHECKING:
    from ..properties import Answer

KNOWN = {"checkpoint", "vnnlib", "time_limit", "nodes", "seed", "threads", "as_json"}


def answer_property(context: typer.Context, network: Path, asked: Path) -> None:
    """Print the answer as VNN-COMP has it, or as JSON. Raises UserError for options that only images have."""
    from ..onnx_files import is_onnx, read_onnx
    from ..properties import answer
    from ..vnnlib_files import read_property

    if not is_onnx(network):
        raise UserError(f"--vnnlib asks about an .onnx network, not {network}; --export writes one")
    options = context.params
    for name in options:
        source = context.get_parameter_source(name)
        if name not in KNOWN and source is not None and source.name == "COMMANDLINE":
            raise UserError(f"--{name.replace('_', '-')} says nothing about a VNN-LIB property; leave it out with --vnnlib")
    start, limit = time.perf_counter(), options["time_limit"]
    if limit is not None and not limit > 0:
        raise UserError(f"--time-limit must be a positive number of seconds, got {limit}")
    if options["nodes"] < 1:
        raise UserError(f"--nodes must be at least 1, got {options['nodes']}")
    found = read_onnx(network)
    wanted = read_property(asked)
    left = None if limit is None else max(0.001, limit - (time.perf_counter() - start))
    result = answer(found.model, found.shape, wanted, left, options["nodes"], options["seed"])
    seconds = round(time.perf_counter() - start, 4)
    if options["as_json"]:
        show(_as_json(result) | {"network": str(network), "property": str(asked), "layout": found.layout, "seconds": seconds})
    else:
        print(_as_text(result))
        for note in result.notes:
            print(f"note: {note}", file=sys.stderr)


def _as_json(result: Answer) -> dict[str, Any]:
    point = {"x": result.x, "y": result.y} if result.status == "sat" else None
    return {"answer": result.status, "counterexample": point, "nodes": result.nodes, "notes": result.notes}


def _as_text(result: Answer) -> str:
    """The first line is the answer; a counterexample follows as VNN-COMP writes it."""
    pairs = [f"({name}_{i} {value!r})" for name, values in (("X", result.x), ("Y", result.y)) for i, value in enumerate(values)]
    return "\n".join([result.status, "(" + "\n ".join(pairs) + ")"]) if pairs else result.status
