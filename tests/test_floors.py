"""Who may import whom, read from the sources: the floors of the house."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import attacks
import bench
import leaderboard
import verifiers

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"attacks": attacks, "bench": bench, "leaderboard": leaderboard, "verifiers": verifiers}

# What a module of bench may import from bench; the packages below it stand after the bar.
FLOORS = """
errors sparsity provenance                 :
threat                                     : | attacks
files                                      : errors
pickles                                    :
published                                  : errors
engine                                     : published | verifiers
readers                                    : errors files pickles published
imagenet                                   : errors files published
models                                     : errors | verifiers
data                                       : errors files readers imagenet published
train                                      : data
loop                                       : train
modes                                      : | verifiers
objectives                                 : modes train | attacks verifiers
methods                                    : factors modes sparsity train | attacks verifiers
build                                      : errors methods objectives | attacks verifiers
cells                                      : errors threat data models train build | leaderboard
phases                                     : files loop provenance sparsity train
factors                                    : errors
layouts                                    : errors factors sparsity
checkpoints                                : errors factors files models layouts
reach                                      : sparsity | verifiers
passport                                   : errors factors sparsity reach | verifiers
health                                     : errors | verifiers
outside                                    : errors data models build checkpoints
masking                                    : cells
evaluate                                   : errors threat train cells masking | attacks verifiers
witnesses                                  : errors evaluate files
selfcheck                                  : build evaluate files provenance threat | leaderboard verifiers
run          : errors factors files health loop passport provenance sparsity data models train build cells phases checkpoints outside evaluate selfcheck witnesses | leaderboard
radii                                      : errors | verifiers
curve                                      : threat build cells evaluate radii | leaderboard
report                                     : files | leaderboard
vnnlib_files                               : errors
onnx_layers                                : errors | verifiers
onnx_files                                 : errors models onnx_layers | verifiers
properties                                 : errors vnnlib_files | verifiers
export                                     : errors data files onnx_files vnnlib_files | verifiers
question: build cells checkpoints data errors factors onnx_files outside provenance radii run threat | leaderboard
answer       : build cells question radii sparsity
certify      : answer build cells curve evaluate export files health onnx_files outside passport question report train | leaderboard
claims : build cells certify checkpoints curve data errors evaluate health outside provenance question run threat witnesses | leaderboard
together     : cells claims evaluate | verifiers
replay       : cells checkpoints claims errors evaluate threat together | attacks verifiers
spot         : cells claims errors evaluate replay together | attacks leaderboard
challenge    : claims errors evaluate files replay threat witnesses | attacks leaderboard verifiers
contracts    : build cells data errors evaluate factors methods objectives phases selfcheck sparsity threat train | attacks verifiers
workers      : files cells evaluate run
screen       : workers
suite        : files cells models run workers screen selfcheck | leaderboard
"""  # noqa: E501


def modules(package: str) -> dict[str, Path]:
    """Every module of a package by its dotted name below it."""
    folder = ROOT / package
    return {".".join(path.relative_to(folder).with_suffix("").parts): path for path in sorted(folder.rglob("*.py"))}


def imported(path: Path) -> Iterator[str]:
    """Absolute dotted names of whatever a file imports, inside functions too; type-checking imports count as well."""
    here = path.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = ".".join(here[: len(here) - node.level]) if node.level else ""
            base = ".".join(part for part in (start, node.module) if part)
            yield from (f"{base}.{name.name}" for name in node.names)


def tops(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported(path)}


def inside_bench(path: Path) -> set[str]:
    """The first part below bench of everything that a file imports from bench."""
    return {name.split(".")[1] for name in imported(path) if name.startswith("bench.")}


def allowed() -> dict[str, tuple[set[str], set[str]]]:
    """module: (what it may import from bench, which of our other packages)."""
    table = {}
    for line in FLOORS.strip().splitlines():
        names, _, rest = line.partition(":")
        own, _, others = rest.partition("|")
        for name in names.split():
            table[name] = set(own.split()), set(others.split())
    return table


def bench_modules() -> list[str]:
    return sorted(modules("bench"))


# ---- between packages ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "package, forbidden",
    [
        ("attacks", {"bench", "leaderboard", "verifiers"}),
        ("verifiers", {"bench", "leaderboard", "attacks"}),
        ("leaderboard", {"bench", "attacks", "verifiers", "torch", "torchvision", "auto_LiRPA", "torchattacks"}),
    ],
)
def test_a_lower_floor_imports_nothing_of_its_neighbours(package: str, forbidden: set[str]) -> None:
    found = {name: tops(path) & forbidden for name, path in modules(package).items()}
    assert {name: wrong for name, wrong in found.items() if wrong} == {}
    assert found


@pytest.mark.parametrize("name", bench_modules())
def test_a_module_of_bench_imports_from_lower_floors_only(name: str) -> None:
    top = name.split(".")[0]
    if top in ("__init__", "__main__", "commands"):
        assert top != "__init__" or not inside_bench(modules("bench")[name])
        return
    table = allowed()
    assert top in table, f"give bench/{name}.py a line in the table of {Path(__file__).name}"
    own, others = table[top]
    path = modules("bench")[name]
    assert inside_bench(path) - {top} <= own
    assert tops(path) & set(PACKAGES) - {"bench"} <= others


def test_the_table_has_no_cycle_and_every_line_is_in_use() -> None:
    table = allowed()
    order: list[str] = []
    while len(order) < len(table):
        ready = [name for name, (own, _) in table.items() if name not in order and own <= set(order)]
        assert ready, f"a cycle among {set(table) - set(order)}"
        order += ready
    assert {name.split(".")[0] for name in bench_modules()} - {"__init__", "__main__", "commands"} == set(table)
    for top, (own, others) in table.items():
        paths = [path for name, path in modules("bench").items() if name.split(".")[0] == top]
        assert own <= {one for path in paths for one in inside_bench(path)}, f"{top} no longer imports all of {own}"
        assert others <= {one for path in paths for one in tops(path)}, f"{top} no longer imports all of {others}"


def test_methods_know_no_objective_and_objectives_neither_sparsity_nor_methods() -> None:
    """Every pair of the two works because neither knows the other."""
    table = allowed()
    assert not table["methods"][0] & {"objectives"}
    assert not table["objectives"][0] & {"sparsity", "methods"}
    assert not table["train"][0] & {"objectives", "methods", "sparsity"}


def test_nothing_in_bench_imports_the_command_line() -> None:
    line = {"__main__", "commands"}
    users = {name: inside_bench(path) & line for name, path in modules("bench").items() if name.split(".")[0] not in line}
    assert {name: wrong for name, wrong in users.items() if wrong} == {}


# ---- names and places ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PACKAGES)
def test_the_packages_in_use_are_ours(name: str) -> None:
    """`verifiers` and `attacks` are names that others publish under, too."""
    assert Path(str(PACKAGES[name].__file__)).resolve() == ROOT / name / "__init__.py"


def test_no_module_is_called_after_nothing() -> None:
    banned = {"utils", "util", "helpers", "helper", "common", "misc", "base", "manager", "handler"}
    stems = {path.stem for package in (*PACKAGES, "tests") for path in (ROOT / package).rglob("*.py")}
    assert stems & banned == set()


def test_the_board_is_read_without_torch_or_any_other_floor() -> None:
    """Every module of leaderboard, in a process where these cannot be imported."""
    inner = [name.removesuffix(".__init__") for name in modules("leaderboard") if name not in ("__init__", "__main__")]
    names = ["leaderboard", *(f"leaderboard.{name}" for name in inner)]
    code = f"""
import importlib, sys
for blocked in ("torch", "bench", "attacks", "verifiers", "auto_LiRPA", "torchattacks"):
    sys.modules[blocked] = None
for name in {names!r}:
    importlib.import_module(name)
print("ok")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "ok\n", done.stderr
