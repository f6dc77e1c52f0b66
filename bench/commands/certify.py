"""certify: one checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from ..errors import UserError
from .options import DataDir, Device, Json, app, show, stderr


@app.command(epilog="Example: `sparsecert certify runs/digits@1/checkpoints/NAME.safetensors --eps 0.1 --verifier crown`")
def certify(
    checkpoint: Annotated[Path, typer.Argument(help="A plain checkpoint: .safetensors, or a .pt state dict.")],
    arch: Annotated[Optional[str], typer.Option(help="Architecture; default: what the file says or what fits.")] = None,  # noqa: UP045
    data: Annotated[Optional[str], typer.Option(help="Data set; default: what the file says.")] = None,  # noqa: UP045
    norm: Annotated[str, typer.Option(help="linf or l2.")] = "linf",
    eps: Annotated[str, typer.Option(help="Radius in [0,1] pixel units, such as 8/255 or 0.1.")] = "0.1",
    verifier: Annotated[Optional[list[str]], typer.Option(help="May be repeated; default: ibp and crown.")] = None,  # noqa: UP045
    attack: Annotated[
        Optional[list[str]], typer.Option(help="May be repeated; default: pgd, none where only smoothing is asked.")  # noqa: UP045
    ] = None,
    limit: Annotated[Optional[int], typer.Option(help="Only the first LIMIT test images.")] = None,  # noqa: UP045
    sigma: Annotated[float, typer.Option(help="Smoothing: noise level.")] = 0.25,
    n0: Annotated[int, typer.Option(help="Smoothing: draws that choose the class.")] = 100,
    n: Annotated[int, typer.Option(help="Smoothing: draws that bound its probability.")] = 100_000,
    alpha: Annotated[float, typer.Option(help="Smoothing: failure probability per image.")] = 0.001,
    seed: Annotated[int, typer.Option(help="Smoothing: seed of the noise.")] = 0,
    mean: Annotated[Optional[list[float]], typer.Option(help="Normalisation inside the network, one per channel.")] = None,  # noqa: UP045
    std: Annotated[Optional[list[float]], typer.Option(help="Normalisation inside the network, one per channel.")] = None,  # noqa: UP045
    rule: Annotated[
        str, typer.Option(help="Smoothing: fixed takes all n draws; sequential stops once the question at eps is settled.")
    ] = "fixed",
    grid: Annotated[
        Optional[str], typer.Option(help="Smoothing, sequential: further radii, like 0.25,0.5; one alpha covers all.")  # noqa: UP045
    ] = None,
    curtail: Annotated[bool, typer.Option(help="Smoothing, fixed: stop when the answer at eps cannot change any more.")] = False,
    nodes: Annotated[int, typer.Option(help="exact: subproblems per image.")] = 2000,
    time_limit: Annotated[Optional[float], typer.Option(help="exact: seconds per image.")] = None,  # noqa: UP045
    density: Annotated[Optional[str], typer.Option(help="Kept fraction, for score checkpoints that do not hold it.")] = None,  # noqa: UP045
    claim: Annotated[Optional[str], typer.Option(help="Claimed pruned share, such as 0.99; exit code 3 if false.")] = None,  # noqa: UP045
    batch_size: Annotated[int, typer.Option(help="Images judged, and kept with --out, at a time.")] = 250,
    total_time_limit: Annotated[
        Optional[float], typer.Option(help="Seconds; images not reached have the verdict timeout.")  # noqa: UP045
    ] = None,
    out: Annotated[
        Optional[Path], typer.Option(help="Folder for answer.json and rows.csv; a killed run goes on from there.")  # noqa: UP045
    ] = None,
    device: Device = "cpu",
    threads: Annotated[int, typer.Option(help="CPU threads; more than 1 pays for large networks on an idle machine.")] = 1,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Certify one checkpoint: measured density, clean, attacked and certified accuracy, and a verdict per test image."""
    import torch

    from ..build import fraction
    from ..certify import Question
    from ..certify import certify as ask
    from ..evaluate import ContradictionError
    from ..files import make_folder
    from ..run import pick_device
    from ..screen import Judging

    if norm not in ("linf", "l2"):
        raise UserError(f"--norm must be linf or l2, got {norm!r}")
    radius = fraction(eps, "--eps")
    if radius == 0:
        raise UserError("--eps must be positive: a ball of radius 0 proves nothing")
    for name, number in (("--limit", limit), ("--batch-size", batch_size), ("--threads", threads)):
        if number is not None and number < 1:
            raise UserError(f"{name} must be at least 1, got {number}")
    if total_time_limit is not None and not total_time_limit > 0:
        raise UserError(f"--total-time-limit must be a positive number of seconds, got {total_time_limit}")
    asked = tuple(verifier or ("ibp", "crown"))
    attacks = tuple(attack) if attack else () if set(asked) == {"smoothing"} else ("pgd",)
    smoothing: tuple[tuple[str, Any], ...] = (("sigma", sigma), ("n0", n0), ("n", n), ("alpha", alpha), ("seed", seed))
    smoothing += (("rule", rule), ("curtail", curtail))
    smoothing += (("grid", tuple(grid.split(","))),) if grid else ()
    exact = (("nodes", nodes), ("seconds", time_limit))
    torch.set_num_threads(threads)
    question = Question(
        checkpoint, norm, radius, asked, attacks, arch, data,
        data_dir, limit, tuple(mean or ()), tuple(std or ()), smoothing, exact,
        None if density is None else fraction(density, "--density"), None if claim is None else fraction(claim, "--claim"),
        batch_size, total_time_limit,
    )
    with Judging(stderr()) as screen:
        try:
            answer = ask(question, pick_device(device), None if out is None else make_folder(out), screen.moved)
        except ContradictionError as found:
            if as_json:
                show({"contradiction": found.facts, "witness": found.witness.tolist()})
            print(f"contradiction: {found}", file=sys.stderr)
            raise typer.Exit(3) from found
    if as_json:
        show(answer)
    else:
        print_answer(answer)
    if answer["claim"] and not answer["claim"]["holds"]:
        print(f"sparsecert: {answer['claim']['sentence']}", file=sys.stderr)
        raise typer.Exit(3)


def print_answer(answer: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    found, threat = answer["summary"], answer["threat"]
    table = Table(title=f"{answer['arch']} on {answer['data']}, {threat['norm']} eps {threat['eps']}", title_justify="left")
    table.add_column("what")
    table.add_column("count", justify="right")
    table.add_column("share", justify="right")

    def row(name: str, count: int) -> None:
        table.add_row(name, str(count), f"{100 * count / max(1, found['n']):.1f} %")

    row("test images", found["n"])
    row("clean", found["clean"])
    for name, count in {**found["survived"]}.items():
        row(f"survive {name}", count)
    for name, count in found["certified_by"].items():
        row(f"certified by {name}", count)
    for name in ("certified", "broken", "open", "misclassified", "abstain", "timeout", "error"):
        if found[name] or name in ("certified", "broken", "open"):
            row(f"verdict {name}", found[name])
    console = Console()
    console.print(table)
    console.print(f"density {found['density']:.4%} of conv and linear weights, {found['seconds']['total']:.1f} s")
    sentences = [f"read as: {answer['layout']}", *answer["notes"], *(flag["sentence"] for flag in answer["health"])]
    sentences += [answer["claim"]["sentence"]] if answer["claim"] else []
    for sentence in [*sentences, *answer["warnings"], *([answer["note"]] if answer["note"] else [])]:
        console.print(f"note: {sentence}", highlight=False, markup=False)
