"""Words become objects exactly, or one sentence says which word is wrong and what would be right."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import pytest

from attacks import names as attack_names
from bench.build import CATALOGUES, build, construct, convert, described, described_attacks, find, fraction, plain
from bench.errors import UserError
from bench.methods import HYDRA, LWM
from bench.objectives import PGDTraining, StabilityTraining
from bench.threat import Threat
from bench.train import Budget
from verifiers import VERIFIERS


def refused(kind: str, spec: dict[str, Any]) -> str:
    """The one sentence that answers a wrong spec."""
    with pytest.raises(UserError) as caught:
        build(kind, spec)
    sentence = str(caught.value)
    assert sentence.strip()
    assert "\n" not in sentence
    return sentence


# ---- exact numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, value",
    [
        ("8/255", Fraction(8, 255)), ("0.1", Fraction(1, 10)), (0.1, Fraction(1, 10)), (0.05, Fraction(1, 20)),
        ("0.031", Fraction(31, 1000)), (1, Fraction(1)), ("1", Fraction(1)), (Fraction(2, 7), Fraction(2, 7)),
        ("1e-3", Fraction(1, 1000)),
    ],
)  # fmt: skip
def test_fractions_are_read_by_their_digits(text: Any, value: Fraction) -> None:
    assert fraction(text, "eps") == value


@pytest.mark.parametrize("text", [
    "eight", "", "\uff18/255", "0.\uff11", "8/0", "8//255", None, True, [1], "nan", float("nan"), float("inf"),
])  # fmt: skip
def test_what_is_no_fraction_is_named_with_two_examples(text: Any) -> None:
    with pytest.raises(UserError, match=r"eps must be a fraction such as 8/255 or a decimal such as 0\.1, got") as caught:
        fraction(text, "eps")
    assert repr(text) in str(caught.value)


HUGE = """
from bench.build import fraction
from bench.errors import UserError
for text in ("1e999999999", "1e-999999999"):
    try:
        fraction(text, "eps")
    except UserError as reason:
        print(reason)
"""


def test_a_fraction_whose_exact_value_would_fill_the_memory_is_refused_at_once() -> None:
    """Fraction("1e999999999") would be exact and never finish; in a process of its own, so that this test ends."""
    try:
        done = subprocess.run([sys.executable, "-c", HUGE], capture_output=True, text=True, timeout=20, check=False)
    except subprocess.TimeoutExpired:
        pytest.fail("it does not return")
    assert done.stdout.count("eps must be a fraction") == 2


def test_eps_of_a_suite_stays_exact_in_attacks_verifiers_objectives_and_threats() -> None:
    spec = {"eps": "8/255"}
    for kind, name in [("attack", "pgd"), ("attack", "apgd"), ("verifier", "ibp"), ("objective", "trades")]:
        assert build(kind, {"name": name, **spec}).eps == Fraction(8, 255)
    assert construct(Threat, {"eps": 0.1}, "threat").eps == Fraction(1, 10)


# ---- conversion ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fields:
    whole: int = 0
    real: float = 0.0
    text: str = ""
    flag: bool = False
    share: Fraction = Fraction(1)
    maybe: Fraction | None = None
    choice: Literal["a", "b"] = "a"
    several: tuple[float, ...] = ()
    anything: Any = None


@pytest.mark.parametrize(
    "name, given, value",
    [
        ("whole", 3, 3), ("real", 3, 3.0), ("real", 0.5, 0.5), ("text", "x", "x"), ("flag", True, True),
        ("share", "1/3", Fraction(1, 3)), ("maybe", None, None), ("maybe", "1/3", Fraction(1, 3)), ("choice", "b", "b"),
        ("several", [1.0, 2.0], (1.0, 2.0)), ("anything", {"x": 1}, {"x": 1}),
    ],
)  # fmt: skip
def test_fields_become_their_annotated_type(name: str, given: Any, value: Any) -> None:
    found = getattr(construct(Fields, {name: given}, "thing"), name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    "name, given, expected",
    [
        ("whole", True, "int"), ("whole", 3.0, "int"), ("whole", "3", "int"), ("whole", None, "int"), ("real", True, "float"),
        ("real", "0.5", "float"), ("text", 5, "str"), ("flag", 1, "bool"), ("flag", "yes", "bool"), ("share", "x", "fraction"),
        ("share", True, "fraction"), ("maybe", "x", "fraction"), ("choice", "c", "one of a, b"), ("choice", 1, "one of a, b"),
        ("choice", ["a"], "one of a, b"), ("several", 5, "list"), ("several", "12", "list"),
    ],
)  # fmt: skip
def test_a_wrong_type_is_one_sentence_with_field_value_and_expectation(name: str, given: Any, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        construct(Fields, {name: given}, "thing 'x'")
    sentence = str(caught.value)
    assert f"{name} of thing 'x'" in sentence
    assert repr(given) in sentence
    assert expected in sentence


def test_an_unknown_field_offers_the_nearest_one() -> None:
    sentence = refused("objective", {"name": "pgd", "step": 3})
    assert "unknown field of objective 'pgd' 'step'; did you mean 'steps'?" in sentence


def test_the_owns_check_of_a_dataclass_becomes_a_sentence_too() -> None:
    with pytest.raises(UserError, match="budget: optimizer is sgd or adam, got 'lion'"):
        construct(Budget, {"optimizer": "lion"}, "budget")
    assert "works in linf" in refused("attack", {"name": "bim", "norm": "l2", "eps": "0.1"})
    assert "eps" in refused("attack", {"name": "pgd"})  # a required field that is missing
    assert "smoothing" in refused("verifier", {"name": "smoothing", "norm": "linf"})


def test_convert_follows_optional_and_any() -> None:
    assert convert(None, Fraction | None, "x") is None
    assert convert("0.5", Fraction | None, "x") == Fraction(1, 2)
    assert convert([1], Any, "x") == [1]


# ---- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, wrong, right",
    [
        ("method", "hidra", "hydra"), ("objective", "trade", "trades"), ("verifier", "crwn", "crown"),
        ("attack", "apgdd", "apgd"),
    ],
)  # fmt: skip
def test_an_unknown_name_offers_the_nearest_known_one(kind: str, wrong: str, right: str) -> None:
    sentence = refused(kind, {"name": wrong})
    assert f"unknown {kind} {wrong!r}; did you mean {right!r}?" in sentence


def test_an_unknown_attack_is_answered_with_where_all_of_them_are() -> None:
    assert refused("attack", {"name": "pgdd"}).endswith("did you mean 'pgd'?; `sparsecert list attacks` shows them all")


def test_a_name_like_no_other_lists_what_there_is() -> None:
    sentence = refused("method", {"name": "zzzzzz"})
    assert f"known: {', '.join(sorted(CATALOGUES['method']))}" in sentence


@pytest.mark.parametrize("name", [None, 5, ["pgd"]])
@pytest.mark.parametrize("kind", ["method", "objective", "attack", "verifier"])
def test_a_missing_name_is_said(kind: str, name: Any) -> None:
    assert refused(kind, {"name": name}) == f"a {kind} needs a name, got {name!r}"


@pytest.mark.parametrize("kind", CATALOGUES)
def test_every_shipped_name_builds_with_its_defaults_and_is_described(kind: str) -> None:
    lines = {one["name"]: one for one in described(kind)}
    for name, found in CATALOGUES[kind].items():
        built = build(kind, {"name": name})
        assert type(built) is found is find(kind, name)
        assert lines[name]["summary"]
        assert set(lines[name]["fields"]) == set(plain(built))


def test_every_attack_is_described_by_its_name() -> None:
    lines = described_attacks()
    assert [one["name"] for one in lines] == [name for name in attack_names() if name != "torchattacks"]
    assert all(one["summary"] for one in lines)


# ---- torchattacks ----------------------------------------------------------------------------------------------------


def test_a_torchattacks_name_takes_the_attacks_own_parameters_beside_it() -> None:
    attack = build("attack", {"name": "square", "eps": "8/255", "n_queries": 100, "seed": 3})
    assert (attack.attack, attack.eps, attack.seed, dict(attack.params)) == ("square", Fraction(8, 255), 3, {"n_queries": 100})
    assert dict(build("attack", {"name": "apgd", "eps": "0.1"}).params) == {"steps": 100}


def test_a_parameter_that_the_attack_does_not_take_is_named() -> None:
    assert "n_querys" in refused("attack", {"name": "square", "eps": "0.1", "n_querys": 100})


@pytest.mark.parametrize("params", [{"steps": 3}, [["steps", 3]], {"decay": 0.5, "steps": 3}])
def test_the_librarys_own_attack_is_reached_by_name_with_params_as_a_table(params: Any) -> None:
    attack = build("attack", {"name": "torchattacks", "attack": "mifgsm", "eps": "0.1", "params": params})
    assert dict(attack.params) == dict(params)


def test_two_letter_parameters_are_not_read_as_pairs_of_letters() -> None:
    """JSMA has `theta` and `gamma`; CW has `c`, `lr`: a table {lr = 0.1} is the learning rate."""
    attack = build("attack", {"name": "torchattacks", "attack": "cw", "norm": "l2", "eps": "0.5", "params": {"lr": 0.1}})
    assert dict(attack.params) == {"lr": 0.1}


def test_an_unknown_attack_of_the_library_is_a_sentence() -> None:
    assert "ppgd" in refused("attack", {"name": "torchattacks", "attack": "ppgd", "eps": "0.1"})


# ---- plug-ins --------------------------------------------------------------------------------------------------------

PLUGIN = '''
"""A plug-in."""
from __future__ import annotations
from dataclasses import dataclass
from fractions import Fraction

@dataclass(frozen=True)
class Mine:
    """Proves nothing."""
    deterministic = True
    norm: str = "linf"
    eps: Fraction = Fraction(1, 10)
    steps: int = 3

class Plain:
    pass

@dataclass(frozen=True)
class Unreadable:
    value: "NoSuchType" = 1

def function():
    pass
'''


@pytest.fixture
def plugin(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "mine.py"
    path.write_text(PLUGIN)
    yield path
    sys.modules.pop("mine", None)  # imported by its name: the next test must not find it


@pytest.mark.parametrize("kind", ["method", "objective", "attack", "verifier"])
def test_a_file_plug_in_is_built_like_a_shipped_one(plugin: Path, kind: str) -> None:
    built = build(kind, {"name": f"{plugin}:Mine", "eps": "8/255"})
    assert (built.eps, built.steps) == (Fraction(8, 255), 3)
    assert "must be int, got 'x'" in refused(kind, {"name": f"{plugin}:Mine", "steps": "x"})


def test_a_module_plug_in_is_imported_by_its_dotted_path(plugin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(plugin.parent))
    assert build("method", {"name": "mine:Mine", "steps": 5}).steps == 5
    assert build("method", {"name": "bench.methods.hydra:HYDRA"}) == HYDRA()


def test_a_file_plug_in_is_what_the_file_says_now(plugin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's own cache cannot tell two texts of one length that were written within a second."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    plugin.write_text(PLUGIN.replace("from __future__ import annotations", ""))
    assert build("objective", {"name": f"{plugin}:Mine"}).steps == 3
    plugin.write_text(plugin.read_text().replace("steps: int = 3", "steps: int = 4"))
    again = build("objective", {"name": f"{plugin}:Mine"})
    assert again.steps == 4
    assert type(again).__dataclass_fields__["eps"].type is Fraction, "compiled with another file's __future__"


@pytest.mark.parametrize("what", ["Plain", "function", "Fraction", ""])
def test_what_is_no_dataclass_is_refused_with_the_two_spellings(plugin: Path, what: str) -> None:
    sentence = refused("method", {"name": f"{plugin}:{what}"})
    assert "is not a dataclass; a method from outside is given as file.py:Class or module:Class" in sentence


def test_a_class_that_is_not_in_the_file_is_answered_with_the_nearest_one(plugin: Path) -> None:
    assert "did you mean 'Mine'?" in refused("method", {"name": f"{plugin}:Mines"})


def test_attacks_and_verifiers_from_outside_need_the_threats_fields_and_a_word_on_determinism(tmp_path: Path) -> None:
    text = "from dataclasses import dataclass\n@dataclass(frozen=True)\nclass Bare:\n    {}\n"
    for body, complaint in (("tries: int = 3", "norm and eps"), ("norm: str = 'linf'\n    eps: object = 1", "deterministic")):
        path = tmp_path / f"{complaint[:4]}.py"
        path.write_text(text.format(body))
        assert complaint in refused("verifier", {"name": f"{path}:Bare"})
    assert "norm and eps" in refused("attack", {"name": f"{tmp_path / 'norm.py'}:Bare"})


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("raise RuntimeError('no luck')", "RuntimeError: no luck"), ("def broken(:", "SyntaxError"),
        ("import no_such_module_at_all", "no_such_module_at_all"), ("\x00", "cannot import"),
    ],
)  # fmt: skip
def test_a_plug_in_that_fails_to_load_says_why(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "bad.py"
    path.write_text(text)
    sentence = refused("objective", {"name": f"{path}:Mine"})
    assert str(path) in sentence
    assert complaint in sentence


@pytest.mark.parametrize("name", ["nowhere.py:Mine", "no_such_module_at_all:Mine", ":Mine", ".relative:Mine"])
def test_a_plug_in_that_is_not_there_is_named(name: str) -> None:
    assert name.rpartition(":")[0] in refused("verifier", {"name": name})


def test_a_plug_in_with_an_annotation_that_nothing_defines_is_a_sentence(plugin: Path) -> None:
    assert "NoSuchType" in refused("method", {"name": f"{plugin}:Unreadable"})


@pytest.mark.parametrize("value, complaint", [("mine:Mine", None), ("no_such_module_at_all:Mine", "no_such_module_at_all")])
def test_entry_points_are_found_by_name_and_a_broken_one_is_a_sentence(
    plugin: Path, monkeypatch: pytest.MonkeyPatch, value: str, complaint: str | None
) -> None:
    monkeypatch.syspath_prepend(str(plugin.parent))
    entry = metadata.EntryPoint("outside", value, "sparsecert.methods")
    monkeypatch.setattr(metadata, "entry_points", lambda group: [entry] if group == "sparsecert.methods" else [])
    if complaint is None:
        assert build("method", {"name": "outside"}).steps == 3
    else:
        assert complaint in refused("method", {"name": "outside"})


# ---- plain values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, spec",
    [
        ("method", {"name": "hydra", "init": "dirac"}), ("method", {"name": "random", "rescale": False}),
        ("objective", {"name": "pgd", "eps": "0.1", "step_size": "1/12"}), ("objective", {"name": "stability", "sigma": 1}),
        ("attack", {"name": "pgd", "eps": "8/255", "loss": "margin"}), ("attack", {"name": "fgsm", "eps": "8/255"}),
        ("attack", {"name": "square", "eps": "8/255", "n_queries": 50}), ("attack", {"name": "autoattack", "eps": "0.1"}),
        ("verifier", {"name": "crown", "eps": "0.1"}), ("verifier", {"name": "smoothing", "sigma": 0.5}),
    ],
)  # fmt: skip
def test_a_built_objects_plain_fields_are_json_and_build_it_again(kind: str, spec: dict[str, Any]) -> None:
    built = build(kind, spec)
    stored = json.loads(json.dumps(plain(built), allow_nan=False))
    assert stored == plain(built)
    again = build(kind, {"name": spec["name"], **stored})
    assert again == built
    assert repr(again) == repr(built)


def test_plain_writes_fractions_as_text_and_tuples_as_lists() -> None:
    @dataclass(frozen=True)
    class Nested:
        eps: Fraction = Fraction(8, 255)
        several: tuple[Any, ...] = (1, (Fraction(1, 2),))
        table: dict[str, Any] = field(default_factory=lambda: {"a": Fraction(1, 3)})
        inner: Any = None

    assert plain(Nested(inner=Threat())) == {
        "eps": "8/255", "several": [1, ["1/2"]], "table": {"a": "1/3"}, "inner": {"norm": "linf", "eps": "8/255"},
    }  # fmt: skip


def test_catalogues_hold_what_is_exported() -> None:
    assert CATALOGUES["method"]["lwm"] is LWM
    assert CATALOGUES["objective"]["pgd"] is PGDTraining
    assert CATALOGUES["objective"]["stability"] is StabilityTraining
    assert CATALOGUES["verifier"] is VERIFIERS


@pytest.mark.parametrize("radius", ["1/0", "1e999999999", "eight", [0.5]])
def test_a_list_of_fractions_is_read_like_a_fraction(radius: Any) -> None:
    good = {"name": "smoothing", "rule": "sequential", "eps": "0.25"}
    assert build("verifier", {**good, "grid": ["1/2", 0.75]}).grid == (Fraction(1, 2), Fraction(3, 4))
    with pytest.raises(UserError, match="grid"):
        build("verifier", {**good, "grid": [radius]})
