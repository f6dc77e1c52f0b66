"""Balls of the linf and l2 norm inside the pixel box [0,1]: distance, projection, random start, steepest step."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

NORMS = ("linf", "l2")


def check_ball(norm: str, eps: Fraction) -> None:
    """Returns for a known norm and an exact radius >= 0. Raises ValueError or TypeError otherwise."""
    if norm not in NORMS:
        raise _unknown(norm)
    if not isinstance(eps, Fraction):
        raise TypeError(f"eps must be an exact Fraction, got {eps!r}: write Fraction('8/255'), not a float")
    if eps < 0:
        raise ValueError(f"eps is a radius in [0,1] pixel units, got {eps}: give a value >= 0")


def distance(x_adv: Tensor, x: Tensor, norm: str) -> Tensor:
    """The distance of each image from its original, computed in float64 [N]. Raises ValueError for an unknown norm."""
    delta = (x_adv.double() - x.double()).flatten(1)
    if norm == "linf":
        return delta.abs().amax(dim=1)
    if norm == "l2":
        return delta.square().sum(dim=1).sqrt()
    raise _unknown(norm)


def project(x_adv: Tensor, x: Tensor, norm: str, eps: Fraction | float) -> Tensor:
    """A point of the ball around x and of [0,1], inside in exact arithmetic: the float64 distance is <= eps too.

    x must lie in [0,1]; the result has x's shape and type. The nearest point of the ball is rounded towards x, then
    clamped to [0,1]. A pixel that is not finite becomes the clean pixel. Raises ValueError for an unknown norm.
    """
    x_adv = torch.where(torch.isfinite(x_adv), x_adv, x)
    exact, radius = x.double(), _round_down(eps)
    if norm == "linf":
        near = torch.minimum(torch.maximum(x_adv.double(), exact - radius), exact + radius).to(x.dtype)
        outside = _further_than(near.double(), exact, radius)
    elif norm == "l2":
        # the sum of n squares is itself rounded: this margin covers it, and is far below a float32 step
        inner = radius * (1 - (exact[:1].numel() + 8) * 2.0**-52)
        delta = x_adv.double() - exact
        length = _per_image(delta.flatten(1).norm(dim=1), delta)
        delta = delta * (inner / length.clamp_min(torch.finfo(torch.float64).tiny)).clamp(max=1.0)
        near = (exact + delta).to(x.dtype)
        outside = (near.double() - exact).abs() > delta.abs()
    else:
        raise _unknown(norm)
    return torch.where(outside, torch.nextafter(near, x), near).clamp(0.0, 1.0)


class Ball:
    """`project` for many iterates around the same images; for linf its bounds are computed once."""

    def __init__(self, x: Tensor, norm: str, eps: Fraction | float) -> None:
        self.x, self.norm, self.eps = x, norm, eps
        self.box = (project(x - 2, x, norm, eps), project(x + 2, x, norm, eps)) if norm == "linf" else None

    def project(self, x_adv: Tensor, rows: Tensor) -> Tensor:
        """The iterates x_adv of the images `rows`, each put into the exact ball and [0,1]."""
        if self.box is None:
            return project(x_adv, self.x[rows], self.norm, self.eps)
        lower, upper = self.box
        finite = torch.where(torch.isfinite(x_adv), x_adv, self.x[rows])
        return torch.minimum(torch.maximum(finite, lower[rows]), upper[rows])


def clip_to_ball(x_adv: Tensor, x: Tensor, norm: str, eps: Fraction | float) -> Tensor:
    """The nearest point of the ball, clamped to [0,1], up to float32 rounding: for the inner steps of training.

    What leaves an attack goes through `project`. Raises ValueError for an unknown norm.
    """
    radius = float(eps)
    if norm == "linf":
        return torch.minimum(torch.maximum(x_adv, x - radius), x + radius).clamp(0.0, 1.0)
    if norm == "l2":
        delta = x_adv - x
        length = _per_image(delta.flatten(1).norm(dim=1), delta).clamp_min(torch.finfo(delta.dtype).tiny)
        return (x + delta * (radius / length).clamp(max=1.0)).clamp(0.0, 1.0)
    raise _unknown(norm)


def ascend(x_adv: Tensor, gradient: Tensor, norm: str, step: Fraction | float) -> Tensor:
    """The point at distance `step` along the steepest ascent of the norm; a zero gradient stays where it is.

    linf moves every pixel by `step` along the gradient's sign, l2 along the gradient scaled to length `step`. The
    result may leave the ball and [0,1]. Raises ValueError for an unknown norm.
    """
    if norm == "linf":
        return x_adv + float(step) * gradient.sign()
    if norm == "l2":
        # dividing by the largest entry first: squares of small gradients underflow
        tiny = torch.finfo(gradient.dtype).tiny
        scaled = gradient / _per_image(gradient.flatten(1).abs().amax(dim=1), gradient).clamp_min(tiny)
        length = _per_image(scaled.flatten(1).norm(dim=1), scaled).clamp_min(tiny)
        return x_adv + float(step) * scaled / length
    raise _unknown(norm)


def random_start(x: Tensor, norm: str, eps: Fraction | float, seed: int | None = None, restart: int = 0) -> Tensor:
    """A uniform point of the ball (linf: the cube, l2: the solid ball), clamped to [0,1], up to float32 rounding.

    With an int seed the noise of an image depends on the seed, the restart and the image's own pixels only, never on
    the batch or the device; with None it comes from torch's global generator. Raises ValueError for an unknown norm.
    """
    if norm not in NORMS:
        raise _unknown(norm)
    if seed is None:
        noise = _unit_noise(x.shape, norm, x.device, None)
    else:
        streams = [_stream(seed, restart, image) for image in x]
        rows = [_unit_noise((1, *x.shape[1:]), norm, torch.device("cpu"), stream) for stream in streams]
        noise = torch.cat(rows).to(x.device) if rows else torch.zeros_like(x)
    return clip_to_ball(x + float(eps) * noise.to(x.dtype), x, norm, eps)


def _unit_noise(shape: Sequence[int], norm: str, device: torch.device, generator: torch.Generator | None) -> Tensor:
    if norm == "linf":
        return 2 * torch.rand(shape, device=device, generator=generator) - 1
    direction = torch.randn(shape, device=device, generator=generator)
    share = torch.rand(shape[:1], device=device, generator=generator) ** (1 / math.prod(shape[1:]))
    return direction * _per_image(share / direction.flatten(1).norm(dim=1), direction)


def _stream(seed: int, restart: int, image: Tensor) -> torch.Generator:
    pixels = image.detach().cpu().contiguous().numpy().tobytes()
    digest = hashlib.sha256(f"{seed}:{restart}:".encode() + pixels).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))


def _round_down(eps: Fraction | float) -> float:
    nearest = float(eps)
    return math.nextafter(nearest, 0.0) if Fraction(nearest) > Fraction(eps) else nearest


def _further_than(a: Tensor, b: Tensor, radius: float) -> Tensor:
    """Whether |a - b| > radius in exact arithmetic, per entry: the rounding error of a - b is a float64 (Knuth)."""
    difference = a - b
    swing = difference - a
    error = (a - (difference - swing)) - (b + swing)
    return (difference.abs() > radius) | ((difference.abs() == radius) & (error * difference > 0))


def _per_image(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.dim() - 1))


def _unknown(norm: str) -> ValueError:
    return ValueError(f"unknown norm {norm!r}: choose one of {', '.join(NORMS)}")
