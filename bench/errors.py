"""The one exception for what a user can mend: shown as a single sentence with exit code 2, never as a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input. The message names the value and the way out."""


def first_line(error: BaseException) -> str:
    """What went wrong inside a library, short enough for one sentence: the exception's type and its first line."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}".rstrip(".: ")


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that is not in a catalogue; it offers the nearest known one."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}?" if near else "known: " + ", ".join(names)
    if near and len(names) <= 12:
        hint += " (known: " + ", ".join(names) + ")"
    return UserError(f"unknown {kind} {name!r}; {hint}")
