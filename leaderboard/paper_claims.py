"""What papers claim, held against records: each claim with its published numbers, what was measured, and a verdict.

Data sets are never mixed: a record speaks about the claim on its own data set only.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationError, model_validator

from leaderboard.board import counting
from leaderboard.canonical import canonical
from leaderboard.errors import BoardError
from leaderboard.paired import Mean, mean_over, share_over
from leaderboard.record import FractionText, Record, Strict, read_all
from leaderboard.stats import outcome

if TYPE_CHECKING:
    import pandas as pd

HERE = Path(__file__).parent
RECORDS = HERE / "records"  # the committed ones, a folder per suite@version
MARGIN = 0.05  # what counts as equal
LEAST_CLEAN = 0.5  # a network below this takes no part
UNSTATED = "not stated"
NOT_MEASURED = "not measured"


class Claim(Strict):
    """One comparison of `left` with `right` (or of `left` with zero); docs/claims.md says what each field means."""

    id: str
    text: str
    source: str
    kind: Literal["above", "about-equal", "near-zero"]
    left: dict[str, Any]
    right: dict[str, Any] | None = None
    objective: str | None = None
    metric: Literal["robust", "clean"] = "robust"
    arch: list[str] = Field(default_factory=list)
    density: list[FractionText] = Field(default_factory=list)
    budget: dict[str, Any] = Field(default_factory=dict)
    eps: dict[str, FractionText] = Field(default_factory=dict)
    below: float = 10.0
    data: str = UNSTATED
    printed: str | None = None
    published: list[dict[str, str]] = Field(min_length=1)

    @model_validator(mode="after")
    def _sides(self) -> Claim:
        if (self.right is None) != (self.kind == "near-zero"):
            raise ValueError(f"{self.id}: a near-zero claim has a left side only, any other a left and a right one")
        return self


class _File(Strict):
    data: dict[str, str]
    claim: list[Claim]


@dataclass(frozen=True)
class Claims:
    """The claims of a file, the names of the data sets in the published table, and that table."""

    claims: tuple[Claim, ...]
    names: Mapping[str, str]
    published: pd.DataFrame

    def rows(self, claim: Claim) -> pd.DataFrame:
        """The published rows of a claim, with a column `data`: the data set by its name here."""
        import pandas as pd

        found = pd.concat([self._picked(claim, wanted) for wanted in claim.published])
        names = [claim.data if not name else self.names.get(name, UNSTATED) for name in found["dataset"]]
        return found.assign(data=names)

    def _picked(self, claim: Claim, wanted: Mapping[str, str]) -> pd.DataFrame:
        rows = self.published
        for column, value in wanted.items():
            if column not in rows:
                raise BoardError(f"{claim.id}: the published table has no column {column!r}; it has {', '.join(self.published)}")
            rows = rows[rows[column] == value]
        if rows.empty:
            raise BoardError(f"{claim.id}: no published row has {dict(wanted)}; look for the spelling in published_results.csv")
        return rows


def read_claims(path: Path = HERE / "claims.toml", published: Path = HERE / "published_results.csv") -> Claims:
    """The claims of a TOML file, every one with its published rows. Raises BoardError, one sentence, for a mistake in it."""
    import pandas as pd

    try:
        file = _File.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BoardError(f"{path.name} is not a readable TOML file: {error}") from None
    except ValidationError as error:
        one = error.errors(include_url=False)[0]
        where = ".".join(map(str, one["loc"]))
        raise BoardError(f"{path.name}: {where + ': ' if where else ''}{one['msg'].removeprefix('Value error, ')}") from None
    if twice := sorted({one.id for one in file.claim if [other.id for other in file.claim].count(one.id) > 1}):
        raise BoardError(f"{path.name}: the id {twice[0]!r} stands twice; give each claim its own")
    claims = Claims(tuple(file.claim), file.data, pd.read_csv(published, dtype=str, keep_default_na=False))
    for claim in claims.claims:
        claims.rows(claim)
    return claims


# ---- records ---------------------------------------------------------------------------------------------------------


def record_folders(folder: Path) -> list[Path]:
    """The folders of records that a folder is or holds: a run's, one with records in it, or several of either.

    Raises BoardError where there are none.
    """
    if not folder.is_dir():
        raise BoardError(f"there is no folder {folder}; name the folder of a run, such as runs/mnist-claims@1")
    found = _own_records(folder) or [own for child in sorted(folder.iterdir()) if child.is_dir() for own in _own_records(child)]
    if not found:
        raise BoardError(f"there are no records in {folder}; name the folder of a run, such as runs/mnist-claims@1")
    return found


def _own_records(folder: Path) -> list[Path]:
    return [place for place in (folder / "records", folder) if any(place.glob("*.json"))][:1]


@dataclass(frozen=True)
class Measured:
    """A record and where its rows are."""

    record: Record
    folder: Path

    @property
    def cell(self) -> dict[str, Any]:
        return self.record.document["cell"]

    @property
    def data(self) -> str:
        """The data set's name; other files than the published ones under that name are another data set."""
        name = str(self.cell["data"]["name"])
        other = any(one.startswith(f"{name}: not the published") for one in self.record.checks.warnings)
        return f"{name} (other files)" if other else name

    @property
    def protocol(self) -> str:
        """All that two records of one comparison share: everything but method and seed, and the very images."""
        rest = {key: value for key, value in self.cell.items() if key not in ("method", "seed")}
        return canonical([rest, self.data, self.record.provenance.data, self.record.samples.digest]).decode()

    def attacks(self, eps: Fraction) -> list[str]:
        """The labels of the attacks of the threat's norm at this very eps."""
        norm = self.cell["threat"]["norm"]
        own = (one for one in self.cell["attacks"] if one.get("norm") == norm and one.get("eps") is not None)
        return [one["label"] for one in own if Fraction(one["eps"]) == eps]


def load_measured(folders: Iterable[Path]) -> list[Measured]:
    """Every record that counts, each once. Raises RecordError for one that cannot be read."""
    found: dict[str, Measured] = {}
    for folder in folders:
        for record in counting(read_all(folder)):
            found.setdefault(record.digest, Measured(record, folder))
    return list(found.values())


# ---- a claim's lines -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A claim on one data set, in one setting. Shares and differences are in [-1, 1]; eps is in [0,1] pixel units."""

    claim: str
    text: str
    kind: str
    source: str
    data: str
    published_here: bool  # whether the claim was published about this data set
    printed: str  # the published numbers, in short
    verdict: str
    published: list[dict[str, str]] = field(default_factory=list)
    setting: dict[str, Any] = field(default_factory=dict)
    budget: str = ""
    measured: dict[str, Any] | None = None
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def place(self) -> str:
        """What the line is about."""
        same = "same claim on" if self.kind == "near-zero" else "same ordering on"
        return self.data if self.published_here else f"{same} {self.data}"

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "place": self.place}


def lines(claims: Claims, measured: list[Measured]) -> list[Line]:
    """For every claim, its published data sets, measured or not, then the others it was measured on. Raises BoardError."""
    return [line for claim in claims.claims for line in _lines(claim, claims.rows(claim), measured)]


def _lines(claim: Claim, rows: pd.DataFrame, measured: list[Measured]) -> Iterable[Line]:
    groups = [group for group in _settings(claim, measured) if group]
    published = list(dict.fromkeys(rows["data"]))
    for name in [*published, *sorted({left[0].data for left, _ in groups} - set(published))]:
        own = rows[rows["data"] == name].drop(columns="data")
        about = {"data": name, "published_here": name in published, "printed": claim.printed or summary(own)}
        common = {"claim": claim.id, "text": claim.text, "kind": claim.kind, "source": claim.source, **about}
        common["published"] = own.to_dict(orient="records")
        found = [_judged(claim, left, right, common) for left, right in groups if left[0].data == name]
        yield from found or [Line(**common, verdict=NOT_MEASURED)]


def _settings(claim: Claim, measured: list[Measured]) -> Iterable[tuple[list[Measured], list[Measured]]]:
    """(left, right) of every setting and every variant of the two methods that was measured; right is empty for near-zero."""
    sides = [_by_setting(claim, spec, measured) for spec in (claim.left, claim.right) if spec is not None]
    for protocol, variants in sides[0].items():
        others = sides[1].get(protocol, []) if claim.right is not None else [[]]
        yield from ((left, right) for left in variants for right in others)


def _by_setting(claim: Claim, spec: Mapping[str, Any], measured: list[Measured]) -> dict[str, list[list[Measured]]]:
    """The fitting records by protocol, in a list per variant of the method. Raises BoardError for two of one cell."""
    found: dict[str, dict[bytes, dict[int, Measured]]] = {}
    for one in measured:
        if not _fits(claim, spec, one):
            continue
        seeds = found.setdefault(one.protocol, {}).setdefault(canonical(one.cell["method"]), {})
        if (other := seeds.setdefault(one.record.cell.seed, one)) is not one:
            raise BoardError(f"{one.record.id} was measured twice, in {other.folder} and {one.folder}; name only one of them")
    return {protocol: [list(seeds.values()) for seeds in variants.values()] for protocol, variants in found.items()}


def _fits(claim: Claim, spec: Mapping[str, Any], one: Measured) -> bool:
    cell = one.cell
    return (
        _has(cell["method"], spec) and _has(cell["budget"], claim.budget)
        and claim.objective in (None, cell["objective"]["name"])
        and (not claim.arch or cell["arch"] in claim.arch)
        and (not claim.density or Fraction(cell["density"]) in map(Fraction, claim.density))
        and (claim.metric == "clean" or bool(one.attacks(_eps(claim, one))))
    )  # fmt: skip


def _has(fields: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    return all(fields.get(name) == value for name, value in wanted.items())


def _eps(claim: Claim, one: Measured) -> Fraction:
    return Fraction(claim.eps.get(one.cell["data"]["name"], one.cell["threat"]["eps"]))


def _judged(claim: Claim, left: list[Measured], right: list[Measured], common: dict[str, Any]) -> Line:
    import pandas as pd

    one, notes = left[0], list[str]()
    setting = {key: one.cell[key] for key in ("suite", "version", "arch", "density", "objective")}
    setting |= {"left": one.cell["method"], "right": right[0].cell["method"] if right else None, "metric": claim.metric}
    if claim.metric == "robust":
        setting |= {"eps": str(_eps(claim, one)), "attacks": one.attacks(_eps(claim, one))}
        notes += _other_eps(common, setting["eps"])
    left_out: list[str] = []
    hits, others = (_hits_by_seed(claim, side, left_out) for side in (left, right))
    line = {**common, "setting": setting, "budget": budget_of(one.cell), "left_out": left_out}
    table = pd.DataFrame({seed: hits[seed] - (others[seed] if right else 0) for seed in hits if seed in others or not right})
    if len(table) < 2:
        return Line(**line, verdict="no pair takes part" if right else "no network takes part", notes=notes)
    found = mean_over(table) if right else share_over(table)
    notes += _doubts([side.record for side in (*left, *right) if side.record.cell.seed in found.by_seed], bool(right))
    measured = {**asdict(found), "by_seed": {str(seed): value for seed, value in found.by_seed.items()}}
    return Line(**line, verdict=verdict(claim, found), measured=measured, notes=notes)


def _hits_by_seed(claim: Claim, side: list[Measured], left_out: list[str]) -> dict[int, pd.Series]:
    """By seed, the hits per image of networks that work at all; says in `left_out` which do not."""
    found = {}
    for one in sorted(side, key=lambda one: one.record.cell.seed):
        rows, seed = one.record.verdicts(one.folder), one.record.cell.seed
        clean = outcome(one.cell, rows, "clean").mean()
        if clean >= LEAST_CLEAN:
            found[seed] = _hits(claim, one, rows)
        else:
            left_out.append(f"{one.cell['method']['name']} seed {seed} (clean {100 * clean:.1f} %)")
    return found


def _hits(claim: Claim, one: Measured, rows: pd.DataFrame) -> pd.Series:
    metrics = ["clean"] if claim.metric == "clean" else [f"robust.{label}" for label in one.attacks(_eps(claim, one))]
    first, *others = (outcome(one.cell, rows, metric) for metric in metrics)
    for other in others:
        first = first & other
    return first.astype(int)


def _doubts(records: list[Record], paired: bool) -> list[str]:
    """What a reader of the verdict should know."""
    seeds = {one.cell.seed for one in records}
    notes = ["one seed: the interval is about images only"] if len(seeds) == 1 else []
    if len({one.provenance.code for one in records}) > 1:
        notes.append("its records were written by different versions of the code")
    sizes: dict[bytes, float] = {}
    for one in records:
        if one.sparsity.bits is not None:
            sizes[canonical(one.document["cell"]["method"])] = one.sparsity.bits.ratio.paper
    if paired and len(sizes) == 2 and min(sizes.values()) < 0.95 * max(sizes.values()):
        size, other = sizes.values()
        notes.append(f"sizes differ: {size:.4f} against {other:.4f} of the dense network's bits")
    return notes


def _other_eps(common: Mapping[str, Any], eps: str) -> list[str]:
    printed = {Fraction(found[0]) for row in common["published"] if (found := re.match(r"\d+/\d+", row["eps"]))}
    if not common["published_here"] or not printed or Fraction(eps) in printed:
        return []
    return [f"published at eps {', '.join(map(str, sorted(printed)))}, measured at {eps}"]


def verdict(claim: Claim, found: Mean) -> str:
    """holds, about equal, does not hold or open, by the interval alone; docs/claims.md has the rules."""
    if claim.kind == "near-zero":
        yes, no = found.high < claim.below / 100, found.low >= claim.below / 100
    elif claim.kind == "about-equal":
        yes, no = found.within(MARGIN), found.low > MARGIN or found.high < -MARGIN
    else:
        yes, no = found.low > 0 and all(one > 0 for one in found.by_seed.values()), found.high < 0
        if not yes and found.within(MARGIN):
            return "about equal"
    return "holds" if yes else "does not hold" if no else "open"


# ---- words -----------------------------------------------------------------------------------------------------------


def summary(rows: pd.DataFrame) -> str:
    """The published values by method: up to three one by one, more as a range."""
    words = []
    for method, own in rows.groupby("method", sort=False):
        values = [value for value in own["value_percent"] if value]
        shown = ", ".join(values) if len(values) <= 3 else f"{min(values, key=float)} to {max(values, key=float)}"
        words.append(f"{method} {shown}")
    return "; ".join(words)


def budget_of(cell: Mapping[str, Any]) -> str:
    """What training was given: images and epochs."""
    budget, images = cell["budget"], cell["data"].get("train")
    epochs = "+".join(str(budget[phase]) for phase in ("pretrain", "prune", "finetune") if phase in budget)
    return f"{'all' if images is None else format(images, ',')} images, {epochs} epochs"
