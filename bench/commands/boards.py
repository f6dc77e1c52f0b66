"""leaderboard check, enter and add, and submit: records held against their evidence, and how those of others enter."""

from __future__ import annotations

import os
import secrets
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from ..errors import UserError, unknown
from .options import RUNS, DataDir, Device, Json, app, show

if TYPE_CHECKING:
    from leaderboard.submission import Manifest

leaderboard = typer.Typer(no_args_is_help=True, help="Check records, enter those of others, release boards.")
app.add_typer(leaderboard, name="leaderboard")

Runs = Annotated[
    Optional[list[Path]],  # noqa: UP045
    typer.Argument(help="Folders of runs or of records, or a suite's title; default: the records of sparsecert itself."),
]


@leaderboard.command(epilog="Example: `sparsecert leaderboard check runs/digits@1 --spot 20`")
def check(
    runs: Runs = None,
    spot: Annotated[int, typer.Option(help="Run this many random samples of every record again; needs the checkpoints.")] = 0,
    seed: Annotated[
        Optional[int], typer.Option(help="Of the draw; default: another one each time, which is printed.")  # noqa: UP045
    ] = None,
    device: Device = "cpu",
    data_dir: DataDir = None,
    plugins: Annotated[bool, typer.Option("--plugins", help="Also run code from outside that a record names.")] = False,
    boards: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Folder of boards: the ledgers must go on from what its releases saw; those of sparsecert always do."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Derive every number of every record again and hold every byte against the ledger; exit code 3 with what is wrong."""
    folders = folders_of(runs)
    found = [checked(folder, boards) for folder in folders]
    problems = [f"{one['title']}: {sentence}" for one in found for sentence in one["problems"]]
    again: dict[str, Any] | None = None
    if spot and not problems:
        again = spot_checked(folders, spot, secrets.randbits(32) if seed is None else seed, device, data_dir, plugins)
    if as_json:
        holds = not problems and (again is None or again["holds"])
        show({"holds": holds, "folders": found, **({} if again is None else {"spot": again})})
    else:
        print_checked(found)
        for sentence in [] if again is None else again["sentences"]:
            print(sentence)
    for sentence in problems:
        print(sentence, file=sys.stderr)
    if problems or (again is not None and not again["holds"]):
        raise typer.Exit(3)


def spot_checked(
    folders: Sequence[Path], count: int, seed: int, device: str, data_dir: str | None, plugins: bool
) -> dict[str, Any]:
    """What came out when random samples of every record were run again."""
    import torch

    from ..claims import Outside
    from ..run import pick_device
    from ..spot import spot_checks

    torch.set_num_threads(1)
    records = [path for folder in folders for path in sorted(folder.glob("*.json"))]
    found, left = spot_checks(records, count, seed, Outside(pick_device(device), data_dir, plugins))
    sentences = [*(sentence for one in found for sentence in one.sentences()), *left]
    if left:
        sentences.append(f"NOT RUN AGAIN: {len(left)} of {len(records)} records, so that nothing is known about these")
    return {
        "holds": all(one.holds for one in found), "all_run": not left, "seed": seed, "records": [one.as_json() for one in found],
        "not_run": left, "sentences": sentences,
    }


def checked(folder: Path, boards: Path | None = None) -> dict[str, Any]:
    """What there is in a folder of records, and every problem with it; its ledger against the releases of `boards`, too.

    Without any, those of sparsecert's own records against the boards that come with it.
    """
    from leaderboard import ledger
    from leaderboard.challenges import contradicted
    from leaderboard.checks import check_records, folder_problems
    from leaderboard.errors import RecordError

    problems = [f"{path.stem}: its certificate was contradicted, so it has no record" for path in contradictions(folder)]
    problems += folder_problems(folder)
    records = check_records(folder, os.cpu_count() or 1)
    problems += [f"{name}: {sentence}" for name, sentences in records.items() for sentence in sentences]
    try:
        events, head = Counter[str](one.event for one in ledger.entries(folder)), ledger.head(folder)
        problems += [f"{name}: a witness contradicts one of its certificates; it has no rank" for name in contradicted(folder)]
    except RecordError as error:
        events, head = Counter[str](), None
        problems = problems or [str(error)]
    problems += _rewritten(folder, boards) if head is not None else []
    return {
        "title": title_of(folder), "folder": str(folder), "records": len(records), "head": head,
        "events": {name: events[name] for name in ledger.EVENTS}, "problems": problems,
    }


def _rewritten(folder: Path, boards: Path | None) -> list[str]:
    from leaderboard.errors import BoardError
    from leaderboard.paper_claims import RECORDS
    from leaderboard.releases import BOARDS, rewritten

    if boards is None and folder.resolve().parent != RECORDS.resolve():
        return []
    try:
        return rewritten(folder, title_of(folder), boards or BOARDS)
    except BoardError as error:
        return [str(error)]


def contradictions(folder: Path) -> list[Path]:
    return sorted((folder.parent / "contradictions").glob("*.json")) if folder.name == "records" else []


def title_of(folder: Path) -> str:
    return folder.resolve().parent.name if folder.name == "records" else folder.name


def folders_of(runs: Sequence[Path] | None) -> list[Path]:
    """The `records` folders that are meant: those named, and those inside a folder of several. Raises UserError for others."""
    from leaderboard.paper_claims import RECORDS

    found = []
    for run in runs or [RECORDS]:
        one = holds_records(run) or (run / "records").is_dir()
        several = [] if one else [path for path in sorted(run.glob("*")) if holds_records(path)]
        found += several or [records_of(run)]
    return found


def holds_records(folder: Path) -> bool:
    """Whether records lie in a folder or lay there once: they may all be gone, which its ledger then shows."""
    return any(any(folder.glob(pattern)) for pattern in ("*.json", "ledger.jsonl")) or bool(contradictions(folder))


def records_of(run: Path) -> Path:
    """The `records` folder of a run, named by its folder, by the records' own or by its title. Raises UserError otherwise."""
    for folder in (run / "records", run, RUNS / run / "records"):
        if holds_records(folder):
            return folder
    known = [path.parent.name for path in RUNS.glob("*/records")]
    raise unknown("run", str(run), known) if known else UserError(f"there are no records in {run}; run a suite first")


def print_checked(found: Sequence[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for name in ("folder", "records", "events", "ledger", "problems"):
        table.add_column(name, justify="right" if name in ("records", "problems") else "left", no_wrap=name == "folder")
    for one in found:
        events = ", ".join(f"{count} {name}" for name, count in one["events"].items() if count)
        table.add_row(one["title"], str(one["records"]), events, (one["head"] or "broken")[:12], str(len(one["problems"])))
    Console().print(table)


@leaderboard.command(epilog="Example: `sparsecert leaderboard enter runs/digits@1`")
def enter(runs: Annotated[list[Path], typer.Argument(help="Folders of runs or of records.")]) -> None:
    """Enter records that hold but that the ledger does not list: copied there, or written before there was a ledger."""
    from leaderboard.entering import adopt

    for folder in map(records_of, runs):
        print(f"{title_of(folder)}: {len(adopt(folder))} records entered")


@contextmanager
def refusals() -> Iterator[None]:
    """Every reason for a refusal on a line of its own, and exit code 3."""
    from leaderboard.errors import RefusedError

    try:
        yield
    except RefusedError as refused:
        for reason in refused.reasons:
            print(f"refused: {reason}", file=sys.stderr)
        raise typer.Exit(3) from None


@app.command(epilog="Example: `sparsecert submit runs/digits@1 --by 'A. Name'`")
def submit(
    run: Annotated[Path, typer.Argument(help="A run's folder, its records folder, or its title.")],
    out: Annotated[Optional[Path], typer.Option(help="The file to write; default: the run's title with .zip.")] = None,  # noqa: UP045
    by: Annotated[str, typer.Option(help="Who submits; it is stored with the records.")] = "",
    weights: Annotated[bool, typer.Option(help="With the checkpoints, so that densities can be counted again.")] = True,
    as_json: Json = False,
) -> None:
    """Pack a run's records and all that speaks for them into one file; refused with exit code 3 where `check` finds a problem."""
    from leaderboard.errors import RefusedError
    from leaderboard.submission import pack

    from ..files import write_whole

    folder = records_of(run)
    target = out or Path(f"{title_of(folder)}.zip")
    if target.exists():
        raise UserError(f"{target} is there already and is left as it is; name another file with --out")
    packed: list[Manifest] = []
    with refusals():
        if found := contradictions(folder):
            raise RefusedError([f"{path.stem}: its certificate was contradicted" for path in found])
        write_whole(target, lambda temporary: packed.append(pack(folder, temporary, by, weights, os.cpu_count() or 1)))
    files = packed[0].files
    if as_json:
        show({"file": str(target), "bytes": target.stat().st_size, "by": by, "files": files})
        return
    records = sum(name.endswith(".json") and name.count("/") == 1 for name in files)
    checkpoints = sum(name.startswith("checkpoints/") for name in files)
    print(f"{target}: {records} records, {checkpoints} checkpoints, {target.stat().st_size} bytes")


@leaderboard.command(epilog="Example: `sparsecert leaderboard add digits@1.zip --to boards/digits@1`")
def add(
    file: Annotated[Path, typer.Argument(help="A file that `sparsecert submit` wrote.")],
    to: Annotated[Path, typer.Option(help="The folder of records (or of a run) that they enter.")],
    weights: Annotated[bool, typer.Option("--weights", help="Keep the checkpoints too; they are checked in any case.")] = False,
    correct: Annotated[bool, typer.Option("--correct", help="Let a record replace the one that it says it supersedes.")] = False,
    as_json: Json = False,
) -> None:
    """Check a submission and enter all of its records, or none: exit code 3 with every reason. Nothing in it is trusted."""
    from leaderboard.adding import add as enter_all

    folder = to / "records" if (to / "records").is_dir() else to
    with refusals():
        steps = enter_all(file, folder, weights, correct, os.cpu_count() or 1)
    if as_json:
        show({"folder": str(folder), "records": {step.record.id: step.kind for step in steps}})
        return
    for step in steps:
        print(f"{SAID[step.kind]} {step.record.id}")


SAID = {
    "entered": "entered:", "corrected": "entered in the place of its predecessor:",
    "rerun": "entered as a rerun by another kind of machine:", "known": "stands already:",
}
