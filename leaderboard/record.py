"""The format of a record (schema 2): what a measured cell claims, and where the evidence lies."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from leaderboard.errors import RecordError
from leaderboard.migrations import SCHEMA, STEPS, migrated
from leaderboard.stats import FRACTION, is_smoothing

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa


def _fraction(text: str) -> str:
    try:
        Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"{text!r} is no fraction like '8/255' or '0.05'") from None
    return text


def _file_name(text: str) -> str:
    if text.startswith(".") or "/" in text or "\\" in text or "\0" in text:
        raise ValueError(f"{text!r} is no plain file name")
    return text


def _moment(text: str) -> str:
    try:
        known = datetime.fromisoformat(text).tzinfo is not None and datetime.fromisoformat(text).astimezone(UTC) is not None
    except (ValueError, OverflowError):
        known = False
    if not known:
        raise ValueError(f"{text[:40]!r} is no date and time with its zone like '2026-11-21T09:00:00+00:00'")
    return text


LARGEST_TABLE = 10**8  # values: a packed file of a few bytes may hold any number of them
LARGEST_TEXT = 2**28  # bytes of all texts of a table: one long one, named by every row, takes next to nothing in the file

FractionText = Annotated[str, Field(pattern=FRACTION), AfterValidator(_fraction)]
Moment = Annotated[str, Field(max_length=40), AfterValidator(_moment)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
FileName = Annotated[str, Field(min_length=1, max_length=250), AfterValidator(_file_name)]
Count = Annotated[int, Field(ge=0)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Part(Strict):
    """A configured plug-in: its name and whatever fields it has."""

    model_config = ConfigDict(extra="allow")
    name: str


class AttackPart(Part):
    label: str
    norm: str | None = None
    eps: FractionText | None = None


class VerifierPart(Part):
    label: str
    norm: str
    eps: FractionText


class Threat(Strict):
    norm: str
    eps: FractionText


class Cell(Strict):
    suite: str
    version: int
    data: Part
    arch: str
    method: Part
    objective: Part
    density: FractionText
    seed: int
    budget: dict[str, Any]
    threat: Threat
    attacks: list[AttackPart]
    verifiers: list[VerifierPart]
    headline: str
    samples: dict[str, Any] = Field(default_factory=dict)


class Share(Strict):
    """`hits` of `n` test samples."""

    hits: Count
    n: Count

    @model_validator(mode="after")
    def _within(self) -> Share:
        if self.hits > self.n:
            raise ValueError(f"{self.hits} hits of {self.n} samples")
        return self


class Certified(Share):
    average_radius: float | None = None
    abstained: Count | None = None


class Metrics(Strict):
    clean: Share
    robust: dict[str, Share]
    certified: dict[str, Certified]

    def get(self, name: str) -> Share | None:
        """The share called "clean", "robust.<attack>" or "certified.<verifier>", None where this record has none."""
        kind, _, label = name.partition(".")
        if name == "clean":
            return self.clean
        if kind == "robust":
            return self.robust.get(label)
        return self.certified.get(label) if kind == "certified" else None

    def all(self) -> dict[str, Share]:
        """Every share under its dotted name."""
        robust = {f"robust.{label}": share for label, share in self.robust.items()}
        return {"clean": self.clean, **robust, **{f"certified.{label}": s for label, s in self.certified.items()}}


Layers = dict[str, Annotated[list[Count], Field(min_length=2, max_length=2)]]  # kept, total


class Ratio(Strict):
    paper: float
    csr: float


class Bits(Strict):
    """Sizes in bits: of the dense network, of 32 bits a non-zero, as ATMC counts, and that with the bits of positions."""

    dense: Annotated[int, Field(gt=0)]
    plain: Count
    paper: Count
    csr: Count
    ratio: Ratio


class Merged(Strict):
    """The plain network's own counts, where something else (factors, codes) is what is stored."""

    kept: Count
    layers: Layers


class Sparsity(Strict):
    """Non-zeros of what is stored, over the weights of the dense network."""

    scope: str
    requested: FractionText
    kept: Count
    total: Annotated[int, Field(gt=0)]
    layers: Layers
    bits: Bits | None = None
    merged: Merged | None = None


class Samples(Strict):
    rule: str
    n: Count
    digest: Sha256


class Evidence(Strict):
    verdicts: FileName
    verdicts_sha256: Sha256
    weights: str | None
    weights_sha256: Sha256 | None
    stored: str | None = None
    stored_sha256: Sha256 | None = None
    witnesses: FileName | None = None
    witnesses_sha256: Sha256 | None = None


class SelfChecks(Strict):
    rechecked_in_float64: dict[str, Count]
    lowering: list[str]
    warnings: list[str]


class Machine(Strict):
    """What kind of machine measured, without a word of whose it is."""

    processor: str
    cores: Annotated[int, Field(gt=0)]
    memory_gib: Annotated[int, Field(gt=0)]


class Provenance(Strict):
    version: str
    code: str
    revision: str | None
    dirty: bool | None
    packages: dict[str, str]
    python: str
    device: str
    machine: Machine | None  # unknown in records of schema 1
    threads: int
    data: str
    plugins: dict[str, Sha256] = Field(default_factory=dict)
    selfcheck: Sha256 | None = None


class Timing(Strict):
    created: Moment
    seconds: dict[str, float]
    peak_memory_mib: float | None = None


class Record(Strict):
    """One measured cell. `document` is its JSON in the newest schema, `original` as it was read, which digests are taken of."""

    schema_: int = Field(alias="schema")
    id: FileName
    suite: str
    suite_version: int
    status: Literal["measured"]
    cell: Cell
    metrics: Metrics
    sparsity: Sparsity
    samples: Samples
    evidence: Evidence
    checks: SelfChecks
    provenance: Provenance
    supersedes: str | None
    digest: Sha256
    timing: Timing
    _document: dict[str, Any] = PrivateAttr(default_factory=dict)
    _original: dict[str, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _agrees(self) -> Record:
        """What is said twice is said alike."""
        if (self.suite, self.suite_version) != (self.cell.suite, self.cell.version):
            raise ValueError(f"suite {self.suite}@{self.suite_version} is not the cell's")
        if self.metrics.get(self.cell.headline) is None:
            raise ValueError(f"the headline {self.cell.headline!r} is none of the metrics {sorted(self.metrics.all())}")
        return self

    @property
    def document(self) -> dict[str, Any]:
        return self._document

    @property
    def original(self) -> dict[str, Any]:
        return self._original

    def verdicts(self, folder: str | Path) -> pd.DataFrame:
        """The verdict rows, one per test sample, with every column that the cell calls for in its right type.

        `folder` is the one the record lies in. Raises RecordError for a missing or unreadable file, a missing
        column or one of the wrong type.
        """
        from pyarrow.parquet import ParquetFile

        path = Path(folder) / self.evidence.verdicts
        try:
            with ParquetFile(path, memory_map=False) as table:
                wanted = self._wanted(table.schema_arrow, path.name)
                _bounded(table.metadata, wanted, path.name)
                texts = [column for column, kind in wanted.items() if kind == "text"]
            with ParquetFile(path, memory_map=False, read_dictionary=texts) as table:
                read = _unfolded(table.read(columns=list(wanted), use_threads=False), path.name)
            rows = read.to_pandas(use_threads=False, ignore_metadata=True)
        except RecordError:
            raise
        except FileNotFoundError:
            raise RecordError(f"{path.name}: the verdict table is missing; copy it next to its record") from None
        except Exception as error:  # pyarrow raises many kinds for a damaged file
            raise RecordError(f"{path.name}: cannot be read as Parquet ({type(error).__name__}: {error})") from error
        for column, kind in wanted.items():
            if not _is_kind(rows[column], kind):
                raise RecordError(f"{path.name}: column {column!r} holds {rows[column].dtype}, expected {kind}")
        return rows

    def _wanted(self, schema: pa.Schema, where: str) -> dict[str, str]:
        """The columns that the cell knows, in the file's order, each with its kind; all others stay unread."""
        must = columns_of(self.document["cell"])
        for column in must:
            if column not in schema.names:
                raise RecordError(f"{where}: column {column!r} is missing; the record's cell calls for it")
        known = must | optional_columns(self.document["cell"])
        wanted = {column: known[column] for column in schema.names if column in known}
        for column, kind in wanted.items():
            if schema.names.count(column) > 1:
                raise RecordError(f"{where}: column {column!r} stands twice")
            if not _is_arrow_kind(found := schema.field(column).type, kind):
                raise RecordError(f"{where}: column {column!r} holds {found}, expected {kind}")
        return wanted


def _bounded(metadata: Any, wanted: dict[str, str], where: str) -> None:
    """Raises RecordError where what would be read is too much, before any of it is."""
    if (size := metadata.num_rows * len(wanted)) > LARGEST_TABLE:
        raise RecordError(f"{where}: {size} values are too many for a verdict table, at most {LARGEST_TABLE}")
    groups = (metadata.row_group(number) for number in range(metadata.num_row_groups))
    pieces = (group.column(number) for group in groups for number in range(group.num_columns))
    size = sum(one.total_uncompressed_size for one in pieces if one.path_in_schema in wanted)
    if size > 8 * LARGEST_TABLE + LARGEST_TEXT:
        raise RecordError(f"{where}: {size} bytes once unpacked are too many for a verdict table")


def _unfolded(table: pa.Table, where: str) -> pa.Table:
    """The table with plain texts where they were read as numbers into a list of different ones."""
    import pyarrow as pa
    import pyarrow.compute as pc

    folded = [name for name in table.column_names if pa.types.is_dictionary(table.schema.field(name).type)]
    size = 0
    for chunk in (chunk for name in folded for chunk in table.column(name).chunks):
        size += pc.sum(pc.binary_length(chunk.dictionary).take(chunk.indices)).as_py() or 0
    if size > LARGEST_TEXT:
        raise RecordError(f"{where}: {size} bytes of text are too many for a verdict table, at most {LARGEST_TEXT}")
    for name in folded:
        plain = table.column(name).cast(pa.large_string())
        table = table.set_column(table.column_names.index(name), name, plain)
    return table


def columns_of(cell: dict[str, Any]) -> dict[str, str]:
    """The columns that a cell's verdict table must have, each with its kind: integer, truth, number or text."""
    columns = {"index": "integer", "label": "integer", "predicted": "integer", "verdict": "text", "by": "text"}
    for attack in cell["attacks"]:
        columns |= {f"survived:{attack['label']}": "truth", f"distance:{attack['label']}": "number"}
    for verifier in cell["verifiers"]:
        label = verifier["label"]
        columns |= {f"status:{label}": "text", f"radius:{label}": "number", f"margin:{label}": "number"}
        if is_smoothing(verifier):
            columns |= {f"{name}:{label}": "integer" for name in ("predicted", "hits", "n")}
    return columns


def optional_columns(cell: dict[str, Any]) -> dict[str, str]:
    """The columns that it may have besides, of verifiers that look for counterexamples or test as they draw."""
    kinds = {"survived": "truth", "distance": "number", "looks": "text"}
    return {f"{name}:{verifier['label']}": kind for verifier in cell["verifiers"] for name, kind in kinds.items()}


def _is_arrow_kind(found: pa.DataType, kind: str) -> bool:
    """Whether a column of this type may be read: nothing nested, whose size nobody knows before."""
    from pyarrow import types

    if kind == "text":
        return bool(types.is_string(found) or types.is_large_string(found) or types.is_null(found))
    return bool({"integer": types.is_integer, "truth": types.is_boolean, "number": types.is_floating}[kind](found))


def _is_kind(column: pd.Series, kind: str) -> bool:
    from pandas.api import types

    if kind == "text":
        return bool(types.is_string_dtype(column.dtype)) and not column.isna().any()
    return bool(column.dtype.kind == {"integer": "i", "truth": "b", "number": "f"}[kind])


def parse(document: Any, name: str) -> Record:
    """A validated Record of a JSON value; `name` is the file that errors speak of. Raises RecordError."""
    if not isinstance(document, dict):
        raise RecordError(f"{name}: a record is a JSON object, this is a {type(document).__name__}")
    schema = document.get("schema")
    if not isinstance(schema, int) or isinstance(schema, bool):
        raise RecordError(f"{name}: schema is {schema!r}, expected the number {SCHEMA}; is this a record of sparsecert?")
    if schema > SCHEMA:
        raise RecordError(f"{name}: schema {schema} is newer than {SCHEMA}, the newest read here; upgrade sparsecert")
    if schema < min(STEPS):
        raise RecordError(f"{name}: there never was a schema {schema}; restore the file")
    newest = migrated(document)
    try:
        record = Record.model_validate(newest)
    except ValidationError as error:
        raise RecordError(f"{name}: {first_error(error)}") from None
    record._document, record._original = newest, document
    return record


def first_error(error: ValidationError) -> str:
    """The place and the reason of what is wrong first, and how many more there are."""
    details = error.errors(include_url=False)
    where = ".".join(str(part) for part in details[0]["loc"]) or "the record"
    message = details[0]["msg"].removeprefix("Value error, ")
    more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
    return f"{where}: {message[:1].lower()}{message[1:]}{more}"


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):  # Python keeps the last of two equal keys, other readers the first
        raise ValueError("a key stands twice in one object")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not allowed in JSON")


def read(path: str | Path) -> Record:
    """The record in a JSON file. Raises RecordError, one sentence with the file's name, for anything else."""
    path = Path(path)
    try:
        document = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once, parse_constant=_no_constant)
    except OSError as error:
        raise RecordError(f"{path.name}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{path.name}: not JSON ({error}); restore the file or run the cell again") from None
    record = parse(document, path.name)
    if record.id != path.stem:
        raise RecordError(f"{path.name}: holds the record {record.id!r}; name the file {record.id}.json")
    return record


def record_files(folder: str | Path) -> Iterable[Path]:
    """The record files of a folder, by name. Raises RecordError where there is no such folder."""
    folder = Path(folder)
    if not folder.is_dir():
        raise RecordError(f"{folder}: no such folder of records; run a suite first")
    return sorted(path for path in folder.glob("*.json") if path.is_file())


def read_all(folder: str | Path) -> list[Record]:
    """Every record of a `records` folder, sorted by id. Raises RecordError for the first that cannot be read."""
    return sorted((read(path) for path in record_files(folder)), key=lambda record: record.id)
