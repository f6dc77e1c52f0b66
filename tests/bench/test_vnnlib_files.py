"""VNN-LIB properties: read exactly, counterexamples judged as the formula itself judges them, everything else refused."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.errors import UserError
from bench.vnnlib_files import Row, float_above, float_below, read_property, robustness_property

pysmt = pytest.importorskip("pysmt")
from pysmt.environment import Environment  # noqa: E402
from pysmt.smtlib.parser import SmtLibParser  # noqa: E402

NAMES = "\n".join(f"(declare-const {name} Real)" for name in ("X_0", "X_1", "Y_0", "Y_1", "Y_2"))
BOX = "(assert (>= X_0 -0.5)) (assert (<= X_0 0.1)) (assert (>= X_1 0)) (assert (<= X_1 1e-1))"
FORMULAS = {
    "a disjunction of single constraints": f"{BOX} (assert (or (and (>= Y_0 Y_1)) (and (>= Y_2 Y_1))))",
    "a conjunction": f"{BOX} (assert (<= Y_0 Y_1)) (assert (< (+ Y_0 (* 2.5 Y_2) (- Y_1)) 0.75))",
    "several boxes": "(assert (or (and (>= X_0 0) (<= X_0 1) (>= X_1 0) (<= X_1 1) (>= Y_0 0)) "
    "(and (>= X_0 -2) (<= X_0 -1) (>= X_1 (- 1)) (<= X_1 0) (or (> Y_1 1) (= Y_2 0.5)))))",
    "boxes and outputs apart": "(assert (or (and (>= X_0 0) (<= X_0 1)) (and (>= X_0 -1.5) (<= X_0 -1)))) "
    "(assert (>= X_1 -1)) (assert (<= X_1 0)) (assert (or (<= Y_0 -0.5) (and (<= Y_1 0) (<= (* Y_2 2) (- Y_0 1)))))",
}


def written(path: Path, text: str) -> Path:
    path.write_text(f"; made by hand\n{NAMES}\n{text}\n")
    return path


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """name: (the property, the judgement of pysmt's own formula at a point)."""
    found = {}
    for name, text in FORMULAS.items():
        path = written(tmp_path_factory.mktemp("vnnlib") / "p.vnnlib", text)
        environment = Environment()
        script = SmtLibParser(environment=environment).get_script(io.StringIO("(set-logic QF_LRA)" + path.read_text()))
        manager = environment.formula_manager
        whole = manager.And([one.args[0] for one in script.commands if one.name == "assert"])

        def judge(x, y, whole=whole, manager=manager, environment=environment):  # type: ignore[no-untyped-def]
            values = {**{f"X_{i}": value for i, value in enumerate(x)}, **{f"Y_{i}": value for i, value in enumerate(y)}}
            point = {manager.get_symbol(key): manager.Real(Fraction(value)) for key, value in values.items()}
            return environment.simplifier.simplify(environment.substituter.substitute(whole, point)).is_true()

        found[name] = read_property(path), judge
    return found


EIGHTHS = st.integers(-16, 16).map(lambda k: k / 8)


@pytest.mark.parametrize("name", FORMULAS)
@settings(max_examples=50, deadline=None)
@given(x=st.tuples(EIGHTHS, EIGHTHS), y=st.tuples(EIGHTHS, EIGHTHS, EIGHTHS))
def test_a_point_breaks_the_property_where_the_formula_is_true(  # type: ignore[no-untyped-def]
    read, name: str, x: tuple[float, float], y: tuple[float, float, float]
) -> None:
    asked, judge = read[name]
    assert asked.broken_by(x, y) == judge(x, y)


def test_numbers_are_read_digit_by_digit(tmp_path: Path) -> None:
    text = BOX.replace("0.1)", "0.30000000000000000000000000000001)") + "(assert (>= Y_0 3.9911256458963100001))"
    (region,) = read_property(written(tmp_path / "p", text)).regions
    assert region.upper == (Fraction(30000000000000000000000000000001, 10**32), Fraction(1, 10))
    assert region.lower == (Fraction(-1, 2), 0)
    assert region.unsafe == ((Row({0: Fraction(-1)}, Fraction(39911256458963100001, 10**19)),),)


@pytest.mark.parametrize(
    "text, words",
    [
        ("(assert (>= X_0 0))", "X_0 has no upper bound"),
        (f"{BOX} (assert (<= (* Y_0 Y_1) 1))", "not linear"),
        (f"{BOX} (assert (<= (+ X_0 Y_1) 1))", "none mixes the two"),
        (f"{BOX} (assert (<= (+ X_0 X_1) 1))", "one by one"),
        (f"{BOX} (assert (< X_0 1))", "one by one"),
        (f"{BOX} (assert (not (<= Y_0 1)))", "other than and, or"),
        (f"{BOX} (assert (<= Z_0 1))", "declared"),
        (f"{BOX} (assert (<= Y_0 1)", "is not a VNN-LIB 1.0 property"),
        (f"{BOX} (assert (<= Y_0 1e99999999))", "out of all range"),
        (f"{BOX} (assert (<= Y_0 1e200))", "out of range"),
        (f"{BOX} (push 1)", "the command push"),
        (f"{BOX} (assert (let ((a (<= Y_0 1))) (and a a)))", "abbreviates terms"),
        ("(declare-const Z Real)", "declares 'Z'"),
        ("(declare-const Y_4 Real)", "without gaps"),
        ("(declare-const X_2 Int)", "sort Real"),
        ("(vnnlib-version <2.0>)", "VNN-LIB 2.0"),
        (" ".join(["(assert (or (<= Y_0 1) (<= Y_1 1)))"] * 14), "16,384 cases"),
        ("(assert (or " + "(and " * 3000 + "(<= Y_0 1)" + " (<= Y_1 2))" * 3000 + " (<= Y_2 1)))", "nested too deeply"),
    ],
)
def test_what_is_no_property_of_boxes_and_linear_constraints_is_refused(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words) as found:
        read_property(written(tmp_path / "p.vnnlib", text))
    assert "\n" not in str(found.value)


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "packed").write_bytes(b"\x1f\x8b\x08\xff")
    for name, words in (("packed", "not a text file"), ("none", "there is no file")):
        with pytest.raises(UserError, match=words):
            read_property(tmp_path / name)


@given(st.fractions(), st.fractions(max_denominator=10**30))
def test_rounded_numbers_enclose_the_exact_one(a: Fraction, b: Fraction) -> None:
    for value in (a, b):
        assert Fraction(float_below(value)) <= value <= Fraction(float_above(value))
        assert float_above(value) <= np.nextafter(float_below(value), np.inf)


def test_a_written_robustness_property_reads_back_as_it_was(tmp_path: Path) -> None:
    low = np.float32([[0.1, 1e-30]])
    high = np.float32([[0.3, 1.0]])
    path = tmp_path / "p.vnnlib"
    path.write_text(robustness_property(low, high, 1, 3, "a title"))
    (region,) = (found := read_property(path)).regions
    assert [float(value) for value in (*region.lower, *region.upper)] == [*low.flatten().tolist(), *high.flatten().tolist()]
    assert list(map(Fraction, low.flatten().tolist())) == list(region.lower)  # the float itself, not a decimal near it
    inside = low.flatten().tolist()
    assert not found.broken_by(inside, [0.0, 1.0, 0.5])
    assert found.broken_by(inside, [0.0, 1.0, 1.0])
    assert found.broken_by(inside, [2.0, 1.0, 0.0])


def test_the_property_of_the_page_is_one(tmp_path: Path) -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "interchange.md"
    path = tmp_path / "p.vnnlib"
    path.write_text(page.read_text().partition("```lisp\n")[2].partition("```")[0])
    found = read_property(path)
    assert (found.inputs, found.outputs, [len(rows) for rows in found.regions[0].unsafe]) == (2, 3, [1, 2])
    assert found.broken_by([0.2, 0.0], [0.0, -1.0, 0.5])
    assert not found.broken_by([0.2, 0.0], [0.0, -1.0, 0.25])
