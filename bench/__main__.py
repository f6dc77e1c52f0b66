"""The command line: `sparsecert <verb>` and `python -m bench <verb>` are the same program."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from .errors import UserError, unknown

try:  # typer brings its own click since 0.26; before, it stood on the package
    from typer._click.exceptions import ClickException
except ImportError:
    from click.exceptions import ClickException  # type: ignore[no-redef, import-not-found]

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


@app.command(epilog="Example: `sparsecert demo`")
def demo(
    out: Out = RUNS, device: Device = "cpu", workers: Workers = None, as_json: Json = False, data_dir: DataDir = None
) -> None:
    """Run the embedded suite digits@1: the whole job on real data in minutes, ending with the ranked table and a page."""
    run("digits@1", out=out, device=device, workers=workers, as_json=as_json, data_dir=data_dir)


@app.command(epilog="Example: `sparsecert run digits@1 --method my_method.py:Mine --workers 2`")
def run(
    suite: Annotated[str, typer.Argument(help="A shipped suite (`sparsecert list suites`) or a TOML file.")],
    out: Out = RUNS,
    method: Annotated[Optional[list[str]], typer.Option(help="Another method to rank: a name or file.py:Class.")] = None,  # noqa: UP045
    device: Device = "cpu",
    workers: Workers = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Run a suite: every cell without a current record is trained, attacked and certified; then the board is drawn.

    Killed at any moment and run again, it goes on where it was and ends with the same records.
    """
    from .cells import read_suite
    from .run import pick_device
    from .suite import check_ready, run_suite
    from .workers import Job

    console, methods = stderr(), tuple(method or ())
    chosen = read_suite(suite, methods)
    place = pick_device(device)
    count = workers if workers is not None else 1 if place.type == "cuda" else (os.cpu_count() or 1)
    if count < 1:
        raise UserError(f"--workers must be at least 1, got {count}")
    check_ready(chosen, data_dir)
    job = Job(suite, methods, str(out / chosen.title), place.type, data_dir)
    finished = run_suite(chosen, job, count, console)
    pages = draw(finished.root, as_json)
    report = {
        "suite": chosen.title, "cells": len(chosen.cells), "skipped": finished.skipped,
        "failed": finished.outcome.failed, "contradicted": finished.outcome.contradicted, **pages,
    }
    if as_json:
        show(report)
    raise typer.Exit(finished.exit_code)


def draw(root: Path, as_json: bool) -> dict[str, Any]:
    """The board of a run folder: a table on stdout (unless JSON is asked for) and one self-contained page."""
    from rich.console import Console

    from leaderboard.board import load, ranked
    from leaderboard.render import page, terminal

    if not any((root / "records").glob("*.json")):
        return {"page": None, "entries": []}
    board = ranked(load(root))
    path = root / "board.html"
    page(root, board, path)
    if not as_json:
        terminal(board, Console())
        print(f"\nboard: {path}\nrecords: {root / 'records'}")
    return {"page": str(path), "entries": json.loads(board.to_json(orient="records"))}


@app.command(epilog="Example: `sparsecert board digits@1`")
def board(
    suite: Annotated[str, typer.Argument(help="A suite's title such as digits@1, or the folder of its results.")],
    out: Out = RUNS,
    as_json: Json = False,
) -> None:
    """Check the records of a suite (every number is derived again from the verdict rows) and draw its board."""
    from leaderboard.checks import check_all

    root = Path(suite) if Path(suite).is_dir() else out / suite
    if not (root / "records").is_dir():
        known = [path.parent.name for path in out.glob("*/records")] if out.is_dir() else []
        raise unknown("board", suite, known) if known else UserError(f"there are no records under {root}; run the suite first")
    if contradicted := sorted((root / "contradictions").glob("*.json")):
        print(f"contradicted certificates, without a record: {', '.join(path.stem for path in contradicted)}", file=sys.stderr)
        raise typer.Exit(3)
    if not any((root / "records").glob("*.json")):
        raise UserError(f"there are no records in {root / 'records'}; see {root / 'failures'} for cells that failed")
    problems = {name: found for name, found in check_all(root).items() if found}
    for name, found in problems.items():
        for sentence in found:
            print(f"{name}: {sentence}", file=sys.stderr)
    if problems:
        raise typer.Exit(3)
    pages = draw(root, as_json)
    if as_json:
        show(pages)


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

    from .build import fraction
    from .certify import Question
    from .certify import certify as ask
    from .evaluate import ContradictionError
    from .files import make_folder
    from .run import pick_device
    from .screen import Judging

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


KINDS = ("methods", "objectives", "attacks", "verifiers", "models", "data", "suites")


@app.command("list", epilog="Example: `sparsecert list verifiers`")
def list_(
    kind: Annotated[str, typer.Argument(help=", ".join(KINDS))],
    as_json: Json = False,
) -> None:
    """List what there is: every name with its guarantee (or summary) and its fields with their defaults."""
    if kind not in KINDS:
        raise unknown("list", kind, KINDS)
    entries = catalogue(kind)
    if as_json:
        show(entries)
        return
    for one in entries:
        fields = ", ".join(f"{name}={value}" for name, value in one["fields"].items())
        print(one["name"] + (f" ({fields})" if fields else ""))
        print(f"    {one['summary']}")


def catalogue(kind: str) -> list[dict[str, Any]]:
    """Entries {name, summary, fields} of one kind."""
    from . import build
    from .cells import read_suite, shipped
    from .data import DATASETS
    from .models import MODELS

    if kind == "attacks":
        return build.described_attacks()
    if kind == "models":
        return [build.entry(name, function) for name, function in MODELS.items()]
    if kind == "data":
        return [
            {"name": name, "summary": source.description, "fields": {"files": source.files or "embedded"}}
            for name, source in DATASETS.items()
        ]
    if kind == "suites":
        suites = {name: read_suite(name) for name in shipped()}
        return [{"name": k, "summary": s.description, "fields": {"cells": len(s.cells)}} for k, s in suites.items()]
    return build.described(kind.removesuffix("s"))


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; every mistake of the user's is one sentence on stderr and exit code 2."""
    from leaderboard.errors import LeaderboardError

    try:
        code = app(args=arguments, standalone_mode=False)
        code = code if isinstance(code, int) else 0
        if code == 130:
            print("sparsecert: interrupted; run the same command again to go on", file=sys.stderr)
    except ClickException as mistake:
        words = mistake.format_message().replace("\n", " ")
        if words:
            print(f"sparsecert: {words}", file=sys.stderr)
        code = 2
    except (UserError, LeaderboardError) as mistake:
        print(f"sparsecert: {mistake}", file=sys.stderr)
        code = 2
    except OSError as reason:
        print(f"sparsecert: {reason}", file=sys.stderr)
        code = 2
    if arguments is None:
        sys.exit(code)
    return code


if __name__ == "__main__":
    main()
