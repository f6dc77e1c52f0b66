"""Headline numbers: against hand calculation, other routines of scipy and statsmodels, and simulation with a fixed seed."""

from __future__ import annotations

import json
import math
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from scipy.integrate import quad
from scipy.stats import binomtest, norm
from statsmodels.stats.multitest import multipletests

from leaderboard.board import load, ranked
from leaderboard.headlines import headlines, pairs, per_entry, resolution
from leaderboard.paired import mean_over, share_over, spread
from leaderboard.ranks import detectable, ranges

from .conftest import ALPHA, DRAWS, SIGMA, Run, rows_of

GROUP = {"suite": "toy", "version": 1, "objective": "pgd", "headline": "robust.worst"}
Hits = dict[tuple[str, float], dict[int, np.ndarray]]


def board_of(hits: Hits, arch: str = "cnn_small") -> tuple[pd.DataFrame, pd.DataFrame]:
    """(frame, entries) of the hits by method, density and seed; of 1,000 weights the kept ones take 4 bytes, 6 with positions."""
    records, entries = [], []
    for (method, density), seeds in hits.items():
        names = [f"{arch}-{method}-{density}-{seed}" for seed in seeds]
        records += [{"record": name, "seed": seed, "outcome": pd.Series(own)} for name, (seed, own) in zip(names, seeds.items())]
        value = float(np.mean([own.mean() for own in seeds.values()]))
        entries.append({
            **GROUP, "arch": arch, "method": method, "density": density, "seeds": list(seeds), "records": names, "value": value,
            "rank": "1", "status": "measured", "bytes": 4000 * density, "bytes:csr": 6000 * density,
        })  # fmt: skip
    return pd.DataFrame(records), pd.DataFrame(entries)


def losing(images: int, missed: int, also: int = 0) -> np.ndarray:
    """Hits on all but the last `also` images, on which dense misses too, and the first `missed`."""
    return np.array([missed <= place < images - also for place in range(images)])


def headline_of(hits: Hits, method: str) -> dict[str, object]:
    found = headlines(*board_of(hits))
    return dict(found[found["method"] == method].iloc[0])


# ---- within one point of dense -----------------------------------------------------------------------------------------


def one_seed(missed: dict[float, int], images: int = 1000) -> Hits:
    """Dense hits 900 images of 1,000; the method misses so many of these at each density."""
    dense = {("dense", 1.0): {0: losing(images, 0, images // 10)}}
    return dense | {("lwm", density): {0: losing(images, count, images // 10)} for density, count in missed.items()}


def test_the_largest_ratio_within_one_point_is_the_sparsest_that_loses_one_image_in_a_hundred_at_most() -> None:
    found = headline_of(one_seed({0.5: 0, 0.25: 5, 0.125: 10, 0.1: 12, 0.05: 100}), "lwm")
    assert (found["ratio"], found["dense"], found["dense_seeds"]) == (8.0, 0.9, [0])
    dense = share_over(pd.DataFrame(losing(1000, 0, 100)))
    assert (found["dense:low"], found["dense:high"]) == (dense.low, dense.high)
    # no image lost of 1,000: surely within a point; 5 lost: -0.5 points and half a width of 0.52; 100 lost: surely out
    assert (found["ratio:low"], found["ratio:high"]) == (2.0, 10.0)
    assert found["densities"] == [0.5, 0.25, 0.125, 0.1, 0.05]
    assert found["values"] == [0.9, 0.895, 0.89, 0.888, 0.8]


def test_what_is_within_no_point_anywhere_leaves_the_dense_network() -> None:
    found = headline_of(one_seed({0.5: 100, 0.25: 200}), "lwm")
    assert (found["ratio"], found["ratio:low"], found["ratio:high"]) == (1.0, 1.0, 1.0)
    assert found["per_kilobyte"] == pytest.approx(0.9 / 4)


def test_better_than_dense_is_within_one_point_of_it() -> None:
    hits = one_seed({0.5: 0})
    hits["lwm", 0.5] = {0: losing(1000, 0)}
    found = headline_of(hits, "lwm")
    assert (found["ratio"], found["ratio:low"], found["ratio:high"]) == (2.0, 2.0, 2.0)


def test_a_density_out_of_doubt_further_on_is_not_sure_where_one_before_it_is_not() -> None:
    """The order is fixed, so that many densities give no more chances to err than one."""
    found = headline_of(one_seed({0.5: 8, 0.25: 0}), "lwm")
    assert (found["ratio"], found["ratio:low"]) == (4.0, 1.0)


def test_seeds_that_dense_was_not_trained_at_take_no_part() -> None:
    hits = one_seed({0.5: 0})
    hits["lwm", 0.5][1] = losing(1000, 500, 100)
    assert headline_of(hits, "lwm")["ratio:low"] == 2.0
    (row,) = per_entry(*board_of(hits)).query("method == 'lwm'").to_dict("records")
    assert (row["seeds"], row["dense_seeds"], row["difference"]) == ([0, 1], [0], 0.0)
    del hits["lwm", 0.5][0]
    assert math.isnan(headline_of(hits, "lwm")["ratio"])


def test_without_a_dense_entry_there_is_no_ratio() -> None:
    hits = {("lwm", 0.5): {0: losing(100, 3)}}
    found = headline_of(hits, "lwm")
    assert math.isnan(found["ratio"])
    assert math.isnan(found["dense"])
    assert found["dense_seeds"] == []


def test_another_setting_of_dense_does_not_take_the_place_of_the_plain_one() -> None:
    hits = one_seed({0.5: 0})
    honest = headline_of(hits, "lwm")
    hits["dense (zz=1)", 1.0] = {0: losing(1000, 1000)}
    for order in (hits, dict(reversed(hits.items()))):
        found = headline_of(order, "lwm")
        assert {name: found[name] for name in ("dense", "ratio", "ratio:low")} == {
            name: honest[name] for name in ("dense", "ratio", "ratio:low")
        }
        assert per_entry(*board_of(order)).set_index("method").loc["lwm", "difference"] == 0.0


def test_with_several_settings_of_dense_and_none_of_them_plain_nothing_is_held_against_dense() -> None:
    hits = one_seed({0.5: 0})
    hits["dense (zz=1)", 1.0] = hits.pop(("dense", 1.0))
    assert headline_of(hits, "lwm")["dense"] == 0.9
    hits["dense (zz=2)", 1.0] = {0: losing(1000, 1000)}
    found = headline_of(hits, "lwm")
    assert [math.isnan(found[name]) for name in ("dense", "ratio", "ratio:low", "ratio:high")] == [True] * 4
    assert headlines(*board_of(hits))["method"].tolist() == ["lwm"]


def test_the_dense_row_comes_first_and_is_within_one_point_of_itself() -> None:
    found = headlines(*board_of(one_seed({0.5: 0, 0.25: 1}))).to_dict("records")
    assert [row["method"] for row in found] == ["dense", "lwm"]
    assert (found[0]["ratio"], found[0]["ratio:low"], found[0]["ratio:high"], found[0]["dense"]) == (1.0, 1.0, 1.0, 0.9)
    assert math.isnan(found[0]["area"])


@pytest.mark.parametrize("truth, wrong", [(-0.0101, ("ratio:low", 10.0)), (-0.0099, ("ratio:high", 1.0))])
def test_each_end_of_the_ratios_interval_errs_in_one_of_forty_at_most(truth: float, wrong: tuple[str, float]) -> None:
    """Just out of one point, "surely within" would be wrong; just within it, "surely out" would be."""
    rng, images, boards = np.random.default_rng(3), 500, []
    lost, won = 0.03 - truth / 2, 0.03 + truth / 2
    for trial in range(60):
        drawn, dense = rng.random(images), rng.random(images) < 0.8
        dense[drawn < lost + won] = drawn[drawn < lost + won] < lost  # dense hits what the method loses
        pruned = np.where(drawn < lost + won, ~dense, dense)
        boards.append(board_of({("dense", 1.0): {0: dense}, ("lwm", 0.1): {0: pruned}}, f"net{trial}"))
    found = headlines(*(pd.concat(parts, ignore_index=True) for parts in zip(*boards)))
    end, value = wrong
    assert (found[found["method"] == "lwm"][end] == value).sum() <= 5  # more would come once in a hundred at 2.5 %


def test_differences_are_those_of_the_crossed_interval() -> None:
    rng = np.random.default_rng(4)
    table = {name: rng.random((60, 3)) < 0.6 for name in ("dense", "lwm")}
    hits: Hits = {(name, 1.0 if name == "dense" else 0.5): {s: own[:, s] for s in range(3)} for name, own in table.items()}
    row = per_entry(*board_of(hits)).iloc[1]
    found = mean_over(pd.DataFrame(table["lwm"].astype(int) - table["dense"].astype(int)))
    assert (row["difference"], row["difference:low"], row["difference:high"]) == (found.mean, found.low, found.high)
    share, parts = share_over(pd.DataFrame(table["lwm"])), spread(pd.DataFrame(table["lwm"]))
    assert (row["low"], row["high"]) == (share.low, share.high)
    assert (row["sd_images"], row["sd_seeds"], row["sd_rest"]) == (parts.images, parts.seeds, parts.rest)


# ---- area and bytes ----------------------------------------------------------------------------------------------------


def test_the_area_is_the_mean_height_of_the_curve_over_log_density() -> None:
    shares = {0.5: 0.9, 0.1: 0.8, 0.02: 0.3}
    hits = {("lwm", density): {0: losing(100, round(100 - 100 * share))} for density, share in shares.items()}
    found = headline_of(hits, "lwm")
    x, y = np.log(sorted(shares)), [shares[one] for one in sorted(shares)]
    drawn, _ = quad(lambda at: float(np.interp(at, x, y)), x[0], x[-1], points=[x[1]])
    assert found["area"] == pytest.approx(drawn / (x[-1] - x[0]), abs=1e-9)
    # log 0.5, 0.1, 0.02 are equally far apart: (0.9 / 2 + 0.8 + 0.3 / 2) / 2
    assert found["area"] == pytest.approx(0.7)
    assert found["area:densities"] == [0.02, 0.1, 0.5]


def test_a_level_curve_has_the_area_and_the_interval_of_its_accuracy() -> None:
    rng = np.random.default_rng(5)
    own = {seed: rng.random(80) < 0.7 for seed in range(3)}
    found = headline_of({("lwm", density): own for density in (0.5, 0.1)}, "lwm")
    share = share_over(pd.DataFrame(own))
    assert (found["area"], found["area:low"], found["area:high"]) == pytest.approx((share.mean, share.low, share.high))
    assert found["area:seeds"] == [0, 1, 2]


def test_areas_are_over_the_densities_that_all_methods_share() -> None:
    hits = {("lwm", density): {0: losing(50, round(10 / density**0.5))} for density in (0.5, 0.1, 0.05)}
    hits |= {("hydra", density): {0: losing(50, 1), 1: losing(50, 2)} for density in (0.5, 0.1, 0.2)}
    for method in ("lwm", "hydra"):
        assert headline_of(hits, method)["area:densities"] == [0.1, 0.5]
    assert headline_of(hits, "hydra")["area:seeds"] == [0, 1]
    assert [row["method"] for row in headlines(*board_of(hits)).to_dict("records")] == ["hydra", "lwm"]
    del hits["hydra", 0.1]
    assert math.isnan(headline_of(hits, "lwm")["area"])


def test_accuracy_per_kilobyte_is_that_of_the_sparsest_network_within_one_point() -> None:
    hits = one_seed({0.5: 5, 0.1: 20})
    found, rows = headline_of(hits, "lwm"), per_entry(*board_of(hits)).set_index("density")
    assert (found["per_kilobyte"], found["per_kilobyte:csr"]) == pytest.approx((0.895 / 2, 0.895 / 3))
    assert rows.loc[0.1, "per_kilobyte"] == pytest.approx(0.88 / 0.4)


def test_bytes_are_those_of_what_is_stored(run: Run) -> None:
    bits = {"dense": 768, "plain": 384, "paper": 320, "csr": 400, "ratio": {"paper": 320 / 768, "csr": 400 / 768}}
    run.edit(run.add(method="hydra"), lambda document: document["sparsity"].update(bits=bits))
    run.add(method="lwm")
    board = load(run.root).set_index("method")
    assert board.loc["hydra", ["bytes", "bytes:csr"]].tolist() == [40, 50]
    assert board.loc["lwm", "bytes"] == 4 * 12
    assert math.isnan(board.loc["lwm", "bytes:csr"])
    entries = ranked(load(run.root))
    assert per_entry(load(run.root), entries).set_index("method").loc["hydra", "per_kilobyte:csr"] == pytest.approx(0.7 / 0.05)


# ---- pairs and what could have been found ------------------------------------------------------------------------------


def random_group(seed: int, entries: int = 4, images: int = 90, seeds: int = 2) -> Hits:
    rng = np.random.default_rng(seed)
    hard = rng.random(images)
    return {
        (f"m{place}", 0.1): {one: hard + rng.normal(0, 0.15, images) < 0.45 + 0.12 * place for one in range(seeds)}
        for place in range(entries)
    }  # fmt: skip


def test_pairs_are_mcnemars_tests_with_holms_correction() -> None:
    hits = random_group(6)
    found = pairs(*board_of(hits)).to_dict("records")
    names, by_hand = [name for name, _ in hits], []
    for one, other in combinations(names, 2):
        a, b = (hits[name, 0.1] for name in (one, other))
        wins = [(int((a[s] & ~b[s]).sum()), int((b[s] & ~a[s]).sum())) for s in (0, 1)]
        signs = {np.sign(won - lost) for won, lost in wins}
        by_hand.append(max(binomtest(won, won + lost).pvalue for won, lost in wins) if len(signs) == 1 else 1.0)
    assert [(row["one"], row["other"]) for row in found] == list(combinations(names, 2))
    assert [row["p"] for row in found] == pytest.approx(by_hand)
    sure, adjusted, *_ = multipletests(by_hand, method="holm")
    assert [row["adjusted"] for row in found] == pytest.approx(adjusted)
    assert [row["verdict"] != "open" for row in found] == sure.tolist()
    assert {row["verdict"] for row in found} == {"worse", "open"}
    assert all(row["difference"] < 0 and row["low"] <= row["difference"] <= row["high"] for row in found)
    assert all(row["discordance"] == pytest.approx(sum(row["only_one"] + row["only_other"]) / 180) for row in found)


@pytest.mark.parametrize("seed", range(5))
def test_the_pairs_say_the_same_as_the_ranges_of_ranks(seed: int) -> None:
    hits = random_group(seed, entries=5, images=60, seeds=1)
    found = pairs(*board_of(hits)).to_dict("records")
    spans = ranges([{s: pd.Series(own) for s, own in one.items()} for one in hits.values()])
    winners = [row["one"] if row["verdict"] == "better" else row["other"] for row in found if row["verdict"] != "open"]
    losers = [row["other"] if row["verdict"] == "better" else row["one"] for row in found if row["verdict"] != "open"]
    assert winners
    assert spans == [(1 + losers.count(name), len(hits) - winners.count(name)) for name, _ in hits]


def test_a_group_says_the_smallest_difference_that_it_could_have_found() -> None:
    hits = random_group(7) | {("dense", 1.0): {0: losing(90, 3)}}
    (row,) = resolution(*board_of(hits)).to_dict("records")
    assert (row["entries"], row["pairs"], row["images"], row["seeds"]) == (4, 6, 90, 2)
    assert row["discordance"] == pytest.approx(np.median(pairs(*board_of(hits))["discordance"]))
    assert row["detectable"] == detectable(90, row["discordance"], pairs=6, seeds=2)
    assert f"{100 * row['detectable']:.1f} points (90 images, 4 entries, 2 common seeds)" in row["note"]


def test_a_group_that_could_find_nothing_says_so() -> None:
    hits = {(name, 0.1): {0: losing(4, missed)} for name, missed in (("a", 0), ("b", 4))}
    (row,) = resolution(*board_of(hits)).to_dict("records")
    assert math.isnan(row["detectable"])
    assert row["note"].startswith("No difference could have been found surely")


def test_one_entry_alone_has_no_pairs_and_none_without_a_common_seed_can_be_told_apart() -> None:
    assert pairs(*board_of({("a", 0.1): {0: losing(9, 1)}})).empty
    apart = {("a", 0.1): {0: losing(9, 0)}, ("b", 0.1): {1: losing(9, 9)}}
    (row,) = pairs(*board_of(apart)).to_dict("records")
    assert (row["seeds"], row["p"], row["verdict"]) == ([], 1.0, "open")
    assert math.isnan(row["difference"])
    assert resolution(*board_of(apart)).empty


# ---- boards ------------------------------------------------------------------------------------------------------------


def test_the_tables_of_a_real_board_are_ready_for_json(run: Run) -> None:
    for seed in (0, 1):
        run.add(rows_of(broken=0), method="dense", density="1", seed=seed)
        for density in ("1/2", "1/4"):
            run.add(rows_of(broken=2), density=density, seed=seed)
            run.add(rows_of(broken=9), method="lwm", density=density, seed=seed)
    frame = load(run.root)
    entries = ranked(frame)
    for table in (headlines, per_entry, pairs, resolution):
        rows = json.loads(table(frame, entries).to_json(orient="records"))
        assert len(rows) == {"headlines": 3, "per_entry": 5, "pairs": 2, "resolution": 2}[table.__name__]
    best = headlines(frame, entries).to_dict("records")
    assert [row["method"] for row in best] == ["dense", "hydra", "lwm"]
    assert [row["area"] for row in best[1:]] == pytest.approx([0.8, 0.45])


def test_an_empty_board_has_empty_tables(run: Run) -> None:
    frame = load(run.root)
    assert [len(table(frame, ranked(frame))) for table in (headlines, per_entry, pairs, resolution)] == [0, 0, 0, 0]


def test_an_entry_with_a_contradicted_record_takes_no_part() -> None:
    frame, entries = board_of(one_seed({0.5: 0, 0.25: 0}))
    entries.loc[entries["density"] == 0.25, "status"] = "contradicted"
    assert headlines(frame, entries).set_index("method").loc["lwm", "densities"] == [0.5]
    assert len(per_entry(frame, entries)) == 2


def test_smoothing_shows_radius_abstentions_and_the_share_that_holds_with_high_probability(run: Run) -> None:
    for seed in (0, 1):
        run.add(objective="stability", headline="certified.smoothing", seed=seed)
    (entry,) = ranked(load(run.root)).to_dict("records")
    # of 10 asked, 2 abstain, 4 have all of 1,000 hits and 4 have 900
    least = [binomtest(hits, DRAWS, alternative="greater").proportion_ci(1 - ALPHA, "exact").low for hits in (DRAWS, 900)]
    assert entry["certified.smoothing:radius"] == pytest.approx(SIGMA * 4 * sum(norm.ppf(least)) / 10)
    assert entry["certified.smoothing:abstained"] == 0.2
    lost = 0.001 + math.sqrt(0.001 * 0.999 * math.log(1000) / 10) + math.log(1000) / 30
    assert entry["certified.smoothing:high-probability"] == pytest.approx(0.8 - lost)
    row = per_entry(load(run.root), ranked(load(run.root))).iloc[0]
    assert (row["value"], row["headline"], row["sd_seeds"]) == (0.8, "certified.smoothing", 0.0)
