"""What changed from one release of a board to the next: who entered, who left, who moved, and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from leaderboard.board import ENTRY
from leaderboard.render import _escaped, place

if TYPE_CHECKING:
    from leaderboard.releases import Line, Release

Kind = Literal["entered", "left", "moved"]
HEADINGS: dict[Kind, str] = {"entered": "Entered", "left": "Left", "moved": "Moved"}


@dataclass(frozen=True)
class Change:
    """An entry that is there now and was not, or the other way round, or whose rank or numbers are others; and why."""

    kind: Kind
    entry: str
    what: str
    why: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "entry": self.entry, "what": self.what, "why": list(self.why)}


def between(before: Release | None, after: Release) -> list[Change]:
    """Every change from one release to a later one (None: there was none), in the order of the boards.

    Entries are the same if they have the same suite, objective, architecture, method and density, or a record in common.
    """
    old = {} if before is None else {_key(entry): entry for entry in before.entries}
    pairs = [(_before(entry, old), entry) for entry in after.entries]
    known = {_key(was) for was, _ in pairs if was is not None}
    found = [Change("entered", name_of(now), _standing(now), ("new record",)) for was, now in pairs if was is None]
    if before is not None:
        found += [_left(was, before, after) for key, was in old.items() if key not in known]
        found += [one for was, now in pairs if was is not None for one in _moved(was, now, before, after)]
    return found


def _key(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(entry[name] for name in ENTRY)


def _before(entry: Mapping[str, Any], old: Mapping[tuple[Any, ...], dict[str, Any]]) -> dict[str, Any] | None:
    """The same entry in the release before; a new setting of its method may have given it a longer name since."""
    return old.get(_key(entry)) or next((one for one in old.values() if set(one["records"]) & set(entry["records"])), None)


def name_of(entry: Mapping[str, Any]) -> str:
    return (
        f"{entry['suite']}@{entry['version']}, {entry['objective']}: {entry['method']}, {entry['arch']}, "
        f"density {entry['density']:g}"
    )


def _standing(entry: Mapping[str, Any]) -> str:
    value = "unknown" if entry["value"] is None else f"{100 * entry['value']:.2f}"
    status = "" if entry["status"] == "measured" else f", {entry['status']}"
    return f"rank {place(entry)}, {entry['headline']} {value}{status}"


def _left(entry: Mapping[str, Any], before: Release, after: Release) -> Change:
    own = {one.digest for one in before.records if one.id in entry["records"]}
    successors = own & {one.supersedes for one in after.records}
    why = "superseded by a record of another entry" if successors else "its records stand no longer in their folders"
    return Change("left", name_of(entry), f"was {_standing(entry)}", (why,))


def _moved(was: Mapping[str, Any], now: Mapping[str, Any], before: Release, after: Release) -> Iterator[Change]:
    names = [name.removesuffix(":low") for name in now if name.endswith(":low")]
    numbers = [f"{name} {_percent(was.get(name))} → {_percent(now[name])}" for name in names if was.get(name) != now[name]]
    ranks = [f"rank {place(was)} → {place(now)}"] if place(was) != place(now) else []
    status = [f"{was['status']} → {now['status']}"] if was["status"] != now["status"] else []
    called = [f"was called {was['method']}"] if _key(was) != _key(now) else []
    why = tuple(dict.fromkeys(_reasons(was, now, before, after)))
    if not why:
        why = (f"computed anew by sparsecert {_made(after)}" if numbers else "others of its group changed",)
    elif not (ranks or numbers or status or called):
        numbers = ["the same numbers"]
    if what := [*ranks, *numbers, *status, *called]:
        yield Change("moved", name_of(now), ", ".join(what), why)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}"


def _made(release: Release) -> str:
    made = release.made_by
    return f"{made.version} ({(made.revision or 'no revision')[:12]})"


def _reasons(was: Mapping[str, Any], now: Mapping[str, Any], before: Release, after: Release) -> Iterator[str]:
    """Why the entry's records are others, or say less, than they did."""
    old = {one.digest: one for one in before.records}
    seeds, stood = set(was["seeds"]), {one.digest for one in before.records if one.id in was["records"]}
    mine = [one for one in after.records if one.id in now["records"]]
    for one in mine:
        if one.digest in old:
            yield from _happened(old[one.digest], one)
        elif one.supersedes in old:
            yield f"{old[one.supersedes].id} superseded{_by_other_code(old[one.supersedes], one)}"
        elif one.seed in seeds:
            yield f"new record {one.id}"
    if more := sorted(one.seed for one in mine if one.seed not in seeds):
        yield f"more seeds: {', '.join(map(str, more))}"
    gone = stood - {one.digest for one in after.records} - {one.supersedes for one in after.records}
    for one in sorted((old[digest] for digest in gone), key=lambda one: one.id):
        yield f"{one.id} stands no longer"


def _happened(was: Line, now: Line) -> Iterator[str]:
    if was.status == "contradicted" != now.status:
        yield f"the contradiction of {now.id} that {was.credit} found has vanished"
    elif now.challenged < was.challenged:
        count = was.challenged - now.challenged
        yield f"a challenge has vanished: {was.credit} had refuted {count} sample{'s' if count > 1 else ''} more of {now.id}"
    elif now.status == "contradicted" != was.status:
        yield f"contradiction: {now.credit} found a witness inside a certificate of {now.id}"
    elif now.challenged > was.challenged:
        count = now.challenged - was.challenged
        yield f"challenge: {now.credit} refuted {count} sample{'s' if count > 1 else ''} of {now.id}"
    elif now.status == "rerun" != was.status:
        yield f"a second machine got the verdicts of {now.id} again"
    elif was.status == "rerun" and now.status == "measured":
        yield f"the second machine of {now.id} has vanished"


def _by_other_code(was: Line, now: Line) -> str:
    if was.code == now.code:
        return ""
    here, there = ((one.revision or one.code)[:12] for one in (now, was))
    return f" by another code revision, {here} instead of {there}"


def changelog(before: Release | None, after: Release) -> str:
    """The changes in Markdown: one entry of a changelog."""
    found = between(before, after)
    since = "the first release" if before is None else f"since {before.release}"
    parts = [f"## {_escaped(after.title)} ({after.date[:10]}), {_escaped(since)}"]
    for kind, heading in HEADINGS.items():
        lines = [
            f"- **{_escaped(one.entry)}**: {_escaped(one.what)}. Why: {_escaped('; '.join(one.why))}."
            for one in found if one.kind == kind
        ]
        parts += [f"### {heading}\n\n" + "\n".join(lines)] if lines else []
    return "\n\n".join(parts if found else [*parts, "Nothing changed."]) + "\n"
