from __future__ import annotations

import io
import re
from collections.abc import Iterator

from rich.console import Console

from leaderboard.board import load, ranked
from leaderboard.render import markdown, terminal
from leaderboard.stats import interval

from .conftest import Run, rows_of

SCRIPT = "<script>alert(1)</script>"


def fill(run: Run) -> None:
    """Two objectives, one with smoothing as its headline, a dense reference, two densities and two seeds."""
    run.add(rows_of(broken=1), method="dense", density="1")
    for method, density, seed in (("hydra", "1/2", 0), ("hydra", "1/2", 1), ("hydra", "1/4", 0), (SCRIPT, "1/2", 0)):
        name = "evil" if method == SCRIPT else None
        run.add(rows_of(broken=2 + seed), name=name, method=method, density=density, seed=seed)
    run.add(objective="stability", headline="certified.smoothing")


def printed(run: Run, width: int = 200) -> Iterator[str]:
    out = io.StringIO()
    terminal(ranked(load(run.root)), Console(file=out, width=width))
    return iter(out.getvalue().splitlines())


def test_the_terminal_shows_a_table_per_objective(run: Run) -> None:
    fill(run)
    lines = list(printed(run))
    assert sum("toy@1, " in line for line in lines) == 2
    assert any("ranked by certified.smoothing" in line for line in lines)
    low, high = interval(17, 20)
    dense = next(line for line in lines if " dense " in line)
    assert f"{85:.1f} [{100 * low:.1f}, {100 * high:.1f}]" in dense
    assert dense.split()[0] == "–"


def test_a_narrow_terminal_loses_no_number(run: Run) -> None:
    fill(run)
    lines = list(printed(run, width=80))
    low, high = interval(18 / 20 * 20 - 2.5, 20)
    assert max(map(len, lines)) <= 80
    assert any(f"{100 * low:.1f}–{100 * high:.1f}" in line for line in lines)
    assert not any("…" in line for line in lines)
    assert sum(" hydra " in line for line in lines) == 3


def test_names_stay_on_a_terminal_that_is_too_narrow_for_everything_else(run: Run) -> None:
    fill(run)
    assert sum(" hydra " in line for line in printed(run, width=76)) == 3


def test_the_terminal_takes_no_name_for_markup(run: Run) -> None:
    run.add(name="odd", method="[red]mine[/nothing]")
    assert any("[red]mine[/nothing]" in line for line in printed(run))


def test_markdown_keeps_names_in_their_cells(run: Run) -> None:
    fill(run)
    run.add(name="odd", method="a|b\nc")
    text = markdown(ranked(load(run.root)))
    tables = [[line for line in part.splitlines() if line.startswith("|")] for part in text.split("###")[1:]]
    assert len(tables) == 2
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1
    assert "<script>" not in text
    assert "&lt;script&gt;" in text
