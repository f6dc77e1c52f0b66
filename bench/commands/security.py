"""leaderboard security: robust accuracy over eps of one or several records, drawn and as numbers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from .boards import leaderboard
from .options import Json, show

if TYPE_CHECKING:
    from leaderboard.record import Record


@leaderboard.command(epilog="Example: `sparsecert leaderboard security runs/mine@1/records/NAME.json --out curve.svg`")
def security(
    records: Annotated[list[Path], typer.Argument(help="Records (.../records/ID.json) of one norm; each becomes a line.")],
    out: Annotated[Path, typer.Option("--out", help="The picture, FILE.svg or FILE.png; a CSV of its numbers lies beside it.")],
    attack: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="Names or labels of the attacks that count; default: all in the norm of the threat."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Draw which share no attack has broken at each eps, from the distances of the witnesses in the verdict rows."""
    import pandas as pd

    from leaderboard.errors import BoardError
    from leaderboard.record import read
    from leaderboard.security import draw, even_grid, labels_of, security_curve
    from leaderboard.stats import ball

    found, norms, curves = [read(path) for path in records], set[str](), {}
    for path, record in zip(records, found, strict=True):
        cell = record.document["cell"]
        labels = labels_of(cell, attack or ())
        norms |= {ball(cell, one)[0] for one in cell["attacks"] if one["label"] in labels}
        curves[record.id] = security_curve(record.verdicts(path.parent), cell, labels, even_grid(cell, labels))
    if len(norms) > 1:
        raise BoardError(f"the records were attacked in {' and '.join(sorted(norms))}; draw them one norm at a time")
    names = _names(found)
    draw({names[name]: curve for name, curve in curves.items()}, norms.pop(), out)
    table = pd.concat([curve.assign(record=name) for name, curve in curves.items()], ignore_index=True)
    table.to_csv(out.with_suffix(".csv"), index=False)
    if as_json:
        points = {name: curve.to_dict(orient="records") for name, curve in curves.items()}
        show({"out": str(out), "csv": str(out.with_suffix(".csv")), "curves": points})
    else:
        print(f"drew {out}, numbers in {out.with_suffix('.csv')}")


def _names(records: list[Record]) -> dict[str, str]:
    """What to call each record in the legend: its method, objective, density and seed, or its id where that is not enough."""
    words = {one.id: "{method}, {objective}, density {density}, seed {seed}".format(**_facts(one)) for one in records}
    short = list(words.values())
    return {name: text if short.count(text) == 1 else name for name, text in words.items()}


def _facts(record: Record) -> dict[str, str]:
    cell = record.document["cell"]
    named = {key: cell[key]["name"].rpartition(":")[2] for key in ("method", "objective")}
    return {**named, "density": cell["density"], "seed": str(cell["seed"])}
