"""replay and selfcheck: does a record hold, and does this installation still give known answers?"""

from __future__ import annotations

import secrets
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from .options import DataDir, Device, Json, app, show

if TYPE_CHECKING:
    from ..replay import Replay
    from ..selfcheck import Outcome


@app.command(epilog="Example: `sparsecert replay runs/digits@1/records/NAME.json --spot 50`")
def replay(
    path: Annotated[
        Path, typer.Argument(help="A record (.../records/ID.json), a folder of certify --out, or a contradiction (.json).")
    ],
    spot: Annotated[int, typer.Option(help="How many certificates are proven again, drawn at random.")] = 20,
    seed: Annotated[
        Optional[int], typer.Option(help="Of the draw; default: another one each time, which is printed.")  # noqa: UP045
    ] = None,
    device: Device = "cpu",
    data_dir: DataDir = None,
    plugins: Annotated[bool, typer.Option("--plugins", help="Also run code from outside that it names.")] = False,
    as_json: Json = False,
) -> None:
    """Execute the witnesses of a record again and prove a random part of its certificates again; exit code 3 if one fails."""
    import torch

    from ..claims import Outside
    from ..replay import replay as again
    from ..run import pick_device

    torch.set_num_threads(1)
    seed = secrets.randbits(32) if seed is None else seed  # whoever forged the file must not have known the draw
    found = again(path, spot, seed, Outside(pick_device(device), data_dir, plugins))
    if as_json:
        show(found.as_json())
    else:
        print_replay(found)
    if not found.holds:
        raise typer.Exit(3)


def print_replay(found: Replay) -> None:
    from rich.console import Console
    from rich.table import Table

    print(f"replay of {found.name}" + ("" if found.seed is None else f", spot checks drawn with --seed {found.seed}"))
    table = Table()
    for name in ("what", "by", "holds", "fails"):
        table.add_column(name, justify="right" if name in ("holds", "fails") else "left")
    counts = Counter((one.what, one.by, one.holds) for one in found.findings)
    for what, by in dict.fromkeys((one.what, one.by) for one in found.findings):
        table.add_row(what, by, str(counts[what, by, True]), str(counts[what, by, False]))
    console = Console()
    console.print(table)
    for one in found.findings:
        sample = "" if one.sample is None else f" of sample {one.sample}"
        if one.why:
            print(f"fails: {one.what}{sample}{f' by {one.by}' if one.by else ''}: {one.why}")
        elif one.note and one.by:
            print(f"note: {one.what}{sample} by {one.by}: {one.note}")
    for note in found.notes:
        print(f"note: {note}")
    if found.caught:
        words = ", ".join(f"{chance:.1%} if {share:.0%} were false" for share, chance in found.caught.items())
        print(f"{found.spot} of {found.certificates} certificates were proven again; a false one would have been met with "
              f"probability {words}")  # fmt: skip
    print("it holds" if found.holds else "it does not hold")


@app.command(epilog="Example: `sparsecert selfcheck`")
def selfcheck(device: Device = "cpu", as_json: Json = False) -> None:
    """Run every shipped verifier on small networks whose exact answers are known; exit code 3 if one is wrong."""
    import torch

    from ..run import pick_device
    from ..selfcheck import outcome_on

    torch.set_num_threads(1)
    found = outcome_on(pick_device(device))
    if as_json:
        checks = [{"question": one.question, "tool": one.tool, "holds": one.holds, "why": one.why} for one in found.checks]
        show({"holds": not found.failed, "digest": found.digest, "calibration": found.calibration, "checks": checks})
    else:
        print_outcome(found)
    if found.failed:
        raise typer.Exit(3)


def print_outcome(found: Outcome) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="known answers", title_justify="left")
    for name in ("tool", "holds", "fails"):
        table.add_column(name, justify="left" if name == "tool" else "right")
    counts = Counter((one.tool, one.holds) for one in found.checks)
    for tool in dict.fromkeys(one.tool for one in found.checks):
        table.add_row(tool, str(counts[tool, True]), str(counts[tool, False]))
    Console().print(table)
    for one in found.failed:
        print(f"fails: {one.tool} on {one.question}: {one.why}")
    print(found.sentence)
