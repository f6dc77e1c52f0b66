"""A run that is killed at any moment leaves whole records or none."""

from __future__ import annotations

import getpass
import io
import json
import os
import random
import signal
import socket
import time
from itertools import cycle, product
from pathlib import Path

import pytest
import torch
from rich.console import Console

from bench.cells import read_suite
from bench.evaluate import evaluate
from bench.models import build_model
from bench.run import Folders, chosen_samples, dataset, write_record
from bench.suite import run_suite
from bench.workers import Job
from leaderboard import ledger
from leaderboard.checks import check_records
from leaderboard.entering import adopt
from leaderboard.record import read, read_all

CPU = torch.device("cpu")
SUITE = """
suite = { name = "killed", version = 1 }
data = { name = "digits" }
threat = { norm = "linf", eps = "0.05" }
samples = { first = 8 }
budget = { pretrain = 0, prune = 0, finetune = 0, batch = 256, lr = 0.1 }
grid = { arch = ["mlp"], density = ["1"], seed = [0, 1] }
method = [{ name = "dense" }]
objective = [{ name = "benign" }]
attack = [{ name = "pgd", steps = 2 }]
verifier = [{ name = "ibp" }]
"""


class Writer:
    """Writes the records of two cells over and over, in the way that every suite does, of other networks each time."""

    def __init__(self, folder: Path) -> None:
        (folder / "killed.toml").write_text(SUITE)
        self.cells = read_suite(str(folder / "killed.toml")).cells
        self.folders = Folders(folder / "killed@1").make()
        self.data = dataset("digits", None, CPU)
        first = self.cells[0]
        self.samples = chosen_samples(first.samples, self.data.test)
        x, y, index = self.samples.pixels(), self.samples.labels, self.samples.index.tolist()
        nets = [build_model(first.arch, self.data.shape, self.data.classes, seed=seed).eval() for seed in (0, 1, 2)]
        self.judged = [(net, evaluate(net, x, y, index, first.threat, first.attacks, first.verifiers)) for net in nets]
        self.turns = cycle(product(self.judged, self.cells))
        self.write()  # whatever is computed once per process is, before any of it is copied

    def write(self) -> None:
        (model, out), cell = next(self.turns)
        write_record(cell, self.folders, self.data, self.samples, model, {}, out, CPU)

    def lines(self) -> int:
        return len(ledger.entries(self.folders.records))

    def killed_after(self, written: int, seconds: float) -> None:
        """A copy of this process writes until SIGKILL, some seconds after so many more lines of the ledger."""
        enough = self.lines() + written
        child = os.fork()
        if child == 0:
            try:
                torch.set_num_threads(1)
                while True:
                    self.write()
            finally:
                os._exit(1)
        while self.lines() < enough:
            time.sleep(0.005)
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), "the writer ended by itself"


@pytest.mark.parametrize("tries", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_a_writer_killed_at_any_moment_leaves_no_readable_but_wrong_record(tmp_path: Path, tries: int) -> None:
    writer, chance = Writer(tmp_path), random.Random(6)
    records, lines, whole = writer.folders.records, 1, 0
    for _ in range(tries):
        writer.killed_after(chance.randrange(3), chance.uniform(0, 0.1))
        assert {name: found for name, found in check_records(records).items() if found} == {}
        whole += len(read_all(records))
        adopt(records)
        assert ledger.problems(records) == []
        assert writer.lines() >= lines, "an entry was lost"
        lines = writer.lines()
    assert whole
    stood = {one.digest for one in ledger.entries(records) if one.event == "entered"}
    superseded = {one.digest for one in ledger.entries(records) if one.event == "superseded"}
    assert stood == superseded | {one.digest for one in read_all(records)}, "a record was lost"


def test_a_suite_enters_the_whole_records_that_its_ledger_does_not_list(tmp_path: Path) -> None:
    writer = Writer(tmp_path)
    writer.write()
    records, suite = writer.folders.records, tmp_path / "killed.toml"
    (records / ledger.NAME).unlink()  # as in a folder from before there was one
    shown = io.StringIO()
    job = Job(str(suite), (), str(writer.folders.root), "cpu", None)
    run_suite(read_suite(str(suite)), job, 0, Console(file=shown), cells=[])
    assert "2 whole records that the ledger did not list are entered into it" in shown.getvalue()
    assert {one.record for one in ledger.entries(records)} == {cell.id for cell in writer.cells}
    assert ledger.problems(records) == []


def test_a_cell_measured_again_keeps_its_old_record_and_rows_and_names_them(tmp_path: Path) -> None:
    writer = Writer(tmp_path)
    records, (cell, _other) = writer.folders.records, writer.cells
    (old,) = read_all(records)
    rows = (records / old.evidence.verdicts).read_bytes()
    for _ in writer.cells:
        writer.write()
    new = read(records / f"{cell.id}.json")
    assert new.supersedes == old.digest != new.digest
    kept = writer.folders.root / "superseded"
    assert json.loads((kept / f"{cell.id}-{old.digest[:8]}.json").read_text()) == old.original
    assert (kept / f"{cell.id}-{old.digest[:8]}.parquet").read_bytes() == rows != (records / new.evidence.verdicts).read_bytes()
    assert check_records(records) == {one.id: [] for one in writer.cells}
    assert ledger.problems(records) == []


def test_a_record_says_what_kind_of_machine_measured_it_and_not_whose(tmp_path: Path) -> None:
    writer = Writer(tmp_path)
    (record,) = read_all(writer.folders.records)
    machine = record.original["provenance"]["machine"]
    assert set(machine) == {"processor", "cores", "memory_gib"}
    assert machine["cores"] == os.cpu_count()
    words = {str(value) for value in machine.values()} | set(machine["processor"].split())
    assert not words & {socket.gethostname(), getpass.getuser()}
    assert {"pandas", "statsmodels", "torchvision", "onnx", "onnx2torch"} <= set(record.provenance.packages)
