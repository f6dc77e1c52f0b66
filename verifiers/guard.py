"""A self-check of every wrapped network, before any of its bounds is believed. It is a test, not a proof."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from .bounds import difference_rows
from .lowering import Lowered
from .proof import UnsupportedNetworkError

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}


def _steepest_points(network: nn.Module, z: Tensor, rows: Tensor, norm: str, eps: float) -> Tensor:
    """One point of the ball per row of C, downhill for that margin: [N, S, ...]."""
    n, s = rows.shape[:2]
    with torch.enable_grad():
        start = z.repeat_interleave(s, 0).detach().requires_grad_()
        (gradient,) = torch.autograd.grad((network(start) * rows.flatten(0, 1)).sum(), start)
    if norm == "linf":
        direction = eps * gradient.sign()
    else:
        length = gradient.flatten(1).norm(dim=1).clamp_min(1e-30)
        direction = eps * gradient / length.view(-1, *[1] * (gradient.dim() - 1))
    return (start - direction).detach().view(n, s, *z.shape[1:])


def _margins(network: nn.Module, points: Tensor, rows: Tensor) -> Tensor:
    logits = network(points.flatten(0, 1)).view(*points.shape[:2], -1)
    return torch.einsum("nsc,nsc->ns", rows, logits)


@torch.no_grad()
def selfcheck(lowered: Lowered, bounded: Any, x: Tensor, y: Tensor, norm: str, eps: Fraction, method: str) -> None:
    """Raises UnsupportedNetworkError when the wrapped network contradicts the plain one; sound bounds never do.

    Checked: equal forward values; at radius 0 the bounds are the margins; at eps/20, eps/4 and eps no steepest point of the
    ball has a margin below the lower bound. x: [N, C, H, W] pixels.
    """
    from .lirpa_compat import BoundedTensor, PerturbationLpNorm

    z, network = lowered.move(x), lowered.network
    logits = network(z)
    tolerance = TOLERANCE[x.dtype] * max(1.0, float(logits.abs().max()))
    _require(float((logits - bounded(z)).abs().max()) < tolerance, "the wrapped graph computes another function", method)
    rows = difference_rows(y, logits.shape[1], x.dtype)
    clean = torch.einsum("nsc,nc->ns", rows, logits)
    for radius in (0.0, float(eps) / 20, float(eps) / 4, float(eps)):
        ball = PerturbationLpNorm(norm=float("inf") if norm == "linf" else 2.0, eps=radius)
        lower, _ = bounded.compute_bounds(x=(BoundedTensor(z, ball),), C=rows, method=method, bound_upper=False)
        _require(bool(torch.isfinite(lower).all()), f"a bound is not finite at radius {radius}", method)
        if radius == 0:
            _require(float((lower - clean).abs().max()) < tolerance, "at radius 0 the bounds miss the margins", method)
            continue
        reached = _margins(network, _steepest_points(network, z, rows, norm, radius), rows)
        _require(float((lower - reached).max()) < tolerance, f"a bound exceeds a reached margin at radius {radius}", method)


def _require(holds: bool, complaint: str, method: str) -> None:
    if not holds:
        raise UnsupportedNetworkError(f"auto-LiRPA's {method} bounds failed the self-check on this network: {complaint}")
