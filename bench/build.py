"""Words become objects here and nowhere else: a name and fields, as a suite or a command line gives them, to a dataclass."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping
from decimal import Decimal
from fractions import Fraction
from importlib import metadata
from pathlib import Path
from typing import Any

from attacks import ATTACKS, attack_class, attack_fields, library
from attacks import names as attack_names
from verifiers import VERIFIERS

from .errors import UserError, unknown
from .methods import METHODS
from .objectives import OBJECTIVES

CATALOGUES: dict[str, Mapping[str, type]] = {"method": METHODS, "objective": OBJECTIVES, "verifier": VERIFIERS}
Spec = Mapping[str, Any]
# two digits of exponent at most: 1e999999999 would be exact and never finish
NUMBER = re.compile(r"[+-]?\d{1,15}(\.\d{1,15})?([eE][+-]?\d{1,2})?|[+-]?\d{1,15}/\d{1,15}", re.ASCII)


def fraction(text: Any, what: str) -> Fraction:
    """An exact number from text such as 8/255 or 0.1 (a TOML number is read by its decimal digits, so 0.1 is 1/10)."""
    if isinstance(text, Fraction):
        return text
    words = format(Decimal(repr(text)), "f") if isinstance(text, float) else str(text).strip()
    try:
        if isinstance(text, bool) or not NUMBER.fullmatch(words):
            raise ValueError
        value = Fraction(words)
        if max(len(str(abs(value.numerator))), len(str(value.denominator))) > 15:
            raise ValueError
        return value
    except (ValueError, ZeroDivisionError):
        raise UserError(f"{what} must be a fraction such as 8/255 or a decimal such as 0.1, got {text!r}") from None


def build(kind: str, spec: Spec) -> Any:
    """The object that `spec` = {name, fields...} describes. Raises UserError naming the value and the nearest known name."""
    name = spec.get("name")
    if not isinstance(name, str):
        raise UserError(f"a {kind} needs a name, got {name!r}")
    fields = {key: value for key, value in spec.items() if key != "name"}
    if kind == "attack" and ":" not in name:
        return _build_attack(name, fields)
    found = find(kind, name)
    _fits_its_kind(kind, name, found)
    return construct(found, fields, f"{kind} {name!r}")


def _fits_its_kind(kind: str, name: str, found: type) -> None:
    """Attacks and verifiers are handed the suite's threat, and a verifier must say what its certificates are about."""
    if kind not in ("attack", "verifier"):
        return
    own = {field.name for field in dataclasses.fields(found)}
    if not {"norm", "eps"} <= own:
        raise UserError(f"the {kind} {name!r} needs the fields norm and eps, which the suite's threat fills in")
    if kind == "verifier" and not hasattr(found, "deterministic"):
        raise UserError(f"the verifier {name!r} needs a class attribute `deterministic`, True or False")


def find(kind: str, name: str) -> type:
    """The class behind a shipped name, an entry point, `module:Class` or `file.py:Class`."""
    if ":" in name:
        return _from_outside(kind, name)
    catalogue = CATALOGUES[kind]
    if name in catalogue:
        return catalogue[name]
    entries = {entry.name: entry for entry in metadata.entry_points(group=f"sparsecert.{kind}s")}
    if name in entries:
        return _from_outside(kind, entries[name].value)
    raise unknown(kind, name, [*catalogue, *entries])


def _build_attack(name: str, fields: dict[str, Any]) -> Any:
    try:
        found = attack_class(name)
    except KeyError:
        raise UserError(f"{unknown('attack', name, attack_names())}; `sparsecert list attacks` shows them all") from None
    return construct(found, attack_fields(name, fields), f"attack {name!r}")


def _from_outside(kind: str, name: str) -> type:
    where, _, attribute = name.rpartition(":")
    try:
        module = load_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    except UserError:
        raise
    except Exception as reason:
        raise UserError(f"cannot import the {kind} {name!r}: {type(reason).__name__}: {reason}") from reason
    found = getattr(module, attribute, None)
    if found is None and attribute:
        raise unknown(f"class in {where}", attribute, [key for key, value in vars(module).items() if isinstance(value, type)])
    if not isinstance(found, type) or not dataclasses.is_dataclass(found):
        raise UserError(f"{name!r} is not a dataclass; a {kind} from outside is given as file.py:Class or module:Class")
    return found


def load_file(path: Path) -> types.ModuleType:
    """The module in a Python file of the user's, as the file stands now: a cached one is told from an edit by seconds only.

    Raises UserError where there is no file, and whatever the file raises.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    name = f"sparsecert_plugin_{path.stem}_{abs(hash(str(path.resolve())))}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    exec(compile(path.read_bytes(), str(path), "exec", dont_inherit=True), vars(module))
    return module


def construct(kind: type, fields: Spec, what: str) -> Any:
    """A dataclass from loosely typed fields; unknown fields and wrong types are one sentence each."""
    try:
        hints = typing.get_type_hints(kind)
    except Exception as reason:
        raise UserError(f"{what}: its fields have annotations that cannot be read: {reason}") from reason
    known = {field.name: hints[field.name] for field in dataclasses.fields(kind)}
    for name in fields:
        if name not in known:
            raise unknown(f"field of {what}", name, known)
    try:
        return kind(**{name: convert(value, known[name], f"{name} of {what}") for name, value in fields.items()})
    except (ValueError, TypeError, KeyError) as reason:
        raise UserError(f"{what}: {reason.args[0] if reason.args else reason}") from reason


def convert(value: Any, hint: Any, what: str) -> Any:
    """`value` as the annotated type, exactly; raises UserError with the field, the value and what was expected."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or hint is object:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return convert(value, next(one for one in arguments if one is not type(None)), what)
    if origin is typing.Literal:
        if value not in arguments:
            raise UserError(f"{what} must be one of {', '.join(map(str, arguments))}, got {value!r}")
        return value
    if hint is Fraction:
        return fraction(value, what)
    if origin is tuple:
        if not isinstance(value, list | tuple | Mapping):
            raise UserError(f"{what} must be a list, got {value!r}")
        if isinstance(value, Mapping):
            return tuple(value.items())
        return tuple(convert(one, arguments[0], what) for one in value) if arguments[1:] == (...,) else tuple(value)
    return _scalar(value, hint, what)


def _scalar(value: Any, hint: Any, what: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise UserError(f"{what} must be {hint.__name__}, got {value!r}")
    return value


def plain(value: Any) -> Any:
    """A built object's fields (or any value in them) as JSON: fractions as text, tuples as lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Fraction):
        return str(value)
    if isinstance(value, tuple | list):
        return [plain(one) for one in value]
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    return value


def described(kind: str) -> list[dict[str, Any]]:
    """Every entry of a catalogue: name, guarantee (first docstring line), fields with defaults."""
    return [entry(name, CATALOGUES[kind][name]) for name in CATALOGUES[kind]]


def entry(name: str, found: type | Callable[..., Any]) -> dict[str, Any]:
    line = (found.__doc__ or "").strip().split("\n")[0]
    fields = {}
    if dataclasses.is_dataclass(found):
        fields = {f.name: plain(f.default) for f in dataclasses.fields(found) if f.default is not dataclasses.MISSING}
    return {"name": name, "summary": line, "fields": fields}


def described_attacks() -> list[dict[str, Any]]:
    """Every attack by name: those written here, then torchattacks' by their lower-case names."""
    out = []
    for name in attack_names():
        found = attack_class(name)
        if name in library.NORMS and name not in ATTACKS:
            norms, steps = " and ".join(library.NORMS[name]), library.STRENGTH.get(name, {})
            words = f"torchattacks' {name} in {norms}; its parameters are further fields of the entry (steps = 100, say)"
            out.append({"name": name, "summary": words, "fields": {"seed": 0, **steps}})
        elif name != "torchattacks":
            out.append(entry(name, found))
    return out
