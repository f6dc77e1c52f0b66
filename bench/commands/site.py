"""leaderboard site: boards as static pages."""

from __future__ import annotations

import inspect
import os
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from .boards import leaderboard
from .options import Json, show

CORES = os.cpu_count() or 1


@leaderboard.command(epilog="Example: `sparsecert leaderboard site runs/digits@1 --out site`")
def site(
    places: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Argument(help="Folders of runs or of records, or of several of either; default: the records of sparsecert itself."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the pages: a new one, or that of an earlier site.")] = Path("site"),
    as_json: Json = False,
) -> None:
    """Write boards as a static site: sorting, filters, pictures, a page per record and method, downloads. It opens from disk.

    Every record is checked first; one that does not hold is marked on the pages, named on stderr, and the exit code is 3.
    """
    from leaderboard.paper_claims import RECORDS
    from leaderboard.site.sources import gather
    from leaderboard.site.write import write_site

    contents = gather(places or [RECORDS], CORES)
    page = write_site(contents, out, about_methods(), CORES)
    found = [*contents.problems]
    found += [f"{name}: {sentence}" for name, one in contents.kept.items() for sentence in one.problems]
    frame = contents.frame
    found += [f"{name}: contradicted by a witness" for name in frame.loc[frame["status"] == "contradicted", "record"]]
    print(*found, sep="\n", end="\n" if found else "", file=sys.stderr)
    if as_json:
        show({"page": str(page), "records": len(contents.kept), "problems": found})
    else:
        print(f"board: {page}\nrecords: {len(contents.kept)}")
    if found:
        raise typer.Exit(3)


def about_methods() -> dict[str, str]:
    """What each pruning method of sparsecert does, by name."""
    from ..methods import METHODS

    return {name: inspect.getdoc(method) or "" for name, method in METHODS.items()}
