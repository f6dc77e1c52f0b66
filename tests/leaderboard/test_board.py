from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest

from leaderboard.board import load, metrics_in, ranked
from leaderboard.errors import BoardError
from leaderboard.ranks import compare, ranges
from leaderboard.stats import interval

from .conftest import Run, cell_of, rows_of


def series(*hits: int) -> pd.Series:
    return pd.Series([bool(hit) for hit in hits])


def test_a_line_holds_what_its_record_says(run: Run) -> None:
    record = run.add()
    (line,) = load(run.root).to_dict("records")
    assert (line["suite"], line["objective"], line["method"], line["arch"]) == ("toy", "pgd", "hydra", "cnn_small")
    assert (line["density"], line["seed"], line["record"], line["measured"]) == (0.5, 0, record.id, 12 / 24)
    assert (line["clean"], line["robust.worst"], line["certified.union"]) == (18 / 20, 14 / 20, 9 / 20)
    assert (line["headline"], line["value"], line["seconds"]) == ("robust.worst", 14 / 20, 4.0)
    assert (line["robust.worst:low"], line["robust.worst:high"]) == interval(14, 20)
    assert line["certified.smoothing:abstained"] == 2 / 10
    assert line["outcome"].tolist() == [True] * 14 + [False] * 6


def test_an_empty_folder_gives_an_empty_board(run: Run) -> None:
    assert len(ranked(load(run.root))) == 0


def test_an_entry_is_the_mean_over_its_seeds_and_lists_them(run: Run) -> None:
    for seed, broken in ((0, 2), (1, 4), (2, 8)):
        run.add(rows_of(broken=broken), seed=seed)
    (entry,) = ranked(load(run.root)).to_dict("records")
    assert entry["seeds"] == [0, 1, 2]
    assert entry["robust.worst:seeds"] == [16 / 20, 14 / 20, 10 / 20]
    assert entry["robust.worst"] == pytest.approx(40 / 60)
    assert entry["value"] == entry["robust.worst"]


def test_more_seeds_do_not_narrow_the_interval(run: Run) -> None:
    run.add(seed=0)
    one = ranked(load(run.root)).iloc[0]
    for seed in range(1, 5):
        run.add(seed=seed)
    five = ranked(load(run.root)).iloc[0]
    theirs = binomtest(14, 20).proportion_ci(0.95, method="wilson")
    for entry in (one, five):
        assert (entry["robust.worst:low"], entry["robust.worst:high"]) == pytest.approx((theirs.low, theirs.high))
        assert entry["robust.worst:n"] == 20


def test_ranks_follow_the_headline_within_an_objective_and_density(run: Run) -> None:
    for method, density, broken in (("a", "1/2", 6), ("b", "1/2", 2), ("c", "1/2", 6), ("d", "1/4", 8)):
        run.add(rows_of(broken=broken), method=method, density=density)
    board = ranked(load(run.root))
    assert board[["method", "density", "rank"]].to_numpy().tolist() == [
        ["b", 0.5, "1"], ["a", 0.5, "2"], ["c", 0.5, "2"], ["d", 0.25, "1"],
    ]


def test_an_objective_is_ranked_by_its_own_headline(run: Run) -> None:
    for objective, headline in (("pgd", "robust.worst"), ("ibp", "certified.union")):
        run.add(rows_of(broken=2, ibp=1, crown=2), method="robust", objective=objective, headline=headline)
        run.add(rows_of(broken=6, ibp=8, crown=9), method="certified", objective=objective, headline=headline)
    board = ranked(load(run.root)).set_index(["objective", "method"])["rank"].to_dict()
    assert board[("pgd", "robust")] == board[("ibp", "certified")] == "1"
    assert board[("ibp", "robust")] == board[("pgd", "certified")] == "2"


def test_dense_comes_first_and_has_no_rank(run: Run) -> None:
    run.add(method="hydra")
    run.add(rows_of(broken=0), method="dense", density="1")
    board = ranked(load(run.root))
    assert board["method"].tolist() == ["dense", "hydra"]
    assert board["rank"].tolist() == ["–", "1"]


def test_a_superseded_record_does_not_count(run: Run) -> None:
    old = run.add(name="old")
    new = run.add(rows_of(broken=2), name="new")
    run.edit(new, lambda document: document.update(supersedes=old.digest))
    assert load(run.root)["record"].tolist() == ["new"]


def test_a_record_of_another_cell_replaces_nothing(run: Run) -> None:
    honest = run.add(name="honest")
    other = run.add(method="lwm", name="other")
    for victim in (honest.digest, honest.id):
        run.edit(other, lambda document, victim=victim: document.update(supersedes=victim))
        assert sorted(load(run.root)["record"]) == ["honest", "other"]


def test_a_method_without_settings_keeps_its_plain_name_beside_one_with_some(run: Run) -> None:
    run.add(name="plain")
    run.edit(run.add(name="set"), lambda document: document["cell"]["method"].update(scope="net"))
    assert load(run.root).set_index("record")["method"].to_dict() == {"plain": "hydra", "set": "hydra (scope=net)"}


def test_the_same_cell_measured_twice_is_refused(run: Run) -> None:
    run.add(name="one")
    run.add(name="two")
    with pytest.raises(BoardError, match="one and two measure the same cell; let one supersede the other"):
        ranked(load(run.root))


def test_records_measured_differently_do_not_share_a_board(run: Run) -> None:
    run.add(method="hydra")
    run.add(method="lwm", budget={"pretrain": 2})
    with pytest.raises(BoardError, match="different settings and may not share a board"):
        ranked(load(run.root))


def test_records_on_other_images_do_not_share_a_board(run: Run) -> None:
    run.add(method="hydra")
    run.edit(run.add(method="lwm"), lambda document: document["samples"].update(digest="b" * 64))
    with pytest.raises(BoardError, match="different test samples"):
        ranked(load(run.root))


def test_two_settings_of_one_method_are_two_entries(run: Run) -> None:
    for name, scope in (("one", "layer"), ("two", "net")):
        method = {"name": "lwm", "scope": scope, "rounds": 1}
        run.edit(run.add(name=name), lambda document, method=method: document["cell"].update(method=method))
    assert sorted(ranked(load(run.root))["method"]) == ["lwm (scope=layer)", "lwm (scope=net)"]


def test_a_board_is_ready_for_json(run: Run) -> None:
    run.add(seed=0)
    run.add(seed=1)
    run.add(method="lwm", verifiers=cell_of()["verifiers"])
    (first, *_) = json.loads(ranked(load(run.root)).to_json(orient="records"))
    assert first["seeds"] == [0, 1]
    assert first["rank"] in {"1", "2"}


def test_objectives_without_smoothing_stand_beside_those_with_it(run: Run) -> None:
    run.add(objective="stability", headline="certified.smoothing")
    run.add(objective="pgd", verifiers=cell_of()["verifiers"][:2])
    board = ranked(load(run.root)).set_index("objective")
    assert "certified.smoothing" in metrics_in(board)
    assert math.isnan(board.loc["pgd", "certified.smoothing"])
    assert board.loc["stability", "certified.smoothing"] == 0.8
    assert board.loc["pgd", "certified.smoothing:seeds"] == []


def test_entries_that_cannot_be_told_apart_share_their_range_of_ranks() -> None:
    a, b = series(*[1] * 10, *[0] * 10), series(*[1] * 9, *[0] * 11)
    assert ranges([{0: a}, {0: b}]) == [(1, 2), (1, 2)]


def test_a_sure_difference_orders_the_entries() -> None:
    best, middle, worst = (series(*[1] * hits, *[0] * (60 - hits)) for hits in (50, 30, 10))
    assert ranges([{0: worst}, {0: best}, {0: middle}]) == [(3, 3), (1, 1), (2, 2)]


def test_the_pairs_p_is_mcnemars_exact_one_of_the_worst_seed() -> None:
    # discordant pairs 6:0 and 5:1 under Binomial(6, 1/2)
    strong = (series(*[1] * 6, 1), series(*[0] * 6, 1))
    weak = (series(*[1] * 5, 0, 1), series(*[0] * 5, 1, 1))
    assert compare({0: strong[0]}, {0: strong[1]}) == (1, pytest.approx(2 / 64))
    assert compare({0: strong[1]}, {0: strong[0]}) == (-1, pytest.approx(2 / 64))
    assert compare({0: strong[0], 1: weak[0]}, {0: strong[1], 1: weak[1]}) == (1, pytest.approx(14 / 64))


def test_seeds_that_disagree_or_are_not_shared_tell_nothing() -> None:
    up, down = series(*[1] * 20), series(*[0] * 20)
    assert compare({0: up, 1: down}, {0: down, 1: up}) == (0, 1.0)
    assert compare({0: up}, {1: down}) == (0, 1.0)


def test_equal_entries_are_seldom_told_apart() -> None:
    generator = np.random.default_rng(0)
    trials = 25
    wrong = 0
    for _ in range(trials):
        entries = [{0: pd.Series(generator.random(60) < 0.5)} for _ in range(3)]
        wrong += any(span != (1, 3) for span in ranges(entries))
    # Holm keeps the family's error below 5 %; 5 or more of 25 would happen with probability below 1 %
    assert wrong <= 4


def test_a_range_contains_the_rank(run: Run) -> None:
    for method, broken in zip("abcd", (0, 3, 8, 16)):
        run.add(rows_of(n=60, broken=broken), method=method)
    board = ranked(load(run.root))
    for rank, span in zip(board["rank"], board["ranks"]):
        low, high = (int(one) for one in (span.split("–") * 2)[:2])
        assert low <= int(rank) <= high
    assert [a <= b for a, b in itertools.pairwise(board["rank"])] == [True] * 3
