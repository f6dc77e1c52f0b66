"""Options and markers of the whole test suite."""

from __future__ import annotations

import os

# one thread: tests are many and small, and results on record are those of one-thread workers
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the slow checks too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Slow checks and GPU checks are left out (deselected, not skipped) where they were not asked for or cannot run."""
    unwanted = {"gpu"} if not torch.cuda.is_available() else set()
    if not config.getoption("--slow"):
        unwanted.add("slow")
    out = [item for item in items if unwanted & {mark.name for mark in item.iter_markers()}]
    if out:
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if item not in out]
    items.sort(key=lambda item: item.path.name != "test_journeys.py")  # the longest file first: two processes end together
