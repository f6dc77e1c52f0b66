"""What a verifier answers in the batch that a record's run gave it: linear relaxations bound the images of a batch together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from verifiers import AlphaCrown, Crown, CrownIBP

from .cells import Assignment
from .claims import Claims
from .evaluate import evaluate

OTHER_MARGIN = "its margin is not the recorded one, as its bounds depend on the other images of a batch"
OTHER_ALONE = "its answer is another one in another batch; in its batch of old it is the recorded one"


@dataclass(frozen=True)
class Again:
    """The answer `found` (a verdict row) that `giver` gave about the row `at` of the record, in the name of `asked`."""

    asked: Assignment
    at: int
    giver: Assignment
    found: pd.Series


def depends_on_batch(one: Assignment) -> bool:
    """Whether an image's bounds depend on the others of its batch: auto-LiRPA refines what any of them leaves unstable."""
    return isinstance(one.tool, (CrownIBP, Crown, AlphaCrown))


def costly(one: Assignment) -> bool:
    """Whether a verifier takes over what others have proven or broken, so that its own answer may be theirs."""
    return bool(getattr(one.tool, "costly", False))


def pixels_of(claims: Claims, at: Sequence[int]) -> tuple[Tensor, Tensor, list[int]]:
    """Images, labels and sample numbers of the rows `at`."""
    where = torch.tensor(list(at), dtype=torch.int64, device=claims.samples.labels.device)
    return claims.samples.pixels(where), claims.samples.labels[where], claims.rows["index"].iloc[list(at)].tolist()


def in_batch_of_old(claims: Claims, unsure: Iterable[tuple[Assignment, int]]) -> Iterator[Again]:
    """Every (verifier, row) once more, each verifier on all images that the record's run asked it about at once.

    Where a costly verifier took its answer over, the one that gave it is asked.
    """
    groups: dict[tuple[str, tuple[int, ...]], list[tuple[Assignment, int]]] = defaultdict(list)
    givers = {one.label: replace(one, first=None) for one in claims.verifiers}
    for one, at in unsure:
        giver = _giver(claims, one, at)
        groups[giver.label, _asked_with(claims, giver, at)].append((one, at))
    for (label, together), asked in groups.items():
        x, y, index = pixels_of(claims, together)
        rows = evaluate(claims.model, x, y, index, claims.threat, [], [givers[label]]).rows
        for one, at in asked:
            yield Again(one, at, givers[label], rows.iloc[together.index(at)])


def _giver(claims: Claims, one: Assignment, at: int) -> Assignment:
    """The verifier whose own answer the record holds: this one, or the first that had proven as much."""
    if not costly(one) or at in _asked(claims, one, at):
        return one
    others = [other for other in claims.verifiers if other.label != one.label and other.tool.deterministic]
    proven = (other for other in others if other.tool.norm == one.tool.norm
              and claims.rows[f"radius:{other.label}"][at] >= float(one.tool.eps))  # fmt: skip
    return next(proven, one)


def _asked_with(claims: Claims, one: Assignment, at: int) -> tuple[int, ...]:
    together = _asked(claims, one, at)
    return together if at in together else (at,)


def _asked(claims: Claims, one: Assignment, at: int) -> tuple[int, ...]:
    """The rows that the verifier was asked about at once in the batch of this one: it has left a margin of its own in these."""
    first = at - at % claims.batch
    batch = claims.rows.iloc[first : first + claims.batch]
    own, own_words = f"raw_margin:{one.label}", [] if costly(one) else ["proved", "open"]
    answered = batch[own].notna() if own in batch else batch[f"status:{one.label}"].isin(own_words)
    return tuple((first + np.flatnonzero(answered)).tolist())
