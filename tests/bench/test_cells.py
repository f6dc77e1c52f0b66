"""Suites: the grid, ids that never change by accident, and a sentence for every mistake in a TOML file."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import fields, replace
from fractions import Fraction
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from bench.cells import Cell, Suite, read_suite, shipped
from bench.errors import UserError
from bench.threat import Threat
from bench.train import Budget
from leaderboard.board import REFERENCE

TEXT = """
[suite]
name = "try"
version = 3
description = "a suite for tests"
[data]
name = "digits"
[threat]
norm = "linf"
eps = "0.1"
[budget]
pretrain = 4
prune = 2
finetune = 3
lr = 0.1
prune_lr = 0.1
finetune_lr = 0.01
batch = 64
optimizer = "sgd"
momentum = 0.9
weight_decay = 0.0
ramp = 0.5
[grid]
arch = ["cnn_small", "mlp"]
density = ["0.1", 0.05]
seed = [0, 1]
[[method]]
name = "dense"
[[method]]
name = "hydra"
init = "dirac"
[[objective]]
name = "pgd"
eps = "8/255"
steps = 3
[[objective]]
name = "stability"
sigma = 0.25
headline = "certified.smooth"
[objective.budget]
pretrain = 9
[[attack]]
name = "pgd"
label = "pgd-5"
steps = 5
[[attack]]
name = "apgd"
objectives = ["pgd"]
[[verifier]]
name = "ibp"
[[verifier]]
name = "smoothing"
label = "smooth"
norm = "l2"
eps = "0.25"
first = 7
objectives = ["stability"]
"""

# To renew after a deliberate change of the format, paste what this prints (GOLDEN.toml holds TEXT):
#   python -c "from bench.cells import read_suite; print(*[c.id for c in read_suite('GOLDEN.toml').cells][:6], sep='\n')"
GOLDEN = [
    "try@3-cnn_small-dense-pgd-d1-s0-3ab5efc3",
    "try@3-cnn_small-hydra-pgd-d0.1-s0-b34639dd",
    "try@3-cnn_small-hydra-pgd-d0.05-s0-206d5e69",
    "try@3-cnn_small-dense-pgd-d1-s1-d6365c2d",
    "try@3-cnn_small-hydra-pgd-d0.1-s1-82a734e2",
    "try@3-cnn_small-hydra-pgd-d0.05-s1-5556bcf5",
]

Read = Callable[..., Suite]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """read(old, new, ...): the suite TEXT with each old part replaced by the new one."""

    def make(*changes: str, methods: tuple[str, ...] = ()) -> Suite:
        text = TEXT
        for old, new in zip(changes[::2], changes[1::2], strict=True):
            assert text.count(old) == 1, f"{old!r} must stand once in TEXT"
            text = text.replace(old, new)
        path = tmp_path / "try.toml"
        path.write_text(text)
        return read_suite(str(path), methods)

    return make


def refused(read: Read, *changes: str) -> str:
    with pytest.raises(UserError) as caught:
        read(*changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- the grid --------------------------------------------------------------------------------------------------------


def test_a_grid_crosses_everything_and_the_dense_reference_stands_once(read: Read) -> None:
    suite = read()
    assert (suite.title, suite.description) == ("try@3", "a suite for tests")
    found = Counter((c.objective["name"], c.arch, c.method["name"], c.density, c.seed) for c in suite.cells)
    tenth, twentieth = Fraction(1, 10), Fraction(1, 20)
    pairs = [("dense", Fraction(1)), ("hydra", tenth), ("hydra", twentieth)]
    wanted = itertools.product(["pgd", "stability"], ["cnn_small", "mlp"], pairs, [0, 1])
    assert found == Counter((o, a, m, d, s) for o, a, (m, d), s in wanted)


def test_the_embedded_suite_has_42_cells_with_dense_once_per_objective_and_seed() -> None:
    cells = read_suite("digits@1").cells
    assert len(cells) == 42
    dense = Counter((c.objective["name"], c.seed) for c in cells if c.method["name"] == "dense")
    assert len(dense) == 6
    assert set(dense.values()) == {1}
    assert {c.method["name"] for c in cells} == {"dense", "random", "lwm", "hydra"}


def test_where_a_suite_names_no_dense_network_one_is_added_at_every_seed_of_the_objectives_methods(read: Read) -> None:
    base, without = read(), read('[[method]]\nname = "dense"\n', "")
    assert {cell.id for cell in without.cells} == {cell.id for cell in base.cells}
    some = read('[[method]]\nname = "dense"\n', "", 'init = "dirac"', 'init = "dirac"\nseeds = [1]\nobjectives = ["stability"]')
    dense = {(cell.objective["name"], cell.arch, cell.seed) for cell in some.cells if cell.method == {"name": "dense"}}
    assert dense == {("stability", "cnn_small", 1), ("stability", "mlp", 1)}  # no method, no board


def test_a_dense_network_at_one_of_the_seeds_is_enough(read: Read) -> None:
    some = read('name = "dense"', 'name = "dense"\nseeds = [1]\nobjectives = ["pgd"]')
    dense = Counter((cell.objective["name"], cell.seed) for cell in some.cells if cell.method["name"] == "dense")
    assert dense == {("pgd", 1): 2, ("stability", 0): 2, ("stability", 1): 2}


@pytest.mark.parametrize("name", shipped())
def test_every_board_of_a_shipped_suite_has_a_dense_row(name: str) -> None:
    cells = read_suite(name).cells
    boards = {(cell.objective["name"], cell.arch) for cell in cells}
    assert {(cell.objective["name"], cell.arch) for cell in cells if cell.method["name"] == REFERENCE} == boards


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_suite_reads_under_its_own_name_with_ids_that_are_unique_file_names(name: str) -> None:
    suite = read_suite(name)
    assert suite.title == name
    assert len({cell.id for cell in suite.cells}) == len(suite.cells) > 0
    assert not any(set(cell.id) & set("/\\: ") for cell in suite.cells)


def test_a_method_from_the_command_line_is_ranked_beside_the_suites_own(read: Read, tmp_path: Path) -> None:
    plugin = tmp_path / "mine.py"
    plugin.write_text("from bench.methods import LWM as Mine\n")
    base, more = read(), read(methods=(f"{plugin}:Mine",))
    new = [cell for cell in more.cells if cell.id not in {one.id for one in base.cells}]
    assert len(more.cells) - len(base.cells) == len(new) == 2 * 2 * 2 * 2
    assert all("-Mine-" in cell.id for cell in new)


# ---- what a cell asks for --------------------------------------------------------------------------------------------


def cell_of(suite: Suite, objective: str) -> Cell:
    return next(cell for cell in suite.cells if cell.objective["name"] == objective and cell.method["name"] == "hydra")


def test_attacks_and_verifiers_apply_to_the_objectives_they_name(read: Read) -> None:
    pgd, stability = (cell_of(read(), name) for name in ("pgd", "stability"))
    assert [one.label for one in pgd.attacks] == ["pgd-5", "apgd"]
    assert [one.label for one in stability.attacks] == ["pgd-5"]
    assert [one.label for one in pgd.verifiers] == ["ibp"]
    assert [one.label for one in stability.verifiers] == ["ibp", "smooth"]


def test_tools_take_the_threat_unless_they_say_otherwise(read: Read) -> None:
    cell = cell_of(read(), "stability")
    tools = {one.label: one for one in (*cell.attacks, *cell.verifiers)}
    assert (tools["pgd-5"].tool.norm, tools["pgd-5"].tool.eps, tools["pgd-5"].tool.steps) == ("linf", Fraction(1, 10), 5)
    assert (tools["ibp"].tool.norm, tools["ibp"].tool.eps, tools["ibp"].first) == ("linf", Fraction(1, 10), None)
    assert (tools["smooth"].tool.norm, tools["smooth"].tool.eps, tools["smooth"].first) == ("l2", Fraction(1, 4), 7)


def test_a_budget_of_an_objective_overrides_the_suites_field_by_field(read: Read) -> None:
    suite = read()
    assert cell_of(suite, "pgd").budget.pretrain == 4
    assert cell_of(suite, "stability").budget == replace(cell_of(suite, "pgd").budget, pretrain=9)


def test_headlines_name_a_metric_of_the_cell(read: Read) -> None:
    suite = read()
    assert cell_of(suite, "pgd").headline == "robust.worst"
    assert cell_of(suite, "stability").headline == "certified.smooth"
    union = read("steps = 3\n", 'steps = 3\nheadline = "certified.union"\n')
    assert cell_of(union, "pgd").headline == "certified.union"
    assert "did you mean 'certified.ibp'" in refused(read, "steps = 3\n", 'steps = 3\nheadline = "certified.ibpp"\n')
    # smoothing is not asked about the pgd cells
    assert "unknown headline" in refused(read, "steps = 3\n", 'steps = 3\nheadline = "certified.smooth"\n')


@pytest.mark.parametrize(
    "table, rule",
    [
        ("", {"rule": "all"}), ("[samples]\n", {"rule": "all"}), ("[samples]\nevery = 3\n", {"rule": "every", "value": 3}),
        ("[samples]\nfirst = 50\n", {"rule": "first", "value": 50}),
    ],
)  # fmt: skip
def test_samples_are_named_by_rule(read: Read, table: str, rule: dict[str, Any]) -> None:
    assert {json.dumps(dict(cell.samples)) for cell in read("[grid]\n", f"{table}[grid]\n").cells} == {json.dumps(rule)}


def test_a_cells_json_holds_the_whole_configuration_defaults_included(read: Read) -> None:
    found = cell_of(read(), "stability").as_json()
    assert json.loads(json.dumps(found)) == found
    assert found["method"] == {"name": "hydra", "init": "dirac"}
    assert found["objective"] == {"name": "stability", "sigma": 0.25, "beta": 6.0, "clip": False}
    assert found["threat"] == {"norm": "linf", "eps": "1/10"}
    assert found["density"] in ("1/10", "1/20")
    assert set(found["budget"]) == {one.name for one in fields(Budget)}
    assert found["attacks"][0]["label"] == "pgd-5"
    assert {"name", "label", "first", "sigma", "n0", "n", "alpha", "seed", "norm", "eps"} <= set(found["verifiers"][1])
    assert "first" not in found["verifiers"][0]


# ---- identity --------------------------------------------------------------------------------------------------------


def test_golden_ids(read: Read) -> None:
    """An id on record must be found again: these may change only together with a decision to do so."""
    assert [cell.id for cell in read().cells][:6] == GOLDEN


def test_an_id_tells_suite_arch_method_objective_density_and_seed(read: Read) -> None:
    cell = cell_of(read(), "pgd")
    assert cell.id.startswith("try@3-cnn_small-hydra-pgd-d0.1-s0-")
    assert cell.id.endswith(cell.fingerprint[:8])


def test_a_fingerprint_does_not_depend_on_how_numbers_and_defaults_are_spelled(read: Read) -> None:
    plain = [cell.fingerprint for cell in read().cells]
    respelled = read(
        'density = ["0.1", 0.05]', 'density = ["1/10", "0.050"]', "steps = 3\n", "steps = 3\nnorm = 'linf'\n",
        "sigma = 0.25", "beta = 6\nsigma = 0.25\nclip = false", "[grid]\n", "[samples]\n[grid]\n",
    )  # fmt: skip
    assert [cell.fingerprint for cell in respelled.cells] == plain


CHANGED: dict[str, Any] = {
    "suite": "other",
    "version": 4,
    "data": {"name": "mnist", "augment": "none"},
    "arch": "mlp",
    "method": {"name": "hydra"},
    "objective": {"name": "pgd", "eps": "8/255", "steps": 4},
    "density": Fraction(1, 11),
    "seed": 7,
    "budget": Budget(),
    "threat": Threat("linf", Fraction(1, 9)),
    "attacks": (),
    "verifiers": (),
    "headline": "certified.ibp",
    "samples": {"rule": "every", "value": 2},
}


@pytest.mark.parametrize("name", [one.name for one in fields(Cell)])
def test_a_fingerprint_changes_with_every_field_of_a_cell(read: Read, name: str) -> None:
    cell = cell_of(read(), "pgd")
    changed = replace(cell, **{name: CHANGED[name]})
    assert changed.fingerprint != cell.fingerprint
    assert changed.id != cell.id


@pytest.mark.parametrize("one", fields(Budget), ids=lambda one: one.name)
def test_a_fingerprint_changes_with_every_number_of_the_budget(read: Read, one: Any) -> None:
    cell = cell_of(read(), "pgd")
    words = {
        "optimizer": "adam", "ramp": 0.25, "wait": 0.1, "init": "ibp", "schedule": "step", "milestones": (0.25,),
        "precision": "bf16",
    }  # fmt: skip
    value = words.get(one.name) or getattr(cell.budget, one.name) + 1
    assert replace(cell, budget=replace(cell.budget, **{one.name: value})).fingerprint != cell.fingerprint


@pytest.mark.parametrize(
    "old, new",
    [
        ("steps = 5", "steps = 6"), ('label = "pgd-5"', 'label = "pgd-6"'), ("first = 7", "first = 8"),
        ('label = "smooth"', 'label = "smooth"\nalpha = 0.01'), ('eps = "0.25"', 'eps = "0.5"'), ("sigma = 0.25", "sigma = 0.5"),
    ],
)  # fmt: skip
def test_a_fingerprint_changes_with_every_attack_verifier_and_objective_field(read: Read, old: str, new: str) -> None:
    headline = ("certified.smooth", "certified.ibp")
    before, after = cell_of(read(*headline), "stability"), cell_of(read(*headline, old, new), "stability")
    assert before.fingerprint != after.fingerprint


# ---- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "old, new, complaint",
    [
        # unknown words, each with the nearest known one
        ("[budget]", "[buget]", "did you mean 'budget'?"),
        ('arch = ["cnn_small", "mlp"]', 'arch = ["cnn_smal"]', "unknown model 'cnn_smal'; did you mean 'cnn_small'?"),
        ('name = "digits"', 'name = "digit"', "unknown data set 'digit'; did you mean 'digits'?"),
        ('name = "digits"', 'name = "digits"\naugment = "crops"', "unknown augmentation 'crops'; did you mean 'crop'?"),
        ('name = "digits"', 'name = "digits"\nagument = "crop"', "did you mean 'augment'?"),
        ('name = "hydra"', 'name = "hidra"', "unknown method 'hidra'; did you mean 'hydra'?"),
        ('init = "dirac"', 'intit = "dirac"', "did you mean 'init'?"),
        ('init = "dirac"', 'init = "diracs"', "must be one of proposed"),
        ('name = "stability"', 'name = "stabilty"', "unknown objective 'stabilty'; did you mean 'stability'?"),
        ("steps = 3", "stepz = 3", "unknown field of objective 'pgd' 'stepz'; did you mean 'steps'?"),
        ("steps = 5", "stepz = 5", "unknown field of attack 'pgd' 'stepz'; did you mean 'steps'?"),
        ('name = "apgd"', 'name = "apgdd"', "unknown attack 'apgdd'; did you mean"),
        ('name = "ibp"', 'name = "ipb"', "unknown verifier 'ipb'; did you mean 'ibp'?"),
        ("prune = 2", "prunes = 2", "did you mean 'prune'?"),
        ('norm = "linf"', 'nrom = "linf"', "did you mean 'norm'?"),
        ("version = 3", "version = 3\nsample = 100", "sample"),
        ("seed = [0, 1]", "seed = [0, 1]\ndensities = [0.1]", "did you mean 'density'?"),
        ('objectives = ["pgd"]', 'objectives = ["pdg"]', "did you mean 'pgd'?"),
        ("[grid]", "[samples]\neach = 2\n[grid]", "[samples] holds `every = k` or `first = n`"),
        ("[grid]", "[samples]\nevery = 2\nfirst = 3\n[grid]", "[samples] holds `every = k` or `first = n`"),
        # wrong types
        ("version = 3", 'version = "3"', "'version' must be int, got '3'"),
        ("version = 3", "version = true", "'version' must be int, got True"),
        ('name = "try"', "name = 5", "'name' must be str, got 5"),
        ("seed = [0, 1]", "seed = 0", "'seed' must be list, got 0"),
        ("seed = [0, 1]", "seed = [true]", "seed must be a whole number from 0, got True"),
        ("seed = [0, 1]", "seed = [-1]", "seed must be a whole number from 0, got -1"),
        ("seed = [0, 1]", "seed = [0.5]", "seed must be a whole number from 0, got 0.5"),
        ('arch = ["cnn_small", "mlp"]', 'arch = "mlp"', "'arch' must be list, got 'mlp'"),
        ('arch = ["cnn_small", "mlp"]', 'arch = [["mlp"]]', "mlp"),
        ('name = "digits"', 'name = ["digits"]', "digits"),
        ('name = "digits"', 'name = "digits"\naugment = ["crop"]', "crop"),
        ('density = ["0.1", 0.05]', "density = [0]", "density is the kept fraction, above 0 and at most 1, got 0"),
        ('density = ["0.1", 0.05]', 'density = ["1.5"]', "density is the kept fraction, above 0 and at most 1, got '1.5'"),
        ('density = ["0.1", 0.05]', 'density = ["x"]', "density must be a fraction such as 8/255"),
        ("pretrain = 4", "pretrain = 4.5", "pretrain of budget of objective 'pgd' must be int, got 4.5"),
        ("pretrain = 4", "pretrain = -4", "epochs >= 0"),
        ("[objective.budget]\npretrain = 9", "budget = 9", "budget"),
        ("first = 7", "first = 0", "`first` of verifier 'smoothing' must be a positive whole number, got 0"),
        ("first = 7", "first = true", "`first` of verifier 'smoothing' must be a positive whole number, got True"),
        ('objectives = ["pgd"]', 'objectives = "pgd"', "`objectives` of attack 'apgd' must be a list of names, got 'pgd'"),
        ('eps = "0.1"', 'eps = "-0.1"', "eps must not be negative, got -1/10"),
        ('norm = "linf"', 'norm = "l1"', "norm of threat must be one of linf, l2, got 'l1'"),
        ('name = "digits"', 'name = "digits"\ntrain = 0', "`train` in [data] is how many training images are used"),
        ("[grid]", "[samples]\nevery = 0\n[grid]", "`every` in [samples] must be a positive whole number, got 0"),
        ('[[method]]\nname = "dense"\n[[method]]', "[method]", "write each method as a [[method]] table"),
        ('name = "dense"', 'nome = "dense"', "a method needs a name, got None"),
        # things that stand twice
        ('name = "dense"', 'name = "hydra"\ninit = "dirac"', "names the same cell twice"),
        ("seed = [0, 1]", "seed = [0, 0]", "names the same cell twice"),
        ('density = ["0.1", 0.05]', 'density = ["0.1", "1/10"]', "names the same cell twice"),
        ('label = "pgd-5"', 'label = "apgd"', "apgd"),
        ('label = "pgd-5"', 'label = "worst"', "worst"),
        # not TOML
        ("[suite]", "[suite", "is not a readable TOML file"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_suite_is_one_sentence(read: Read, old: str, new: str, complaint: str) -> None:
    assert complaint in refused(read, old, new)


def test_mixtrain_is_refused_on_networks_that_it_would_take_too_much_memory_for(read: Read) -> None:
    mixtrain = ('name = "pgd"\neps = "8/255"\nsteps = 3', 'name = "mixtrain"', 'objectives = ["pgd"]', "")
    assert "mlp, cnn_*, lenet" in refused(read, *mixtrain, '"cnn_small", "mlp"', '"mlp", "resnet18@1/16"')
    narrow = read(*mixtrain, '"cnn_small", "mlp"', '"cnn_small@1/2", "mlp"')
    assert {cell.arch for cell in narrow.cells} == {"cnn_small@1/2", "mlp"}


def test_an_attack_on_the_first_images_only_is_refused_since_the_rest_would_count_as_robust(read: Read) -> None:
    assert "`first`" in refused(read, 'label = "pgd-5"', 'label = "pgd-5"\nfirst = 3')


@pytest.mark.parametrize(
    "line, word",
    [("rest: bool = True", "a field 'rest'"), ("label: str = 'x'", "a field 'label'"), ("cost: float = float('nan')", "`cost`")],
)
def test_an_attack_whose_own_fields_would_be_mistaken_for_the_suites_words_is_refused(
    read: Read, tmp_path: Path, line: str, word: str
) -> None:
    text = f"""
        from dataclasses import dataclass
        from fractions import Fraction

        @dataclass(frozen=True)
        class Mine:
            eps: Fraction
            norm: str = "linf"
            {line}

            def __call__(self, model, x, y):
                return x
    """
    (tmp_path / "mine.py").write_text(dedent(text))
    assert word in refused(read, 'name = "apgd"', f'name = "{tmp_path}/mine.py:Mine"')


def test_a_weaker_bundle_may_not_be_labelled_autoattack(read: Read) -> None:
    full = read('name = "apgd"', 'name = "autoattack"')
    assert "autoattack" in {one.label for cell in full.cells for one in cell.attacks}
    assert "'autoattack'" in refused(read, 'name = "apgd"', 'name = "autoattack"\nlabel = "autoattack"\nqueries = 10')


def test_a_verifier_may_not_take_the_name_of_the_union_of_all(read: Read) -> None:
    assert "union" in refused(read, 'label = "smooth"', 'label = "union"', "certified.smooth", "certified.union")


@pytest.mark.parametrize("table", ["suite", "data", "threat", "budget", "grid"])
def test_a_missing_table_is_named(tmp_path: Path, table: str) -> None:
    blocks = TEXT.split("\n[")
    kept = [block for block in blocks if not block.startswith(f"{table}]")]
    assert len(kept) == len(blocks) - 1
    (tmp_path / "try.toml").write_text("\n[".join(kept))
    with pytest.raises(UserError, match=f"'{table}' must be a table, got None"):
        read_suite(str(tmp_path / "try.toml"))


def test_a_suite_that_is_not_there_is_named_with_the_nearest_shipped_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown suite 'digit@1'; did you mean 'digits@1'"):
        read_suite("digit@1")
    with pytest.raises(UserError, match="there is no suite file"):
        read_suite(str(tmp_path / "nothing.toml"))
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is not a readable TOML file"):
        read_suite(str(tmp_path / "binary.toml"))


def test_a_fingerprint_is_the_sha256_of_the_sorted_compact_json(read: Read) -> None:
    cell = cell_of(read(), "stability")
    text = json.dumps(cell.as_json(), sort_keys=True, separators=(",", ":"))
    assert cell.fingerprint == hashlib.sha256(text.encode()).hexdigest()
