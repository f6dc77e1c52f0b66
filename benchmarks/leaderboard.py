"""How long `leaderboard check` takes for many records, by the clock and in CPU seconds.

    python -m benchmarks.leaderboard [--records 1000] [--processes 2] [--keep FOLDER]

The records are the committed ones over and over, each with a seed of its own and signed again; every one has its own rows.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import resource
import shutil
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from leaderboard import ledger
from leaderboard.canonical import canonical, digest
from leaderboard.checks import check_records, folder_problems
from leaderboard.entering import files_of
from leaderboard.paper_claims import RECORDS
from leaderboard.record import read

GOAL = 30.0  # seconds for 1,000 records on two cores


def synthesise(folder: Path, count: int) -> None:
    """`count` records that hold, in the `records` folder given, with their ledger."""
    folder.mkdir(parents=True, exist_ok=True)
    models = [(path.parent, read(path).original) for path in sorted(RECORDS.glob("*/*.json"))]
    for seed, (place, document) in enumerate(islice(cycle(models), count)):
        one = reseeded(document, seed)
        shutil.copyfile(place / document["evidence"]["verdicts"], folder / one["evidence"]["verdicts"])
        (folder / f"{one['id']}.json").write_text(json.dumps(one, indent=1), encoding="utf-8")
        ledger.append(folder, "entered", one["id"], one["digest"], files_of(folder, one["id"], one["evidence"]))


def reseeded(document: dict[str, Any], seed: int) -> dict[str, Any]:
    """The record as another seed's, named and signed as the bench would have."""
    one = copy.deepcopy(document)
    one["cell"]["seed"] = seed
    words, _, _ = document["id"].rpartition("-s")
    one["id"] = f"{words}-s{seed}-{hashlib.sha256(canonical(one['cell'])).hexdigest()[:8]}"
    one["evidence"] = {key: value.replace(document["id"], one["id"]) for key, value in document["evidence"].items()}
    return {**one, "digest": digest(one)}


def measure(folder: Path, processes: int) -> dict[str, Any]:
    before, start = cpu_seconds(), time.perf_counter()
    whole = folder_problems(folder)
    middle = time.perf_counter()
    each = check_records(folder, processes)
    end = time.perf_counter()
    assert not whole
    assert not any(each.values())
    return {
        "records": len(each), "processes": processes, "seconds": end - start, "of the ledger": middle - start,
        "cpu_seconds": cpu_seconds() - before, "load": os.getloadavg()[0],
    }


def cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=1000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--keep", type=Path, help="make the records there, or use those that are there")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (asked.keep or Path(temporary)) / "records"
        if not folder.is_dir():
            synthesise(folder, asked.records)
        found = measure(folder, asked.processes)
    print(json.dumps(found, indent=1))
    each, allowed = found["cpu_seconds"] / asked.processes, GOAL * found["records"] / 1000
    by_clock = f"{found['seconds']:.1f} s by the clock"
    print(f"{each:.1f} s of CPU on each of {asked.processes} cores, {allowed:.1f} s allowed; {by_clock}")


if __name__ == "__main__":
    main()
