"""VNN-LIB 1.0 properties, in exact arithmetic: boxes of inputs, and linear constraints of outputs that a counterexample meets.

The format is a part of SMT-LIB, so pysmt reads it. (The package called vnnlib reads either only VNN-LIB 2.0 or, in its old
version, rounds every number.)
"""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from .errors import UserError

LARGEST = 64 * 2**20  # bytes of a property
MOST = 10_000  # conjunctions of a property in disjunctive normal form
RANGE = Fraction(10) ** 150  # numbers of a property, in size: quotients of two are floats
NAME = re.compile(r"([XY])_(0|[1-9]\d{0,8})")
EXPONENT = re.compile(r"\d[eE][+-]?\d{4,}")
REALS = "(set-logic QF_LRA)\n"  # 1 is a real number, too
LET = re.compile(r"\(\s*let\b")  # a few of these unfold to any size
COMMANDS = {"declare-const", "declare-fun", "assert", "set-logic", "set-info", "check-sat", "exit"}

Terms = Mapping[str, Fraction]  # by name; "" is the constant


@dataclass(frozen=True)
class Row:
    """sum of coefficients[i] * Y_i, plus offset, is at most 0 (below 0 if strict)."""

    coefficients: Mapping[int, Fraction]
    offset: Fraction
    strict: bool = False

    def holds(self, y: Sequence[float]) -> bool:
        value = self.offset + sum(by * Fraction(y[i]) for i, by in self.coefficients.items())
        return value < 0 if self.strict else value <= 0


@dataclass(frozen=True)
class Region:
    """A box of inputs, and the conjunctions of rows of which a counterexample in it meets at least one."""

    lower: tuple[Fraction, ...]
    upper: tuple[Fraction, ...]
    unsafe: tuple[tuple[Row, ...], ...]

    @property
    def empty(self) -> bool:
        return any(low > high for low, high in zip(self.lower, self.upper))


@dataclass(frozen=True)
class Property:
    """What a counterexample must meet: one of the regions."""

    inputs: int
    outputs: int
    regions: tuple[Region, ...]

    def broken_by(self, x: Sequence[float], y: Sequence[float]) -> bool:
        """Whether input and output meet the formula, in exact arithmetic."""
        point = [Fraction(value) for value in x]
        return any(
            all(low <= value <= high for low, value, high in zip(one.lower, point, one.upper, strict=True))
            and any(all(row.holds(y) for row in rows) for rows in one.unsafe)
            for one in self.regions
        )


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_property(path: Path) -> Property:
    """The property of a VNN-LIB 1.0 file: inputs X_i in boxes, linear constraints of outputs Y_i, combined by and and or.

    Raises UserError, one sentence, for anything else: mixed or nonlinear constraints, inputs without bounds, VNN-LIB 2.0.
    """
    names, formulas = _script(_text(path), path)
    inputs, outputs = _count(names, "X", path), _count(names, "Y", path)
    try:
        common, choices = _normal_form(formulas)
        regions: dict[tuple[tuple[Fraction, ...], tuple[Fraction, ...]], list[tuple[Row, ...]]] = {}
        shared = _split(common)
        for choice in itertools.product(*choices):
            own = _split([atom for part in choice for atom in part])
            if shared is None or own is None:
                continue
            box = _box([*shared[0], *own[0]], inputs)
            regions.setdefault(box, []).append((*shared[1], *own[1]))
    except _UnreadError as reason:
        raise UserError(f"{path}: {reason}") from reason
    except RecursionError as reason:
        raise UserError(f"{path} is nested too deeply") from reason
    return Property(inputs, outputs, tuple(Region(*box, tuple(unsafe)) for box, unsafe in regions.items()))


class _UnreadError(Exception):
    """This is no property of boxes and linear constraints."""


def _text(path: Path) -> str:
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    if path.stat().st_size > LARGEST:
        raise UserError(f"{path} has {path.stat().st_size:,} bytes; properties above {LARGEST:,} are refused")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as reason:
        raise UserError(f"{path} is not a text file; a packed property must be unpacked first") from reason
    if LET.search(text):
        raise UserError(f"{path} abbreviates terms by let, which is not read; write them out")
    if "(vnnlib-version" in text:
        raise UserError(f"{path} is written in VNN-LIB 2.0; version 1.0 (declare-const X_0 Real) is read")
    found = EXPONENT.search(text)
    if found:
        raise UserError(f"{path} holds the number ...{found[0]}, which is out of all range")
    return text


def _script(text: str, path: Path) -> tuple[list[str], list[Any]]:
    """(declared names, asserted formulas)."""
    try:
        from pysmt.environment import Environment
        from pysmt.smtlib.parser import SmtLibParser
    except ImportError as reason:
        raise UserError(f"VNN-LIB files need the package pysmt ({reason}): pip install pysmt==0.9.6") from reason
    try:
        script = SmtLibParser(environment=Environment()).get_script(io.StringIO(REALS + text))
    except Exception as reason:
        own = "pysmt" in type(reason).__module__
        words = str(reason).partition("\n")[0] if own else "a command is cut off or malformed, or a name is not declared"
        raise UserError(f"{path} is not a VNN-LIB 1.0 property: {words}") from reason
    for command in script.commands:
        if command.name not in COMMANDS:
            raise UserError(f"{path}: the command {command.name} is not read; a property has declare-const and assert")
    declared = [command.args[0] for command in script.commands if command.name.startswith("declare")]
    if not all(one.is_symbol() and one.symbol_type().is_real_type() for one in declared):
        raise UserError(f"{path} declares something else than constants of sort Real")
    return [one.symbol_name() for one in declared], [one.args[0] for one in script.commands if one.name == "assert"]


def _count(names: Iterable[str], kind: str, path: Path) -> int:
    found = [NAME.fullmatch(name) for name in names]
    if not all(found):
        strange = next(name for name, match in zip(names, found) if not match)
        raise UserError(f"{path} declares {strange[:80]!r}; inputs are called X_0, X_1, ... and outputs Y_0, Y_1, ...")
    places = sorted(int(match[2]) for match in found if match and match[1] == kind)
    if not places or places != list(range(len(places))):
        raise UserError(f"{path} must declare {kind}_0, {kind}_1, ... without gaps, it declares {len(places)} of them")
    return len(places)


class _Atom(dict[str, Fraction]):
    """Terms whose sum is at most 0, or below 0."""

    strict: bool = False


def _normal_form(formulas: Iterable[Any]) -> tuple[list[_Atom], list[list[list[_Atom]]]]:
    """(atoms that always hold, choices): the conjunction of all formulas is all of the first and one of each choice."""
    common: list[_Atom] = []
    choices: list[list[list[_Atom]]] = []
    for formula in formulas:
        found = _disjuncts(formula)
        if len(found) == 1:
            common += found[0]
        else:
            choices.append(found)
    cases = math.prod(map(len, choices))
    if cases > MOST or (choices and cases * len(common) > MOST * MOST):
        raise _UnreadError(f"it has {cases:,} cases; up to {MOST:,} are read, fewer of long ones")
    return common, choices


def _disjuncts(formula: Any) -> list[list[_Atom]]:
    if formula.is_or():
        return [one for part in formula.args() for one in _disjuncts(part)]
    if formula.is_and():
        common, choices = _normal_form(formula.args())
        return [[*common, *(atom for part in choice for atom in part)] for choice in itertools.product(*choices)]
    if formula.is_bool_constant():
        return [[]] if formula.is_true() else []
    if formula.is_le() or formula.is_lt() or formula.is_equals():
        left, right = (_terms(side) for side in formula.args())
        atom = _sum(left, right, Fraction(-1))
        atom.strict = formula.is_lt()
        return [[atom, _sum({}, atom, Fraction(-1))]] if formula.is_equals() else [[atom]]
    raise _UnreadError("a formula other than and, or, <=, >=, <, > and = is not read")


def _terms(term: Any) -> Terms:
    if term.is_symbol():
        return {term.symbol_name(): Fraction(1)}
    if term.is_constant():
        value = term.constant_value()
        return {"": Fraction(int(value.numerator), int(value.denominator))}
    parts = [_terms(part) for part in term.args()]
    if term.is_plus() or term.is_minus():
        total: Terms = parts[0]
        for part in parts[1:]:
            total = _sum(total, part, Fraction(-1 if term.is_minus() else 1))
        return total
    if term.is_times():
        product: Terms = {"": Fraction(1)}
        for part in parts:
            product = _product(product, part)
        return product
    raise _UnreadError("a term other than sums and multiples of X_i and Y_i is not read")


def _sum(a: Terms, b: Terms, by: Fraction) -> _Atom:
    total = _Atom(a)
    for name, value in b.items():
        total[name] = total.get(name, Fraction(0)) + by * value
    return total


def _product(a: Terms, b: Terms) -> Terms:
    for constant, other in ((a, b), (b, a)):
        if not any(constant):
            by = constant.get("", Fraction(0))
            return {name: by * value for name, value in other.items()}
    raise _UnreadError("a product of two variables is not linear")


Bound = tuple[int, Fraction, bool]  # input, value, whether it is the upper one


def _split(atoms: Iterable[_Atom]) -> tuple[list[Bound], list[Row]] | None:
    """(bounds of inputs, rows of outputs); None where an atom without variables is false."""
    bounds: list[Bound] = []
    rows: list[Row] = []
    for atom in atoms:
        offset = atom.get("", Fraction(0))
        used = {name: value for name, value in atom.items() if name and value != 0}
        kinds = {name[0] for name in used}
        if any(abs(value) > RANGE or (name and 0 < abs(value) * RANGE < 1) for name, value in atom.items()):
            raise _UnreadError("a number above 1e150 or below 1e-150 is out of range")
        if not used:
            if offset > 0 or (atom.strict and offset == 0):
                return None
        elif kinds == {"Y"}:
            rows.append(Row({int(name[2:]): value for name, value in used.items()}, offset, atom.strict))
        elif kinds == {"X"} and len(used) == 1 and not atom.strict:
            ((name, by),) = used.items()
            bounds.append((int(name[2:]), -offset / by, by > 0))
        else:
            raise _UnreadError(
                f"the constraint on {', '.join(list(used)[:4])} is not read: inputs have bounds (<=, >=) one by one, "
                "outputs linear constraints, and none mixes the two"
            )
    return bounds, rows


def _box(bounds: Iterable[Bound], inputs: int) -> tuple[tuple[Fraction, ...], tuple[Fraction, ...]]:
    lower: dict[int, Fraction] = {}
    upper: dict[int, Fraction] = {}
    for at, value, is_upper in bounds:
        side = upper if is_upper else lower
        side[at] = value if at not in side else min(side[at], value) if is_upper else max(side[at], value)
    for at in range(inputs):
        for side, word in ((lower, "lower"), (upper, "upper")):
            if at not in side:
                raise _UnreadError(f"X_{at} has no {word} bound")
    return tuple(lower[at] for at in range(inputs)), tuple(upper[at] for at in range(inputs))


# ---- floats on the safe side -----------------------------------------------------------------------------------------


def float_below(value: Fraction) -> float:
    """The largest float64 not above the exact value (one step below it at most)."""
    near = float(value)
    return near if Fraction(near) <= value else float(np.nextafter(near, -math.inf))


def float_above(value: Fraction) -> float:
    return -float_below(-value)


# ---- writing ---------------------------------------------------------------------------------------------------------


def robustness_property(lower: np.ndarray, upper: np.ndarray, label: int, classes: int, title: str) -> str:
    """VNN-LIB 1.0: an input of the box whose label is not strictly ahead of all other classes is a counterexample.

    lower, upper: floats, any shape, read row by row; they are written as the exact decimals that they are.
    """
    return "\n".join(_robustness_lines(lower, upper, label, classes, title)) + "\n"


def _robustness_lines(lower: np.ndarray, upper: np.ndarray, label: int, classes: int, title: str) -> Iterator[str]:
    yield f"; {title}"
    sides = list(zip(lower.flatten().tolist(), upper.flatten().tolist()))
    yield from (f"(declare-const X_{i} Real)" for i in range(len(sides)))
    yield from (f"(declare-const Y_{j} Real)" for j in range(classes))
    for i, (low, high) in enumerate(sides):
        yield f"(assert (>= X_{i} {_decimal(low)}))"
        yield f"(assert (<= X_{i} {_decimal(high)}))"
    others = " ".join(f"(and (>= Y_{j} Y_{label}))" for j in range(classes) if j != label)
    yield f"(assert (or {others}))"


def _decimal(value: float) -> str:
    text = format(Decimal(value), "f")
    return text if "." in text else f"{text}.0"
