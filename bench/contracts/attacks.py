"""What an attack promises: images of the ball, a network left alone, and an answer that belongs to the image."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from attacks import TooFewClassesError

from ..errors import UserError
from ..evaluate import predict
from ..threat import within
from .cases import CLASSES, Finding, alone_complaints, found, toy_split, trained_net

BALL = "stays in the ball and in [0,1]"
ALONE = "leaves the network and the random generators as they were"
BROKEN = "never mends what was broken"
BATCH = "the same answer for one image as in a batch"
TAKES = "takes the threat of a suite"
BALLS = {"linf": Fraction(1, 5), "l2": Fraction(1)}  # of which PGD breaks about a half of the toy images
ALONE_AT_MOST = 8  # images that are asked about one by one
ROUNDING = Fraction(1, 10**6)  # of float32: the caller projects, but by no more than that
Make = Callable[..., Any]


def attack_findings(make: Make) -> Iterator[Finding]:
    """Every contract of an attack in both norms; make(norm=..., eps=...) raises UserError for a norm that it does not take."""
    refused = []
    for norm, eps in BALLS.items():
        try:
            tool = make(norm=norm, eps=eps)
        except UserError as reason:
            refused.append(str(reason))
            yield Finding(TAKES, norm, refused=str(reason))
            continue
        if few := _too_few_classes(tool):
            yield Finding(TAKES, norm, refused=few)
            continue
        yield from _in_one_ball(tool, norm, eps)
    if len(refused) == len(BALLS):
        yield Finding(TAKES, "any norm", f"takes neither linf nor l2: {refused[0]}")


def _too_few_classes(tool: Any) -> str:
    """Why its loss cannot be tried on the toy's three classes; empty where it can."""
    images = toy_split(seed=1, n=1)
    try:
        tool(trained_net(), images.pixels(), images.labels)
    except TooFewClassesError as reason:
        return str(reason)
    except Exception:  # every contract will say so by itself
        return ""
    return ""


def _in_one_ball(tool: Any, norm: str, eps: Fraction) -> Iterator[Finding]:
    images = toy_split(seed=1, n=24)
    x, y = images.pixels(), images.labels
    edge = (2 * x - 0.5).clamp(0, 1)  # with pixels at 0 and 1
    yield found(BALL, norm, lambda: ball_complaints(tool, trained_net(), x, y, norm, eps))
    yield found(BALL, f"{norm}, pixels at 0 and 1", lambda: ball_complaints(tool, trained_net(), edge, y, norm, eps))
    yield found(ALONE, norm, lambda: alone_complaints(tool, x, y))
    yield found(BROKEN, norm, lambda: broken_complaints(tool, trained_net(), x, (y + 1) % CLASSES))
    yield found(BATCH, norm, lambda: batch_complaints(tool, trained_net(), x, y))


def _asked(tool: Any, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Its images. Raises TypeError where they are none of the shape of x."""
    x_adv = tool(model, x.clone(), y.clone())
    if not isinstance(x_adv, Tensor) or x_adv.shape != x.shape or not x_adv.is_floating_point():
        got = f"{x_adv.dtype} {tuple(x_adv.shape)}" if isinstance(x_adv, Tensor) else type(x_adv).__name__
        raise TypeError(f"returned {got}, expected images of shape {tuple(x.shape)}")
    return x_adv.detach()


def ball_complaints(tool: Any, model: nn.Module, x: Tensor, y: Tensor, norm: str, eps: Fraction) -> Iterator[str]:
    x_adv = _asked(tool, model, x, y)
    if not bool(torch.isfinite(x_adv).all()):
        yield "proposes pixels that are no finite numbers"
        return
    if float(x_adv.min()) < 0 or float(x_adv.max()) > 1:
        yield f"leaves [0,1]: pixels from {float(x_adv.min()):.6g} to {float(x_adv.max()):.6g}; clamp them"
    inside = within(x_adv.clamp(0, 1), x, norm, eps * (1 + ROUNDING) + ROUNDING)
    if not bool(inside.all()):
        many = f"{int((~inside).sum())} of {len(x)} images"
        yield f"leaves the {norm} ball of radius {eps} with {many}; attacks.lp.project puts them back"


def broken_complaints(tool: Any, model: nn.Module, x: Tensor, y: Tensor) -> Iterator[str]:
    """y: labels that the network does not predict."""
    wrong = predict(model, x) != y
    mended = wrong & (predict(model, _asked(tool, model, x, y)) == y)
    if bool(mended.any()):
        yield (
            f"turns {int(mended.sum())} of {int(wrong.sum())} misclassified images into rightly classified ones; "
            "return such an image as it is"
        )


def batch_complaints(tool: Any, model: nn.Module, x: Tensor, y: Tensor) -> Iterator[str]:
    """Whether an image is broken, asked in a batch, in the reversed batch and alone; and twice."""
    def broken(x: Tensor, y: Tensor) -> Tensor:
        return predict(copy.deepcopy(model).double(), _asked(tool, model, x, y).double()) != y

    together = broken(x, y)
    if not torch.equal(broken(x, y), together):
        yield "answers otherwise when it is asked again; draw from a generator that you seed"
        return
    reversed_ = broken(x.flip(0), y.flip(0)).flip(0)
    alone = torch.cat([*(broken(x[i : i + 1], y[i : i + 1]) for i in range(ALONE_AT_MOST)), together[ALONE_AT_MOST:]])
    for how, other in (("in another order", reversed_), ("alone", alone)):
        if count := int((other != together).sum()):
            yield f"breaks {count} of {len(x)} images otherwise {how}; what an image gets must depend on that image only"
