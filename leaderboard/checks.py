"""Does the evidence carry the claim? Every number of a record is derived again from its rows and its weights."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from functools import partial
from math import floor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leaderboard import ledger, row_checks
from leaderboard.canonical import digest, sha256_file
from leaderboard.errors import RecordError
from leaderboard.record import Bits, Layers, Record, read, record_files
from leaderboard.stats import ball, is_smoothing, metrics_of, number, within_threat

if TYPE_CHECKING:
    import pandas as pd

WORTH_A_PROCESS = 32  # records: fewer are checked before another process has started
PER_LAYER, WHOLE_FILTERS = "per layer", "whole filters per layer"  # scopes whose rounding is another than the whole network's


def check(record: Record, folder: str | Path) -> list[str]:
    """Every problem found with a record in the `records` folder it lies in, one sentence each; empty where it holds.

    Digest, evidence digests, metrics derived again, totals, verdict rows (see `row_checks`), and, where the weights files are
    present, their non-zeros counted again: those of the plain weights and those of the stored form, whose bits are, too.
    """
    folder, problems = Path(folder), list[str]()
    for found in (
        _digest(record), _sparsity(record), _density(record), _weights(record, folder), _verdict_digest(record, folder),
        _witness_digest(record, folder), _totals(record), _rows(record, folder),
    ):  # fmt: skip
        try:
            problems.extend(found)
        except Exception as error:  # whoever forged a file may have put anything into it
            problems.append(f"what it says cannot be made sense of ({type(error).__name__}: {error})")
    return problems


def check_all(run_folder: str | Path, processes: int = 1) -> dict[str, list[str]]:
    """The problems of every record under `<run_folder>/records` by id; an unreadable one is listed by its file's stem.

    Raises RecordError where there is no such folder.
    """
    return check_records(Path(run_folder) / "records", processes)


def check_records(folder: str | Path, processes: int = 1) -> dict[str, list[str]]:
    """The same of a folder that holds the records itself. Where they are many, up to `processes` share the work."""
    paths = list(record_files(folder))
    processes = min(processes, len(paths) // WORTH_A_PROCESS)
    if processes < 2:
        return dict(map(_checked, paths))
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        return dict(pool.map(_checked, paths, chunksize=WORTH_A_PROCESS // 2))


def _checked(path: Path) -> tuple[str, list[str]]:
    try:
        return path.stem, check(read(path), path.parent)
    except RecordError as error:
        return path.stem, [str(error)]


def folder_problems(folder: str | Path) -> list[str]:
    """What is wrong with a `records` folder as a whole, one sentence each: its ledger, every listed byte, who replaces whom."""
    readable = []
    for path in record_files(folder):
        try:
            readable.append(read(path))
        except RecordError:  # `check_records` says so
            continue
    found = ledger.problems(folder)
    return [*found, *_replaced(readable), *([] if found else _listed_as_said(readable, folder))]


def _listed_as_said(records: Iterable[Record], folder: str | Path) -> Iterator[str]:
    """The ledger names the record's own digest, and its verdict table among the files that may not change."""
    stands = ledger.standing(ledger.entries(folder))
    for one in records:
        if stands[one.id].digest != one.digest:
            yield f"{one.id}: the ledger lists the digest {stands[one.id].digest[:12]}..., the record's is {one.digest[:12]}..."
        if one.evidence.verdicts not in stands[one.id].files:
            yield f"{one.id}: the ledger does not list its verdict table {one.evidence.verdicts}"


def _replaced(records: Iterable[Record]) -> Iterator[str]:
    """A record may replace an earlier one of its own cell, which then stands here no longer, and nobody else's."""
    standing = {one.digest: one.id for one in records} | {one.id: one.id for one in records}
    for one in records:
        if one.supersedes in standing:
            yield f"{one.id}: says that it supersedes {standing[one.supersedes]}, which still stands; move one of the two away"


def _digest(record: Record) -> Iterator[str]:
    actual = digest(record.original)
    if actual != record.digest:
        yield f"digest is {record.digest[:12]}..., but the record's content gives {actual[:12]}...: it was edited after writing"


def _verdict_digest(record: Record, folder: Path) -> Iterator[str]:
    path = folder / record.evidence.verdicts
    if path.is_file() and sha256_file(path) != record.evidence.verdicts_sha256:
        yield f"{path.name} is not the verdict table that was recorded: its sha256 differs from verdicts_sha256"


def _witness_digest(record: Record, folder: Path) -> Iterator[str]:
    name = record.evidence.witnesses
    path = folder / (name or "")
    if path.is_file() and sha256_file(path) != record.evidence.witnesses_sha256:  # like weights, they need not travel along
        yield f"{path.name} is not the file of witnesses that was recorded: its sha256 differs from witnesses_sha256"


def _totals(record: Record) -> Iterator[str]:
    """In total, too: certified by a deterministic verifier <= survivors of an attack in the same ball <= clean."""
    cell, metrics = record.document["cell"], record.metrics
    for name, share in metrics.robust.items():
        if share.hits > metrics.clean.hits:
            yield f"robust.{name} has {share.hits} hits, more than clean with {metrics.clean.hits}"
    for verifier in (one for one in cell["verifiers"] if not is_smoothing(one) and one["label"] in metrics.certified):
        hits, (norm, eps) = metrics.certified[verifier["label"]].hits, ball(cell, verifier)
        within = [one for one in cell["attacks"] if ball(cell, one)[0] == norm and ball(cell, one)[1] <= eps]
        above = {"clean": metrics.clean, **{f"robust.{one['label']}": metrics.robust.get(one["label"]) for one in within}}
        for name, share in ((name, share) for name, share in above.items() if share is not None):
            if hits > share.hits:
                yield f"certified.{verifier['label']} has {hits} hits, more than {name} with {share.hits}"


def _rows(record: Record, folder: Path) -> Iterator[str]:
    try:
        rows = record.verdicts(folder)
    except RecordError as error:
        yield str(error)
        return
    yield from _samples(record, rows)
    yield from _metrics(record, rows)
    yield from row_checks.problems(record.document["cell"], rows)


def _samples(record: Record, rows: pd.DataFrame) -> Iterator[str]:
    if len(rows) != record.samples.n:
        yield f"samples.n is {record.samples.n}, but the verdict table has {len(rows)} rows"
    if rows["index"].duplicated().any() or (rows["index"] < 0).any():
        yield "index: a sample stands twice in the verdict table or has a negative number"


def _metrics(record: Record, rows: pd.DataFrame) -> Iterator[str]:
    claimed = record.document["metrics"]
    try:
        derived = metrics_of(record.document["cell"], rows)
    except ValueError as error:
        yield f"metrics cannot be derived from the rows: {error}"
        return
    flat_claimed, flat_derived = _flat(claimed), _flat(derived)
    for name in sorted(flat_claimed.keys() | flat_derived.keys()):
        here, there = flat_claimed.get(name, "nothing"), flat_derived.get(name, "nothing")
        if here != there:
            yield f"metrics.{name} says {here}, but the verdict rows give {there}"
    worst = claimed["robust"].get("worst")
    for label in (one["label"] for one in record.document["cell"]["attacks"] if within_threat(record.document["cell"], one)):
        share = claimed["robust"].get(label)
        if worst is not None and share is not None and worst["hits"] > share["hits"]:
            yield f"robust.worst has {worst['hits']} hits, more than robust.{label} with {share['hits']}"


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _sparsity(record: Record) -> Iterator[str]:
    block = record.sparsity
    kept, total = (sum(counts[i] for counts in block.layers.values()) for i in (0, 1))
    if (block.kept, block.total) != (kept, total):
        yield f"sparsity says {block.kept} of {block.total} weights kept, but its layers sum to {kept} of {total}"
    if number(block.requested) != number(record.cell.density):
        yield f"sparsity.requested is {block.requested}, but the cell asks for density {record.cell.density}"
    yield from _bits(record)
    if block.merged is not None:
        merged = sum(counts[0] for counts in block.merged.layers.values())
        if block.merged.kept != merged:
            yield f"sparsity.merged says {block.merged.kept} weights kept, but its layers sum to {merged}"
        if {name: counts[1] for name, counts in block.merged.layers.items()} != {n: one[1] for n, one in block.layers.items()}:
            yield "sparsity.merged has other layers, or other sizes of them, than sparsity.layers"
    if (block.merged is None) != (record.evidence.stored is None):
        yield "sparsity.merged and evidence.stored go together: both are there for a stored form, else neither"


def kept_more(record: Record) -> str | None:
    """What a record says of itself whose method kept more weights than its density allows; None where it did not.

    A plug-in may keep what it likes, if the record says so; such a record is never added to a board, which ranks by density.
    """
    block = record.sparsity
    return over_density(block.kept, block.total, record.cell.density) if block.kept > _budget(record) else None


def over_density(kept: int, total: int, density: object) -> str:
    """The warning that marks the record of a method that keeps to no budget."""
    return f"the method kept {kept} of {total} weights, more than density {density} allows"


def _budget(record: Record) -> int:
    return floor(Fraction(record.cell.density) * record.sparsity.total)


def _density(record: Record) -> Iterator[str]:
    """No more is kept than density and scope allow (the roundings of `bench.sparsity`), unless the record says so.

    Methods that are known to keep a budget have no such excuse. Whole filters are counted on the weights.
    """
    block, density = record.sparsity, Fraction(record.cell.density)
    if block.scope == PER_LAYER:
        for name, (kept, total) in block.layers.items():
            if kept > (allowed := _allowed(total, density)):
                yield f"{name} keeps {kept} of {total} weights, but density {record.cell.density} per layer allows {allowed}"
    elif block.scope != WHOLE_FILTERS and (sentence := kept_more(record)) is not None:
        excused = sentence in record.checks.warnings and not block.scope.startswith("global")
        if not excused:
            allowed = _budget(record)
            yield f"sparsity keeps {block.kept} weights, but density {record.cell.density} of {block.total} allows {allowed}"


def _allowed(size: int, density: Fraction) -> int:
    return size - floor((1 - density) * size)


def _filters(tensors: Any, layers: Layers, where: str, density: Fraction) -> Iterator[str]:
    """Of C filters, C - floor((1 - density) C) are kept, each whole: a little more than the budget where C is small."""
    names = set(tensors.keys())
    for layer, (kept, total) in layers.items():
        if f"{layer}.weight" not in names:
            continue  # `_plain` says so
        filters = tensors.get_slice(f"{layer}.weight").get_shape()[0]
        if kept > (allowed := total // filters * _allowed(filters, density)):
            yield f"{layer} keeps {kept} of {total} weights, but density {density} of its {filters} filters allows {allowed}"


def _uncounted(tensors: Any, layers: Layers, where: str) -> Iterator[str]:
    """No matrix of weights may be hidden: all of 2 dimensions or more count, BatchNorm's have 1."""
    hidden = set[str]()
    for name in sorted(set(tensors.keys())):
        split = str.rpartition if name.endswith(".weight") else str.partition
        layer, weight, part = split(f"{name}.", ".weight.")
        if weight and layer not in layers and (part or len(tensors.get_slice(name).get_shape()) > 1):
            hidden.add(layer)
    for layer in sorted(hidden):
        yield f"{where} holds {layer}.weight, which sparsity.layers does not count"


def _bits(record: Record) -> Iterator[str]:
    block = record.sparsity
    bits = block.bits
    if bits is None:
        return
    if (bits.dense, bits.plain) != (32 * block.total, 32 * block.kept):
        counted = f"{32 * block.kept} of {32 * block.total}"
        yield f"sparsity.bits says {bits.plain} of {bits.dense}, but 32 bits for each counted weight are {counted}"
    for name in ("paper", "csr"):
        ratio, derived = getattr(bits.ratio, name), getattr(bits, name) / bits.dense
        if ratio != derived:
            yield f"sparsity.bits.ratio.{name} is {ratio}, but {getattr(bits, name)} of {bits.dense} bits are {derived}"


def _weights(record: Record, folder: Path) -> Iterator[str]:
    evidence, block = record.evidence, record.sparsity
    plain = block.layers if block.merged is None else block.merged.layers
    path = yield from _present(evidence.weights, evidence.weights_sha256, "weights", folder)
    if path is not None:
        yield from _recount(path, plain, _plain)
        yield from _recount(path, plain, _uncounted)
        if block.scope == WHOLE_FILTERS:
            yield from _recount(path, block.layers, partial(_filters, density=Fraction(record.cell.density)))
    if evidence.stored is not None:
        path = yield from _present(evidence.stored, evidence.stored_sha256, "stored", folder)
        if path is not None:
            yield from _recount(path, block.layers, _stored)
            yield from _recount(path, block.layers, _uncounted)
    if path is not None and block.bits is not None:
        yield from _recount(path, block.layers, partial(_size, bits=block.bits))


def _present(name: str | None, recorded: str | None, what: str, folder: Path) -> Generator[str, None, Path | None]:
    """A file of weights if it lies where the record says: they are large and need not travel with the records."""
    if name is None:
        return None
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve().parent):
        yield f"evidence.{what} {name!r} points out of the run's folder"
        return None
    if not path.is_file():
        return None
    if sha256_file(path) != recorded:
        yield f"{path.name} is not the {what} file that was recorded: its sha256 differs from {what}_sha256"
    return path


def _recount(path: Path, layers: Layers, count: Callable[[Any, Layers, str], Iterator[str]]) -> Iterator[str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as tensors:
            yield from count(tensors, layers, path.name)
    except (SafetensorError, OSError, TypeError) as error:
        yield f"{path.name} cannot be read as safetensors: {error}"


def _plain(tensors: Any, layers: Layers, where: str) -> Iterator[str]:
    import numpy as np

    names = set(tensors.keys())
    for layer, (kept, total) in layers.items():
        weight = f"{layer}.weight"
        if weight not in names:
            yield f"{where} has no tensor {weight!r}, which sparsity.layers counts"
            continue
        values = tensors.get_tensor(weight)
        if (found := int(np.count_nonzero(values))) != kept or values.size != total:
            yield f"{weight} has {found} non-zeros of {values.size}, but sparsity.layers says {kept} of {total}"


def _stored(tensors: Any, layers: Layers, where: str) -> Iterator[str]:
    """Non-zeros of factors and codes: one that is coded is zero where its mask is, or without a mask where its code is."""
    import numpy as np

    names = set(tensors.keys())
    counted = [name for name in names if not name.endswith(".book") and f"{name.removesuffix('.codes')}.mask" not in names]
    for layer, (kept, _) in layers.items():
        own = [name for name in counted if f"{name}.".startswith(f"{layer}.weight.")]
        if (found := sum(int(np.count_nonzero(tensors.get_tensor(name))) for name in own)) != kept:
            yield f"{where} stores {layer}.weight in {found} non-zeros, but sparsity.layers says {kept}"


def _size(tensors: Any, layers: Layers, where: str, bits: Bits) -> Iterator[str]:
    """Both sizes by their definition: every factor or coded tensor of a layer is one of its own."""
    try:
        values = [value for layer in layers for value in _values(tensors, f"{layer}.weight")]
        paper = sum(_payload(value) for value in values)
        csr = paper + sum(_positions(value) for value in values)
    except IndexError:
        yield f"{where} holds a code that is not in its book"
        return
    if (paper, csr) != (bits.paper, bits.csr):
        yield f"{where} takes {paper} bits, {csr} with positions, but sparsity.bits says {bits.paper} and {bits.csr}"


def _values(tensors: Any, weight: str) -> Iterator[Any]:
    """What is stored of a weight: itself, or each of its factors; codes are looked up in their book."""
    import numpy as np

    names = set(tensors.keys())
    for name in sorted(names):
        if not f"{name}.".startswith(f"{weight}.") or name.endswith((".book", ".mask")):
            continue
        stored, own = tensors.get_tensor(name), name.removesuffix(".codes")
        if own == name:
            yield stored
        elif f"{own}.mask" in names:
            yield np.where(tensors.get_tensor(f"{own}.mask") != 0, tensors.get_tensor(f"{own}.book")[stored], 0)
        else:
            yield np.append(np.zeros(1, np.float32), tensors.get_tensor(f"{own}.book"))[stored]


def _payload(values: Any) -> int:
    """Bits of the non-zeros, positions free (Gui et al. 2019): codes and their book where these pay, else 32 each."""
    import numpy as np

    nnz, distinct = int(np.count_nonzero(values)), len(np.unique(values[values != 0]))
    code = (distinct - 1).bit_length() if distinct else 0
    booked, plain = nnz * code + 32 * distinct, 32 * nnz
    return booked if 2**code < nnz and (distinct <= 256 or booked < plain) else plain


def _positions(values: Any) -> int:
    """ceil(log2 g) bits for each non-zero, g the largest step from one to the next in reading order."""
    import numpy as np

    places = np.flatnonzero(values)
    return len(places) * (int(np.diff(places, prepend=-1).max()) - 1).bit_length() if len(places) else 0
