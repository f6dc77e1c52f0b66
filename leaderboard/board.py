"""From records to a board: one row per record, then one row per entry with the mean over its seeds and a rank."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leaderboard.canonical import canonical
from leaderboard.challenges import Effect, effects
from leaderboard.errors import BoardError
from leaderboard.ranks import ranges
from leaderboard.record import Certified, Metrics, Record, Sparsity, read_all
from leaderboard.stats import high_probability_accuracy, interval, metrics_of, number, outcome

if TYPE_CHECKING:
    import pandas as pd

REFERENCE = "dense"
UNRANKED = "–"
STATUSES = ("contradicted", "challenged", "measured", "rerun")  # an entry has the first of these that one of its records has
BOARD = ["suite", "version", "objective"]
ENTRY = [*BOARD, "arch", "method", "density"]
GROUP = ["suite", "version", "objective", "arch", "density"]
# What may differ between two records of one board's objective; all else is the protocol and must not.
VARIES = {"method", "objective", "arch", "density", "seed"}


def load(run_folder: str | Path) -> pd.DataFrame:
    """One row per record that counts (not superseded by another), sorted by suite, objective, arch, method, density, seed.

    Columns: suite, version, objective, method, arch, density (requested, float), seed, record, headline (a metric's name),
    value (of the headline), measured (density by counting), bytes (of what is stored, as the paper counts: non-zeros and code
    books), bytes:csr (with the positions too; NaN in records without them), seconds, images (digest of the test samples),
    protocol, outcome (the headline's hit or miss per image); and for every metric M (clean, robust.L, certified.L) M itself in
    [0, 1], M:n, M:low and M:high (95 % Wilson), for smoothing M:radius, M:abstained and M:high-probability.
    Metrics that a record has not are NaN. status is that of `leaderboard.challenges`; challenged counts the samples that a
    challenge has refuted and credit names who did: values, metrics and outcome are those that are left. Raises RecordError.
    """
    return load_records(Path(run_folder) / "records")


def load_records(folder: str | Path) -> pd.DataFrame:
    """`load` of a folder of records itself, such as leaderboard/records/mnist-objectives@1."""
    import pandas as pd

    folder = Path(folder)
    records, happened = counting(read_all(folder)), effects(folder)
    methods, objectives = (labels(records, part) for part in ("method", "objective"))
    lines = [_line(one, folder, methods[one.id], objectives[one.id], happened.get(one.digest, Effect())) for one in records]
    if not lines:
        return pd.DataFrame(columns=[*ENTRY, "seed", "record", "headline", "value"])
    return pd.DataFrame(lines).sort_values([*ENTRY, "seed"], kind="stable", ignore_index=True)


def counting(records: Iterable[Record]) -> list[Record]:
    """The records that no other one of the same cell supersedes, by id or by digest."""
    records = list(records)
    replaced = {(one.supersedes, canonical(one.document["cell"])) for one in records if one.supersedes is not None}
    return [one for one in records if not replaced & {(name, canonical(one.document["cell"])) for name in (one.id, one.digest)}]


def labels(records: list[Record], part: str) -> dict[str, str]:
    """A name for each record's method or objective; where one name has several settings, those that differ are added.

    One without any setting keeps the plain name.
    """
    settings = {one.id: one.document["cell"][part] for one in records}
    labels = {}
    for name, mine in settings.items():
        others = [fields for fields in settings.values() if fields["name"] == mine["name"]]
        differs = sorted({key for fields in others for key in fields | mine if fields.get(key) != mine.get(key)})
        words = ", ".join(f"{key}={mine.get(key)}" for key in differs if len(mine) > 1)
        labels[name] = mine["name"] + (f" ({words})" if words else "")
    return labels


def _line(record: Record, folder: Path, method: str, objective: str, effect: Effect) -> dict[str, Any]:
    cell, rows, metrics = record.document["cell"], record.verdicts(folder), record.metrics
    if effect.challenges:
        rows = effect.lowered(rows)
        metrics = Metrics.model_validate(metrics_of(cell, rows))
    protocol = {key: value for key, value in cell.items() if key not in VARIES}
    line: dict[str, Any] = {
        "suite": record.suite, "version": record.suite_version, "objective": objective, "arch": record.cell.arch,
        "method": method, "density": float(Fraction(record.cell.density)), "seed": record.cell.seed, "record": record.id,
        "headline": record.cell.headline, "measured": record.sparsity.kept / record.sparsity.total,
        **_bytes(record.sparsity), "seconds": sum(record.timing.seconds.values()), "images": record.samples.digest,
        "protocol": canonical(protocol).decode(), "outcome": outcome(cell, rows, record.cell.headline),
        "status": effect.status, "challenged": len(effect.samples), "credit": ", ".join(effect.credit),
    }
    for name, share in metrics.all().items():
        line |= {name: share.hits / share.n if share.n else float("nan"), f"{name}:n": share.n}
        line |= dict(zip((f"{name}:low", f"{name}:high"), interval(share.hits, share.n)))
        if isinstance(share, Certified) and share.average_radius is not None:
            line |= _smoothing(cell, name, share)
    return line | {"value": line[record.cell.headline]}


def _bytes(sparsity: Sparsity) -> dict[str, float]:
    """Of the weights as they are stored; biases and BatchNorm never count."""
    if sparsity.bits is None:
        return {"bytes": 4.0 * sparsity.kept, "bytes:csr": float("nan")}
    return {"bytes": sparsity.bits.paper / 8, "bytes:csr": sparsity.bits.csr / 8}


def _smoothing(cell: dict[str, Any], name: str, share: Certified) -> dict[str, float]:
    verifier = next(v for v in cell["verifiers"] if f"certified.{v['label']}" == name)
    if not share.n:
        return {}
    bound = high_probability_accuracy(share.hits / share.n, share.n, number(verifier["alpha"]))
    abstained = (share.abstained or 0) / share.n
    return {f"{name}:radius": share.average_radius or 0.0, f"{name}:abstained": abstained, f"{name}:high-probability": bound}


def metrics_in(frame: pd.DataFrame) -> list[str]:
    """The metrics that a frame of `load` or `ranked` has, clean first."""
    return [name.removesuffix(":low") for name in frame.columns if name.endswith(":low")]


def smoothed_in(frame: pd.DataFrame) -> list[str]:
    """Those of them that are smoothing certificates."""
    return [name for name in metrics_in(frame) if f"{name}:radius" in frame.columns]


def ranked(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per (suite, objective, arch, method, density), dense first in each objective, then by density and rank.

    Every metric is the mean over seeds, with M:seeds the seeds' values one by one (in the order of `seeds`). Its interval is
    Wilson's 95 % with p = that mean and n = the number of images, not images x seeds: seeds share the images, so more of
    them do not widen the sample, and the interval is conservative. `rank` orders by the headline metric within (objective,
    arch, density); `ranks` is the range of ranks that paired tests leave possible. `dense` is the reference and has rank "–",
    and so has an entry with a contradicted record. status is the worst of its records', challenged their sum.
    All columns are plain values or lists, ready for JSON. Raises BoardError for records that may not share a board.
    """
    import pandas as pd

    if frame.empty:
        return pd.DataFrame(columns=[*ENTRY, "headline", "value", "rank", "ranks", "seeds", "records"])
    one_protocol(frame)
    entries = pd.DataFrame([_entry(part) for _, part in frame.groupby(ENTRY, sort=True)])
    entries[["rank", "ranks"]] = UNRANKED
    placed = entries[~_is_reference(entries) & (entries["status"] != "contradicted")]
    for _, group in placed.groupby(GROUP):
        places = group["value"].rank(method="min", ascending=False)
        entries.loc[group.index, "rank"] = [UNRANKED if place != place else f"{place:.0f}" for place in places]
        spans = ranges([_outcomes(frame, group.loc[i]) for i in group.index])
        entries.loc[group.index, "ranks"] = [f"{a}–{b}" if a < b else f"{a}" for a, b in spans]
    return _in_order(entries)


def _is_reference(entries: pd.DataFrame) -> pd.Series:
    return entries["method"].str.split(" ").str[0] == REFERENCE


def _in_order(entries: pd.DataFrame) -> pd.DataFrame:
    keys = entries.assign(first=~_is_reference(entries), sparse=-entries["density"], worse=-entries["value"])
    order = keys.sort_values([*BOARD, "first", "sparse", "worse", "arch", "method"], kind="stable").index
    return entries.loc[order].reset_index(drop=True)


def one_protocol(frame: pd.DataFrame) -> None:
    """Refuses records of one suite that were measured differently, on other images, or twice."""
    for (suite, version, objective), part in frame.groupby(BOARD):
        for column in ("protocol", "images"):
            first = part.iloc[0]
            other = part[part[column] != first[column]]
            if len(other):
                raise BoardError(
                    f"{suite}@{version}, {objective}: {first['record']} and {other.iloc[0]['record']} have different "
                    f"{'settings' if column == 'protocol' else 'test samples'} and may not share a board; give the changed suite "
                    "a new version, or move the older records away"
                )
    again = frame[frame.duplicated([*ENTRY, "seed"], keep=False)]
    if len(again):
        raise BoardError(
            f"{again.iloc[0]['record']} and {again.iloc[1]['record']} measure the same cell; let one supersede the other"
        )


def _entry(part: pd.DataFrame) -> dict[str, Any]:
    first = part.iloc[0]
    entry: dict[str, Any] = {name: _plain(first[name]) for name in [*ENTRY, "headline"]}
    entry |= {"value": float(part["value"].mean()), "seeds": part["seed"].tolist(), "records": part["record"].tolist()}
    entry |= {name: float(part[name].mean()) for name in ("measured", "bytes", "bytes:csr")}
    entry["seconds"] = float(part["seconds"].sum())
    entry |= {"status": min(part["status"], key=STATUSES.index), "challenged": int(part["challenged"].sum())}
    entry["credit"] = ", ".join(dict.fromkeys(name for name in part["credit"] if name))
    for name in metrics_in(part):
        entry |= _mean(part, name)
    for name in part.columns:
        if name.endswith((":radius", ":abstained", ":high-probability")):
            entry[name] = float(part[name].mean())
    return entry


def _mean(part: pd.DataFrame, name: str) -> dict[str, Any]:
    known = part[part[name].notna()]
    if known.empty:
        nothing = float("nan")
        return {name: nothing, f"{name}:n": 0, f"{name}:low": nothing, f"{name}:high": nothing, f"{name}:seeds": []}
    mean, n = float(known[name].mean()), int(known[f"{name}:n"].min())
    low, high = interval(min(mean, 1.0) * n, n)
    return {name: mean, f"{name}:n": n, f"{name}:low": low, f"{name}:high": high, f"{name}:seeds": known[name].tolist()}


def _outcomes(frame: pd.DataFrame, entry: pd.Series) -> dict[int, pd.Series]:
    part = frame[frame["record"].isin(entry["records"])]
    return dict(zip(part["seed"].tolist(), part["outcome"]))


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value
