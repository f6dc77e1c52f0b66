"""Loss and gradient magnitude over the epochs of a phase, as Figure 1 of the HYDRA response draws them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from leaderboard.board import load
from leaderboard.errors import BoardError
from leaderboard.plot import COLOURS, DASHES, MARKERS

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ["phase", "epoch", "loss", "gradient"]
FIGURE = ["objective", "arch", "density"]
TITLES = {"loss": "training loss", "gradient": "mean |gradient| of what is trained"}


def read_curves(run_folder: str | Path, phase: str) -> pd.DataFrame:
    """A row per record and epoch of a phase: objective, arch, density, method, seed, record, epoch, loss, gradient.

    loss and gradient are means over the epoch's steps. Reads <run_folder>/curves/<record>.csv. Raises RecordError, or BoardError
    where no record has a curve of that phase.
    """
    import pandas as pd

    folder = Path(run_folder)
    board = load(folder)
    parts = [_curve(folder / "curves" / f"{name}.csv").assign(record=name) for name in board["record"]]
    curves = pd.concat([pd.DataFrame(columns=[*COLUMNS, "record"]), *parts]) if not parts else pd.concat(parts)
    found = curves[curves["phase"] == phase]
    if found.empty:
        known = ", ".join(sorted(set(curves["phase"]))) or "none"
        raise BoardError(f"no record in {folder} has a curve of the phase {phase!r}; phases with one: {known}")
    chosen = board[[*FIGURE, "method", "seed", "record"]].merge(found, on="record", validate="one_to_many")
    return chosen.drop(columns="phase").sort_values([*FIGURE, "method", "seed", "epoch"], ignore_index=True)


def _curve(path: Path) -> pd.DataFrame:
    import pandas as pd

    if not path.is_file():
        return pd.DataFrame(columns=COLUMNS)
    try:
        found = pd.read_csv(path, dtype={"phase": str, "epoch": int, "loss": float, "gradient": float})
    except (ValueError, OSError) as error:
        raise BoardError(f"{path} is no table of a run's epochs ({error}); run the cell again") from None
    if list(found) != COLUMNS:
        raise BoardError(f"{path} has the columns {', '.join(found)}, expected {', '.join(COLUMNS)}; run the cell again")
    return found


def draw(curves: pd.DataFrame, folder: Path, name: str) -> list[tuple[Path, Path]]:
    """(PNG, CSV) of every objective, architecture and density in a frame of `read_curves`; equal frames give equal bytes."""
    made = []
    for (objective, arch, density), own in curves.groupby(FIGURE, sort=True):
        words = f"{name}-{arch}-{objective}-d{density:g}".replace("/", "of").replace(" ", "-")
        png, table = folder / f"{words}.png", folder / f"{words}.csv"
        own.to_csv(table, index=False)
        _figure(own, f"{arch}, {objective}, density {density:g}", png)
        made.append((png, table))
    return made


def _figure(curves: pd.DataFrame, title: str, path: Path) -> None:
    """Two panels; a line is the mean over the seeds, and its band reaches from the lowest seed to the highest."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    for axis, (column, label) in zip(figure.subplots(1, 2), TITLES.items()):
        for place, (method, own) in enumerate(curves.groupby("method", sort=True)):
            _line(axis, own.groupby("epoch")[column], str(method), place)
        axis.set_xlabel("epoch")
        axis.set_ylabel(label)
        axis.xaxis.get_major_locator().set_params(integer=True)
        if column == "gradient" and (curves[column] > 0).all():
            axis.set_yscale("log")
    figure.suptitle(title)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False)
    figure.savefig(path, dpi=150, metadata={"Software": None})


def _line(axis: Any, epochs: Any, method: str, place: int) -> None:
    mean = epochs.mean()
    colour, marker = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
    axis.plot(mean.index, mean, label=method, color=colour, marker=marker, linestyle=DASHES[place % len(DASHES)], markersize=4)
    axis.fill_between(mean.index, epochs.min(), epochs.max(), color=colour, alpha=0.15, linewidth=0)
