"""leaderboard release, show and changes: boards as they stood, for good."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Optional

import typer

from .boards import leaderboard, refusals
from .options import Json, show

Boards = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(help="Folder of boards; default: those that come with sparsecert."),
]
RELEASE = "A release's folder, or BOARD@V/NAME of those in --boards."


@leaderboard.command(epilog="Example: `sparsecert leaderboard release mnist-linf@1 --name 2026-11 --boards boards`")
def release(
    board: Annotated[str, typer.Argument(help="A board's title such as mnist-linf@1.")],
    name: Annotated[str, typer.Option(help="What to call the release, such as 2026-11.")],
    boards: Boards = None,
    records: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Folder with the records of each suite@version; default: those that come with sparsecert."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Freeze a board: numbers, intervals, ranks, ledger heads and what changed; exit code 3 where `check` finds a problem."""
    from leaderboard.paper_claims import RECORDS
    from leaderboard.releases import BOARDS, CHANGELOG, freeze

    from ..provenance import revision, version

    commit, dirty = revision()
    made_by = {"version": version(), "revision": commit, "dirty": dirty}
    place = boards or BOARDS
    with refusals():
        made = freeze(board, name, place, records or RECORDS, made_by, os.cpu_count() or 1)
    folder = place / board / name
    if as_json:
        show({"folder": str(folder), "digest": made.digest, "records": len(made.records), "without": made.without_records})
        return
    print(f"{folder}: {len(made.records)} records, {len(made.entries)} entries, digest {made.digest[:12]}")
    if made.without_records:
        print(f"left out, without records so far: {', '.join(made.without_records)}")
    print("\n" + (folder / CHANGELOG).read_text(encoding="utf-8"), end="")


@leaderboard.command("show", epilog="Example: `sparsecert leaderboard show mnist-linf@1/2026-11`")
def show_release(
    release: Annotated[str, typer.Argument(help=RELEASE)], boards: Boards = None, as_json: Json = False
) -> None:
    """Print a release in Markdown; it needs nothing but its own folder, of which every byte is checked."""
    from leaderboard.releases import page, read_release

    found = read_release(_folder(release, boards))
    if as_json:
        show(found.model_dump(by_alias=True))
    else:
        print(page(found), end="")


@leaderboard.command(epilog="Example: `sparsecert leaderboard changes mnist-linf@1/2026-11 mnist-linf@1/2026-12`")
def changes(
    before: Annotated[str, typer.Argument(help=RELEASE)],
    after: Annotated[str, typer.Argument(help=RELEASE)],
    boards: Boards = None,
    as_json: Json = False,
) -> None:
    """Print what changed between two releases: who entered, who left, who moved, and why."""
    from leaderboard.changes import between, changelog
    from leaderboard.errors import BoardError
    from leaderboard.releases import read_release

    old, new = (read_release(_folder(one, boards)) for one in (before, after))
    if old.board.board != new.board.board:
        raise BoardError(f"{old.title} and {new.title} are releases of different boards, which are never compared")
    if as_json:
        show({"before": old.title, "after": new.title, "changes": [one.as_json() for one in between(old, new)]})
    else:
        print(changelog(old, new), end="")


def _folder(release: str, boards: Path | None) -> Path:
    from leaderboard.releases import BOARDS

    return Path(release) if Path(release).is_dir() else (boards or BOARDS) / release
