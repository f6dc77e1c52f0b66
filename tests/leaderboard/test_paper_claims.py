"""Claims of papers held against records that are made by hand, so that every verdict is known beforehand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from leaderboard.claim_tables import markdown, result
from leaderboard.errors import BoardError
from leaderboard.paper_claims import Claims, Line, lines, load_measured, read_claims, record_folders

N = 200
ATTACKS = [{"name": "pgd", "label": "pgd", "norm": "linf", "eps": "1/10"}]
STRONG = {"name": "pgd", "label": "strong", "norm": "linf", "eps": "76/255"}
TEXT = """
[data]
"CIFAR-10" = "cifar10"
"MNIST" = "mnist"

[[claim]]
id = "one"
text = "HYDRA above Adv-ADMM"
source = "a table"
kind = "above"
left = { name = "hydra", init = "proposed" }
right = { name = "admm" }
objective = "pgd"
published = [{ method = "HYDRA minus Adv-ADMM", metric = "difference in era (points)" }]
"""


def rows(hits: int, strong: int = 0, right: int = N) -> pd.DataFrame:
    """N images, the first `right` correct, the first `hits` of them robust and `strong` even at 76/255."""
    index = np.arange(N)
    return pd.DataFrame({
        "index": index, "label": index % 3, "predicted": np.where(index < right, index % 3, (index + 1) % 3),
        "verdict": np.where(index >= right, "misclassified", np.where(index < hits, "open", "broken")).tolist(),
        "by": np.where((index < right) & (index >= hits), "pgd", "").tolist(),
        "survived:pgd": index < min(hits, right), "distance:pgd": np.where(index < right, 0.1, np.nan),
        "survived:strong": index < min(strong, right), "distance:strong": np.where(index < right, 0.29, np.nan),
    })  # fmt: skip


@pytest.fixture
def add(run: Any) -> Callable[..., Any]:
    """add(method, hits, seed=0, ...): one record of a method, `{"name": ...}` or a name."""

    def make(method: Any, hits: int, seed: int = 0, strong: int = 0, right: int = N, data: str = "mnist", **changes: Any) -> Any:
        spec = {"name": method} if isinstance(method, str) else method
        attacks = [*ATTACKS, STRONG] if strong else ATTACKS
        cell = {
            "method": spec["name"], "seed": seed, "attacks": attacks, "verifiers": [], "headline": "robust.pgd",
            "data": {"name": data, "augment": "none", "train": 15000}, "budget": {"pretrain": 3, "prune": 1, "finetune": 3},
            **changes,
        }
        name = f"{data}-{spec['name']}-{len(list(run.records.glob('*.json')))}"
        made = run.add(rows(hits, strong, right), name=name, **cell)
        return run.edit(made, lambda document: document["cell"].update(method=spec))

    return make


@pytest.fixture
def judge(run: Any, tmp_path: Path) -> Callable[..., list[Line]]:
    """judge(old, new, ...): the lines of the claims in TEXT, with replacements, about the run's records."""

    def make(*changes: str) -> list[Line]:
        return lines(claims_of(tmp_path, *changes), load_measured([run.records]))

    return make


def claims_of(folder: Path, *changes: str) -> Claims:
    text = TEXT
    for old, new in zip(changes[::2], changes[1::2], strict=True):
        assert old in text
        text = text.replace(old, new)
    (folder / "claims.toml").write_text(text)
    return read_claims(folder / "claims.toml")


HYDRA = {"name": "hydra", "init": "proposed"}


def pairs(add: Callable[..., Any], left: list[int], right: list[int], **changes: Any) -> None:
    for seed, (one, other) in enumerate(zip(left, right, strict=True)):
        add(HYDRA, one, seed, **changes)
        add("admm", other, seed, **changes)


@pytest.mark.parametrize(
    "left, right, said",
    [
        ([150, 152, 151], [120, 121, 119], "holds"),
        ([120, 121, 119], [150, 152, 151], "does not hold"),
        ([150, 150, 150], [150, 151, 150], "about equal"),
        ([150, 110, 160], [120, 140, 121], "open"),
        ([150], [120], "holds"),
        ([123], [120], "about equal"),
        ([125], [120], "open"),
        ([126], [120], "holds"),
    ],
)
def test_a_verdict_follows_from_the_interval(
    add: Callable[..., Any], judge: Callable[..., list[Line]], left: list[int], right: list[int], said: str
) -> None:
    pairs(add, left, right)
    cifar, mnist = judge()
    assert (cifar.verdict, cifar.measured) == ("not measured", None)
    assert mnist.measured is not None
    low, high = mnist.measured["low"], mnist.measured["high"]
    assert mnist.measured["mean"] == pytest.approx((sum(left) - sum(right)) / N / len(left))
    assert mnist.verdict == said, (low, high)
    above, equal, below = low > 0, max(-low, high) <= 0.05, high < 0  # the rules, again
    assert said == ("holds" if above else "about equal" if equal else "does not hold" if below else "open")
    assert ("one seed: the interval is about images only" in mnist.notes) == (len(left) == 1)


def test_one_seed_of_the_other_sign_keeps_an_ordering_open(add: Callable[..., Any], judge: Callable[..., list[Line]]) -> None:
    pairs(add, [160] * 7 + [119], [120] * 8)
    found = judge()[1]
    assert found.measured is not None
    assert found.measured["low"] > 0 > min(found.measured["by_seed"].values())
    assert found.verdict == "open"


def test_a_run_on_mnist_never_answers_a_claim_about_cifar10(add: Callable[..., Any], judge: Callable[..., list[Line]]) -> None:
    pairs(add, [150], [120])
    assert [(one.place, one.verdict) for one in judge()] == [("cifar10", "not measured"), ("same ordering on mnist", "holds")]
    pairs(add, [120], [150], data="cifar10")
    pairs(add, [120], [150], data="cifar10-jpeg")
    found = {one.place: one.verdict for one in judge()}
    assert found == {
        "cifar10": "does not hold", "same ordering on cifar10-jpeg": "does not hold", "same ordering on mnist": "holds"
    }


def test_other_files_under_a_data_sets_name_are_another_data_set(
    run: Any, add: Callable[..., Any], judge: Callable[..., list[Line]]
) -> None:
    def note(document: dict[str, Any]) -> None:
        document["checks"]["warnings"] = ["cifar10: not the published CIFAR-10 files: another md5 than that of data_batch_1"]

    for method, hits in ((HYDRA, 150), ("admm", 120)):
        run.edit(add(method, hits, data="cifar10"), note)
    assert [one.place for one in judge()] == ["cifar10", "same ordering on cifar10 (other files)"]
    assert judge()[0].verdict == "not measured"


@pytest.mark.parametrize("change", [{"arch": "lenet"}, {"density": "1/4"}, {"budget": {"pretrain": 9}}, {"objective": "ibp"}])
def test_only_records_of_one_protocol_are_compared(
    add: Callable[..., Any], judge: Callable[..., list[Line]], change: dict[str, Any]
) -> None:
    add(HYDRA, 150)
    add("admm", 120, **change)
    assert [one.verdict for one in judge()] == ["not measured"]


def test_only_seeds_that_both_have_count(add: Callable[..., Any], judge: Callable[..., list[Line]]) -> None:
    pairs(add, [150, 152], [120, 121])
    add(HYDRA, 0, seed=2)
    found = judge()[1].measured
    assert found is not None
    assert found["by_seed"] == {"0": 0.15, "1": 0.155}


def test_a_network_below_half_clean_accuracy_takes_no_part_and_the_row_says_so(
    add: Callable[..., Any], judge: Callable[..., list[Line]]
) -> None:
    pairs(add, [150, 152], [120, 99])
    add(HYDRA, 150, seed=2)
    add("admm", 90, seed=2, right=N // 2 - 1)
    found = judge()[1]
    assert found.left_out == ["admm seed 2 (clean 49.5 %)"]
    assert "take no part: admm seed 2 (clean 49.5 %)" in result(found)
    assert found.measured is not None
    assert set(found.measured["by_seed"]) == {"0", "1"}


def test_where_no_network_works_there_is_no_verdict(add: Callable[..., Any], judge: Callable[..., list[Line]]) -> None:
    add(HYDRA, 20, right=30)
    add("admm", 10, right=30)
    found = judge()[1]
    assert (found.verdict, found.measured) == ("no pair takes part", None)
    assert "clean 15.0 %" in markdown([found])


def test_a_score_initialisation_is_not_mixed_with_another(add: Callable[..., Any], judge: Callable[..., list[Line]]) -> None:
    pairs(add, [150], [120])
    add({"name": "hydra", "init": "dirac"}, 20)
    assert [one.verdict for one in judge()] == ["not measured", "holds"]
    other = judge('right = { name = "admm" }', 'right = { name = "hydra", init = "dirac" }')
    assert other[1].setting["right"] == {"name": "hydra", "init": "dirac"}
    assert other[1].measured is not None
    assert other[1].measured["mean"] == pytest.approx(130 / N)


NEAR_ZERO = ('kind = "above"', 'kind = "near-zero"\neps = { mnist = "76/255" }', 'right = { name = "admm" }\n', "")


@pytest.mark.parametrize("strong, said", [([1, 2], "holds"), ([100, 98], "does not hold"), ([15, 16], "open"), ([1], "holds")])
def test_near_zero_is_an_upper_bound_below_ten_points_at_the_claims_own_eps(
    add: Callable[..., Any], judge: Callable[..., list[Line]], strong: list[int], said: str
) -> None:
    for seed, hits in enumerate(strong):
        add(HYDRA, 180, seed, strong=hits)
    found = judge(*NEAR_ZERO)[-1]
    assert (found.verdict, found.setting["attacks"], found.setting["eps"]) == (said, ["strong"], "76/255")
    assert found.place == "same claim on mnist"
    assert judge(*NEAR_ZERO, "76/255", "1/2") == judge(*NEAR_ZERO, "76/255", "1/3")  # no attack of that eps: not measured
    assert [one.verdict for one in judge(*NEAR_ZERO, "76/255", "1/2")] == ["not measured"]


ABOUT_EQUAL = ('kind = "above"', 'kind = "about-equal"')


@pytest.mark.parametrize("left, right, said", [([150], [150], "holds"), ([180], [120], "does not hold"), ([150], [140], "open")])
def test_about_equal_holds_within_five_points(
    add: Callable[..., Any], judge: Callable[..., list[Line]], left: list[int], right: list[int], said: str
) -> None:
    pairs(add, left, right)
    assert judge(*ABOUT_EQUAL)[1].verdict == said


def test_sizes_that_differ_are_named(run: Any, add: Callable[..., Any], judge: Callable[..., list[Line]]) -> None:
    for method, hits, size in ((HYDRA, 150, 0.02), ("admm", 120, 0.05)):

        def weigh(document: dict[str, Any], size: float = size) -> None:
            ratio = {"paper": size, "csr": size}
            document["sparsity"]["bits"] = {"dense": 768, "plain": 384, "paper": 384, "csr": 400, "ratio": ratio}

        run.edit(add(method, hits), weigh)
    assert "sizes differ: 0.0200 against 0.0500 of the dense network's bits" in judge()[1].notes


def test_a_cell_that_was_measured_twice_is_refused(add: Callable[..., Any], judge: Callable[..., list[Line]]) -> None:
    pairs(add, [150], [120])
    add(HYDRA, 151)
    with pytest.raises(BoardError, match="was measured twice"):
        judge()


def test_the_same_folder_twice_is_read_once(run: Any, add: Callable[..., Any]) -> None:
    pairs(add, [150], [120])
    assert len(load_measured([run.records, run.records])) == 2
    assert record_folders(run.root) == record_folders(run.records) == [run.records]
    with pytest.raises(BoardError, match="there are no records in"):
        record_folders(run.root / "checkpoints")


def test_a_folder_of_runs_is_all_of_them(tmp_path: Path) -> None:
    places = [tmp_path / "a@1" / "records", tmp_path / "b@1"]
    for place in places:
        place.mkdir(parents=True)
        (place / "one.json").write_text("{}")
    (tmp_path / "c").mkdir()
    assert record_folders(tmp_path) == places


@pytest.mark.parametrize("name", ["nothing", "empty"])
def test_a_folder_without_records_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(BoardError, match=rf"there (is no folder|are no records in) .*{name}; name the folder of a run"):
        record_folders(tmp_path / name)


# ---- the file of claims ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "old, new, complaint",
    [
        ('kind = "above"', 'kind = "below"', "claim.0.kind: Input should be 'above'"),
        ('right = { name = "admm" }', "", "one: a near-zero claim has a left side only"),
        ("text =", "tekst =", "claim.0"),
        ('method = "HYDRA minus Adv-ADMM"', 'method = "HYDRA minus"', "one: no published row has"),
        ('metric = "diff', 'metrik = "diff', "no column 'metrik'"),
        ("[data]", "[data", "is not a readable TOML file"),
        ("[[claim]]", TEXT[TEXT.index("[[claim]]"):] + "\n[[claim]]", "the id 'one' stands twice"),
    ],
)  # fmt: skip
def test_a_mistake_in_the_file_is_one_sentence(tmp_path: Path, old: str, new: str, complaint: str) -> None:
    with pytest.raises(BoardError) as caught:
        claims_of(tmp_path, old, new)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value).split("(at line")[0]


def test_every_shipped_claim_shows_the_numbers_that_were_published() -> None:
    found = {(one.claim, one.data): one for one in lines(read_claims(), [])}
    assert {one.verdict for one in found.values()} == {"not measured"}
    table = found["hydra-above-admm", "cifar10"]
    deltas = {row["architecture"]: float(row["value_percent"]) for row in table.published}
    assert deltas == {  # the response's Table 1, typed from the text of the response
        "ResNet-18": 5.5, "ResNet-34": 2.9, "ResNet-50": 3.1, "WRN-28-2": 3.2, "GoogleNet": 6.3, "MobileNet-v2": 16.4
    }  # fmt: skip
    assert table.printed == "HYDRA minus Adv-ADMM 2.9 to 16.4"
    assert found["snip-equals-random", "cifar10"].printed == "SNIP 27.2; scratch (random pruning) 24.6"
    assert found["atmc8-above-al0-8bit", "svhn"].printed == "Al0 + post-hoc 8-bit, relative to ATMC-8 1.5, 2.1, 8.1"
    assert found["benign-rigl-near-zero", "not stated"].printed == "RigL (public pre-trained checkpoint) 0.0, 0.5"
    assert {row["eps"] for row in found["nap-near-zero", "mnist"].published} == {"76/255"}


def test_another_eps_than_the_published_one_is_said(add: Callable[..., Any], run: Any) -> None:
    add("atmc", 150)
    add({"name": "al0", "schedule": "constant"}, 120)
    found = [one for one in lines(read_claims(), load_measured([run.records])) if one.claim == "atmc-above-al0" and one.measured]
    assert [one.place for one in found] == ["mnist"]
    assert "published at eps 76/255, measured at 1/10" in found[0].notes
