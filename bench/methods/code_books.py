"""Few values for many weights: learned code books (1-D k-means beside a fixed zero) and evenly spaced levels."""

from __future__ import annotations

import torch
from torch import Tensor

from ..factors import BOOK

EXACT = 512  # points of the dynamic programme: all distinct values, or of more values as many even intervals
ROUNDS = 20  # of Lloyd's algorithm, as in the ATMC release


@torch.no_grad()
def learned_book(values: Tensor, size: int = BOOK) -> Tensor:
    """Every entry moved to the nearest of 0 and `size` learned values; zeros stay zeros.

    The values are the best ones in squared error where at most 512 entries differ, else the best ones for the means of 512 even
    intervals, improved by at most 20 rounds of Lloyd's algorithm. With at most `size` distinct non-zeros nothing changes, nor
    where an entry is not finite. values: any shape. Raises ValueError for a size below 1. Gui et al. 2019 (arXiv 1902.03538).
    """
    if size < 1:
        raise ValueError(f"a code book needs at least one value, got {size}")
    kept = values != 0
    entries = values[kept].double().cpu()
    points, counts = entries.unique(return_counts=True)
    if len(points) <= size or not bool(points.isfinite().all()):  # the loop stops a training that diverges
        return values.clone()
    book = _best(points, counts.double(), size) if len(points) <= EXACT else _lloyd(entries, _best(*_intervals(entries), size))
    out = torch.zeros_like(values)
    out[kept] = _nearest(entries, book)[0].to(values)
    return out


def _intervals(entries: Tensor) -> tuple[Tensor, Tensor]:
    """(means, counts) of the entries in evenly wide intervals, without empty ones."""
    low, high = entries.min(), entries.max()
    count, mean = _means(((entries - low) / (high - low) * EXACT).long().clamp_max(EXACT - 1), entries, EXACT)
    return mean[count > 0], count[count > 0]


def _means(places: Tensor, entries: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """(how many entries are in each place, their mean)."""
    count = torch.bincount(places, minlength=size).double()
    return count, torch.bincount(places, entries, size) / count


def _nearest(entries: Tensor, book: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(each entry's nearest value of the book or 0, its place in the table, the sorted table)."""
    table = torch.cat([book.new_zeros(1), book]).unique()
    places = torch.bucketize(entries, (table[1:] + table[:-1]) / 2)
    return table[places], places, table


def _lloyd(entries: Tensor, book: Tensor) -> Tensor:
    """Means of the entries that are nearest to them; the cell of 0 has no mean of its own."""
    for _ in range(ROUNDS):
        _, places, table = _nearest(entries, book)
        count, means = _means(places, entries, len(table))
        before, book = book, means[(table != 0) & (count > 0)]
        if torch.equal(book, before):
            break
    return book


def _best(points: Tensor, counts: Tensor, size: int) -> Tensor:
    """The optimal book of sorted distinct non-zero points: the cell of 0 splits them, each side is a dynamic programme."""
    below, above = points < 0, points > 0
    left, left_costs = _side(-points[below].flip(0), counts[below].flip(0), size)
    right, right_costs = _side(points[above], counts[above], size)
    split = int((left_costs + right_costs.flip(0)).argmin())
    return torch.cat([-_centres(left, split), _centres(right, size - split)])


class _Side:
    """Positive points, nearest to 0 first, and where the last cell starts in the best cover of the first j points by k cells."""

    def __init__(self, points: Tensor, counts: Tensor) -> None:
        zero, self.points, self.counts = counts.new_zeros(1), points, counts
        self.weight = torch.cat([zero, counts.cumsum(0)])
        self.moment = torch.cat([zero, (counts * points).cumsum(0)])
        self.square = torch.cat([zero, (counts * points.square()).cumsum(0)])
        self.starts: list[Tensor] = []

    def errors(self) -> Tensor:
        """[i, j]: the squared error of the points i to j - 1 around their mean; 0 for none of them."""
        weight, moment, square = (sums[None, :] - sums[:, None] for sums in (self.weight, self.moment, self.square))
        error = (square - moment.square() / weight).clamp_min(0).fill_diagonal_(0)
        return error.masked_fill(torch.ones_like(error, dtype=torch.bool).tril(-1), torch.inf)


def _side(points: Tensor, counts: Tensor, size: int) -> tuple[_Side, Tensor]:
    """(the side, its least error with 0 to `size` values beside 0)."""
    side = _Side(points, counts)
    errors, best, costs = side.errors(), side.square, [side.square[-1]]
    for _ in range(size):
        best, start = (best[:, None] + errors).min(0)
        side.starts.append(start)
        costs.append(best[-1])
    return side, torch.stack(costs)


def _centres(side: _Side, cells: int) -> Tensor:
    """The means of the best `cells` cells; empty ones have none."""
    end, found = len(side.points), []
    for start_of in reversed(side.starts[:cells]):
        start = int(start_of[end])
        if start < end:
            counts = side.counts[start:end]
            found.append((side.points[start:end] * counts).sum() / counts.sum())
        end = start
    return torch.stack(found) if found else side.points.new_zeros(0)


@torch.no_grad()
def even_levels(values: Tensor, symmetric: bool = False) -> Tensor:
    """The non-zeros rounded to 256 levels from the smallest to the largest of them; zeros stay zeros.

    symmetric: to the 255 levels -127 to 127 times max|w| / 127 instead, of which 0 is one. values: finite, any shape.
    """
    kept = values != 0
    if not bool(kept.any()):
        return values.clone()
    entries = values[kept].double()
    low, steps = (entries.new_zeros(()), 127) if symmetric else (entries.min(), 255)
    step = ((entries.abs().max() if symmetric else entries.max()) - low) / steps
    out = values.clone()
    if float(step) > 0:
        out[kept] = (low + ((entries - low) / step).round() * step).to(values)
    return out
