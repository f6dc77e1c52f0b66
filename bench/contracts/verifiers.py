"""What a verifier promises: no certificate that is false, and an answer for each sample that belongs to that sample."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from attacks import FGSM, PGD
from verifiers import Proof, UnsupportedNetworkError, exact_radius
from verifiers.proof import ABSTAIN, BROKEN, ERROR, OPEN, PROVED, TIMEOUT

from ..cells import Assignment
from ..errors import UserError
from ..evaluate import ContradictionError, evaluate
from ..selfcheck import CALIBRATION, balls, complaints, network
from ..threat import Threat
from .cases import CLASSES, Finding, alone_complaints, found, toy_split, trained_net

STATUS = "answers every sample with a known status"
NAN = "NaN proves nothing"
WRONG = "a wrong answer is never certified"
SURVIVES = "its certificates survive the shipped attacks"
EXACT = "no radius beyond the exact one"
BATCH = "the same answer for one image as in a batch"
ALONE = "leaves the network and the random generators as they were"
KNOWN = "known answers"
TAKES = "takes the threat of a suite"
STATUSES = (PROVED, BROKEN, OPEN, ABSTAIN, TIMEOUT, ERROR)
EPS = (Fraction(1, 50), Fraction(1, 10), Fraction(1, 4))
BRACKET = Fraction(1, 200)
Make = Callable[..., Any]


def verifier_findings(make: Make) -> Iterator[Finding]:
    """Every contract of a verifier; make(norm=..., eps=...) raises UserError for a norm that it does not take.

    A verifier whose statement is not about the network itself (`deterministic = False`) is not held against exact answers.
    """
    refused = []
    for norm in ("linf", "l2"):
        try:
            tools = [make(norm=norm, eps=eps) for eps in EPS]
        except UserError as reason:
            refused.append(str(reason))
            yield Finding(TAKES, norm, refused=str(reason))
            continue
        yield from _in_one_norm(tools, norm)
        if tools[0].deterministic:
            yield from _against_the_truth(make, norm)
    if len(refused) == 2:
        yield Finding(TAKES, "any norm", f"takes neither linf nor l2: {refused[0]}")


def _in_one_norm(tools: list[Any], norm: str) -> Iterator[Finding]:
    images = toy_split(seed=1, n=12)
    x, y = images.pixels(), images.labels
    others = (y + 1) % CLASSES
    for tool in tools:
        case, net = f"{norm} {tool.eps}", trained_net(narrow=True)
        yield _tried(STATUS, case, partial(status_complaints, tool, net, x, y))
        yield _tried(BATCH, case, partial(batch_complaints, tool, net, x, y))
        yield _tried(WRONG, case, partial(wrong_complaints, tool, net, x, others))
        yield _tried(SURVIVES, case, partial(attacked_complaints, tool, net, x, y))
    least = tools[0]
    yield _tried(NAN, f"{norm}, weights", partial(nan_complaints, least, _with_nan(trained_net(narrow=True)), x, y))
    yield _tried(NAN, f"{norm}, pixels", partial(nan_complaints, least, trained_net(narrow=True), x * torch.nan, y))
    yield _tried(ALONE, norm, partial(alone_complaints, least, x, y))


def _against_the_truth(make: Make, norm: str) -> Iterator[Finding]:
    for ball in balls(json.loads(CALIBRATION.read_text(encoding="utf-8")), torch.device("cpu")):
        if ball.norm == norm:
            yield _tried(KNOWN, ball.name, partial(_known, make(norm=norm, eps=ball.eps), ball))
    if norm == "linf":
        for case, (model, x, y, distance) in exact_distances().items():
            yield _tried(EXACT, case, partial(exact_complaints, make, model, x, y, distance))


def _tried(contract: str, case: str, complaints: Callable[[], Iterator[str]]) -> Finding:
    """A verifier may say that it has no rule for a network; that proves nothing and is no mistake."""
    refusals: list[str] = []

    def guarded() -> Iterator[str]:
        try:
            yield from complaints()
        except UnsupportedNetworkError as reason:
            refusals.append(str(reason))

    one = found(contract, case, guarded)
    return Finding(contract, case, refused=refusals[0]) if refusals and not one.why else one


def _with_nan(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        next(model.parameters())[0] = torch.nan
    return model


# ---- one contract each -----------------------------------------------------------------------------------------------


def _proof(tool: Any, model: nn.Module, x: Tensor, y: Tensor) -> Proof:
    proof = tool(model, x.clone(), y.clone())
    if not isinstance(proof, Proof):
        raise TypeError(f"returned {type(proof).__name__}, not a verifiers.Proof")
    return proof


def status_complaints(tool: Any, model: nn.Module, x: Tensor, y: Tensor) -> Iterator[str]:
    proof = _proof(tool, model, x, y)
    lengths = {len(proof.radius), len(proof.margin), len(proof.predicted), len(proof.status)}
    if lengths != {len(x)}:
        yield f"answers {', '.join(map(str, sorted(lengths)))} samples of {len(x)}"
        return
    if unknown := [status for status in proof.status if status not in STATUSES]:
        yield f"says {unknown[0]!r}; a status is one of {', '.join(STATUSES)}"
    if not bool(((proof.radius >= 0) & (proof.radius < torch.inf)).all()):
        yield "gives a radius that is no finite number from 0"
    if proof.radius.dtype != torch.float64 or proof.margin.dtype != torch.float64:
        yield f"gives radius and margin in {proof.radius.dtype} and {proof.margin.dtype}, not in float64"
    if any(status != PROVED and radius > 0 for status, radius in zip(proof.status, proof.radius.tolist())):
        yield "gives a radius above 0 to a sample that it does not call proved"
    if any(status == PROVED and radius == 0 for status, radius in zip(proof.status, proof.radius.tolist())):
        yield "calls a sample proved at radius 0, which proves nothing"


def batch_complaints(tool: Any, model: nn.Module, x: Tensor, y: Tensor) -> Iterator[str]:
    """Radius and status of each image in a batch, in the reversed batch and alone."""
    together = _answers(_proof(tool, model, x, y))
    reversed_ = _answers(_proof(tool, model, x.flip(0), y.flip(0)))[::-1]
    alone = [_answers(_proof(tool, model, x[i : i + 1], y[i : i + 1]))[0] for i in range(len(x))]
    for how, other in (("in another order", reversed_), ("alone", alone)):
        if changed := [i for i in range(len(x)) if other[i] != together[i]]:
            i = changed[0]
            yield f"says {together[i][1]} (radius {together[i][0]:.6g}) of image {i}, {how} {other[i][1]} ({other[i][0]:.6g})"


def _answers(proof: Proof) -> list[tuple[float, str]]:
    return list(zip(proof.radius.tolist(), proof.status))


def _certified(proof: Proof) -> Tensor:
    """bool [N]. NaN > 0 is False, so a radius of NaN counts by its status."""
    return (proof.radius.cpu() > 0) | torch.tensor([status == PROVED for status in proof.status])


def wrong_complaints(tool: Any, model: nn.Module, x: Tensor, y: Tensor) -> Iterator[str]:
    """y: labels that the network does not predict. A verifier without a statement about the network judges another one."""
    if tool.deterministic and bool((certified := _certified(_proof(tool, model, x, y))).any()):
        yield f"certifies {int(certified.sum())} of {len(x)} images that the network misclassifies"


def nan_complaints(tool: Any, model: nn.Module, x: Tensor, y: Tensor) -> Iterator[str]:
    """Refusing (UnsupportedNetworkError) is a right answer, too."""
    try:
        proof = _proof(tool, model, x, y)
    except UnsupportedNetworkError:
        return
    if bool((certified := _certified(proof)).any()):
        yield f"certifies {int(certified.sum())} of {len(x)} images although there is NaN in them or in the network"


def attacked_complaints(tool: Any, model: nn.Module, x: Tensor, y: Tensor) -> Iterator[str]:
    """As in a run: every witness of the attacks against every certificate."""
    pgd = PGD(norm=tool.norm, eps=tool.eps, steps=30, restarts=3, loss="margin")
    assaults = [Assignment(type(one).__name__, {}, one) for one in (pgd, FGSM(norm=tool.norm, eps=tool.eps))]
    try:
        out = evaluate(model, x, y, range(len(x)), Threat(tool.norm, tool.eps), assaults, [Assignment("it", {}, tool)])
    except ContradictionError as contradiction:
        yield f"certifies what an attack breaks: {contradiction}"
        return
    if refusals := [words for words in out.warnings if words.startswith("it: ")]:
        raise UnsupportedNetworkError(refusals[0].removeprefix("it: "))


def _known(tool: Any, ball: Any) -> Iterator[str]:
    tool(ball.model, ball.x, ball.y)  # a refusal ends it here
    yield from complaints(tool, ball)


# ---- the exact distances ---------------------------------------------------------------------------------------------


@functools.cache
def exact_distances() -> dict[str, tuple[nn.Module, Tensor, Tensor, Tensor]]:
    """case: (network, x, y, no less than the smallest adversarial linf distance [N]); enumerated ones, and by `exact`."""
    out: dict[str, tuple[nn.Module, Tensor, Tensor, Tensor]] = {}
    for spec in json.loads(CALIBRATION.read_text(encoding="utf-8"))["networks"]:
        if "distances" in spec:
            x, y = torch.tensor(spec["images"], dtype=torch.float32).view(-1, *spec["shape"]), torch.tensor(spec["labels"])
            distance = torch.tensor(spec["distances"], dtype=torch.float64) + spec["tolerance"]
            out[f"{spec['name']}, enumerated"] = network(spec), x, y, distance
    for seed in (0, 1):
        model, x = _sparse_net(seed), torch.rand(4, 1, 2, 2, generator=torch.Generator().manual_seed(seed))
        y = model(x).argmax(1)
        out[f"sparse 4-6-3 number {seed}"] = model, x, y, exact_radius(model, x, y, Fraction(1, 2), BRACKET)[1]
    return out


@torch.no_grad()
def _sparse_net(seed: int) -> nn.Module:
    """A tiny ReLU network, half of whose weights are zero."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    for parameter in model.parameters():
        draw = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(draw * (torch.rand(parameter.shape, generator=generator) < 0.5))
    return model.eval().requires_grad_(False)


def exact_complaints(make: Make, model: nn.Module, x: Tensor, y: Tensor, distance: Tensor) -> Iterator[str]:
    """distance: no less than the smallest adversarial linf distance [N]."""
    for eps in (Fraction(1, 100), Fraction(1, 20), Fraction(1, 10), Fraction(1, 5), Fraction(2, 5)):
        radius = _proof(make(norm="linf", eps=eps), model, x, y).radius
        if bool((beyond := radius > distance).any()):
            at = int(beyond.nonzero()[0])
            known = f"but there is an adversarial image at {float(distance[at]):.6g}"
            yield f"certifies radius {float(radius[at]):.6g} of image {at}, {known}"
            return
