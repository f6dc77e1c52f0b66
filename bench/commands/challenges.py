"""challenge: a witness against what a record says."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UserError
from .options import DataDir, Device, Json, app, show

if TYPE_CHECKING:
    from ..challenge import Outcome


@app.command(epilog="Example: `sparsecert challenge leaderboard/records/SUITE/NAME.json mine.safetensors --by 'A. Name'`")
def challenge(
    record: Annotated[Path, typer.Argument(help="The record (.../ID.json); its checkpoint must lie where it says.")],
    witnesses: Annotated[
        Path, typer.Argument(help="A safetensors file: `index` int64 [n], the samples' numbers, `images` float32 [n, C, H, W].")
    ],
    by: Annotated[str, typer.Option(help="Who gets the credit.")],
    device: Device = "cpu",
    data_dir: DataDir = None,
    plugins: Annotated[bool, typer.Option("--plugins", help="Also build code from outside that the record names.")] = False,
    as_json: Json = False,
) -> None:
    """Refute a record with images: those that replay lower its numbers; exit code 3 if one contradicts a certificate.

    An image counts if it lies in the exact ball and in [0,1] and the record's network misclassifies it in float64.
    """
    import torch

    from ..challenge import challenge as judge
    from ..claims import Outside
    from ..run import pick_device

    torch.set_num_threads(1)
    found = judge(record, witnesses, by, Outside(pick_device(device), data_dir, plugins))
    for one in found.judged:
        if one.sample is None:
            print(f"sample {one.index} does not count: {one.why}", file=sys.stderr)
    if found.path is None:
        raise UserError(f"none of the {len(found.judged)} witnesses refutes what {found.record} says; nothing was written")
    if as_json:
        show(found.as_json())
    else:
        print_outcome(found, by)
    if found.contradicted:
        raise typer.Exit(3)


def print_outcome(found: Outcome, by: str) -> None:
    for one in found.challenged:
        print(f"sample {one.index}: survives no longer, {', '.join(one.refutes)} (distance {one.distance:.6g})")
    for one in found.contradicted:
        print(f"sample {one.index}: CONTRADICTED, a witness of a certified sample, {', '.join(one.refutes)} (distance "
              f"{one.distance:.6g})")  # fmt: skip
    if found.contradicted:
        print(f"{found.record} is contradicted: it stays listed, frozen and without a rank")
    count = len(found.challenged) + len(found.contradicted)
    print(f"{count} of {len(found.judged)} witnesses count, credit to {by}: {found.path}")
