"""Old records, read for ever: one pure function per schema, from a document of that schema to one of the next.

A migrated document is what is read; its digest stays that of the document as it was written (`Record.original`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

SCHEMA = 2


def _second(document: dict[str, Any]) -> dict[str, Any]:
    """Schema 2 says which machine measured; schema 1 did not."""
    provenance = document.get("provenance")
    known = {**provenance, "machine": None} if isinstance(provenance, dict) else provenance
    return {**document, "schema": 2, "provenance": known}


STEPS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _second}


def migrated(document: dict[str, Any]) -> dict[str, Any]:
    """The document in the newest schema, itself unchanged; raises KeyError for a schema that never was."""
    while document["schema"] != SCHEMA:
        document = STEPS[document["schema"]](document)
    return document
