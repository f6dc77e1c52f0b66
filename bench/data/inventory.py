"""What lies in the data folder: for each data set whether it is there, whole and the published one, and how to get it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError, unknown
from ..published import MissingFilesError
from .catalogue import DATASETS, data_folder

USABLE = ("embedded", "there")


@dataclass(frozen=True)
class Holding:
    """One data set in one data folder."""

    name: str
    state: str  # embedded, there, missing, incomplete or damaged
    images: tuple[int, int, int] | None  # training, validation, test; None where they were not read
    digest: str | None  # of the whole data set, as records store it
    note: str  # what a report of results must say, or what the first use will do
    problem: str  # one sentence where the set cannot be used
    files: str
    origin: str

    @property
    def usable(self) -> bool:
        return self.state in USABLE


def survey(name: str, data_dir: str | Path | None = None) -> Holding:
    """Read a data set as a run would and say how that went; downloads nothing, decodes nothing that takes hours.

    Raises UserError for an unknown name only.
    """
    if name not in DATASETS:
        raise unknown("data set", name, DATASETS)
    source, folder = DATASETS[name], data_folder(data_dir)
    state, images, digest, note, problem = "there" if source.files else "embedded", None, None, "", ""
    try:
        note = source.pending(folder) if source.pending else ""
        if not note:
            data = source.read(folder)
            images, digest, note = (len(data.train), len(data.validation), len(data.test)), data.digest, data.note
    except MissingFilesError as reason:
        state, problem = "incomplete" if reason.found else "missing", str(reason)
    except UserError as reason:
        state, problem = "damaged", str(reason)
    return Holding(name, state, images, digest, note, problem, source.files, source.origin)
