"""claims and curves: what papers claim, held against records."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from ..errors import UserError
from .options import Json, app, show


@app.command(epilog="Example: `sparsecert claims runs/mnist-claims@1`")
def claims(
    runs: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Argument(help="Folders of runs, or of several of them; default: the records that come with sparsecert."),
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="The table in Markdown.")] = False,
    as_json: Json = False,
) -> None:
    """Hold what the HYDRA and ATMC responses claim against records: published numbers, what was measured here, a verdict.

    Data sets are never mixed: a claim about CIFAR-10 stays "not measured" until it is run on CIFAR-10.
    """
    from rich.console import Console

    from leaderboard import claim_tables, paper_claims
    from leaderboard.checks import check

    if markdown and as_json:
        raise UserError("--markdown and --json exclude each other; choose one")
    asked = runs or ([paper_claims.RECORDS] if paper_claims.RECORDS.is_dir() else [])
    folders = [own for folder in asked for own in paper_claims.record_folders(folder)]
    measured = paper_claims.load_measured(folders)
    problems = [f"{one.record.id}: {sentence}" for one in measured for sentence in check(one.record, one.folder)]
    if problems:
        print(*problems, sep="\n", file=sys.stderr)
        raise typer.Exit(3)
    lines = paper_claims.lines(paper_claims.read_claims(), measured)
    if as_json:
        show({"records": len(measured), "claims": [line.as_json() for line in lines]})
    elif markdown:
        print(claim_tables.markdown(lines), end="")
    else:
        claim_tables.terminal(lines, Console())


@app.command(epilog="Example: `sparsecert curves runs/mnist-inits@1`")
def curves(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, such as runs/mnist-inits@1.")],
    phase: Annotated[str, typer.Option(help="Which phase of the training.")] = "prune",
    out: Annotated[Optional[Path], typer.Option(help="Folder of the figures; default: figures in each run's folder.")] = None,  # noqa: UP045
    as_json: Json = False,
) -> None:
    """Draw loss and gradient magnitude over the epochs of a phase, a line per method: a PNG and its numbers as CSV.

    With the suite mnist-inits@1 this is Figure 1 of the HYDRA response: its score initialisation against six others.
    """
    from leaderboard.curves import draw, read_curves

    from ..files import make_folder

    made = []
    for run in runs:
        made += draw(read_curves(run, phase), make_folder(out or run / "figures"), f"{run.resolve().name}-{phase}")
    if as_json:
        show({"figures": [{"png": str(png), "csv": str(table)} for png, table in made]})
    else:
        for png, table in made:
            print(f"figure: {png}\nnumbers: {table}")
