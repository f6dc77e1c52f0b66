"""The site of many records: seconds to gather and write it, and seconds until Chromium has loaded, filtered and sorted its board.

    python -m benchmarks.leaderboard_site [RECORDS] [PROCESSES]     # default: 2,000 records, 2 processes

The records are copies of the committed ones with other methods, architectures, densities and seeds, some images made wrong, and
everything derived again, so that every one of them passes `leaderboard check`. Checking them is timed apart from the rest.
"""

from __future__ import annotations

import copy
import itertools
import json
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from leaderboard.canonical import digest, sha256_file
from leaderboard.checks import check_records
from leaderboard.paper_claims import RECORDS
from leaderboard.site.sources import gather
from leaderboard.site.write import write_site
from leaderboard.stats import metrics_of

METHODS = ("dense", *(f"method-{i}" for i in range(15)))
DENSITIES, ARCHITECTURES, SEEDS = ("1/2", "1/5", "1/10", "1/20", "1/100"), ("cnn_small", "cnn_large"), (0, 1)


def cells() -> Iterator[dict[str, Any]]:
    """Changes to a cell, without end: a new version of the suite whenever all combinations are used up."""
    for version in itertools.count(1):
        for arch, method, density, seed in itertools.product(ARCHITECTURES, METHODS, DENSITIES, SEEDS):
            if method != "dense" or density == DENSITIES[0]:
                chosen = "1" if method == "dense" else density
                yield {"version": version, "arch": arch, "method": {"name": method}, "density": chosen, "seed": seed}


def make(folder: Path, count: int) -> None:
    base = [(json.loads(path.read_text()), pd.read_parquet(path.with_suffix(".parquet")))
            for path in sorted((RECORDS / "mnist-objectives@1").glob("mnist*.json"))]  # fmt: skip
    pairs = ((changes, *one) for changes in cells() for one in base)
    for i, (changes, document, rows) in enumerate(itertools.islice(pairs, count)):
        name = f"record-{i}"
        wrong = np.random.default_rng(i).random(len(rows)) < 0.02 * (1 + i % 5)
        written(folder / name, changed(copy.deepcopy(document), changes, name), misclassified(rows, wrong))


def changed(document: dict[str, Any], changes: dict[str, Any], name: str) -> dict[str, Any]:
    document["cell"] |= changes
    document |= {"id": name, "suite_version": changes["version"]}
    document["sparsity"] |= {"requested": changes["density"], "bits": None}
    document["evidence"] |= dict.fromkeys(("weights", "weights_sha256", "witnesses", "witnesses_sha256"))
    return document


def misclassified(rows: pd.DataFrame, wrong: np.ndarray) -> pd.DataFrame:
    rows = rows.copy()
    rows.loc[wrong, "predicted"] = (rows.loc[wrong, "label"] + 1) % 10
    rows.loc[wrong, ["verdict", "by"]] = ["misclassified", ""]
    answers = {"survived": False, "distance": np.nan, "status": "misclassified", "radius": 0.0, "margin": np.nan}
    for column in rows:
        kind, _, label = str(column).partition(":")
        if kind in answers and label != "smoothing":
            rows.loc[wrong, column] = answers[kind]
    return rows


def written(stem: Path, document: dict[str, Any], rows: pd.DataFrame) -> None:
    table = stem.with_name(f"{stem.name}.parquet")
    rows.to_parquet(table, index=False)
    document["evidence"] |= {"verdicts": table.name, "verdicts_sha256": sha256_file(table)}
    document["metrics"] = metrics_of(document["cell"], rows)
    stem.with_name(f"{stem.name}.json").write_text(json.dumps({**document, "digest": digest(document)}))


def in_chromium(page: Path) -> Iterator[tuple[str, float]]:
    """(what, seconds): from asking for the page to its board being there with its filters; from a choice to the next picture."""
    from playwright.sync_api import sync_playwright

    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        tab = browser.new_page()
        for again in ("first", "second"):
            tab.goto(page.as_uri())
            tab.wait_for_selector("form.filters:not([hidden])")
            yield f"load, {again} time", tab.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd") / 1000
        for name, value in (("density", "0.1"), ("method", "method-3"), ("density", "")):
            yield f"filter {name} = {value or 'all'}", tab.evaluate(CHOOSE, [name, value]) / 1000
        yield "sort", tab.evaluate(SORT) / 1000
        browser.close()


CHOOSE = """([name, value]) => new Promise(done => {
  const field = document.querySelector(`select[name=${name}]`), start = performance.now();
  field.value = value;
  field.dispatchEvent(new Event("input", { bubbles: true }));
  requestAnimationFrame(() => setTimeout(() => done(performance.now() - start)));
})"""
SORT = """() => new Promise(done => {
  const start = performance.now();
  document.querySelectorAll("#board thead button")[4].click();
  requestAnimationFrame(() => setTimeout(() => done(performance.now() - start)));
})"""


def spent() -> float:
    """CPU seconds of this process and of those that it waited for."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def main() -> None:
    count, processes = (int(one) for one in (*sys.argv[1:], *("2000", "2")[len(sys.argv) - 1 :]))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "records"
        folder.mkdir()
        make(folder, count)
        steps = [("check", lambda: check_records(folder, processes)), ("gather, with check", lambda: gather([folder], processes))]
        found: dict[str, Any] = {}
        for name, step in steps:
            found[name] = timed(name, step)
        contents = found["gather, with check"]
        assert not [one for one in contents.kept.values() if one.problems], "the copies should pass"
        page = timed("write", lambda: write_site(contents, Path(place) / "site", {}, processes))
        print(f"index.html {page.stat().st_size / 1e6:.1f} MB, {len(contents.board)} entries of {len(contents.kept)} records")
        for name, seconds in in_chromium(page):
            print(f"{name:30} {seconds:8.2f} s")


def timed(name: str, step: Any) -> Any:
    start, before = time.perf_counter(), spent()
    found = step()
    print(f"{name:30} {time.perf_counter() - start:8.1f} s, {spent() - before:8.1f} s of CPU", flush=True)
    return found


if __name__ == "__main__":
    main()
