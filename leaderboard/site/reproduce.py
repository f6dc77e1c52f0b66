"""A record's cell as a suite of its own, for whoever wants to measure it again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def suite_of(cell: Mapping[str, Any]) -> str:
    """A suite file (TOML) for this one cell and its dense reference: `sparsecert run` of it gives the record's id again.

    A field whose value is null is left out: TOML has no null, and where a plug-in's field may be null, that is its default.
    """
    data = {key: value for key, value in cell["data"].items() if not key.endswith("sha256")}
    rule = cell.get("samples", {})
    samples = {rule["rule"]: rule["value"]} if "value" in rule else {}
    grid = {"arch": [cell["arch"]], "density": [cell["density"]], "seed": [cell["seed"]]}
    tables = {
        "[suite]": {"name": cell["suite"], "version": cell["version"]}, "[data]": data, "[samples]": samples,
        "[threat]": cell["threat"], "[budget]": cell["budget"], "[grid]": grid, "[[method]]": cell["method"],
        "[[objective]]": {**cell["objective"], "headline": cell["headline"]},
    }
    tools = [(f"[[{kind}]]", one) for kind in ("attack", "verifier") for one in cell[f"{kind}s"]]
    return "\n".join(f"{title}\n{_lines(fields)}" for title, fields in [*tables.items(), *tools])


def _lines(fields: Mapping[str, Any]) -> str:
    return "".join(f"{_text(key)} = {_value(value)}\n" for key, value in fields.items() if value is not None)


def _value(value: Any) -> str:
    """A JSON value as TOML, on one line."""
    if isinstance(value, Mapping):
        inner = ", ".join(f"{_text(key)} = {_value(own)}" for key, own in value.items() if own is not None)
        return f"{{ {inner} }}"
    if isinstance(value, list):
        return f"[{', '.join(_value(one) for one in value)}]"
    return _text(value) if isinstance(value, str) else json.dumps(value)


def _text(text: str) -> str:
    """A basic string; TOML's escapes are JSON's, but for DEL, which JSON leaves as it is."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
