"""Whether attacks that need no gradients break what gradient attacks do not: then the gradients may be masked."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from .cells import Assignment

ITERATIVE = 30  # forward passes of an image, ten gradient steps: what a single step misses shows nothing
PAGE = "docs/health_flags.md#gradient-masking"


def masking_suspected(rows: pd.DataFrame, attacks: Sequence[Assignment]) -> list[str]:
    """A sentence for each black-box attack that broke a sample which every iterative gradient attack left standing.

    rows: verdict rows with the columns survived and distance of all attacks. Only gradient attacks of the same norm, in a ball
    no smaller, are compared with; a bundle of both kinds (`black_box` None) says nothing. Athalye et al. 2018, arXiv 1802.00420.
    """
    out = []
    for one in attacks:
        if getattr(one.tool, "black_box", False) is not True:
            continue
        gradient = [other for other in attacks if _comparable(other, one)]
        if not gradient:
            continue
        standing = rows[[f"survived:{other.label}" for other in gradient]].all(axis=1)
        own = ~rows[f"survived:{one.label}"] & rows[f"distance:{one.label}"].notna()  # else another attack had been first
        if bool((standing & own & (rows["predicted"] == rows["label"])).any()):
            names = ", ".join(other.label for other in gradient)
            out.append(f"gradient masking suspected: {one.label} breaks images that {names} cannot break; see {PAGE}")
    return out


def _comparable(other: Assignment, one: Assignment) -> bool:
    by_gradient = getattr(other.tool, "black_box", False) is False and getattr(other.tool, "cost", ITERATIVE) >= ITERATIVE
    return by_gradient and other.tool.norm == one.tool.norm and other.tool.eps >= one.tool.eps
