"""Contracts of plug-ins: what every method, objective, attack and verifier promises, tried on networks that train in a blink."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from typing import Any

from attacks import Library, attack_class, library
from attacks import names as attack_names

from ..build import CATALOGUES, build, find
from ..errors import UserError, unknown
from .attacks import attack_findings
from .cases import Finding
from .methods import method_findings
from .objectives import objective_findings
from .verifiers import verifier_findings

KINDS = ("method", "objective", "attack", "verifier")
FINDINGS = {
    "method": method_findings, "objective": objective_findings, "attack": attack_findings, "verifier": verifier_findings,
}

__all__ = ["FINDINGS", "KINDS", "Finding", "findings", "kind_of"]


def findings(kind: str, name: str) -> Iterator[Finding]:
    """Every contract of the kind, tried on what `name` stands for, in about half a minute on one core.

    name: file.py:Class, module:Class or a known name. A file is loaded anew for every object, as a new process would.
    Raises UserError where nothing can be built from the name alone.
    """
    if kind not in KINDS:
        raise unknown("kind", kind, KINDS)
    build(kind, {"name": name, **_threat(kind, name)})
    return FINDINGS[kind](lambda **fields: build(kind, {"name": name, **fields}))


def _threat(kind: str, name: str) -> dict[str, Any]:
    """The fields that a suite's threat fills in: norm keeps its default where it has one, since not every tool takes linf."""
    if kind not in ("attack", "verifier"):
        return {}
    if kind == "attack" and ":" not in name:
        found = attack_class(name)
        return {"norm": library.NORMS[name][0] if found is Library else getattr(found, "norm", "linf"), "eps": "1/10"}
    given = {one.name for one in dataclasses.fields(find(kind, name)) if one.default is not dataclasses.MISSING}
    return {field: value for field, value in (("norm", "linf"), ("eps", "1/10")) if field not in given}


def kind_of(name: str) -> str:
    """Whether a name stands for a method, an objective, an attack or a verifier. Raises UserError where that is not clear."""
    if ":" not in name:
        kinds = [kind for kind, known in CATALOGUES.items() if name in known]
        kinds += ["attack"] * (name in attack_names())
        if len(kinds) == 1:
            return kinds[0]
        if kinds:
            raise UserError(f"{name!r} is the name of {' and '.join(f'a {kind}' for kind in kinds)}; say which with --kind")
        raise unknown("plug-in", name, [*(one for known in CATALOGUES.values() for one in known), *attack_names()])
    found = find("plug-in", name)
    try:
        words = [one for one in inspect.signature(found.__call__).parameters if one != "self"]
    except (TypeError, ValueError):
        words = []
    if len(words) == 4 and "progress" in words:
        return "objective"
    if len(words) == 3 and (words[2] == "training" or inspect.isgeneratorfunction(found.__call__)):
        return "method"
    if len(words) == 3:
        return "verifier" if any(hasattr(found, mark) for mark in ("deterministic", "costly", "falsifies")) else "attack"
    raise UserError(
        f"cannot tell what {name!r} is from its __call__({', '.join(words)}): a method takes (model, density, training), an "
        "objective (model, x, y, progress), attacks and verifiers (model, x, y); say which with --kind"
    )
