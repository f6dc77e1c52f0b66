"""list: what there is."""

from __future__ import annotations

import inspect
from typing import Annotated, Any

import typer

from ..errors import unknown
from .certify import SMOOTHING, certify
from .options import Json, app, show

KINDS = ("methods", "objectives", "attacks", "verifiers", "models", "data", "suites")


@app.command("list", epilog="Example: `sparsecert list verifiers`")
def list_(
    kind: Annotated[str, typer.Argument(help=", ".join(KINDS))],
    as_json: Json = False,
) -> None:
    """List what there is: every name with its guarantee (or summary) and its fields with their defaults."""
    if kind not in KINDS:
        raise unknown("list", kind, KINDS)
    entries = catalogue(kind)
    if as_json:
        show(entries)
        return
    for one in entries:
        fields = ", ".join(f"{name}={value}" for name, value in one["fields"].items())
        print(one["name"] + (f" ({fields})" if fields else ""))
        print(f"    {one['summary']}")
        if one.get("certify"):
            print("    certify asks with " + ", ".join(f"{name}={value}" for name, value in one["certify"].items()))


def catalogue(kind: str) -> list[dict[str, Any]]:
    """Entries {name, summary, fields} of one kind; of verifiers also the defaults that `certify` has instead of the fields'."""
    from .. import build
    from ..cells import read_suite, shipped
    from ..data import DATASETS
    from ..models import ARCHITECTURES

    if kind == "attacks":
        return build.described_attacks()
    if kind == "models":
        return [build.entry(name, function) for name, function in ARCHITECTURES.items()]
    if kind == "data":
        return [
            {"name": name, "summary": source.description, "fields": {"files": source.files or "embedded"}}
            for name, source in DATASETS.items()
        ]
    if kind == "suites":
        suites = {name: read_suite(name) for name in shipped()}
        return [{"name": k, "summary": s.description, "fields": {"cells": len(s.cells)}} for k, s in suites.items()]
    entries = build.described(kind.removesuffix("s"))
    return [{**one, "certify": _of_certify(one)} for one in entries] if kind == "verifiers" else entries


def _of_certify(one: dict[str, Any]) -> dict[str, Any]:
    """Where certify's options differ from the fields of a verifier; the norm is the user's word for both."""
    options, own = inspect.signature(certify).parameters, ("eps", *(SMOOTHING if one["name"] == "smoothing" else ()))
    return {name: options[name].default for name in own if options[name].default != one["fields"][name]}
