"""The board's numbers as files: entries (mean over seeds) and records (one row each) as CSV, Parquet and JSON."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from leaderboard.site.sources import Contents

if TYPE_CHECKING:
    import pandas as pd

KINDS = {"csv": "CSV", "parquet": "Parquet", "json": "JSON"}
TABLES = {"board": "the board, a row per entry", "records": "the records behind it, a row each"}


def downloads(contents: Contents) -> dict[str, bytes]:
    """File name to bytes, the same for the same contents; shares are in [0, 1], what an entry has not is empty or null."""
    # the hits per image are the verdict table's, which lies beside the record
    tables = {"board": contents.board, "records": contents.frame.drop(columns="outcome")}
    return {f"{name}.{kind}": _encoded(table, kind) for name, table in tables.items() for kind in KINDS}


def _encoded(table: pd.DataFrame, kind: str) -> bytes:
    if kind == "csv":
        lists = [name for name in table if table[name].map(lambda value: isinstance(value, list)).any()]
        plain = table.assign(**{name: table[name].map(_joined) for name in lists})
        return plain.to_csv(index=False, lineterminator="\n").encode()
    if kind == "json":
        return (table.to_json(orient="records", double_precision=15, indent=1) + "\n").encode()
    out = io.BytesIO()
    table.to_parquet(out, index=False)
    return out.getvalue()


def _joined(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
