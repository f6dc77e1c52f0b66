"""The command line's application and the options that several verbs have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

app = typer.Typer(
    name="sparsecert", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown",
    help="Train, prune, attack, certify and rank sparse image classifiers. Exit codes: 0 done, 1 a cell failed (the rest is "
    "written), 2 bad input, 3 a contradicted certificate or a failed check.",
)

Out = Annotated[Path, typer.Option(help="Folder of all results.", show_default=True)]
DataDir = Annotated[Optional[str], typer.Option(help="Folder of the data sets; default: $SPARSECERT_DATA, else ./data.")]  # noqa: UP045
Device = Annotated[str, typer.Option(help="cpu, cuda or auto.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, for machines; progress goes to stderr.")]
Workers = Annotated[Optional[int], typer.Option(help="One-thread processes; default: one per core, 1 on a GPU.")]  # noqa: UP045
RUNS = Path("runs")


def stderr() -> Any:
    from rich.console import Console

    return Console(stderr=True)


def show(value: Any) -> None:
    print(json.dumps(value, indent=1, allow_nan=False))
