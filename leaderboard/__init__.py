"""Reads the records and verdict rows that `bench` wrote: validates, re-derives, ranks and renders them, without torch.

`canonical` (digests), `record` (the format), `stats` (metrics and intervals), `checks` (does the evidence carry the claim),
`board` (tables), `ranks` (paired tests), `render` and `plot` (terminal, Markdown, one page). Only the errors are imported
here, so that `import leaderboard` stays quick and needs nothing but the standard library.
"""

from __future__ import annotations

from leaderboard.errors import BoardError, LeaderboardError, RecordError

__all__ = ["BoardError", "LeaderboardError", "RecordError"]
