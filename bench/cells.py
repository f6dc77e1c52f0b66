"""Suites: a TOML file becomes a grid of cells, each with a readable id and a fingerprint of everything it asks for."""

from __future__ import annotations

import hashlib
import itertools
import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatch
from fractions import Fraction
from pathlib import Path
from typing import Any

from leaderboard.canonical import canonical, sha256_file

from .build import build, construct, find, fraction, plain
from .data import AUGMENTATIONS, DATASETS
from .errors import UserError, unknown
from .models import ARCHITECTURES, architecture
from .threat import Threat
from .train import Budget

SUITES = Path(__file__).parent / "suites"
OF_SUITES = frozenset({"label", "objectives", "first", "rest"})  # what a suite says of an attack or verifier beside its fields
DENSE = "dense"  # the row that boards hold all others against


@dataclass(frozen=True)
class Assignment:
    """One attack or verifier of a suite: the built object, its label on the board and the cells it applies to.

    first: a smoothing verifier is asked about the first samples only; rest: an attack is run only on what others have not broken.
    """

    label: str
    spec: Mapping[str, Any]
    tool: Any
    objectives: tuple[str, ...] | None = None
    first: int | None = None
    rest: bool = False

    def as_json(self) -> dict[str, Any]:
        limits = {**({} if self.first is None else {"first": self.first}), **({"rest": True} if self.rest else {})}
        return {**plain(self.tool), "name": self.spec["name"], "label": self.label, **limits}


@dataclass(frozen=True)
class Cell:
    """One point of a suite's grid: train, prune, attack and certify one network."""

    suite: str
    version: int
    data: Mapping[str, Any]
    arch: str
    method: Mapping[str, Any]
    objective: Mapping[str, Any]
    density: Fraction
    seed: int
    budget: Budget
    threat: Threat
    attacks: tuple[Assignment, ...]
    verifiers: tuple[Assignment, ...]
    headline: str
    samples: Mapping[str, Any] = field(default_factory=lambda: {"rule": "all"})

    def as_json(self) -> dict[str, Any]:
        """The whole configuration, defaults included, as the record stores it."""
        return {
            "suite": self.suite,
            "version": self.version,
            "data": dict(self.data),
            "arch": self.arch,
            "method": {"name": self.method["name"], **plain(build("method", self.method))},
            "objective": {"name": self.objective["name"], **plain(build("objective", self.objective))},
            "density": str(self.density),
            "seed": self.seed,
            "budget": plain(self.budget),
            "threat": plain(self.threat),
            "attacks": [one.as_json() for one in self.attacks],
            "verifiers": [one.as_json() for one in self.verifiers],
            "headline": self.headline,
            "samples": dict(self.samples),
        }

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(canonical(self.as_json())).hexdigest()

    @property
    def id(self) -> str:
        arch = self.arch.replace("/", "of")  # resnet18@1/16: ids are file names
        words = [
            f"{self.suite}@{self.version}", arch, _slug(self.method["name"]), _slug(self.objective["name"]),
            f"d{float(self.density):g}", f"s{self.seed}", self.fingerprint[:8],
        ]
        return "-".join(words)


@dataclass(frozen=True)
class Suite:
    name: str
    version: int
    description: str
    cells: tuple[Cell, ...]

    @property
    def title(self) -> str:
        return f"{self.name}@{self.version}"


def _slug(name: str) -> str:
    """mine.py:Mine -> Mine."""
    return name.rpartition(":")[2]


def shipped() -> dict[str, Path]:
    return {path.stem: path for path in sorted(SUITES.glob("*.toml"))}


def read_suite(name: str, methods: Iterable[str] = ()) -> Suite:
    """The shipped suite `name` or the TOML file of that path; `methods` are ranked beside the suite's own.

    Every objective and architecture has a dense cell: where the suite names none, one at each seed of the objective's methods.
    Raises UserError for anything in it that does not exist or has the wrong type.
    """
    path = Path(name) if name.endswith(".toml") else shipped().get(name)
    if path is None and Path(name).exists():
        raise UserError(f"{name} is not a suite; suites are files that end in .toml")
    if path is None:
        raise unknown("suite", name, shipped())
    if not path.is_file():
        raise UserError(f"there is no suite file {path}")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as reason:
        raise UserError(f"{path} is not a readable TOML file: {reason}") from reason
    return _suite(table, str(path), [{"name": method} for method in methods])


NORMS = ("linf", "l2")
SUITE_KEYS = ("name", "version", "description")
GRID_KEYS = ("arch", "density", "seed")
KEYS = {"suite", "data", "threat", "samples", "budget", "grid", "method", "objective", "attack", "verifier"}


def _suite(table: dict[str, Any], where: str, extra: list[dict[str, Any]]) -> Suite:
    for key in table:
        if key not in KEYS:
            raise unknown(f"table in {where}", key, KEYS)
    head = _table(table, "suite", where)
    _known_keys(head, SUITE_KEYS, "[suite]")
    _known_keys(_table(table, "grid", where), GRID_KEYS, "[grid]")
    threat = construct(Threat, _table(table, "threat", where), "threat")
    attacks = [_assignment("attack", spec, threat) for spec in _tables(table, "attack", where)]
    verifiers = [_assignment("verifier", spec, threat) for spec in _tables(table, "verifier", where)]
    methods = [*_tables(table, "method", where), *extra]
    if not methods or not table.get("objective"):
        raise UserError(f"{where} needs at least one [[method]] and one [[objective]]")
    cells = [
        cell
        for objective in _tables(table, "objective", where)
        for cell in _grid(table, where, head, threat, objective, methods, attacks, verifiers)
    ]
    _distinct_labels(attacks, verifiers, [str(one.get("name")) for one in _tables(table, "objective", where)])
    if len({cell.id for cell in cells}) != len(cells):
        raise UserError(f"{where} names the same cell twice; look for a repeated method, objective, density or seed")
    name, version = _typed(head, "name", str, where), _typed(head, "version", int, where)
    return Suite(name, version, str(head.get("description", "")), tuple(cells))


def _grid(
    table: dict[str, Any], where: str, head: dict[str, Any], threat: Threat, objective: dict[str, Any],
    methods: list[dict[str, Any]], attacks: list[Assignment], verifiers: list[Assignment],
) -> Iterable[Cell]:
    grid, data = _table(table, "grid", where), _data(_table(table, "data", where))
    name, base = str(objective.get("name")), _table(table, "budget", where)
    own = {key: value for key, value in objective.items() if key not in ("headline", "budget")}
    built = build("objective", own)
    budget = _typed({"budget": {}, **objective}, "budget", dict, f"objective {name!r}")
    asked = [one for one in verifiers if one.objectives is None or name in one.objectives]
    made = [one for one in attacks if one.objectives is None or name in one.objectives]
    cell = Cell(
        suite=_typed(head, "name", str, where), version=_typed(head, "version", int, where), data=data, arch="",
        method={}, objective=own, density=Fraction(1), seed=0,
        budget=construct(Budget, {**base, **budget}, f"budget of objective {name!r}"), threat=threat,
        attacks=tuple(made), verifiers=tuple(asked), headline=_headline(objective, made, asked, threat),
        samples=_samples(table.get("samples", {})),
    )
    densities = [_density(value) for value in _list(grid, "density", where)]
    seeds, objectives = _seeds(grid, where), [str(one.get("name")) for one in _tables(table, "objective", where)]
    shares = [_share(spec, seeds, objectives) for spec in methods]
    chosen = _with_dense([(method, own_seeds) for method, own_seeds, own_objectives in shares if name in own_objectives])
    for arch, seed in itertools.product(_archs(grid, where), seeds):
        _fits_network(built, name, arch)
        for method, own_seeds in chosen:
            if seed not in own_seeds:
                continue
            prunes = getattr(find("method", method["name"]), "prunes", True)
            for density in densities if prunes else [Fraction(1)]:
                yield replace(cell, arch=arch, seed=seed, method=method, density=density)


def _with_dense(chosen: list[tuple[dict[str, Any], list[int]]]) -> list[tuple[dict[str, Any], list[int]]]:
    """An objective's methods with their seeds; where dense is none of them, it is added at all of these seeds."""
    if not chosen or any(method["name"] == DENSE for method, _ in chosen):
        return chosen
    return [*chosen, ({"name": DENSE}, sorted({seed for _, seeds in chosen for seed in seeds}))]


def _share(spec: dict[str, Any], seeds: list[int], objectives: list[str]) -> tuple[dict[str, Any], list[int], list[str]]:
    """(the method alone, its seeds, its objectives): a method may take part in some of the suite's only."""
    method = {key: value for key, value in spec.items() if key not in ("seeds", "objectives")}
    build("method", method)
    for key, known in (("seeds", seeds), ("objectives", objectives)):
        own = spec.get(key, known)
        if not isinstance(own, list) or not own:
            raise UserError(f"`{key}` of method {method['name']!r} must be a list of some of the suite's {key}, got {own!r}")
        for one in own:
            if one not in known or isinstance(one, bool):
                raise unknown(f"{key.removesuffix('s')} of method {method['name']!r}", str(one), map(str, known))
    return method, spec.get("seeds", seeds), spec.get("objectives", objectives)


def _fits_network(objective: Any, name: str, arch: str) -> None:
    """An objective may say which networks it is for (`networks`, patterns of names), at any width."""
    known = getattr(objective, "networks", ("*",))
    if not any(fnmatch(arch.partition("@")[0], one) for one in known):
        raise UserError(f"the objective {name!r} is for {', '.join(known)}, not for {arch!r}; give {arch!r} a suite of its own")


def _assignment(kind: str, spec: dict[str, Any], threat: Threat) -> Assignment:
    own = {key: value for key, value in spec.items() if key not in OF_SUITES}
    tool = judging(kind, {"norm": threat.norm, "eps": threat.eps, **own})
    if tool.norm not in NORMS:
        raise UserError(f"{kind} {own['name']!r} has norm {tool.norm!r}; suites judge in {' and '.join(NORMS)}")
    if kind == "verifier" and not tool.deterministic and not hasattr(tool, "sigma"):
        raise UserError(f"{own['name']!r} as set here proves nothing about the network or a smoothed one, so it cannot be ranked")
    if getattr(tool, "seconds", None) is not None:
        raise UserError(f"{own['name']!r} may not be limited by seconds in a suite: records must be reproducible; limit its work")
    first, objectives = spec.get("first"), spec.get("objectives")
    if kind == "attack" and first is not None:
        raise UserError("an attack takes no `first`: images that it never saw would count as survivors; use [samples]")
    if first is not None and (not isinstance(first, int) or isinstance(first, bool) or first < 1):
        raise UserError(f"`first` of {kind} {own['name']!r} must be a positive whole number, got {first!r}")
    if first is not None and tool.deterministic:
        raise UserError(f"`first` is for smoothing; {own['name']!r} must judge the same images as the others: use [samples]")
    if objectives is not None and not isinstance(objectives, list):
        raise UserError(f"`objectives` of {kind} {own['name']!r} must be a list of names, got {objectives!r}")
    label = spec.get("label", getattr(tool, "label", _slug(str(own["name"]))))
    if label == "autoattack" and getattr(tool, "label", label) != label:
        raise UserError(f"only the bundle at its published strength is labelled 'autoattack'; this one is {tool.label!r}")
    return Assignment(str(label), own, tool, None if objectives is None else tuple(objectives), first, _rest(kind, spec, tool))


def judging(kind: str, spec: Mapping[str, Any]) -> Any:
    """The attack or verifier of a spec without the keys of `OF_SUITES`. Raises UserError where it cannot be told or ordered."""
    tool = build(kind, spec)
    if taken := sorted({one.name for one in fields(tool)} & OF_SUITES):
        raise UserError(f"{kind} {spec['name']!r} has a field {taken[0]!r}, a word of suites: rename it")
    if kind == "attack" and type(rest := getattr(tool, "rest", False)) is not bool:
        raise UserError(f"`rest` of attack {spec['name']!r} must be true or false, got {rest!r}")
    cost = getattr(tool, "cost", 0)
    if kind == "attack" and (isinstance(cost, bool) or not isinstance(cost, int | float) or math.isnan(cost)):
        raise UserError(f"`cost` of attack {spec['name']!r} must be a number, about the forward passes of an image, got {cost!r}")
    return tool


def _rest(kind: str, spec: dict[str, Any], tool: Any) -> bool:
    """Whether an attack is run only on what the others have not broken: as the suite says, else as the attack itself does."""
    rest = spec.get("rest", kind == "attack" and getattr(tool, "rest", False))
    if kind != "attack" and "rest" in spec:
        raise UserError(f"`rest` is for attacks; {kind} {spec['name']!r} judges every image that it is asked about")
    if not isinstance(rest, bool):
        raise UserError(f"`rest` of attack {spec['name']!r} must be true or false, got {rest!r}")
    return rest


def _distinct_labels(attacks: list[Assignment], verifiers: list[Assignment], objectives: list[str]) -> None:
    """Labels name columns and metrics, so none may stand twice or take the name of a metric over all."""
    for tools, taken in ((attacks, "worst"), (verifiers, "union")):
        seen = {taken: f"the metric {taken!r}"}
        for one in tools:
            if one.label in seen:
                raise UserError(f"the label {one.label!r} is taken by {seen[one.label]}; give another `label`")
            seen[one.label] = "another entry"
            for name in one.objectives or ():
                if name not in objectives:
                    raise unknown(f"objective of {one.label!r}", str(name), objectives)


def _known_keys(table: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    for key in table:
        if key not in known:
            raise unknown(f"field of {where}", key, known)


def _headline(objective: dict[str, Any], attacks: list[Assignment], verifiers: list[Assignment], threat: Threat) -> str:
    known = [f"certified.{one.label}" for one in verifiers] + [f"robust.{one.label}" for one in attacks]
    inside = any(one.tool.norm == threat.norm and one.tool.eps <= threat.eps for one in attacks)
    known += ["robust.worst"] if inside else []
    known += ["certified.union"] if any(one.tool.deterministic and one.tool.norm == threat.norm for one in verifiers) else []
    if not known:
        raise UserError("a suite needs at least one [[attack]] or [[verifier]] that applies to each objective")
    usual = next((one for one in ("robust.worst", "certified.union") if one in known), known[0])
    headline = objective.get("headline", usual)
    if headline not in known:
        raise unknown(f"headline of objective {objective.get('name')!r}", str(headline), known)
    return str(headline)


def _samples(table: Any) -> dict[str, Any]:
    if not isinstance(table, dict) or not set(table) <= {"every", "first"} or len(table) > 1:
        raise UserError(f"[samples] holds `every = k` or `first = n`, got {table!r}")
    for rule, value in table.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"`{rule}` in [samples] must be a positive whole number, got {value!r}")
        return {"rule": rule, "value": value}
    return {"rule": "all"}


def _data(table: dict[str, Any]) -> dict[str, Any]:
    name, augment = table.get("name"), table.get("augment", "none")
    if not isinstance(name, str) or not (name in DATASETS or name.endswith(".npz")):
        raise unknown("data set", str(name), DATASETS)
    if not isinstance(augment, str) or augment not in AUGMENTATIONS:
        raise unknown("augmentation", str(augment), AUGMENTATIONS)
    _known_keys(table, ("name", "augment", "train", "extra"), "[data]")
    found = {"name": name, "augment": augment}
    if name.endswith(".npz"):
        found["sha256"] = _file_digest(name, "name")
    if "extra" in table:
        found |= {"extra": table["extra"], "extra_sha256": _file_digest(table["extra"], "extra")}
    if "train" not in table:
        return found
    count = table["train"]
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise UserError(f"`train` in [data] is how many training images are used, at least 1, got {count!r}")
    return {**found, "train": count}


def _file_digest(path: Any, key: str) -> str:
    """A file's content is part of a cell: other images under the same name are another cell."""
    if not isinstance(path, str) or not path.endswith(".npz"):
        raise UserError(f"`{key}` in [data] is a file of images and labels that ends in .npz, got {path!r}")
    if not Path(path).is_file():
        raise UserError(f"`{key}` in [data] names {path}, and there is no such file")
    return sha256_file(Path(path))


def _density(value: Any) -> Fraction:
    density = fraction(value, "density")
    if not 0 < density <= 1:
        raise UserError(f"density is the kept fraction, above 0 and at most 1, got {value!r}")
    return density


def _archs(grid: dict[str, Any], where: str) -> list[str]:
    names = _list(grid, "arch", where)
    for name in names:
        if not isinstance(name, str):
            raise unknown("model", str(name), ARCHITECTURES)
        architecture(name)
    return names


def _seeds(grid: dict[str, Any], where: str) -> list[int]:
    seeds = _list(grid, "seed", where)
    for seed in seeds:
        if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
            raise UserError(f"seed must be a whole number from 0, got {seed!r}")
    return seeds


def _table(table: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    return _typed(table, key, dict, where)


def _tables(table: dict[str, Any], key: str, where: str) -> list[dict[str, Any]]:
    found = table.get(key, [])
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise UserError(f"{where}: write each {key} as a [[{key}]] table")
    return found


def _list(table: dict[str, Any], key: str, where: str) -> list[Any]:
    return _typed(table, key, list, where)


def _typed(table: dict[str, Any], key: str, kind: type, where: str) -> Any:
    value = table.get(key)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
        raise UserError(f"{where}: {key!r} must be {'a table' if kind is dict else kind.__name__}, got {value!r}")
    return value
