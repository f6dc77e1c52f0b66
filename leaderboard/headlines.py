"""The numbers a board is asked for beyond its table: what pruning costs against dense, curves in one number, bytes, pairs.

All are about the headline metric, whose hit or miss per image and seed the frame of `leaderboard.board.load` holds, and are
functions of that frame and of the entries of `leaderboard.board.ranked`; docs/statistics.md says what each means.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import dropwhile, takewhile
from statistics import median
from typing import TYPE_CHECKING, Any

from leaderboard.board import ENTRY, GROUP, REFERENCE
from leaderboard.paired import aligned, share_over, spread
from leaderboard.ranks import POWER, Hits, detectable, difference, paired_tests, pairwise

if TYPE_CHECKING:
    import pandas as pd

MARGIN = 0.01  # one point
ROUNDING = 1e-12
KILOBYTE = 1000
VERDICTS = {1: "better", -1: "worse", 0: "open"}
CURVE = ["suite", "version", "objective", "arch"]
NOTHING = float("nan")


def per_entry(frame: pd.DataFrame, entries: pd.DataFrame) -> pd.DataFrame:
    """One row per entry, in their order; those with a contradicted record are left out here and below.

    suite, version, objective, arch, method, density, headline, seeds: as in `entries`.
    value, low, high: the headline's mean over seeds, in [0, 1], and its 95 % interval over new test images and new training
        seeds (`leaderboard.paired.share_over`); with one seed over new images only.
    sd_images, sd_seeds, sd_rest: standard deviations of a single hit over test images, over training seeds, and of what is due
        to both together (`leaderboard.paired.spread`); with one seed the latter two are NaN.
    bytes, bytes:csr: of the stored weights, without and with the positions of non-zeros, mean over seeds.
    per_kilobyte, per_kilobyte:csr: value per 1,000 of these bytes.
    difference, difference:low, difference:high: value less that of the dense entry of the same suite, objective and
        architecture on the same images at the seeds that both have (`dense_seeds`), with its 95 % interval; NaN for dense itself
        and where there is no dense entry or no common seed. Of several settings of `dense` the plain one is the reference.
    """
    import pandas as pd

    lines = [{name: value for name, value in line.items() if name != "records"} for line in _lines(frame, entries)]
    return pd.DataFrame(lines, columns=_if_empty(lines, ENTRY))


def _lines(frame: pd.DataFrame, entries: pd.DataFrame) -> list[dict[str, Any]]:
    hits, standing = _hits(frame), _standing(entries)
    dense = {_key(entry, CURVE): _of(hits, entry) for entry in _references(standing)}
    lines = []
    for entry in standing:
        own = _of(hits, entry)
        reference = {} if _is_dense(entry) else dense.get(_key(entry, CURVE), {})
        mean, low, high = difference(own, reference)
        lines.append({
            **entry, **_spread(own), **_per_kilobyte(entry), "dense_seeds": sorted(own.keys() & reference.keys()),
            "difference": mean, "difference:low": low, "difference:high": high,
        })  # fmt: skip
    return lines


def headlines(frame: pd.DataFrame, entries: pd.DataFrame) -> pd.DataFrame:
    """One row per suite, version, objective, architecture and method, dense first, then the largest area first.

    suite, version, objective, arch, method, headline (the metric's name).
    densities: those of the method's entries, the densest first; values: the headline's mean at each.
    dense, dense:low, dense:high: the dense entry's headline as in `per_entry`, to see what "within one point of it" is worth.
    ratio: the largest pruning ratio 1 / density (density as asked for) at which the headline is within one point (0.01) of the
        dense network's or above: the mean over images and common seeds of hit less dense hit is -0.01 or more. 1 where it is at
        no density: then only the dense network is. Among measured densities; NaN without a dense entry, or with several
        settings of it of which none is the plain one.
    ratio:low: the largest ratio that is surely within one point: from the densest on, as long as the lower end of the
        difference's 95 % interval is -0.01 or more (non-inferiority in a fixed order).
    ratio:high: the largest ratio that is not surely out of it: the sparsest left after taking away, from the sparsest on, those
        where the upper end of that interval is below -0.01. With 95 % confidence the true largest of the measured ratios lies
        from ratio:low to ratio:high, whatever the curve's shape: each end is a sequence in fixed order, which errs in 2.5 %.
    dense_seeds: the seeds that the method has in common with dense; one means that the interval is about new test images only.
    area: under the headline over log density, by the trapezoidal rule, divided by the width, so that it is a mean accuracy in
        [0, 1]; over `area:densities`, those that every pruned method of this suite, objective and architecture has. NaN where
        these are fewer than two, and for dense. area:low, area:high: 95 % over new images and new seeds; `area:seeds`: those
        that the method has at each of these densities.
    per_kilobyte, per_kilobyte:csr: headline per 1,000 stored bytes (without and with positions) at the density of `ratio`; of
        the dense entry where ratio is 1. At every density: `per_entry`.
    """
    import pandas as pd

    hits, rows = _hits(frame), list[dict[str, Any]]()
    for own in _grouped(_lines(frame, entries), CURVE):
        dense = next(iter(_references(own)), None)
        methods = [_densest_first(lines) for lines in _grouped((line for line in own if not _is_dense(line)), ["method"])]
        shared = sorted(set.intersection(*({line["density"] for line in lines} for lines in methods))) if methods else []
        found = []
        for lines in methods:
            by_density = {line["density"]: _of(hits, line) for line in lines}
            found.append({**_method(lines), **_within(lines, dense), **_area({one: by_density[one] for one in shared})})
        found.sort(key=lambda row: -row["area"] if row["area"] == row["area"] else 1.0)
        rows += ([] if dense is None else [{**_method([dense]), **_within([dense], dense), **_area({})}]) + found
    return pd.DataFrame(rows, columns=_if_empty(rows, [*CURVE, "method"]))


def _method(lines: list[dict[str, Any]]) -> dict[str, Any]:
    about = {name: lines[0][name] for name in [*CURVE, "method", "headline"]}
    return about | {"densities": [line["density"] for line in lines], "values": [line["value"] for line in lines]}


def _within(lines: list[dict[str, Any]], dense: dict[str, Any] | None) -> dict[str, Any]:
    """What a method's rows of `per_entry`, the densest first, say about pruning within one point of dense."""
    seeds = sorted(set().union(*(line["dense_seeds"] for line in lines)))
    ends = {"dense": "value", "dense:low": "low", "dense:high": "high"}
    about = {name: NOTHING if dense is None else dense[end] for name, end in ends.items()} | {"dense_seeds": seeds}
    if dense is None or not (seeds or _is_dense(lines[0])):
        return about | dict.fromkeys(("ratio", "ratio:low", "ratio:high", "per_kilobyte", "per_kilobyte:csr"), NOTHING)
    close = [line for line in lines if line["difference"] >= -MARGIN - ROUNDING]
    surely = list(takewhile(lambda line: line["difference:low"] >= -MARGIN, lines))
    perhaps = list(dropwhile(lambda line: line["difference:high"] < -MARGIN, reversed(lines)))
    point, low, high = ([dense, *close][-1], [dense, *surely][-1], [*perhaps, dense][0])
    ratios = {"ratio": 1 / point["density"], "ratio:low": 1 / low["density"], "ratio:high": 1 / high["density"]}
    return about | ratios | {name: point[name] for name in ("per_kilobyte", "per_kilobyte:csr")}


def _area(by_density: Mapping[float, Hits]) -> dict[str, Any]:
    """Every image at every seed has an area of its own, whose mean is the curve's: so the interval knows what is paired."""
    import numpy as np
    import pandas as pd
    from scipy.integrate import trapezoid

    densities = list(by_density)
    seeds = sorted(set.intersection(*(set(hits) for hits in by_density.values()))) if densities else []
    about = {"area": NOTHING, "area:low": NOTHING, "area:high": NOTHING, "area:densities": densities, "area:seeds": seeds}
    if len(densities) < 2 or not seeds:
        return about
    hits = aligned([own[seed] for own in by_density.values() for seed in seeds])
    if len(hits) < 2:
        return about
    heights, x = hits.reshape(len(hits), len(densities), len(seeds)), np.log(densities)
    found = share_over(pd.DataFrame(trapezoid(heights, x, axis=1) / (x[-1] - x[0]), columns=seeds))
    return about | {"area": found.mean, "area:low": found.low, "area:high": found.high}


def pairs(frame: pd.DataFrame, entries: pd.DataFrame) -> pd.DataFrame:
    """A row per pair of ranked entries of one suite, version, objective, architecture and density: are they told apart, and how?

    suite, version, objective, arch, density; one, other: the two methods, the better ranked first; then the keys of
    `leaderboard.ranks.pairwise`, and verdict: "better", "worse" (`one` than `other`, surely) or "open".
    """
    import pandas as pd

    rows = []
    for group, names, hits in _groups(frame, entries):
        for row in pairwise(hits):
            who = {side: names[row[side]] for side in ("one", "other")}
            rows.append({**group, **row, **who, "verdict": VERDICTS[row["sure"]]})
    return pd.DataFrame(rows, columns=_if_empty(rows, [*GROUP, "one", "other", "verdict"]))


def resolution(frame: pd.DataFrame, entries: pd.DataFrame) -> pd.DataFrame:
    """A row per ranked group of two entries or more: the smallest difference that it could have found.

    suite, version, objective, arch, density; entries; pairs; images (that a pair shares, the fewest of all pairs); seeds (that a
    pair shares, the most of all pairs); discordance: the share of images that exactly one of a pair hits, of the median pair;
    detectable: the smallest true difference, in [0, 1], that the paired tests call sure with probability 0.8 at least
    (`leaderboard.ranks.detectable`), NaN where none; note: all this as one sentence.
    """
    import pandas as pd

    rows = []
    for group, names, hits in _groups(frame, entries):
        found = paired_tests(hits)
        usable = [pair for pair in found if pair.images]
        if not usable:
            continue
        images, seeds = min(pair.images for pair in usable), max(len(pair.by_seed) for pair in usable)
        discordance = median(pair.discordance for pair in usable)
        least = detectable(images, discordance, len(found), seeds)
        rows.append({
            **group, "entries": len(names), "pairs": len(found), "images": images, "seeds": seeds, "discordance": discordance,
            "detectable": least, "note": _note(images, len(names), seeds, least),
        })  # fmt: skip
    return pd.DataFrame(rows, columns=_if_empty(rows, [*GROUP, "detectable", "note"]))


def _note(images: int, entries: int, seeds: int, least: float) -> str:
    sizes = f"{images:,} images, {entries} entries, {seeds} common {'seed' if seeds == 1 else 'seeds'}"
    if least != least:
        return f"No difference could have been found surely ({sizes})."
    return f"The smallest difference that could be found with power {POWER:g}: {100 * least:.1f} points ({sizes})."


def _groups(frame: pd.DataFrame, entries: pd.DataFrame) -> Iterable[tuple[dict[str, Any], list[str], list[Hits]]]:
    """(its names, its methods, their hits) of every ranked group, the entries in their order on the board."""
    hits = _hits(frame)
    for group in _grouped((entry for entry in _standing(entries) if not _is_dense(entry)), GROUP):
        yield dict(zip(GROUP, _key(group[0], GROUP))), [entry["method"] for entry in group], [_of(hits, entry) for entry in group]


def _hits(frame: pd.DataFrame) -> dict[str, tuple[int, pd.Series]]:
    """By record, its seed and the headline's hits."""
    return {} if frame.empty else dict(zip(frame["record"], zip(frame["seed"], frame["outcome"])))


def _of(hits: Mapping[str, tuple[int, pd.Series]], entry: Mapping[str, Any]) -> Hits:
    return dict(hits[record] for record in entry["records"])


def _standing(entries: pd.DataFrame) -> list[dict[str, Any]]:
    """The entries that no challenge has contradicted, in plain dictionaries of what is needed here."""
    needed = [*ENTRY, "headline", "seeds", "records", "value", "bytes", "bytes:csr"]
    return [] if entries.empty else entries[entries["status"] != "contradicted"][needed].to_dict("records")


def _grouped(lines: Iterable[dict[str, Any]], columns: list[str]) -> list[list[dict[str, Any]]]:
    """Lists of the lines that are equal in these columns, by these; within a list in the order that they had."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault(_key(line, columns), []).append(line)
    return [groups[key] for key in sorted(groups)]


def _densest_first(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(lines, key=lambda line: -line["density"])


def _if_empty(rows: list[Any], columns: list[str]) -> list[str] | None:
    """The columns of an empty table."""
    return None if rows else columns


def _key(line: Mapping[str, Any], columns: list[str]) -> tuple[Any, ...]:
    return tuple(line[name] for name in columns)


def _is_dense(line: Mapping[str, Any]) -> bool:
    return str(line["method"]).split(" ")[0] == REFERENCE


def _references(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The one dense line of each curve that all others are held against: of several settings the plain one; none if unsure."""
    found = []
    for own in _grouped((line for line in lines if _is_dense(line) and line["density"] == 1), CURVE):
        plain = [line for line in own if line["method"] == REFERENCE] or own
        found += plain if len(plain) == 1 else []
    return found


def _spread(hits: Hits) -> dict[str, float]:
    import pandas as pd

    table = pd.DataFrame(aligned(list(hits.values())), columns=list(hits))
    if len(table) < 2:
        return dict.fromkeys(("low", "high", "sd_images", "sd_seeds", "sd_rest"), NOTHING)
    found, parts = share_over(table), spread(table)
    return {"low": found.low, "high": found.high, "sd_images": parts.images, "sd_seeds": parts.seeds, "sd_rest": parts.rest}


def _per_kilobyte(entry: Mapping[str, Any]) -> dict[str, float]:
    sizes = {"per_kilobyte": entry["bytes"], "per_kilobyte:csr": entry["bytes:csr"]}
    return {name: entry["value"] * KILOBYTE / size if size else NOTHING for name, size in sizes.items()}
