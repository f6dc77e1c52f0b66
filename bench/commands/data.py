"""data: what lies in the data folder."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from ..errors import UserError
from .options import DataDir, Json, app, show

if TYPE_CHECKING:
    from ..data.inventory import Holding


@app.command("data", epilog="Example: `sparsecert data mnist --data-dir ~/data`")
def data_(
    name: Annotated[Optional[str], typer.Argument(help="One data set; left out: all.")] = None,  # noqa: UP045
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Say for each data set whether it is there, whole and the published one, and how to get it. Downloads nothing.

    The digest is the one that records store, cut to 12 letters (whole with --json). Exit code 2 where a set was named and
    cannot be used.
    """
    from ..data import DATASETS
    from ..data.inventory import survey

    found = [survey(one, data_dir) for one in ([name] if name else DATASETS)]
    if as_json:
        show([{**asdict(one), "usable": one.usable} for one in found])
    else:
        _print(found)
    if name and not found[0].usable:
        raise UserError(found[0].problem)


def _print(found: list[Holding]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("data set", "state", "train / validation / test", "digest")
    for one in found:
        counts = " / ".join(f"{count:,}" for count in one.images) if one.images else ""
        table.add_row(one.name, one.state, counts, (one.digest or "")[:12])
    Console().print(table)
    for one in found:
        how = "" if one.usable else f"{one.name} needs {one.files}, from {one.origin}"
        for words in filter(None, (one.note, one.problem, how)):
            print(words if words is how else f"{one.name}: {words}")
