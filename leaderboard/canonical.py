"""One byte string per value, so that a digest depends on what a record says and not on how it was written down."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Two runs of the same cell say the same; only the clock differs, so it stays outside the digest.
OUTSIDE_DIGEST = frozenset({"digest", "timing"})


def canonical(obj: Any) -> bytes:
    """The same bytes for equal JSON values, whatever the order of their keys: sorted, compact, UTF-8.

    Raises ValueError for NaN and infinities, which JSON has not, and TypeError for what is no JSON value.
    """
    text = json.dumps(obj, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8")


def digest(record: Mapping[str, Any]) -> str:
    """The sha256 (64 hex digits) of a record's canonical form without its fields "digest" and "timing"."""
    return hashlib.sha256(canonical({k: v for k, v in record.items() if k not in OUTSIDE_DIGEST})).hexdigest()


def sha256_file(path: str | Path) -> str:
    """The sha256 (64 hex digits) of a file's bytes, read in pieces. Raises OSError where it cannot be read."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
