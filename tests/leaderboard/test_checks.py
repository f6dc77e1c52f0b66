from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import save_file
from scipy.stats import beta, norm

from leaderboard.canonical import sha256_file
from leaderboard.checks import check, check_all
from leaderboard.errors import RecordError
from leaderboard.row_checks import certified_radius

from .conftest import ALPHA, DRAWS, SIGMA, WEIGHTS, Run, cell_of, rows_of

Forgery = Callable[[pd.DataFrame], None]


def put(row: int, **values: Any) -> Forgery:
    """Sets columns of one row; a double underscore stands for the colon, a single one for the dash."""

    def forge(rows: pd.DataFrame) -> None:
        for name, value in values.items():
            rows.loc[row, name.replace("__", ":").replace("pgd_50", "pgd-50")] = value

    return forge


def test_an_honest_record_has_no_problems(run: Run) -> None:
    record = run.add()
    assert check(record, run.records) == []
    assert check_all(run.root) == {record.id: []}


def test_weights_need_not_travel_with_the_record(run: Run) -> None:
    record = run.add()
    (run.root / "checkpoints" / f"{record.id}.safetensors").unlink()
    assert check(record, run.records) == []


def test_an_edited_metric_is_named_twice_over(run: Run) -> None:
    record = run.add()

    def better(document: dict[str, Any]) -> None:
        document["metrics"]["robust"]["worst"]["hits"] = 15

    problems = check(run.edit(record, better, sign=False), run.records)
    assert "metrics.robust.worst.hits says 15, but the verdict rows give 14" in problems
    assert any(one.startswith("digest is") for one in problems)


def test_an_edited_metric_is_named_though_the_forger_signed_again(run: Run) -> None:
    def better(document: dict[str, Any]) -> None:
        document["metrics"]["certified"]["smoothing"]["average_radius"] = 0.7

    problems = check(run.edit(run.add(), better), run.records)
    assert len(problems) == 1
    assert problems[0].startswith("metrics.certified.smoothing.average_radius says 0.7, but")


def test_a_worst_case_above_an_attack_is_named(run: Run) -> None:
    def better(document: dict[str, Any]) -> None:
        document["metrics"]["robust"]["worst"]["hits"] = 17

    problems = check(run.edit(run.add(), better), run.records)
    assert "robust.worst has 17 hits, more than robust.apgd with 14" in problems


def test_a_metric_that_was_left_out_is_named(run: Run) -> None:
    def leave_out(document: dict[str, Any]) -> None:
        del document["metrics"]["certified"]["ibp"]

    assert "metrics.certified.ibp.hits says nothing, but the verdict rows give 6" in check(
        run.edit(run.add(), leave_out), run.records
    )


def test_an_edited_digest_is_named(run: Run) -> None:
    def other(document: dict[str, Any]) -> None:
        document["digest"] = "0" * 64

    (problem,) = check(run.edit(run.add(), other, sign=False), run.records)
    assert problem.startswith("digest is 000000000000..., but the record's content gives")


def test_the_clock_is_not_part_of_the_digest(run: Run) -> None:
    def later(document: dict[str, Any]) -> None:
        document["timing"]["seconds"] = {"train": 1.0}

    assert check(run.edit(run.add(), later, sign=False), run.records) == []


def test_a_flipped_verdict_is_named(run: Run) -> None:
    record = run.forge(run.add(), put(15, verdict="open", by=""), consistent=False)
    problems = check(record, run.records)
    assert any("is not the verdict table that was recorded" in one for one in problems)
    assert "broken under the cell's threat, but the verdict is another: sample 15" in problems


@pytest.mark.parametrize(
    "forgery, sentence",
    [
        (put(15, survived__apgd=True), "verdict broken, but not by the attack named: sample 15"),
        (put(19, survived__apgd=True), "misclassified, yet said to survive apgd: sample 19"),
        (put(3, survived__pgd_50=False), "certified by ibp, yet broken by pgd-50: sample 3"),
        (put(19, radius__crown=0.1, status__crown="proved"), "certified by crown, yet misclassified: sample 19"),
        (put(2, radius__crown=0.0, status__crown="open"), "certified by ibp, but not by crown, which includes it: sample 2"),
        (put(15, distance__pgd_50=0.2, distance__apgd=0.2), "the distance of the witness is outside its ball of 1/10: sample 15"),
        (put(15, distance__apgd=np.nan), "the distance of the witness is outside its ball of 1/10: sample 15"),
        (put(11, distance__apgd=np.nan), "said to survive apgd, but never attacked: sample 11"),
        (put(11, status__ibp="proved"), "ibp says proved with radius 0: sample 11"),
        (put(11, radius__ibp=0.1), "ibp has a radius without having proved it: sample 11"),
        (put(11, radius__crown=-0.1), "radius:crown is no finite number from 0: sample 11"),
        (put(11, radius__crown=np.nan), "radius:crown is no finite number from 0: sample 11"),
        (put(11, radius__crown=np.inf, status__crown="proved"), "radius:crown is no finite number from 0: sample 11"),
        (put(11, status__crown="fine"), "status:crown is none of proved"),
        (put(11, verdict="certified", by="crown"), "verdict certified, but not by the verifier named: sample 11"),
        (put(8, by="ibp"), "verdict certified, but not by the verifier named: sample 8"),
        (put(8, verdict="open", by=""), "certified under the cell's threat, but the verdict is another: sample 8"),
        (put(16, by=""), "verdict broken, but not by the attack named: sample 16"),
        (put(18, verdict="open"), "verdict misclassified and predicted == label do not exclude each other: sample 18"),
        (put(11, verdict="misclassified"), "verdict misclassified and predicted == label do not exclude each other: sample 11"),
        (put(11, verdict="timeout"), "verdict timeout, but no verifier has that status: sample 11"),
        (put(11, verdict="unsure"), "verdict is none of misclassified"),
        (put(11, by="apgd"), "`by` names somebody although the verdict is nobody's: sample 11"),
        (put(0, radius__smoothing=2.0), "radius:smoothing is above what any smoothing run of its n can prove: sample 0"),
        (put(1, radius__smoothing=0.35), "radius:smoothing is not the one that hits:smoothing out of n:smoothing prove"),
        (put(1, hits__smoothing=901), "radius:smoothing is not the one that hits:smoothing out of n:smoothing prove"),
        (put(1, hits__smoothing=1001), "hits:smoothing is no count out of n:smoothing: sample 1"),
        (put(1, predicted__smoothing=2), "radius:smoothing is not the one that hits:smoothing out of n:smoothing prove"),
        (put(4, predicted__smoothing=1), "status:smoothing and predicted:smoothing disagree about abstaining: sample 4"),
        (put(11, index=3), "index: a sample stands twice"),
    ],
)
def test_rows_that_contradict_themselves_are_named_though_all_sums_fit(run: Run, forgery: Forgery, sentence: str) -> None:
    problems = check(run.forge(run.add(), forgery), run.records)
    assert any(sentence in one for one in problems), problems


def test_a_witness_of_a_larger_attack_contradicts_a_certificate_only_within_its_radius(run: Run) -> None:
    cell = cell_of()
    cell["attacks"][0] |= {"eps": "1/5"}
    record = run.add(attacks=cell["attacks"])

    def broken_at(distance: float) -> list[str]:
        forged = run.forge(record, put(3, survived__pgd_50=False, distance__pgd_50=distance))
        return [one for one in check(forged, run.records) if "yet broken" in one]

    assert broken_at(0.15) == []
    assert broken_at(0.09) == [f"certified by {one}, yet broken by pgd-50: sample 3" for one in ("ibp", "crown")]


def test_what_interval_bounds_certify_they_certify_in_every_smaller_ball(run: Run) -> None:
    verifiers = [cell_of()["verifiers"][0], {**cell_of()["verifiers"][0], "label": "ibp-small", "eps": "1/20"}]

    def smaller(rows: pd.DataFrame, certifies: int) -> pd.DataFrame:
        return rows.assign(**{
            "status:ibp-small": np.where(rows["verdict"] == "misclassified", "misclassified", np.where(
                rows["index"] < certifies, "proved", "open"
            )).tolist(),
            "radius:ibp-small": np.where(rows["index"] < certifies, 0.05, 0.0), "margin:ibp-small": rows["margin:ibp"],
        })  # fmt: skip

    def broken_and_open(rows: pd.DataFrame) -> pd.DataFrame:  # nobody asks `crown` in this cell
        return rows.assign(**{name: rows[name].where(rows["by"] != "crown", other) for name, other in (
            ("verdict", "open"), ("by", "")
        )})  # fmt: skip

    def found(certifies: int, margin: float = 0.5) -> list[str]:
        rows = broken_and_open(smaller(rows_of(), certifies))
        rows.loc[5, "margin:ibp"] = margin
        return check(run.add(rows, verifiers=verifiers), run.records)

    assert found(6) == found(7) == []
    assert found(5) == ["certified by ibp, but not by ibp-small, which asks for less: sample 5"]
    assert found(5, margin=1e-6) == []  # as near to zero as rounding reaches


def test_totals_that_cannot_be_are_named(run: Run) -> None:
    def better(document: dict[str, Any]) -> None:
        document["metrics"]["certified"]["crown"]["hits"] = 19

    problems = check(run.edit(run.add(), better), run.records)
    for name, hits in (("clean", 18), ("robust.apgd", 14), ("robust.pgd-50", 16)):
        assert f"certified.crown has 19 hits, more than {name} with {hits}" in problems

    def survivors(document: dict[str, Any]) -> None:
        document["metrics"]["robust"]["apgd"]["hits"] = 19

    problems = check(run.edit(run.add(), survivors), run.records)
    assert "robust.apgd has 19 hits, more than clean with 18" in problems


def test_nobody_chooses_which_samples_are_skipped(run: Run) -> None:
    def found(forgery: Forgery) -> list[str]:
        return check(run.forge(run.add(), forgery), run.records)

    deterministic = found(put(11, status__ibp="skipped"))
    assert deterministic == ["status:ibp says skipped of other samples than those after the first 20: sample 11"]
    nothing = {"predicted__smoothing": -1, "radius__smoothing": 0.0, "hits__smoothing": 0, "n__smoothing": 0}
    early = found(put(4, status__smoothing="skipped", **nothing))
    assert early == ["status:smoothing says skipped of other samples than those after the first 10: sample 4"]
    late = found(put(10, status__smoothing="abstain", hits__smoothing=500, n__smoothing=DRAWS))
    assert late == ["status:smoothing says skipped of other samples than those after the first 10: sample 10"]


@pytest.mark.parametrize("first", [0, -1, True, "10", None, 10.0])
def test_first_is_a_count_and_belongs_to_smoothing(run: Run, first: Any) -> None:
    def says(verifier: int, value: Any) -> list[str]:
        verifiers = cell_of()["verifiers"]
        verifiers[verifier] |= {"first": value}
        return check(run.add(verifiers=verifiers), run.records)

    assert any(one.startswith("`first` of smoothing is no whole number from 1") for one in says(2, first))
    assert says(0, 20) == [
        "ibp was asked about its first images only, which only smoothing may be: all others judge the same images"
    ]


@pytest.mark.parametrize("field", ["alpha", "sigma", "growth", "grid"])
def test_a_number_with_a_huge_exponent_is_named_and_never_computed(run: Run, field: str) -> None:
    verifiers = cell_of()["verifiers"]
    value: Any = ["1e999999999"] if field == "grid" else "1e999999999"
    rows = rows_of().assign(**{"looks:smoothing": ""})
    verifiers[2] |= {"rule": "sequential", field: value}
    found = check(run.add(rows, verifiers=verifiers), run.records)
    assert any("'1e999999999' is no number like '8/255' or '0.05'" in one for one in found)


@pytest.mark.parametrize("alpha", ["much", None, [], {}, "1/0"])
def test_a_cell_that_makes_no_sense_is_named_and_no_crash(run: Run, alpha: Any) -> None:
    def senseless(document: dict[str, Any]) -> None:
        document["cell"]["verifiers"][2]["alpha"] = alpha

    assert any("cannot be made sense of" in one for one in check(run.edit(run.add(), senseless), run.records))


def test_a_table_that_would_fill_the_memory_is_not_read(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    record = run.add()
    monkeypatch.setattr("leaderboard.record.LARGEST_TABLE", 20)
    (problem,) = check(record, run.records)
    assert "values are too many for a verdict table, at most 20" in problem


@pytest.mark.slow
def test_many_records_are_checked_by_several_processes_with_the_same_answer(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leaderboard.checks.WORTH_A_PROCESS", 2)
    for seed in range(4):
        run.add(seed=seed)
    (run.records / "broken.json").write_text("{")
    found = check_all(run.root, processes=2)
    assert found == check_all(run.root)
    assert next(iter(found)) == "broken"
    assert len(found) == 5


def test_attacks_do_not_contradict_a_smoothing_certificate(run: Run) -> None:
    smoothing = cell_of()["verifiers"][2] | {"norm": "linf", "eps": "1/10"}
    record = run.add(verifiers=[smoothing], headline="certified.smoothing")
    assert [one for one in check(record, run.records) if "yet" in one] == []


def test_a_verifier_that_ran_out_of_time_need_not_certify_what_a_cheaper_one_did(run: Run) -> None:
    forged = run.forge(run.add(), put(2, radius__crown=0.0, status__crown="timeout"))
    assert check(forged, run.records) == []


@pytest.mark.parametrize("hits", [0, 1, 499, 532, 548, 549, 550, 900, 999, 1000])
def test_the_smoothing_radius_is_that_of_the_exact_binomial_bound(hits: int) -> None:
    p = beta.ppf(ALPHA, hits, DRAWS - hits + 1) if 0 < hits < DRAWS else float(hits == DRAWS) * ALPHA ** (1 / DRAWS)
    expected = SIGMA * norm.ppf(p) if p > 0.5 else 0.0
    found = certified_radius(np.array([hits]), np.array([DRAWS]), ALPHA, SIGMA)
    assert found[0] == pytest.approx(expected, abs=1e-10)


def test_edited_weights_are_named(run: Run) -> None:
    record = run.add()
    path = run.root / "checkpoints" / f"{record.id}.safetensors"
    save_file({**WEIGHTS, "conv1.weight": np.ones((4, 4), dtype=np.float32)}, path)
    problems = check(record, run.records)
    assert any("is not the weights file that was recorded" in one for one in problems)
    assert "conv1.weight has 16 non-zeros of 16, but sparsity.layers says 4 of 16" in problems

    def sign(document: dict[str, Any]) -> None:
        document["evidence"]["weights_sha256"] = sha256_file(path)

    assert check(run.edit(record, sign), run.records) == [problems[-1]]


def test_a_layer_that_the_weights_have_not_is_named(run: Run) -> None:
    def rename(document: dict[str, Any]) -> None:
        document["sparsity"]["layers"] = {"conv9": [4, 16], "fc": [8, 8]}

    missing, hidden = check(run.edit(run.add(), rename), run.records)
    assert "has no tensor 'conv9.weight'" in missing
    assert hidden.endswith("holds conv1.weight, which sparsity.layers does not count")


def test_a_layer_cannot_be_hidden_while_its_weights_are_there(run: Run) -> None:
    def hide(document: dict[str, Any]) -> None:
        document["sparsity"] |= {"layers": {"conv1": [4, 16]}, "kept": 4, "total": 16}

    (problem,) = check(run.edit(run.add(), hide), run.records)
    assert problem.endswith("holds fc.weight, which sparsity.layers does not count")


def test_what_has_one_dimension_need_not_be_counted(run: Run) -> None:
    record = run.add()
    path = run.root / "checkpoints" / f"{record.id}.safetensors"
    save_file({**WEIGHTS, "bn.weight": np.ones(4, np.float32), "fc.bias": np.ones(2, np.float32)}, path)
    signed = run.edit(record, lambda one: one["evidence"].update(weights_sha256=sha256_file(path)))
    assert check(signed, run.records) == []


OWN_BUDGET = "the method kept 12 of 24 weights, more than density 1/4 allows"


@pytest.mark.parametrize(
    "scope, density, warnings, problems",
    [
        ("global", "1/2", [], []),
        ("global", "1/4", [], ["sparsity keeps 12 weights, but density 1/4 of 24 allows 6"]),
        ("global, at most", "1/4", [OWN_BUDGET], ["sparsity keeps 12 weights, but density 1/4 of 24 allows 6"]),
        ("whole network", "1/4", [], ["sparsity keeps 12 weights, but density 1/4 of 24 allows 6"]),
        ("whole network", "1/4", [OWN_BUDGET], []),  # a plug-in's, which no board takes
        ("per layer", "1/2", [], ["fc keeps 8 of 8 weights, but density 1/2 per layer allows 4"]),
        ("per layer", "1", [], []),
        ("whole filters per layer", "3/4", [], []),  # 1.5 of 2 filters are 2
        ("whole filters per layer", "1/2", [], ["fc keeps 8 of 8 weights, but density 1/2 of its 2 filters allows 4"]),
    ],
)
def test_no_more_is_kept_than_density_and_scope_allow(
    run: Run, scope: str, density: str, warnings: list[str], problems: list[str]
) -> None:
    def says(document: dict[str, Any]) -> None:
        document["sparsity"]["scope"] = scope
        document["checks"]["warnings"] = warnings

    assert check(run.edit(run.add(density=density), says), run.records) == problems


def test_layers_that_do_not_sum_up_are_named(run: Run) -> None:
    def sparser(document: dict[str, Any]) -> None:
        document["sparsity"]["kept"] = 2

    assert check(run.edit(run.add(), sparser), run.records) == [
        "sparsity says 2 of 24 weights kept, but its layers sum to 12 of 24"
    ]


# conv1 is the identity: a book of one value, and four positions at most 5 apart, 3 bits each; fc is all ones and needs neither
BITS = {"dense": 32 * 24, "plain": 32 * 12, "paper": 32 + 32, "csr": 64 + 4 * 3, "ratio": {"paper": 64 / 768, "csr": 76 / 768}}


def test_sizes_in_bits_are_counted_again(run: Run) -> None:
    def honest(document: dict[str, Any]) -> None:
        document["sparsity"]["bits"] = BITS

    def smaller(document: dict[str, Any]) -> None:
        document["sparsity"]["bits"] = {**BITS, "paper": 32, "ratio": {**BITS["ratio"], "paper": 32 / 768}}  # type: ignore[dict-item]

    record = run.edit(run.add(), honest)
    assert check(record, run.records) == []
    (problem,) = check(run.edit(record, smaller), run.records)
    assert problem.endswith("takes 64 bits, 76 with positions, but sparsity.bits says 32 and 76")


@pytest.mark.parametrize(
    "stored, kept, paper, csr",
    [
        ({"codes": [0, 1, 0, 2], "book": [0.5, 0.25]}, 2, 64, 66),  # two values of two: no book; steps of 2
        ({"codes": [0, 1, 0, 1], "book": [0.5, 0.25], "mask": [1, 1, 0, 1]}, 3, 67, 70),  # code 0 is a value; 3 codes, 2 values
        ({"codes": [0, 1, 0, 3], "book": [0.5, 0.25]}, 2, 0, 0),
    ],
)
def test_the_bits_of_codes_are_those_of_the_values_they_stand_for(
    run: Run, stored: dict[str, list[float]], kept: int, paper: int, csr: int
) -> None:
    kinds = {"codes": np.uint8, "book": np.float32, "mask": np.uint8}
    path = run.root / "checkpoints" / "codes.safetensors"
    save_file({f"fc.weight.{part}": np.array(values, kinds[part]) for part, values in stored.items()}, path)

    def stores(document: dict[str, Any]) -> None:
        block = document["sparsity"]
        block["layers"], block["kept"] = {"conv1": [0, 16], "fc": [kept, 8]}, kept
        block["merged"] = {"kept": 12, "layers": {"conv1": [4, 16], "fc": [8, 8]}}
        ratio = {"paper": paper / 768, "csr": csr / 768}
        block["bits"] = {"dense": 768, "plain": 32 * kept, "paper": paper, "csr": csr, "ratio": ratio}
        document["evidence"] |= {"stored": f"../checkpoints/{path.name}", "stored_sha256": sha256_file(path)}

    outside = stored["codes"][3] > len(stored["book"])
    expected = [f"{path.name} holds a code that is not in its book"] if outside else []
    assert check(run.edit(run.add(), stores), run.records) == expected


def test_weights_are_not_looked_for_outside_the_run(run: Run) -> None:
    def outside(document: dict[str, Any]) -> None:
        document["evidence"]["weights"] = "../../elsewhere.safetensors"

    (problem,) = check(run.edit(run.add(), outside), run.records)
    assert "points out of the run's folder" in problem


def test_a_file_that_is_no_safetensors_is_named(run: Run) -> None:
    record = run.add()
    (run.root / "checkpoints" / f"{record.id}.safetensors").write_bytes(b"\x80\x04pickle")
    assert any("cannot be read as safetensors" in one for one in check(record, run.records))


def test_a_record_that_left_samples_out_is_named(run: Run) -> None:
    record = run.add()
    forged = run.forge(record, lambda rows: rows.drop(index=19, inplace=True))
    assert "samples.n is 20, but the verdict table has 19 rows" in check(forged, run.records)


def test_one_unreadable_record_does_not_hide_the_others(run: Run) -> None:
    record = run.add()
    (run.records / "broken.json").write_text("{")
    found = check_all(run.root)
    assert found[record.id] == []
    assert found["broken"][0].startswith("broken.json: not JSON")


def test_a_missing_verdict_table_is_a_problem_and_not_a_crash(run: Run) -> None:
    record = run.add()
    (run.records / record.evidence.verdicts).unlink()
    assert any("the verdict table is missing" in one for one in check(record, run.records))


def test_a_folder_without_records_is_named(run: Run) -> None:
    with pytest.raises(RecordError, match="no such folder"):
        check_all(run.root / "nowhere")
