"""What can be wrong with stored results: each message is one sentence that names the file or value and the way out."""

from __future__ import annotations


class LeaderboardError(Exception):
    """Any problem of this package that a user can mend."""


class RecordError(LeaderboardError):
    """A record or its verdict table cannot be read as what it says it is."""


class BoardError(LeaderboardError):
    """Records that may not stand on one board."""


class RefusedError(LeaderboardError):
    """Records that do not hold, and so enter no board and leave in no submission: `reasons`, one sentence each."""

    def __init__(self, reasons: list[str]) -> None:
        super().__init__("; ".join(reasons))
        self.reasons = reasons
