"""certify: one checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from ..errors import UserError
from .interchange import answer_property
from .options import DataDir, Device, Json, app, show, stderr

if TYPE_CHECKING:
    from fractions import Fraction

    from ..question import Question


SMOOTHING = ("sigma", "n0", "n", "alpha", "seed", "rule", "curtail")  # options that are fields of the verifier


@app.command(epilog="Example: `sparsecert certify runs/digits@1/checkpoints/NAME.safetensors --eps 0.1 --verifier crown`")
def certify(
    context: typer.Context,
    checkpoint: Annotated[Path, typer.Argument(help="A plain checkpoint: .safetensors, a .pt state dict, or .onnx.")],
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
    radius: Annotated[bool, typer.Option("--radius", help="exact: bracket each image's minimal distance, up to --eps.")] = False,
    tolerance: Annotated[str, typer.Option(help="exact --radius: width of a bracket that is narrow enough.")] = "1/1000",
    curve: Annotated[
        Optional[str], typer.Option(help="Certified and attacked accuracy at these eps, too, like 0.02,0.05,0.1.")  # noqa: UP045
    ] = None,
    density: Annotated[Optional[str], typer.Option(help="Kept fraction, for score checkpoints that do not hold it.")] = None,  # noqa: UP045
    claim: Annotated[Optional[str], typer.Option(help="Claimed pruned share, such as 0.99; exit code 3 if false.")] = None,  # noqa: UP045
    batch_size: Annotated[int, typer.Option(help="Images judged, and kept with --out, at a time.")] = 250,
    total_time_limit: Annotated[
        Optional[float], typer.Option(help="Seconds; images not reached have the verdict timeout.")  # noqa: UP045
    ] = None,
    out: Annotated[
        Optional[Path], typer.Option(help="Folder for report.html, JSON and tables; a killed run goes on from there.")  # noqa: UP045
    ] = None,
    vnnlib: Annotated[
        Optional[Path], typer.Option(help="Answer this VNN-LIB property of an .onnx network (unsat, sat ...) instead.")  # noqa: UP045
    ] = None,
    export: Annotated[
        Optional[Path], typer.Option(help="Folder for net.onnx and a VNN-LIB property per image, for any other verifier.")  # noqa: UP045
    ] = None,
    device: Device = "cpu",
    threads: Annotated[int, typer.Option(help="CPU threads; more than 1 pays for large networks on an idle machine.")] = 1,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Certify one checkpoint: measured density, clean, attacked and certified accuracy, and a verdict per test image."""
    import torch

    from ..certify import certify as ask
    from ..evaluate import ContradictionError
    from ..files import make_folder
    from ..run import pick_device
    from ..screen import Judging

    _check_counts(context.params)
    torch.set_num_threads(threads)
    if vnnlib is not None:
        answer_property(context, checkpoint, vnnlib)
        return
    question = _question(context.params)
    with Judging(stderr()) as screen:
        try:
            answer = ask(question, pick_device(device), None if out is None else make_folder(out), screen.moved, screen.doing)
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


def _check_counts(options: Mapping[str, Any]) -> None:
    for name in ("limit", "batch_size", "threads"):
        if options[name] is not None and options[name] < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {options[name]}")


def _question(options: Mapping[str, Any]) -> Question:
    """The question that the options of the command line ask; raises UserError for those that make no sense."""
    from ..build import fraction
    from ..question import Question

    norm, total = options["norm"], options["total_time_limit"]
    if norm not in ("linf", "l2"):
        raise UserError(f"--norm must be linf or l2, got {norm!r}")
    if total is not None and not total > 0:
        raise UserError(f"--total-time-limit must be a positive number of seconds, got {total}")
    if not options["radius"] and options["tolerance"] != "1/1000":
        raise UserError("--tolerance is the width of --radius's brackets; ask for --radius as well")
    verifiers = tuple(options["verifier"] or ("ibp", "crown"))
    attacks = tuple(options["attack"] or (() if set(verifiers) == {"smoothing"} else ("pgd",)))
    smoothing = tuple((name, options[name]) for name in SMOOTHING)
    smoothing += (("grid", tuple(_radius(one, "--grid") for one in options["grid"].split(","))),) if options["grid"] else ()
    share = {name: None if options[name] is None else fraction(options[name], f"--{name}") for name in ("density", "claim")}
    return Question(
        Path(options["checkpoint"]), norm, _radius(options["eps"], "--eps"), verifiers, attacks, options["arch"], options["data"],
        options["data_dir"], options["limit"], tuple(options["mean"] or ()), tuple(options["std"] or ()), smoothing,
        (("nodes", options["nodes"]), ("seconds", options["time_limit"])), **share,
        batch=options["batch_size"], total_seconds=total,
        curve=() if options["curve"] is None else tuple(sorted({_radius(one, "--curve") for one in options["curve"].split(",")})),
        tolerance=_radius(options["tolerance"], "--tolerance") if options["radius"] else None, export=options["export"],
    )


def _radius(text: str, option: str) -> Fraction:
    from ..build import fraction

    found = fraction(text, option)
    if found == 0:
        raise UserError(f"{option} must be positive: a radius of 0 proves nothing")
    return found


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
    for point in (point for point in answer["curve"] if point["exact"] is not None):
        what = f"certified by {point['by']}" if point["kind"] == "certified" else "survive every attack"
        console.print(f"at {point['exact']}: {what} {point['count']} of {point['n']}", highlight=False, markup=False)
    if "distance" in found:
        each = found["distance"]
        most = "" if each["median_upper"] is None else f", at most {each['median_upper']:.6g}"
        console.print(f"minimal distance, median of {each['n']} images: at least {each['median_lower'] or 0:.6g}{most}")
    console.print(f"density {found['density']:.4%} of conv and linear weights, {found['seconds']['total']:.1f} s")
    if "stored" in answer["passport"]:
        stored = answer["passport"]["stored"]
        console.print(f"stored form: {stored['kept']:,} non-zeros, {stored['density']:.4%} of the dense weights")
    sentences = [f"read as: {answer['layout']}", *answer["notes"], *(flag["sentence"] for flag in answer["health"])]
    sentences += [answer["claim"]["sentence"]] if answer["claim"] else []
    for sentence in [*sentences, *answer["warnings"], *([answer["note"]] if answer["note"] else [])]:
        console.print(f"note: {sentence}", highlight=False, markup=False)
